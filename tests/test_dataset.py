"""dataset.py: composites checked, read, kept and served, augmentation that moves photo and label together."""
import multiprocessing
import os
import resource
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm.auto import tqdm

import dataset
from conftest import FORKSERVER, HEIGHT
from dataset import CompositeDataset, DatasetError, Split
from draw_demo import draw_scene, write_composite

CPU = torch.device("cpu")


def make_split(folder, image_size=64, n_classes=20, workers=0, resize_labels=True):
    paths = dataset.list_composites(folder)
    return Split(CompositeDataset(paths, image_size, n_classes, resize_labels=resize_labels), workers)


def read(split, keep=True):
    problems = split.read(keep, tqdm(disable=True))
    assert problems == []
    return split


# --- Composites ---------------------------------------------------------------------------------------------


def test_photo_and_label_are_the_two_halves(scenes):
    image, label = dataset.read_composite(scenes / "train" / "3.jpg", HEIGHT)
    composite = np.asarray(Image.open(scenes / "train" / "3.jpg"))
    assert image.shape == (HEIGHT, HEIGHT, 3) and image.dtype == label.dtype == np.uint8
    assert np.array_equal(image, composite[:, :HEIGHT])
    truth = Image.fromarray(draw_scene(2, 4 * HEIGHT)[1]).resize((HEIGHT, HEIGHT), Image.Resampling.NEAREST)
    assert np.mean(label == dataset.decode_label(np.asarray(truth))) > 0.98


def test_resizing_moves_both_halves_and_keeps_ids(scenes):
    image, label = dataset.read_composite(scenes / "val" / "1.jpg", 64)
    full_image, full_label = dataset.read_composite(scenes / "val" / "1.jpg", None)
    blocks = full_image.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert image.shape == (64, 64, 3) and np.abs(image - blocks).mean() < 4
    assert np.array_equal(label, full_label[1::2, 1::2])


def test_labels_to_score_on_keep_their_size(scenes):
    image, label = dataset.read_composite(scenes / "val" / "1.jpg", 64, resize_label=False)
    assert image.shape == (64, 64, 3) and label.shape == (HEIGHT, HEIGHT)


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "jpe", "jfif", "ppm"])
def test_composites_of_other_formats_are_read_too(tmp_path, suffix):
    photo, label_rgb = draw_scene(0, 64)
    composite = Image.fromarray(np.concatenate([photo, label_rgb], axis=1))
    composite.save(tmp_path / f"1.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    split = read(make_split(tmp_path))
    assert len(split) == 1
    enough = 0.9 if suffix[0] == "j" else 0.9999
    assert np.mean(split.labels[0].numpy() == dataset.decode_label(label_rgb)) > enough


def test_a_raw_file_among_composites_is_named(own_scenes):
    (own_scenes / "train" / "9.nef").write_bytes(b"raw")
    (problem,) = make_split(own_scenes / "train").read(True, tqdm(disable=True))
    assert "9.nef" in problem and "does not read .nef" in problem


def swap_halves(path):
    Image.fromarray(np.roll(np.asarray(Image.open(path)), HEIGHT, axis=1)).save(path, quality=95)


def photo_twice(path):
    composite = np.asarray(Image.open(path)).copy()
    composite[:, HEIGHT:] = np.random.default_rng(0).integers(256, size=(HEIGHT, HEIGHT, 3))
    Image.fromarray(composite).save(path, quality=95)


def make_unreadable(path):
    path.unlink()
    path.symlink_to("/proc/self/mem")


def bomb(path):
    """30000x15000 pixels, says its header, which is all that is looked at."""
    Image.new("1", (1, 1)).save(path, "PNG")
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">2I", 30000, 15000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)


BAD_COMPOSITES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:5000]), ["cannot be read as an image"]),
    "text": (lambda path: path.write_text("no picture"), ["cannot be read as an image", "replace or remove"]),
    "empty": (lambda path: path.write_bytes(b""), ["cannot be read as an image"]),
    "swapped": (swap_halves, ["halves are swapped", "photo left"]),
    "no label": (photo_twice, ["no colour-coded label", "expected 45%"]),
    "square": (lambda path: Image.new("RGB", (256, 256)).save(path), ["256x256", "twice as wide as high"]),
    "dot": (lambda path: Image.new("RGB", (1, 1)).save(path), ["1x1"]),
    "bomb": (bomb, ["450.0 megapixels", "shrink it"]),
    "vanished": (lambda path: (path.unlink(), path.symlink_to("nowhere.jpg")), ["check the path"]),
    "unreadable": (make_unreadable, ["nput/output error"]),
}


@pytest.mark.parametrize("kind", BAD_COMPOSITES)
@pytest.mark.parametrize("keep", [True, False])
def test_one_bad_composite_is_named_at_the_start(kind, keep, own_scenes):
    if kind == "unreadable" and not Path("/proc/self/mem").exists():
        pytest.skip("needs Linux's /proc for a file that not even root can read")
    spoil, words = BAD_COMPOSITES[kind]
    spoil(own_scenes / "train" / "5.jpg")
    (problem,) = make_split(own_scenes / "train").read(keep, tqdm(disable=True))
    for word in ["5.jpg", *words]:
        assert word in problem


def link(folder, numbers):
    """More composites, which are the first eight again."""
    for number in numbers:
        os.link(folder / f"{(number - 1) % 8 + 1}.jpg", folder / f"{number}.jpg")


def test_processes_read_in_order(own_scenes, monkeypatch):
    monkeypatch.setattr(dataset, "MANY_FILES", 2)
    link(own_scenes / "train", range(9, 51))
    split = read(make_split(own_scenes / "train", 32, workers=2))
    for index in (8, 20, 49):
        assert torch.equal(split.images[index], split.images[index % 8])
        assert torch.equal(split.labels[index], split.labels[index % 8])


def test_one_bad_file_among_many_is_named_by_the_processes_that_read(tmp_path):
    for number in range(1, 9):
        write_composite(tmp_path / f"{number}.jpg", *draw_scene(number, 64))
    link(tmp_path, range(9, dataset.MANY_FILES + 2))
    (tmp_path / "177.jpg").unlink()
    (tmp_path / "177.jpg").write_bytes(b"damaged")
    (problem,) = make_split(tmp_path, 32, workers=2).read(True, tqdm(disable=True))
    assert "177.jpg: cannot be read as an image" in problem


def test_ids_beyond_the_number_of_classes_are_named(scenes):
    problems = make_split(scenes / "train", n_classes=12).read(True, tqdm(disable=True))
    assert len(problems) == 8 and "1.jpg: holds class id 19 (bicycle)" in problems[0]
    assert "pass --num_classes 20" in problems[0]


@pytest.mark.parametrize("folder, words", [("train", "holds no composites"), ("val", "is missing"),
                                           ("file", "is not a folder"), ("x" * 300, "cannot be reached")])
def test_missing_folders_name_the_layout_and_the_sources(tmp_path, folder, words):
    (tmp_path / "train").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError) as error:
        dataset.list_composites(tmp_path / folder)
    for word in (words, "train/ and val/", "pix2pix", "cityscapes-image-pairs", "--demo"):
        assert word in str(error.value)


# --- Splits and batches -------------------------------------------------------------------------------------


def test_images_are_kept_or_only_checked(scenes):
    kept, fresh = (read(make_split(scenes / "val"), keep) for keep in (True, False))
    assert kept.has_foreground and fresh.has_foreground
    assert kept.images.nbytes == 7 * 3 * 64 * 64 and fresh.images is None


@pytest.mark.parametrize("keep", [True, False])
def test_batches_hold_what_their_indices_say(scenes, keep):
    split = read(make_split(scenes / "val"), keep)
    batches = list(split.batches([[6, 0, 3], [1]], CPU))
    assert [len(labels) for _, labels in batches] == [3, 1]
    images, labels = batches[0]
    assert images.shape == (3, 3, 64, 64) and labels.shape == (3, 64, 64)
    assert images.dtype == labels.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    image, label = dataset.read_composite(scenes / "val" / "1.jpg", 64)
    assert np.array_equal(images[1].permute(1, 2, 0), image) and np.array_equal(labels[1], label)


def encode(images):
    """Two feature maps that tell which image they are of."""
    return [(images.float() * factor).contiguous(memory_format=torch.channels_last) for factor in (1, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_features_take_the_place_of_images_in_their_dtype(scenes, dtype):
    split, like = read(make_split(scenes / "val")), [torch.empty(1, 3, 64, 64, dtype=dtype)] * 2
    images = split.images
    split.keep_features(encode, like, tqdm(disable=True))
    assert split.images is None and all(one.dtype == dtype for one in split.features)
    ((features, labels),) = split.batches([[5, 2]], CPU)
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in features)
    assert torch.equal(features[1], (2 * images[[5, 2]].float()).to(dtype)) and labels.shape == (2, 64, 64)


def test_features_too_large_for_float16_are_refused(scenes):
    split, like = read(make_split(scenes / "val")), [torch.empty(1, 3, 64, 64, dtype=torch.float16)] * 2
    with pytest.raises(DatasetError, match="exceed torch.float16.*--no_cache"):
        split.keep_features(lambda images: [one * 1e4 for one in encode(images)], like, tqdm(disable=True))


@pytest.mark.parametrize("keep", [True, False])
def test_labels_of_several_sizes_are_served_as_they_are(own_scenes, keep):
    composite = Image.open(own_scenes / "val" / "2.jpg").resize((640, 320), Image.Resampling.NEAREST)
    composite.save(own_scenes / "val" / "2.jpg", quality=95)
    split = read(make_split(own_scenes / "val", resize_labels=False), keep)
    ((images, labels),) = split.batches([[0, 1]], CPU)
    assert images.shape == (2, 3, 64, 64)
    assert [tuple(label.shape) for label in labels] == [(HEIGHT, HEIGHT), (320, 320)]


@pytest.mark.parametrize("resize_labels", [True, False])
def test_what_is_kept_is_known_before_it_is_read(own_scenes, resize_labels):
    composite = Image.open(own_scenes / "val" / "2.jpg").resize((640, 320), Image.Resampling.NEAREST)
    composite.save(own_scenes / "val" / "2.jpg", quality=95)
    split = make_split(own_scenes / "val", resize_labels=resize_labels)
    needed = split.composites.kept_bytes()
    read(split)
    assert needed == split.images.nbytes + sum(label.nbytes for label in split.labels)
    (own_scenes / "val" / "1.jpg").write_bytes(b"damaged")
    assert split.composites.kept_bytes() == needed - (0 if resize_labels else HEIGHT**2)


def read_without_shared_memory(folder):
    """A worker's shared memory is a file: none over a megabyte, as in a container."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
    multiprocessing.set_start_method("fork", force=True)  # a second fork server would take 5 s
    composites = CompositeDataset(dataset.list_composites(folder), 512, 20, resize_labels=False)
    ((images, labels, problems),) = composites.load([range(8)], workers=1)
    assert images.shape == (8, 3, 512, 512) and labels.shape == (8, HEIGHT, HEIGHT) and not problems


def test_workers_need_no_shared_memory(scenes):
    process = FORKSERVER.Process(target=read_without_shared_memory, args=[scenes / "train"])
    process.start()
    process.join(60)
    process.kill()  # where it waits for a worker that has failed
    assert process.exitcode == 0


@pytest.mark.parametrize("error", [OSError("no /dev/shm"), RuntimeError("DataLoader worker (pid 7) died")])
def test_processes_that_cannot_read_are_told_in_a_line(error, scenes, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(dataset.DataLoader, "__iter__", fail)
    with pytest.raises(DatasetError, match="--num_workers 0"):
        make_split(scenes / "val").read(True, tqdm(disable=True))


def test_workers_that_a_batch_system_stops_raise_nothing_in_the_main_process(scenes):
    before = multiprocessing.active_children()
    composites = CompositeDataset(dataset.list_composites(scenes / "train"), 64, 20, resize_labels=True)
    batches = composites.load([[index % 8] for index in range(16)], workers=2)
    next(batches), next(batches)  # one of each worker: both have started
    workers = set(multiprocessing.active_children()) - set(before)
    subprocess.run(["kill", *(str(worker.pid) for worker in workers)], check=True)  # by another process
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0]
    batches.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_between_epochs_is_named(own_scenes, workers):
    split = read(make_split(own_scenes / "train", workers=workers), keep=False)
    (own_scenes / "train" / "5.jpg").unlink()
    with pytest.raises(DatasetError, match="5.jpg: no such file"):
        list(split.batches([[0, 1], [4, 5]], CPU))


@pytest.mark.parametrize("n_bytes, dtype, free, options", [
    (3.8e9, torch.float32, {"cuda": 6e9, "cpu": 20e9},
     ["cuda float32", "cuda float16", "cpu float32", "cpu float16"]),
    (3.8e9, torch.float32, {"cuda": 2e9, "cpu": 20e9},  # a GTX 10xx
     ["cuda float16", "cpu float32", "cpu float16"]),
    (3.8e9, torch.float32, {"cuda": 1e9, "cpu": 3e9}, ["cpu float16"]),
    (1.9e9, torch.bfloat16, {"cuda": 1e9, "cpu": 3e9}, ["cpu bfloat16"]),
    (1.9e9, torch.float16, {"cuda": 1e9}, []),
])
def test_features_are_kept_in_the_best_place_that_holds_them(n_bytes, dtype, free, options):
    assert [" ".join(option) for option in dataset.storage_options(n_bytes, dtype, free)] == options


# --- Whole batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalize_is_imagenets(dtype):
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (dataset.MEAN, dataset.STD))
    expected = (images / 255 - mean) / std
    torch.testing.assert_close(dataset.normalize(images.to(dtype)), expected)
    assert dataset.normalize(images).is_contiguous(memory_format=torch.channels_last)


def test_augmentation_mirrors_photo_and_label_together():
    """With the label's id as the photo's grey level, each pixel's grey still tells its id."""
    labels = torch.randint(20, (16, 48, 64), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    images, moved = dataset.augment(labels[:, None].repeat(1, 3, 1, 1), labels, generator)
    assert images.dtype == torch.float32 and moved.dtype == torch.uint8
    kept, mirrored = ((moved == way).flatten(1).all(1) for way in (labels, labels.flip(2)))
    assert (kept ^ mirrored).all() and 0 < mirrored.sum() < 16
    for image, label in zip(images[:, 0], moved):
        # Brightness and contrast are linear.
        assert np.corrcoef(label.flatten(), image.flatten())[0, 1] > 0.999999


def test_augmentation_stays_within_its_range_and_black_stays_black():
    images = torch.full((64, 3, 8, 8), 100, dtype=torch.uint8)
    images[..., :4] = 0  # half black: contrast is round the mean, 50
    labels = torch.zeros(64, 8, 8, dtype=torch.uint8)
    moved, _ = dataset.augment(images, labels, torch.Generator().manual_seed(0))
    levels = moved.amax(dim=(1, 2, 3))
    most = dataset.PHOTOMETRIC
    assert (50 + 50 * (1 - most)) * (1 - most) <= levels.min() < 90
    assert 110 < levels.max() <= (50 + 50 * (1 + most)) * (1 + most)
    black, _ = dataset.augment(images * 0, labels, torch.Generator().manual_seed(0))
    assert (black == 0).all()


def test_each_image_is_augmented_on_its_own_and_repeatably():
    images, labels = make_images(), torch.zeros(8, 64, 64, dtype=torch.uint8)
    first, again, other = (dataset.augment(images, labels, torch.Generator().manual_seed(seed))[0]
                           for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({round(image.mean().item(), 4) for image in first}) == 8


def make_images():
    return torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8).repeat(8, 1, 1, 1)


# --- The original download ----------------------------------------------------------------------------------


@pytest.fixture
def download(tmp_path):
    """leftImg8bit and gtFine as the Cityscapes archives hold them, one frame a split."""
    photo, label_rgb = draw_scene(7, 128)
    for split in ("train", "val"):
        for kind, suffix, rgb in (("leftImg8bit", "leftImg8bit", photo),
                                  ("gtFine", "gtFine_color", label_rgb)):
            folder = tmp_path / "cityscapes" / kind / split / "aachen"
            folder.mkdir(parents=True)
            picture = Image.fromarray(rgb).resize((256, 128), Image.Resampling.NEAREST)
            picture = picture.convert("RGBA" if kind == "gtFine" else "RGB")
            picture.save(folder / f"aachen_000000_000019_{suffix}.png")
    return tmp_path / "cityscapes"


def test_composites_from_the_original_download(download, tmp_path, capsys):
    for path in download.glob("leftImg8bit/*/*/*.png"):
        path.with_name(f"._{path.name}").write_bytes(b"what macOS leaves beside files")
    dataset.main([str(download), "--output", str(tmp_path / "data"), "--size", "64"])
    assert "2 composites" in capsys.readouterr().out
    (path,) = (tmp_path / "data" / "val").iterdir()
    _, label = dataset.read_composite(path, 64)
    small = Image.fromarray(draw_scene(7, 128)[1]).resize((256, 128), Image.Resampling.NEAREST)
    smaller = np.asarray(small.resize((64, 64), Image.Resampling.NEAREST))
    assert np.array_equal(label, dataset.decode_label(smaller))


def test_composites_that_are_there_are_not_made_again(download, tmp_path):
    dataset.main([str(download), "--output", str(tmp_path / "data"), "--size", "64"])
    (path,) = (tmp_path / "data" / "val").iterdir()
    made = path.stat().st_mtime_ns
    dataset.main([str(download), "--output", str(tmp_path / "data"), "--size", "64"])
    assert path.stat().st_mtime_ns == made


def test_stopping_keeps_the_composites_so_far(download, tmp_path, monkeypatch, fails):
    def stop(path):
        if "val" in path.parts:
            raise KeyboardInterrupt
        return Image.open(path).convert("RGB")

    argv = [download, "--output", tmp_path / "data", "--size", 64]
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "read_image", stop)
        fails(dataset.main, argv, "stopped by SIGINT", "the same command goes on", status=130)
    assert [path.parent.name for path in (tmp_path / "data").rglob("*.*")] == ["train"]
    dataset.main([str(argument) for argument in argv])
    assert len(list((tmp_path / "data").rglob("*.png"))) == 2


def test_a_missing_half_of_the_download_is_named(download, capsys):
    shutil.rmtree(download / "leftImg8bit")
    with pytest.raises(SystemExit) as end:
        dataset.main([str(download)])
    assert end.value.code == 1 and "leftImg8bit_trainvaltest.zip" in capsys.readouterr().err


def test_nothing_half_written_is_left_where_a_label_is_missing(download, tmp_path, capsys):
    shutil.rmtree(download / "gtFine" / "val")
    with pytest.raises(SystemExit) as end:
        dataset.main([str(download), "--output", str(tmp_path / "data"), "--size", "64"])
    assert end.value.code == 1 and "gtFine" in capsys.readouterr().err
    assert not list((tmp_path / "data").rglob(".*"))
