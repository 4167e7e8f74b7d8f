"""images/demo and its painter: small files in the published layout, all classes in both splits."""
import numpy as np
import pytest
from PIL import Image

from dataset import CLASSES, decode_label, find_images
from draw_demo import DEMO_SPLITS, LABEL_COLORS, ROOT, draw_scene, write_scenes

DEMO = ROOT / "images" / "demo"


def quality_95_tables(folder):
    """The quantization tables that Pillow writes at quality 95."""
    Image.new("RGB", (16, 16)).save(folder / "reference.jpg", quality=95)
    return Image.open(folder / "reference.jpg").quantization


@pytest.mark.parametrize("split", DEMO_SPLITS)
def test_the_demo_holds_all_classes_in_composites_that_decode(split, tmp_path):
    paths, others = find_images(DEMO / split)
    names = [f"{number}.jpg" for number in range(1, DEMO_SPLITS[split] + 1)]
    assert [path.name for path in paths] == names and not others
    tables, found = quality_95_tables(tmp_path), set()
    for composite in map(Image.open, paths):
        assert (composite.format, composite.size, composite.quantization) == ("JPEG", (512, 256), tables)
        found |= set(decode_label(np.asarray(composite)[:, 256:]).flat)
    assert found == set(range(len(CLASSES)))


def test_the_demo_is_a_small_download():
    assert sum(path.stat().st_size for path in DEMO.rglob("*.jpg")) < 2_000_000


def test_the_files_are_what_the_painter_draws(tmp_path):
    """Only nearly: another version of Pillow may round a pixel otherwise."""
    write_scenes(tmp_path, {"train": 2})
    for name in ("1.jpg", "2.jpg"):
        drawn = np.asarray(Image.open(tmp_path / "train" / name), dtype=int)
        kept = np.asarray(Image.open(DEMO / "train" / name), dtype=int)
        assert np.mean(abs(drawn - kept) > 8) < 0.01


def test_a_seed_draws_one_scene_and_another_seed_another():
    (photo, label_rgb), again, other = draw_scene(3, 128), draw_scene(3, 128), draw_scene(4, 128)
    assert photo.shape == label_rgb.shape == (128, 128, 3)
    assert photo.dtype == label_rgb.dtype == np.uint8
    assert np.array_equal(photo, again[0]) and np.array_equal(label_rgb, again[1])
    assert not np.array_equal(photo, other[0]) and not np.array_equal(label_rgb, other[1])


def test_labels_hold_pure_colours_and_every_kind_of_void():
    found = set()
    for seed in range(15):
        found |= {color for _, color in Image.fromarray(draw_scene(seed, 512)[1]).getcolors()}
    assert found == set(LABEL_COLORS.values())
