"""predict.py: masks of photos of every mode and size, scores of composites, and whatever bytes come through the image door."""
import random

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import predict
from predict import Segmenter


@pytest.fixture(scope="module")
def checkpoint(run_dir):
    return run_dir / "best.pth"


@pytest.fixture(scope="module")
def photo():
    """A scene's photo of an odd size."""
    return Image.fromarray(dataset.draw_scene(3, 256)[0]).resize((211, 97))


def sixteen_bit(photo):
    return Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)


MODES = {
    "rgb.jpg": lambda p: p, "rgb.png": lambda p: p, "grey.png": lambda p: p.convert("L"), "rgba.png": lambda p: p.convert("RGBA"),
    "grey_alpha.png": lambda p: p.convert("LA"), "palette.png": lambda p: p.quantize(64), "one_bit.png": lambda p: p.convert("1"),
    "cmyk.jpg": lambda p: p.convert("CMYK"), "cmyk.tif": lambda p: p.convert("CMYK"), "16_bit.png": sixteen_bit,
    "16_bit.tif": sixteen_bit, "float.tif": lambda p: p.convert("F"), "rgb.webp": lambda p: p, "rgb.bmp": lambda p: p,
    "animation.gif": lambda p: p,
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_gives_a_palette_png_of_the_photos_size(name, photo, checkpoint, tmp_path, capsys):
    MODES[name](photo).save(tmp_path / name)
    predict.main([str(tmp_path / name), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "mask.png"), "--device", "cpu"])
    mask = Image.open(tmp_path / "mask.png")
    assert mask.mode == "P" and mask.size == photo.size and np.asarray(mask).max() < 20
    colors = np.asarray(mask.convert("RGB"))
    assert np.array_equal(colors, dataset.colorize(np.asarray(mask)))  # opens in the official colours
    line = capsys.readouterr().out.strip()
    shares = [float(part.rsplit(" ", 1)[1].rstrip("%")) for part in line.split(": ", 1)[1].split(", ")]
    assert sum(shares) == pytest.approx(100, abs=1.5) and shares == sorted(shares, reverse=True)


def test_sixteen_bits_are_scaled_not_clipped(photo, tmp_path):
    sixteen_bit(photo).save(tmp_path / "16.png")
    read = np.asarray(dataset.read_image(tmp_path / "16.png").convert("L")).astype(int)
    assert np.abs(read - np.asarray(photo.convert("L"))).max() <= 1


def test_exif_rotation_gives_an_upright_mask(photo, checkpoint, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright: rotate by 90 degrees to see the photo
    photo.save(tmp_path / "rotated.jpg", exif=exif, quality=100)
    predict.main([str(tmp_path / "rotated.jpg"), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "mask.png")])
    assert Image.open(tmp_path / "mask.png").size == (97, 211)


def test_a_folder_in_a_folder_out_in_batches(photo, checkpoint, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    sizes = [(40 + 7 * i, 90 - 5 * i) for i in range(11)]
    for i, size in enumerate(sizes):
        photo.resize(size).save(photos / f"{i}.jpg")
    photo.save(photos / "5.png")
    (photos / "notes.txt").write_text("no photo")
    predict.main([str(photos), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "masks"), "--overlay"])
    for i, size in enumerate(sizes):
        name = "5.jpg" if i == 5 else str(i)  # 5.jpg and 5.png would meet in one 5.png
        assert Image.open(tmp_path / "masks" / f"{name}.png").size == size
        overlay = Image.open(tmp_path / "masks" / f"{name}_overlay.png")
        assert overlay.mode == "RGB" and overlay.height > size[1]
    output = capsys.readouterr().out
    assert "12 of 12 photos segmented" in output
    assert [line.split(" -> ")[0].rsplit("/")[-1] for line in output.splitlines()[1:3]] == ["1.jpg", "2.jpg"]  # natural order


def test_batched_and_single_predictions_agree(photo, checkpoint):
    segmenter = Segmenter(checkpoint, "cpu")
    photos = [photo, photo.rotate(180), photo.resize((64, 64))]
    for one, label in zip(photos, segmenter.segment(photos)):
        assert np.mean(segmenter(one) == label) > 0.999


def test_arrays_and_images_give_the_same_label_map(photo, checkpoint):
    segmenter = Segmenter(checkpoint, "cpu")
    label = segmenter(np.asarray(photo))
    assert label.dtype == np.uint8 and label.shape == (97, 211) and np.array_equal(label, segmenter(photo))
    with pytest.raises(ValueError, match="uint8 array"):
        segmenter(np.zeros((4, 4, 3)))


def test_best_classes_equals_argmax_of_stretched_logits():
    logits = torch.randn(20, 8, 8)
    stretched = torch.nn.functional.interpolate(logits[None], size=(37, 21), mode="bilinear", align_corners=False)
    assert torch.equal(predict.best_classes(logits, (37, 21)).long(), stretched[0].argmax(0))


def test_composites_are_scored_against_their_right_half(scenes, checkpoint, tmp_path, capsys):
    predict.main([str(scenes / "val"), "--composite", "--checkpoint", str(checkpoint), "--output", str(tmp_path), "--device", "cpu"])
    output = capsys.readouterr().out
    labels, masks = [], []
    for i in range(1, 8):
        labels.append(dataset.read_composite(scenes / "val" / f"{i}.jpg")[1])
        masks.append(np.asarray(Image.open(tmp_path / f"{i}.png")))
        assert f"{i}.png: dice {np.mean(labels[-1] == masks[-1]):.4f}" in output
    assert f"All 7 composites together: dice {np.mean(np.stack(labels) == np.stack(masks)):.4f}" in output


def test_bare_state_dicts_and_prefixes_predict_the_same_and_say_so(photo, checkpoint, tmp_path, capsys):
    weights = torch.load(checkpoint, weights_only=True)["model"]
    torch.save({f"module.{key}": value for key, value in weights.items()} | {"module.base_model.classifier.1.bias": torch.zeros(9)},
               tmp_path / "bare.pth")
    photo.save(tmp_path / "photo.png")
    for name, more in ((checkpoint, []), (tmp_path / "bare.pth", ["--image_size", "64"])):
        predict.main([str(tmp_path / "photo.png"), "--checkpoint", str(name), "--output", str(tmp_path / f"{name.stem}_mask.png"), *more])
    assert np.array_equal(*(np.asarray(Image.open(tmp_path / f"{name}_mask.png")) for name in ("best", "bare")))
    assert "holds weights alone" in capsys.readouterr().out


# --- Mistakes -----------------------------------------------------------------------------------------------------------


def test_mistakes_end_in_one_line(photo, checkpoint, tmp_path, fails):
    photo.save(tmp_path / "photo.png")
    (tmp_path / "text.jpg").write_text("this is no photo")
    (tmp_path / "empty.png").write_bytes(b"")
    photo.save(tmp_path / "whole.jpg")
    (tmp_path / "truncated.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    (tmp_path / "nothing").mkdir()
    torch.save({"out.weight": torch.zeros(20, 24, 1, 1)}, tmp_path / "other.pth")
    good = ["--checkpoint", checkpoint, "--output", tmp_path / "mask.png", "--device", "cpu"]
    rows = [
        ([tmp_path / "absent.jpg", *good], ["absent.jpg", "no such file"]),
        ([tmp_path / "text.jpg", *good], ["text.jpg", "cannot be read as an image"]),
        ([tmp_path / "empty.png", *good], ["empty.png", "cannot be read as an image"]),
        ([tmp_path / "truncated.jpg", *good], ["truncated.jpg", "replace or remove it"]),
        ([tmp_path / "bomb.png", *good], ["bomb.png", "decompression bomb"]),
        ([tmp_path / "dot.png", *good], ["dot.png", "1x1", "expected 2x2"]),
        ([tmp_path / "nothing", *good], ["nothing", "holds no images"]),
        ([tmp_path / "photo.png", "--checkpoint", tmp_path / "other.pth", "--output", tmp_path / "m.png"], ["other.pth", "missing"]),
        ([tmp_path / "photo.png", "--checkpoint", tmp_path / "text.jpg", "--output", tmp_path / "m.png"], ["text.jpg", "cannot be loaded"]),
        ([tmp_path / "photo.png", "--checkpoint", tmp_path / "absent.pth", "--output", tmp_path / "m.png"], ["absent.pth"]),
        ([tmp_path / "photo.png", "--checkpoint", checkpoint, "--output", tmp_path / "mask.jpg"], ["mask.jpg", "PNG"]),
        ([tmp_path / "photo.png", "--checkpoint", checkpoint, "--output", tmp_path / "photo.png"], ["over a photo"]),
        ([tmp_path / "photo.png", tmp_path / "dot.png", "--checkpoint", checkpoint, "--output", tmp_path / "text.jpg"], ["name a folder"]),
        ([tmp_path / "photo.png", "--composite", *good], ["photo.png", "twice as wide as high"]),
        ([tmp_path / "photo.png", *good[:-1], "tpu"], ["--device tpu", "expected auto, cpu"]),
    ]
    before = (tmp_path / "photo.png").read_bytes()
    for argv, words in rows:
        fails(predict.main, argv, *words)
    fails(predict.main, [tmp_path / "photo.png", "--chekpoint", "x", *good], "did you mean --checkpoint?", status=2)
    assert (tmp_path / "photo.png").read_bytes() == before and not (tmp_path / "mask.png").exists()


def test_a_bad_photo_among_good_ones_costs_none_of_them(photo, checkpoint, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(5):
        photo.save(photos / f"{i}.png")
    (photos / "2.png").write_bytes(b"damaged")
    with pytest.raises(SystemExit) as end:
        predict.main([str(photos), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "masks"), "--device", "cpu"])
    captured = capsys.readouterr()
    assert end.value.code == 1 and "skipped 1 of 5" in captured.err and "2.png" in captured.err
    assert "4 of 5 photos segmented" in captured.out and len(list((tmp_path / "masks").iterdir())) == 4


def mutate(data, chance):
    """A file of an image, damaged: bytes changed, cut out, doubled, or the end missing."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(len(data)) if chance.random() < 0.5 else chance.randrange(min(len(data), 200))
        kind = chance.randrange(4)
        if kind == 0:
            data[place] = chance.randrange(256)
        elif kind == 1:
            del data[place : place + chance.randint(1, 20)]
        elif kind == 2:
            data[place:place] = data[place : place + chance.randint(1, 50)]
        else:
            del data[max(place, 1):]
        if not data:
            break
    return bytes(data)


def test_thousands_of_damaged_files_neither_crash_nor_hang_it(photo, checkpoint, tmp_path, capsys):
    chance, photos, n_files = random.Random(0), tmp_path / "photos", 2200
    photos.mkdir()
    small = photo.resize((48, 32))
    exif = Image.Exif()
    exif[274] = 6
    for name, options in (("a.jpg", {"exif": exif}), ("b.jpg", {"progressive": True}), ("c.png", {}), ("d.png", {})):
        (small.quantize(16) if name == "d.png" else small).save(tmp_path / name, **options)
    originals = [(tmp_path / name).read_bytes() for name in ("a.jpg", "b.jpg", "c.png", "d.png")]
    for i in range(n_files):
        (photos / f"{i}.{'jpg' if i % 4 < 2 else 'png'}").write_bytes(mutate(originals[i % 4], chance))
    with pytest.raises(SystemExit) as end:
        predict.main([str(photos), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "masks"), "--device", "cpu"])
    captured = capsys.readouterr()
    n_masks = len(list((tmp_path / "masks").iterdir()))
    assert end.value.code == 1 and f"skipped {n_files - n_masks} of {n_files}" in captured.err
    assert 0 < n_masks < n_files and "Traceback" not in captured.err
    with capsys.disabled():
        print(f"\nfuzz: {n_files} damaged files, {n_masks} still readable and segmented, {n_files - n_masks} refused by name")
