"""dataset.py: folders, composites, what a Split keeps and serves, augmentation, composites of own data."""
import csv
import os
import re
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm.auto import tqdm

import dataset
import train
from conftest import HEIGHT, SMALL, hurry, rows_of
from dataset import DatasetError, SegmentationClass, Split
from draw_demo import draw_scene, write_composite

CPU = torch.device("cpu")
WHITE = (255, 255, 255)  # no colour of the class table
ABC = {"a": "a", "b": "b", "c": "c"}  # photos and their labels
NOT_ROAD = (SegmentationClass("not road", (0, 0, 0)), SegmentationClass("road", WHITE))


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def names_below(folder, paths):
    return [path.relative_to(folder).as_posix() for path in paths]


# --- Folders ------------------------------------------------------------------------------------------------


def test_subfolders_are_read_in_natural_order_without_what_is_hidden(tmp_path):
    names = ["01.jpg", "1.jpg", "2.jpg", "10.JPG", "a2/1.png", "a2/b/3.webp", "a10/1.png"]
    touch(tmp_path, *reversed(names), "notes.txt", "a2/9.nef", ".hidden.jpg", "a2/._1.png", ".trash/1.jpg")
    images, others = dataset.find_images(tmp_path)
    assert names_below(tmp_path, images) == names
    assert names_below(tmp_path, others) == ["a2/9.nef", "notes.txt"]


def test_linked_folders_are_followed_and_loops_survived(tmp_path):
    touch(tmp_path, "train/2.jpg", "far/1.jpg")
    (tmp_path / "train" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "train")
    images, _ = dataset.find_images(tmp_path / "train")
    assert names_below(tmp_path / "train", images) == ["2.jpg", "linked/1.jpg"]


@pytest.mark.parametrize("name, words", [("train", "holds no composites"), ("val", "is missing")])
def test_a_folder_without_composites_names_the_layout_and_the_sources(name, words, tmp_path):
    touch(tmp_path, "train/notes.txt")
    with pytest.raises(DatasetError) as error:
        dataset.list_composites(tmp_path / name)
    for word in (f"{name} {words}", "train/ and val/", "pix2pix", "cityscapes-image-pairs", "--demo"):
        assert word in str(error.value)


def test_a_folder_nested_once_too_deep_is_named(tmp_path):
    touch(tmp_path, "data/data/train/1.jpg")
    with pytest.raises(DatasetError, match=re.escape(f"pass --data_dir {tmp_path / 'data' / 'data'}")):
        dataset.list_composites(tmp_path / "data" / "train")


# --- Composites ---------------------------------------------------------------------------------------------


def test_photo_and_label_are_the_two_halves(scenes):
    image, label = dataset.read_composite(scenes / "train" / "3.jpg", HEIGHT)
    composite = np.asarray(Image.open(scenes / "train" / "3.jpg"))
    assert image.shape == (HEIGHT, HEIGHT, 3) and image.dtype == label.dtype == np.uint8
    assert np.array_equal(image, composite[:, :HEIGHT])
    truth = Image.fromarray(draw_scene(2, 4 * HEIGHT)[1]).resize((HEIGHT, HEIGHT), Image.Resampling.NEAREST)
    assert np.mean(label == dataset.decode_label(np.asarray(truth))) > 0.98


def test_resizing_moves_both_halves_and_keeps_ids_and_a_label_to_score_on_keeps_its_size(scenes):
    path = scenes / "val" / "1.jpg"
    image, label = dataset.read_composite(path, 64)
    full_image, full_label = dataset.read_composite(path, None)
    blocks = full_image.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert image.shape == (64, 64, 3) and np.abs(image - blocks).mean() < 4
    assert np.array_equal(label, full_label[1::2, 1::2])
    assert np.array_equal(dataset.read_composite(path, 64, resize_label=False)[1], full_label)


def repainted(change):
    return lambda path: Image.fromarray(change(np.asarray(Image.open(path)))).save(path, quality=95)


BAD_COMPOSITES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:5000]), ["image file is truncated"]),
    "swapped": (repainted(lambda rgb: np.roll(rgb, HEIGHT, axis=1)), ["halves are swapped", "photo left"]),
    "photo twice": (repainted(lambda rgb: np.tile(rgb[:, :HEIGHT], (1, 2, 1))), ["not in the colours of"]),
    "square": (repainted(lambda rgb: rgb[:, :HEIGHT]), ["128x128", "twice as wide as high"]),
}


@pytest.mark.parametrize("kind", BAD_COMPOSITES)
def test_one_bad_composite_is_named_at_the_start(kind, own_scenes):
    spoil, words = BAD_COMPOSITES[kind]
    spoil(own_scenes / "train" / "5.jpg")
    with pytest.raises(DatasetError) as error:
        keep(make_split(own_scenes / "train"), device=None)
    for word in [str(own_scenes / "train" / "5.jpg"), *words]:
        assert word in str(error.value)


# --- Splits -------------------------------------------------------------------------------------------------


def make_split(folder, n_classes=20, resize_labels=True, n_threads=2):
    return Split(dataset.list_composites(folder)[0], 64, n_classes, resize_labels, n_threads)


def keep(split, encode=lambda images: [images], device=CPU):
    split.keep(encode, device, tqdm(disable=True))
    return split


def test_ids_beyond_the_number_of_classes_are_named(scenes):
    with pytest.raises(DatasetError, match=r"1.jpg: holds class id 19 \(bicycle\).*--num_classes 12"):
        keep(make_split(scenes / "train", n_classes=12))


def test_features_are_kept_in_the_one_pass_that_reads_and_checks(own_scenes):
    """Of more photos than are encoded at once, by threads, in order, and in the encoder's dtypes."""
    for number in range(9, 20):
        os.link(own_scenes / "train" / f"{(number - 1) % 8 + 1}.jpg", own_scenes / "train" / f"{number}.jpg")
    sizes, paths = [], dataset.list_composites(own_scenes / "train")[0]

    def encode(images):
        sizes.append(len(images))
        assert images.dtype == torch.uint8 and images.is_contiguous(memory_format=torch.channels_last)
        return [images[:, :2] / 255, images[:, :, ::2, ::2].bfloat16()]

    split = keep(make_split(own_scenes / "train"), encode)
    assert sum(sizes) == 19 and max(sizes) == dataset.ENCODE_BATCH  # photos are never all there at once
    images, labels = zip(*(dataset.read_composite(path, 64) for path in paths))
    expected = encode(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    assert [one.dtype for one in split.inputs] == [torch.float32, torch.bfloat16] and split.has_foreground
    assert all(torch.equal(*pair) for pair in zip(split.inputs, expected))
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in split.inputs)
    assert np.array_equal(split.labels, np.stack(labels))


def test_without_a_device_files_are_only_checked(scenes, tmp_path):
    split = keep(make_split(scenes / "val"), encode=None, device=None)
    assert split.inputs is None and not split.labels and split.has_foreground
    write_composite(tmp_path / "1.png", draw_scene(0, 64)[0], np.zeros((64, 64, 3), dtype=np.uint8))
    assert not keep(make_split(tmp_path), encode=None, device=None).has_foreground


@pytest.mark.parametrize("device", [CPU, None])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_batches_hold_what_their_indices_say_of_images_kept_or_read_anew(device, n_threads, scenes):
    split = keep(make_split(scenes / "val", n_threads=n_threads), device=device)
    assert device is None or (split.inputs[0].dtype, len(split.inputs[0])) == (torch.uint8, 7)
    batches = list(split.batches([[6, 0, 3], [1]], CPU))
    assert [len(labels) for _, labels in batches] == [3, 1]
    (images,), labels = batches[0]
    assert images.dtype == labels.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    for index, number in enumerate((7, 1, 4)):
        image, label = dataset.read_composite(scenes / "val" / f"{number}.jpg", 64)
        assert np.array_equal(images[index].permute(1, 2, 0), image) and np.array_equal(labels[index], label)


@pytest.mark.parametrize("device", [CPU, None])
def test_labels_of_several_sizes_are_served_as_they_are(device, own_scenes):
    path = own_scenes / "val" / "2.jpg"
    Image.open(path).resize((640, 320), Image.Resampling.NEAREST).save(path, quality=95)
    split = make_split(own_scenes / "val", resize_labels=False)
    assert split.label_bytes() == 6 * HEIGHT**2 + 320**2  # known before they are read
    (((images,), labels),) = keep(split, device=device).batches([[0, 1]], CPU)
    assert images.shape == (2, 3, 64, 64)
    assert [tuple(label.shape) for label in labels] == [(HEIGHT, HEIGHT), (320, 320)]
    assert np.array_equal(labels[1], dataset.read_composite(path, None)[1])


def test_a_file_that_vanishes_between_epochs_is_named(own_scenes):
    split = keep(make_split(own_scenes / "train"), device=None)
    (own_scenes / "train" / "5.jpg").unlink()
    with pytest.raises(DatasetError, match="5.jpg: No such file"):
        list(split.batches([[0, 1], [4, 5]], CPU))


# --- Whole batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalize_is_imagenets(dtype):
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
                 for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    normalized = dataset.normalize(images.to(dtype))
    torch.testing.assert_close(normalized, ((images.double() / 255 - mean) / std).float())
    assert normalized.is_contiguous(memory_format=torch.channels_last)


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
    levels, most = moved.amax(dim=(1, 2, 3)), dataset.PHOTOMETRIC
    assert (50 + 50 * (1 - most)) * (1 - most) <= levels.min() < 90
    assert 110 < levels.max() <= (50 + 50 * (1 + most)) * (1 + most)
    black, _ = dataset.augment(images * 0, labels, torch.Generator().manual_seed(0))
    assert (black == 0).all()


def test_each_image_is_augmented_on_its_own_and_repeatably():
    images = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8).repeat(8, 1, 1, 1)
    labels = torch.zeros(8, 64, 64, dtype=torch.uint8)
    first, again, other = (dataset.augment(images, labels, torch.Generator().manual_seed(seed))[0]
                           for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({round(image.mean().item(), 4) for image in first}) == 8


# --- Composites of own data ---------------------------------------------------------------------------------


def as_grey(label):
    """Class ids as one channel, and 255 for background."""
    return Image.fromarray(np.where(label == 0, 255, label).astype(np.uint8))


def as_palette(label):
    image = as_grey(label)
    image.putpalette(np.random.default_rng(0).integers(256, size=768).tolist())  # of no meaning
    return image


def as_colors(label):
    return Image.fromarray(dataset.colorize(label))


def truth(seed):
    return dataset.decode_label(draw_scene(seed, 64)[1])


def write_own(folder, names, save=as_grey):
    """A scene for each name of a photo and its label, as JPEG and as what `save` makes of the ids, in PNG."""
    for seed, (photo, label) in enumerate(names.items()):
        images = {f"photos/{photo}.jpg": Image.fromarray(draw_scene(seed, 64)[0]),
                  f"labels/{label}.png": save(truth(seed))}
        for name, image in images.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / name)


def own_arguments(folder, *more):
    photos, labels = folder / "photos", folder / "labels"
    return ["--photos", photos, "--labels", labels, "--output", folder / "made", "--size", 64, *more]


def make(folder, *more):
    """The names of all composites that are made, train/ or val/ before them."""
    dataset.main(own_arguments(folder, *more))
    return names_below(folder / "made", dataset.find_images(folder / "made")[0])


@pytest.mark.parametrize("save", [as_grey, as_palette, as_colors])
def test_labels_of_ids_and_of_colours_become_the_same_lossless_composites(save, tmp_path, capsys):
    names = {"berlin/img1": "berlin/img1_mask", "berlin/img10": "berlin/img10-gt", "c.d": "c.d",
             "berlin/img1_left": "berlin/img1_left_mask"}
    write_own(tmp_path, names, save)
    touch(tmp_path, "photos/clip.mp4", "labels/berlin/img12_mask.png")
    made = [name.partition("/")[2] for name in make(tmp_path)]
    assert sorted(made) == sorted(f"{name}.png" for name in names)
    said = capsys.readouterr().out
    assert f"3 in {tmp_path / 'made' / 'train'}, 1 in {tmp_path / 'made' / 'val'}" in said
    assert "Left out" in said and "clip.mp4" in said and "img12_mask.png" in said
    for seed, name in enumerate(names):
        (path,) = (tmp_path / "made").glob(f"*/{name}.png")
        image, label = dataset.read_composite(path, None)
        assert np.array_equal(image, dataset.read_image(tmp_path / "photos" / f"{name}.jpg"))
        assert np.array_equal(label, truth(seed))


def test_val_is_a_share_that_the_seed_draws_and_has_one_at_least(tmp_path):
    write_own(tmp_path, {str(number): str(number) for number in range(8)})
    drawn = []
    for val, seed in ((0.3, 0), (0.3, 0), (0.3, 1), (0.001, 0), (0.999, 0)):
        made = make(tmp_path, "--val", val, "--seed", seed)
        drawn.append([name for name in made if name.startswith("val/")])
        shutil.rmtree(tmp_path / "made")
    assert [*map(len, drawn)] == [2, 2, 2, 1, 7]
    assert drawn[0] == drawn[1] != drawn[2]


def test_home_is_known_in_every_path(tmp_path, monkeypatch):
    write_own(tmp_path, ABC)
    monkeypatch.setenv("HOME", str(tmp_path))
    dataset.main(["--photos", "~/photos", "--labels=~/labels", "--output=~/made", "--size", "64"])
    assert len(dataset.find_images(tmp_path / "made")[0]) == 3


def relabel(change, name="b.png"):
    """Put what `change` makes of the ids of b's label in its place."""
    def spoil(folder):
        changed = change(np.array(Image.open(folder / "labels" / "b.png")))
        (folder / "labels" / "b.png").unlink()
        Image.fromarray(changed).save(folder / "labels" / name)

    return spoil


def with_white(where, scale=1):
    def change(ids):
        rgb = dataset.colorize((ids % 255).repeat(scale, axis=0).repeat(scale, axis=1))
        rgb[where] = WHITE
        return rgb

    return relabel(change)


def copied(old, new):
    return lambda folder: shutil.copy(folder / old, folder / new)


REFUSALS = {
    "a foreign colour": (with_white(np.s_[20:40, 30:50]), ["labels/b.png", f"rgb{WHITE}", "CLASSES"]),
    "a foreign line": (with_white(np.s_[4:60, 30:33]), ["labels/b.png", f"rgb{WHITE}", "CLASSES"]),
    "a foreign dot": (with_white(np.s_[101:109, 101:109], scale=8), ["labels/b.png", f"rgb{WHITE}"]),
    "an id beyond the table": (relabel(lambda ids: np.maximum(ids, 20 * np.eye(64, dtype=np.uint8))),
                               ["labels/b.png", "class id 20", "CLASSES"]),
    "no label": (lambda folder: (folder / "labels" / "b.png").unlink(), ["photos/b.jpg", "no label"]),
    "two labels": (copied("labels/b.png", "labels/b_x.png"), ["photos/b.jpg", "labels/b.png", "b_x.png"]),
    "two photos": (copied("photos/b.jpg", "photos/b.png"), ["photos/b.jpg", "photos/b.png"]),
    "another shape": (relabel(lambda ids: ids[:32]), ["labels/b.png", "64x32", "photos/b.jpg", "64x64"]),
    "ids in a JPEG": (relabel(lambda ids: ids, "b.jpg"), ["labels/b.jpg", "JPEG", "PNG"]),
    "a damaged photo": (lambda folder: touch(folder, "photos/b.jpg"), ["photos/b.jpg", "leave it out"]),
    "an output that exists": (lambda folder: touch(folder, "made/x"), ["--output", "made", "new folder"]),
    "no folder": (lambda folder: shutil.rmtree(folder / "labels"), ["labels", "No such file"]),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_own_data_are_refused_by_name_before_anything_is_written(kind, tmp_path, fails):
    spoil, words = REFUSALS[kind]
    write_own(tmp_path, ABC)
    spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    fails(dataset.main, own_arguments(tmp_path), *words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("argv", [["--photos", "x"], ["x", "--photos", "x"], ["x", "--seed", 1],
                                  ["--photos", "x", "--labels", "x", "--val", 1], ["x", "--size", 1]])
def test_what_the_arguments_alone_show_to_be_wrong_has_status_2(argv, fails):
    fails(dataset.main, argv, "dataset.py: error: ", status=2)


def test_stopping_leaves_nothing_half_made(tmp_path, monkeypatch, fails):
    write_own(tmp_path, ABC)
    monkeypatch.setattr(dataset, "read_image", Mock(side_effect=KeyboardInterrupt))
    fails(dataset.main, own_arguments(tmp_path), "nothing was written", status=130)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels", "photos"]


def test_a_background_that_is_a_class_is_scored_and_a_checkpoint_remembers_it(tmp_path, monkeypatch, capsys):
    write_own(tmp_path, ABC, lambda label: as_grey(label == 1))
    monkeypatch.setattr(dataset, "CLASSES", NOT_ROAD)
    make(tmp_path)
    data, run, figures = tmp_path / "made", tmp_path / "run", []
    new = ["--data_dir", data, "--output_dir", run, "--num_epochs", 1, "--num_classes", 2, *SMALL]
    for scored, argv in ((True, new), (False, ["--evaluate", run / "best.pth", "--device", "cpu"])):
        monkeypatch.setattr(dataset, "SCORE_BACKGROUND", scored)
        with hurry():
            train.main(argv)
        figures += re.findall(r"mean_iou ([0-9.]+)", capsys.readouterr().out)
    with open(run / "per_class.csv", newline="") as file:
        ious = [float(row["iou"]) for row in csv.DictReader(file)]  # the first is empty where id 0 is void
    assert figures[-1] == f"{np.mean(ious):.4f}" == f"{float(rows_of(run)[0]['val_mean_iou']):.4f}"


# --- Composites of the original download --------------------------------------------------------------------


@pytest.fixture
def download(tmp_path):
    """leftImg8bit and gtFine as the Cityscapes archives hold them, one frame a split."""
    names = "leftImg8bit/{}/aachen/{}_leftImg8bit", "gtFine/{}/aachen/{}_gtFine_color"
    for name, rgb in zip(names, draw_scene(7, 128)):
        for split in ("train", "val", "test"):
            path = tmp_path / "cityscapes" / f"{name.format(split, 'aachen_000000_000019')}.png"
            path.parent.mkdir(parents=True)
            picture = Image.fromarray(rgb).resize((256, 128), Image.Resampling.NEAREST)
            picture.convert("RGBA" if "gtFine" in name else "RGB").save(path)
    return tmp_path / "cityscapes"


def test_composites_from_the_original_download(download, tmp_path):
    touch(download, "leftImg8bit/train/aachen/._aachen_000000_000019_leftImg8bit.png")  # as macOS leaves them
    dataset.main([download, "--output", tmp_path / "data", "--size", 64])
    name = "aachen/aachen_000000_000019.png"
    made, _ = dataset.find_images(tmp_path / "data")
    assert names_below(tmp_path / "data", made) == [f"train/{name}", f"val/{name}"]
    stretched = Image.fromarray(draw_scene(7, 128)[1]).resize((256, 128), Image.Resampling.NEAREST)
    label_rgb = np.asarray(stretched.resize((64, 64), Image.Resampling.NEAREST))
    assert np.array_equal(dataset.read_composite(made[1], 64)[1], dataset.decode_label(label_rgb))


@pytest.mark.parametrize("missing, words", [("leftImg8bit", ["leftImg8bit_trainvaltest.zip"]),
                                            ("gtFine/val", ["gtFine_color.png", "No such file"])])
def test_a_missing_part_of_the_download_is_named(missing, words, download, tmp_path, fails):
    shutil.rmtree(download / missing)
    fails(dataset.main, [download, "--output", tmp_path / "data", "--size", 64], *words)
    assert [path.name for path in tmp_path.iterdir()] == ["cityscapes"]
