"""dataset.py: labels decoded right, composites checked and served, augmentation that moves photo and label together."""
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

import dataset
import utils
from dataset import CLASSES, COLOR_TO_ID, COLORS, CompositeDataset, DatasetError, decode_label

from conftest import ROOT


# --- Labels -------------------------------------------------------------------------------------------------------------


def test_the_class_table_is_the_official_one():
    assert len(CLASSES) == 20 and len(COLORS) == 29 == len({tuple(color) for color in COLORS.tolist()})
    assert CLASSES[7] == ("traffic light", (250, 170, 30)) and CLASSES[19] == ("bicycle", (119, 11, 32))


def test_official_colours_decode_exactly_wherever_they_stand():
    indices = np.random.default_rng(0).integers(29, size=(67, 91))
    assert np.array_equal(decode_label(COLORS[indices]), COLOR_TO_ID[indices])
    for index in range(29):
        assert (decode_label(np.broadcast_to(COLORS[index], (3, 2, 3)).copy()) == COLOR_TO_ID[index]).all()


def test_colorize_and_decode_are_inverse():
    label = np.random.default_rng(0).integers(20, size=(32, 32)).astype(np.uint8)
    assert np.array_equal(decode_label(dataset.colorize(label)), label)


def through_jpeg(rgb):
    """Quality 95 and 4:2:0 chroma, at the right of a photo as in a composite."""
    file = io.BytesIO()
    Image.fromarray(np.concatenate([np.full_like(rgb, 127), rgb], axis=1)).save(file, "JPEG", quality=95, subsampling="4:2:0")
    return np.asarray(Image.open(file))[:, rgb.shape[1]:]


COLOR_NAMES = [*dataset.CLASS_NAMES, *dataset.VOID_COLORS]


def draw_street(seed, size=1024):
    """A label drawn large, uint8 (size, size) of indices into COLORS: thin poles, a rider, signs, curved outlines, void things."""
    rng = np.random.default_rng(seed)
    image = Image.new("L", (size, size), COLOR_NAMES.index("sky"))
    pen = ImageDraw.Draw(image)

    def polygon(name, *points):
        pen.polygon([(x * size, y * size) for x, y in points], fill=COLOR_NAMES.index(name))

    def ellipse(name, x, y, rx, ry):
        pen.ellipse(((x - rx) * size, (y - ry) * size, (x + rx) * size, (y + ry) * size), fill=COLOR_NAMES.index(name))

    def line(name, *points, width):
        pen.line([(x * size, y * size) for x, y in points], fill=COLOR_NAMES.index(name), width=round(width * size))

    horizon, x = rng.uniform(0.4, 0.5), 0.0
    while x < 1:
        width, *heights = rng.uniform((0.5, 0.15, 0.15), (0.8, 0.3, 0.3))
        polygon("building", (x, horizon - heights[0]), (x + width, horizon - heights[1]), (x + width, 0.7), (x, 0.7))
        x += width
    for x, y in rng.uniform((0, horizon - 0.15), (1, horizon), (2, 2)):
        ellipse("vegetation", x, y, 0.1, 0.08)
    polygon("sidewalk", (0, horizon + 0.1), (1, horizon + 0.1), (1, 1), (0, 1))
    polygon("road", (0.4, horizon + 0.08), (0.6, horizon + 0.08), (1, 1), (0, 1))
    ground, barrier = rng.choice(["parking", "ground", "terrain", "rail track"]), rng.choice(["wall", "fence", "guard rail", "bridge"])
    polygon(ground, (0.6, horizon + 0.1), (0.75, horizon + 0.1), (1, 0.8), (1, 0.97))
    polygon(barrier, (0, horizon), (0.2, horizon), (0.2, horizon + 0.1), (0, horizon + 0.14))
    for name in rng.choice(["car", "car", "truck", "bus", "train", "caravan", "trailer"], 2):
        x, y, r = rng.uniform((0.1, horizon + 0.08, 0.03), (0.9, 0.8, 0.09))
        polygon(name, (x - r, y), (x + r, y), (x + r, y + 0.7 * r), (x - r, y + 0.7 * r))
        ellipse(name, x, y, 0.8 * r, 0.6 * r)
        for side in (-0.6, 0.6):
            ellipse(name, x + side * r, y + 0.7 * r, 0.22 * r, 0.22 * r)
    for name in ("rider", "person", "dynamic"):
        x, y, h = rng.uniform((0.1, horizon + 0.1, 0.05), (0.9, 0.75, 0.14))
        if name == "rider":
            cycle = ("bicycle", "motorcycle")[seed % 2]
            for side in (-0.3, 0.3):
                ellipse(cycle, x + side * h, y + h * 0.9, 0.25 * h, 0.25 * h)
            line(cycle, (x - 0.3 * h, y + 0.9 * h), (x, y + 0.6 * h), (x + 0.3 * h, y + 0.9 * h), width=0.05 * h)
        ellipse(name, x, y, 0.08 * h, 0.1 * h)
        ellipse(name, x, y + 0.35 * h, 0.16 * h, 0.28 * h)
        for side in (-0.1, 0.1):
            line(name, (x + side * h, y + 0.9 * h), (x, y + 0.5 * h), width=0.1 * h)
    for top in ("traffic sign", "traffic light"):
        x, foot, h, width = rng.uniform((0.05, horizon + 0.1, 0.15, 0.006), (0.95, 0.75, 0.35, 0.012))
        line("pole", (x, foot), (x, foot - h), width=width)
        if top == "traffic sign":
            ellipse(top, x, foot - h, 0.02, 0.02)
        else:
            polygon(top, (x - 0.012, foot - h), (x + 0.012, foot - h), (x + 0.012, foot - h + 0.06), (x - 0.012, foot - h + 0.06))
    ellipse("background", 0.5, 1.03, 0.6, 0.1)
    return np.asarray(image)


def majority(label, size):
    """The commonest class in each pixel's source area: (H, W) to (size, size)."""
    scale = len(label) // size
    blocks = label.reshape(size, scale, size, scale).transpose(0, 2, 1, 3).reshape(size, size, -1)
    return np.stack([(blocks == c).sum(axis=-1) for c in range(20)]).argmax(axis=0)


def nearest_color(rgb, colors):
    return COLOR_TO_ID[((rgb[:, :, None].astype(int) - colors.astype(int)) ** 2).sum(axis=-1).argmin(axis=-1)]


@pytest.mark.parametrize("resampling", [Image.Resampling.NEAREST, Image.Resampling.BICUBIC])
def test_rendered_scenes_decode_to_the_commonest_class_of_each_source_area(resampling, capsys):
    """Drawn at 1024, shrunk to 256, compressed. Shrinking by nearest alone, decoded without a fault, already differs in 0.25%."""
    wrong = {"20 colours": [], "29 colours": [], "decode_label": []}
    for street in map(draw_street, range(8)):
        rgb = through_jpeg(np.asarray(Image.fromarray(COLORS[street]).resize((256, 256), resampling)))
        truth = majority(COLOR_TO_ID[street], 256)
        wrong["20 colours"].append(np.mean(nearest_color(rgb, COLORS[:20]) != truth))
        wrong["29 colours"].append(np.mean(nearest_color(rgb, COLORS) != truth))
        wrong["decode_label"].append(np.mean(decode_label(rgb) != truth))
    shares = {name: np.mean(values) for name, values in wrong.items()}
    with capsys.disabled():
        print(f"\nwrong pixels, {resampling.name}: " + ", ".join(f"{name} {share:.2%}" for name, share in shares.items()))
    assert shares["decode_label"] < min(0.008, 0.5 * shares["29 colours"], 0.5 * shares["20 colours"])


def test_no_void_rings_round_cars():
    """A blue car before grey and pink: nearest of 29 sees void between them, decode_label only the two sides."""
    label = np.full((64, 64), 3, dtype=np.uint8)
    label[32:] = 2
    label[20:44, 16:48] = 14
    rgb = through_jpeg(np.asarray(Image.fromarray(dataset.colorize(label)).resize((32, 32), Image.Resampling.BICUBIC)))
    assert (nearest_color(rgb, COLORS) == 0).any()
    assert set(np.unique(decode_label(rgb))) <= {2, 3, 14}


def test_a_thin_pole_lives():
    label = np.full((256, 256), 9, dtype=np.uint8)  # vegetation
    label[40:200, 100:102] = 6
    decoded = decode_label(through_jpeg(dataset.colorize(label)))
    assert np.mean(decoded[45:195, 100:102] == 6) > 0.9


def real_labels():
    folder = ROOT.parent / "shared" / "data" / "cityscapes" / "train"
    if not folder.is_dir():
        pytest.skip("needs the real composites, which are not part of the project")
    return [np.asarray(Image.open(path))[:, 256:] for path in dataset.list_images(folder)[::30]]


def test_orphans_are_rare_and_thin_things_live_on_real_composites(capsys):
    """Orphan: a pixel whose class has no pixel of nearly its colour (12 in RGB) within two pixels."""
    orphans, shares, plain = [], np.zeros(20), np.zeros(20)
    for rgb in real_labels():
        label = decode_label(rgb)
        distances = ((rgb[:, :, None].astype(int) - COLORS.astype(int)) ** 2).sum(axis=-1)
        near = torch.zeros(20, 256, 256)
        for index, class_id in enumerate(COLOR_TO_ID):
            near[class_id] += torch.from_numpy(distances[..., index] < 12**2)
        around = torch.nn.functional.max_pool2d(near[None], 5, stride=1, padding=2)[0]
        orphans.append((around.gather(0, torch.from_numpy(label).long()[None]) == 0).float().mean().item())
        shares += np.bincount(label.ravel(), minlength=20) / label.size
        plain += np.bincount(COLOR_TO_ID[distances.argmin(axis=-1)].ravel(), minlength=20) / label.size
    shares, plain = shares / len(orphans), plain / len(orphans)
    with capsys.disabled():
        print(f"\n{len(orphans)} real labels: orphans {np.mean(orphans):.2%}, poles {shares[6]:.2%}, traffic lights {shares[7]:.3%} "
              f"(nearest of 29: {plain[7]:.3%}), traffic signs {shares[8]:.3%} ({plain[8]:.3%})")
    assert np.mean(orphans) < 0.03  # nearest of 29 colours: 0.066; 0.028 lie further than that from any official colour
    assert shares[6] > 0.006 and shares[7] >= plain[7] and shares[8] >= plain[8]


# --- Composites ---------------------------------------------------------------------------------------------------------


def test_natural_order(tmp_path):
    for name in ("10.jpg", "2.jpg", "1.JPG", "a2.png", "a10.png", ".hidden.jpg", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in dataset.list_images(tmp_path)] == ["1.JPG", "2.jpg", "10.jpg", "a2.png", "a10.png"]


def test_photo_and_label_are_the_two_halves(scenes):
    image, label = CompositeDataset(scenes / "train")[2]
    composite = np.asarray(Image.open(scenes / "train" / "3.jpg"))
    assert image.shape == (3, 256, 256) and image.dtype == label.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0), composite[:, :256])
    truth = np.asarray(Image.fromarray(dataset.draw_scene(2)[1]).resize((256, 256), Image.Resampling.NEAREST))
    assert np.mean(label.numpy() == truth) > 0.98


def test_resizing_moves_both_halves_and_keeps_ids(scenes):
    small = CompositeDataset(scenes / "val", image_size=64)
    image, label = small[0]
    full_image, full_label = CompositeDataset(scenes / "val")[0]
    assert image.shape == (3, 64, 64) and set(label.unique().tolist()) <= set(full_label.unique().tolist())
    blocks = full_image.float().reshape(3, 64, 4, 64, 4).mean(dim=(2, 4))
    assert (image.float() - blocks).abs().mean() < 4
    assert torch.equal(label, full_label[2::4, 2::4])


def test_a_batch_is_one_gather_with_or_without_cache(scenes):
    cached, fresh = CompositeDataset(scenes / "val"), CompositeDataset(scenes / "val", cache=False)
    for data in (cached, fresh):
        batch = data.__getitems__([6, 0, 3])
        images, labels = dataset.split_batch(batch)
        assert batch.shape == (3, 256, 256, 4) and images.shape == (3, 3, 256, 256) and labels.shape == (3, 256, 256)
        assert dataset.normalize(images).is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images[1], cached[0][0]) and torch.equal(labels[2], cached[3][1])
        assert data.class_pixels.tolist() == np.bincount(cached.pixels[..., 3].flatten(), minlength=20).tolist()
    assert cached.pixels.nbytes == 7 * 256 * 256 * 4 and fresh.pixels.nbytes == 0


def test_lossless_composites_are_read_too(tmp_path):
    photo, label = dataset.draw_scene(0, 64)
    dataset.write_composite(tmp_path / "1.png", photo, dataset.colorize(label))
    image, read = dataset.read_composite(tmp_path / "1.png", 64)
    assert np.array_equal(image, photo) and np.array_equal(read, label)


def swap_halves(path):
    composite = np.asarray(Image.open(path))
    Image.fromarray(np.roll(composite, 256, axis=1)).save(path, quality=95)


def photo_twice(path):
    composite = np.asarray(Image.open(path)).copy()
    composite[:, 256:] = np.random.default_rng(0).integers(256, size=(256, 256, 3))
    Image.fromarray(composite).save(path, quality=95)


BAD_COMPOSITES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:5000]), ["cannot be read as an image", "replace or remove"]),
    "text": (lambda path: path.write_text("no picture"), ["cannot be read as an image"]),
    "empty": (lambda path: path.write_bytes(b""), ["cannot be read as an image"]),
    "swapped": (swap_halves, ["halves are swapped", "photo left"]),
    "no label": (photo_twice, ["no colour-coded label", "expected 45%"]),
    "square": (lambda path: Image.new("RGB", (256, 256)).save(path), ["256x256", "twice as wide as high"]),
    "dot": (lambda path: Image.new("RGB", (1, 1)).save(path), ["1x1"]),
    "bomb": (lambda path: Image.new("1", (30000, 15000)).save(path, "PNG"), ["decompression bomb"]),
    "folder": (lambda path: (path.unlink(), path.mkdir()), ["is a folder"]),
    "unreadable": (lambda path: (path.unlink(), path.symlink_to("/proc/self/mem")), ["Input/output error", "replace or remove"]),
}


@pytest.mark.parametrize("kind", BAD_COMPOSITES)
@pytest.mark.parametrize("cache", [True, False])
def test_one_bad_composite_is_named_at_the_start(kind, cache, own_scenes):
    if kind == "unreadable" and not Path("/proc/self/mem").exists():
        pytest.skip("needs Linux's /proc for a file that not even root can read")
    spoil, words = BAD_COMPOSITES[kind]
    spoil(own_scenes / "train" / "5.jpg")
    with pytest.raises(DatasetError) as error:
        CompositeDataset(own_scenes / "train", cache=cache)
    for word in ["5.jpg", *words]:
        assert word in str(error.value)


def test_one_bad_file_among_thousands_is_named_by_the_processes_that_read(own_scenes):
    def link(numbers):
        for number in numbers:
            os.link(own_scenes / "train" / f"{number % 8 + 1}.jpg", own_scenes / "train" / f"{number}.jpg")

    link(range(9, 301))
    data = CompositeDataset(own_scenes / "train", 64)
    for index in (8, 100, 299):  # in order, although several processes read them
        assert torch.equal(data[index][0], data[(index + 1) % 8][0]) and torch.equal(data[index][1], data[(index + 1) % 8][1])
    link(range(301, 2001))
    (own_scenes / "train" / "1277.jpg").unlink()
    (own_scenes / "train" / "1277.jpg").write_bytes(b"damaged")
    with pytest.raises(DatasetError, match=r"1277\.jpg: cannot be read as an image"):
        CompositeDataset(own_scenes / "train", 64)


def test_a_file_that_vanishes_while_workers_decode_ends_in_one_line(own_scenes, capsys):
    data = CompositeDataset(own_scenes / "train", 64, cache=False)
    (own_scenes / "train" / "5.jpg").unlink()
    with pytest.raises(SystemExit), utils.user_errors(DatasetError):
        list(DataLoader(data, 2, num_workers=1, collate_fn=dataset.keep_batch))
    assert capsys.readouterr().err.endswith("5.jpg: no such file; check the path\n")


def test_ids_beyond_the_number_of_classes_are_named(scenes):
    with pytest.raises(DatasetError, match=r"1\.jpg: holds class id 19 \(bicycle\).*--num_classes 20 or more.*and 7 other"):
        CompositeDataset(scenes / "train", n_classes=12)


def test_missing_folders_name_the_layout_and_the_sources(tmp_path):
    (tmp_path / "train").mkdir()
    for folder, words in (("train", "holds no composites"), ("val", "is missing")):
        with pytest.raises(DatasetError) as error:
            CompositeDataset(tmp_path / folder)
        for word in (words, "train/ and val/", "pix2pix", "cityscapes-image-pairs", "--demo"):
            assert word in str(error.value)


def test_available_memory_is_what_the_machine_and_its_container_leave(tmp_path):
    assert dataset.available_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal:       9000 kB\nMemFree:         100 kB\nMemAvailable:    8000 kB\n")
    assert dataset.available_memory(tmp_path) == 8000 * 1024
    cgroup = tmp_path / "sys" / "fs" / "cgroup"
    cgroup.mkdir(parents=True)
    for name, text in (("memory.max", "max\n"), ("memory.current", "3000000\n"), ("memory.stat", "anon 5\ninactive_file 1000000\n")):
        (cgroup / name).write_text(text)
    assert dataset.available_memory(tmp_path) == 8000 * 1024
    (cgroup / "memory.max").write_text("5000000\n")
    assert dataset.available_memory(tmp_path) == 3_000_000


# --- Batches ------------------------------------------------------------------------------------------------------------


def test_normalize_is_imagenets():
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = (images / 255 - torch.tensor(dataset.MEAN).view(3, 1, 1)) / torch.tensor(dataset.STD).view(3, 1, 1)
    torch.testing.assert_close(dataset.normalize(images), expected)


def test_augmentation_moves_photo_and_label_together():
    """With the label's id as the photo's grey level, each pixel's grey still tells its id after flips and crops."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(1, 20, (16, 8, 8), dtype=torch.uint8, generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = labels[:, None].float().repeat(1, 3, 1, 1)
    moved, moved_labels = dataset.augment(images, labels, generator, min_crop=0.5)
    assert moved.shape == images.shape and moved_labels.dtype == torch.uint8
    for image, label in zip(moved, moved_labels.float()):
        highest, lowest = (sign * torch.nn.functional.max_pool2d(sign * label[None], 5, stride=1)[0] for sign in (1, -1))
        inside = highest == lowest  # away from edges, where bilinear and nearest differ
        assert inside.float().mean() > 0.1
        label, image = label[2:-2, 2:-2], image[0, 2:-2, 2:-2]
        assert np.corrcoef(label[inside], image[inside])[0, 1] > 0.999999  # brightness and contrast are linear
    assert not torch.equal(moved_labels, labels)


def test_each_image_is_augmented_on_its_own_and_repeatably():
    images, labels = torch.randn(1, 3, 64, 64).repeat(8, 1, 1, 1), torch.zeros(8, 64, 64, dtype=torch.uint8)
    first, _ = dataset.augment(images, labels, torch.Generator().manual_seed(3))
    again, _ = dataset.augment(images, labels, torch.Generator().manual_seed(3))
    other, _ = dataset.augment(images, labels, torch.Generator().manual_seed(4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({round(image.mean().item(), 6) for image in first}) == 8


def test_without_a_crop_a_label_is_itself_or_its_mirror_image():
    labels = torch.randint(20, (16, 48, 64), dtype=torch.uint8)
    _, moved = dataset.augment(torch.zeros(16, 3, 48, 64), labels, torch.Generator().manual_seed(0))
    kept, mirrored = ((moved == way).flatten(1).all(1) for way in (labels, labels.flip(2)))
    assert (kept ^ mirrored).all() and 0 < mirrored.sum() < 16


# --- Demo and original data ---------------------------------------------------------------------------------------------


def test_demo_scenes_are_deterministic_jpegs_with_all_classes(tmp_path):
    for folder in ("a", "b"):
        dataset.write_demo(tmp_path / folder, {"train": 4, "val": 1})
    for path in (tmp_path / "a").rglob("*.jpg"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    data = CompositeDataset(tmp_path / "a" / "train")
    assert data.pixels[..., 3].unique().tolist() == list(range(20))
    assert Image.open(tmp_path / "a" / "train" / "1.jpg").format == "JPEG"


def test_composites_from_the_original_download(tmp_path, capsys):
    for split in ("train", "val"):
        photo, label = dataset.draw_scene(7, 128)
        for kind, suffix, rgb in (("leftImg8bit", "leftImg8bit", photo), ("gtFine", "gtFine_color", dataset.colorize(label))):
            folder = tmp_path / "cityscapes" / kind / split / "aachen"
            folder.mkdir(parents=True)
            Image.fromarray(rgb).resize((256, 128), Image.Resampling.NEAREST).convert("RGBA" if kind == "gtFine" else "RGB").save(
                folder / f"aachen_000000_000019_{suffix}.png")
    dataset.main([str(tmp_path / "cityscapes"), "--output", str(tmp_path / "data"), "--size", "64"])
    assert "2 composites" in capsys.readouterr().out
    image, read = CompositeDataset(tmp_path / "data" / "val", 64)[0]
    assert np.array_equal(read, np.asarray(Image.fromarray(label).resize((64, 64), Image.Resampling.NEAREST)))
    shutil.rmtree(tmp_path / "cityscapes" / "leftImg8bit")
    with pytest.raises(SystemExit) as end:
        dataset.main([str(tmp_path / "cityscapes")])
    assert end.value.code == 1 and "leftImg8bit_trainvaltest.zip" in capsys.readouterr().err
