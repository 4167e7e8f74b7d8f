"""predict.py: what the network says, which files are read and written, and that no log line ends a run."""

import io
import os
import random
import select
import signal
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import efficientnet_b0

import dataset
import metrics
import model as models
import predict
import utils
from conftest import backbone, shallow_efficientnet
from predict import Segmenter

ROOT = Path(predict.__file__).parent
N_CLASSES = len(dataset.CLASSES)


@pytest.fixture(scope="module", autouse=True)
def with_a_shallow_encoder():
    with backbone(shallow_efficientnet):
        yield


@pytest.fixture(scope="module")
def weights():
    """A network with random weights."""
    torch.manual_seed(0)
    return models.EfficientSegNet(N_CLASSES, "none").state_dict()


@pytest.fixture(scope="module")
def config():
    names, colors, _ = zip(*dataset.CLASSES)
    return {"image_size": 64, "class_names": list(names), "class_colors": [list(color) for color in colors]}


@pytest.fixture(scope="module")
def checkpoint(weights, config, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "best.pth"
    torch.save({"model": weights, "config": config}, path)
    return path


@pytest.fixture(scope="module")
def photo():
    """97 rows of 211, and not its own mirror image."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((211, 97), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(photo, tmp_path):
    """A folder with 0.png, 1.png and 2.png."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        photo.rotate(120 * i).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def save_odd(weights, config, tmp_path):
    """Write odd.pth, a checkpoint whose config has these changes; returns its path."""

    def save(**changes):
        torch.save({"model": weights, "config": config | changes}, tmp_path / "odd.pth")
        return tmp_path / "odd.pth"

    return save


@pytest.fixture
def run(checkpoint):
    """predict.main with a checkpoint; returns the exit status."""

    def main(*argv, checkpoint=checkpoint):
        try:
            predict.main([*map(str, argv), "--checkpoint", str(checkpoint), "--device", "cpu"])
        except SystemExit as end:
            return end.code
        return 0

    return main


def content(folder):
    """Name and bytes of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- What the network says ----------------------------------------------------------------------------------

MODES = {
    "rgb.jpg": lambda p: p,
    "grey.png": lambda p: p.convert("L"),
    "rgba.png": lambda p: p.convert("RGBA"),
    "palette.gif": lambda p: p.quantize(64),
    "one_bit.png": lambda p: p.convert("1"),
    "cmyk.jpg": lambda p: p.convert("CMYK"),
    "sixteen_bits.png": lambda p: Image.fromarray(np.asarray(p.convert("L")).astype(np.uint16) * 257),
    "float.tif": lambda p: p.convert("F"),
    "lossy.webp": lambda p: p,
}


def test_every_mode_gives_a_palette_png_of_the_photos_size(photo, run, tmp_path, capsys):
    for name, convert in MODES.items():
        convert(photo).save(tmp_path / name)
    assert run(*map(tmp_path.joinpath, MODES), "--output", tmp_path / "masks") == 0
    lines = capsys.readouterr().out.splitlines()
    for name in MODES:
        mask = Image.open(tmp_path / "masks" / Path(name).with_suffix(".png"))
        assert mask.mode == "P" and mask.size == photo.size and np.asarray(mask).max() < N_CLASSES, name
        # opens in the classes' colours
        assert np.array_equal(mask.convert("RGB"), dataset.colorize(np.asarray(mask))), name
        (line,) = [line for line in lines if line.startswith(str(tmp_path / name))]
        shares = [float(part.rsplit(" ", 1)[1].rstrip("%")) for part in line.split(": ", 1)[1].split(", ")]
        assert sum(shares) == pytest.approx(100, abs=1.5) and shares == sorted(shares, reverse=True), line


def test_exif_rotation_gives_an_upright_mask(photo, run, tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    photo.save(tmp_path / "rotated.jpg", exif=exif)
    assert run(tmp_path / "rotated.jpg", "--output", tmp_path / "mask.png") == 0
    assert Image.open(tmp_path / "mask.png").size == (97, 211)


def test_predictions_are_the_best_of_the_stretched_logits(photo, weights, checkpoint):
    network = models.EfficientSegNet(N_CLASSES, None).eval()
    network.load_state_dict(weights)
    square = np.array(photo.resize((64, 64), Image.Resampling.BILINEAR))
    with torch.no_grad():
        logits = network(dataset.normalize(torch.from_numpy(square).permute(2, 0, 1)[None]))
    expected = torch.nn.functional.interpolate(logits, size=(97, 211), mode="bilinear", align_corners=False)[
        0
    ].argmax(0)
    segmenter = Segmenter(checkpoint, "cpu")
    segmenter.runtime = utils.Runtime(segmenter.runtime.device, None, "float32, to compare")
    predictions = segmenter(photo)
    assert len(np.unique(predictions)) > 1 and np.mean(predictions == expected.numpy()) > 0.999


def test_flip_averages_the_logits_of_the_photo_and_its_mirror_image(photo, checkpoint):
    plain, both = Segmenter(checkpoint, "cpu"), Segmenter(checkpoint, "cpu", flip=True)
    mirrored = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert np.mean(both(photo) == both(mirrored)[:, ::-1]) > 0.999
    assert np.mean(plain(photo) == plain(mirrored)[:, ::-1]) < 0.999


def test_flip_is_a_flag(photos, run, checkpoint, tmp_path):
    assert run(photos / "0.png", "--output", tmp_path / "mask.png", "--flip") == 0
    expected = Segmenter(checkpoint, "cpu", flip=True)(Image.open(photos / "0.png"))
    assert np.array_equal(Image.open(tmp_path / "mask.png"), expected)


def test_batched_and_single_predictions_agree(photo, checkpoint):
    segmenter = Segmenter(checkpoint, "cpu")
    several = [photo, photo.rotate(180), photo.resize((64, 64))]
    for one, predictions in zip(several, segmenter.segment(several)):
        assert np.mean(segmenter(one) == predictions) > 0.999


def test_arrays_and_images_give_the_same_predictions(photo, checkpoint):
    segmenter = Segmenter(checkpoint, "cpu")
    predictions = segmenter(np.asarray(photo))
    assert predictions.dtype == np.uint8 and predictions.shape == (97, 211)
    assert np.array_equal(predictions, segmenter(photo))


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)], ids=str
)
def test_other_arrays_are_refused(array, checkpoint):
    with pytest.raises(ValueError, match="uint8 array"):
        Segmenter(checkpoint, "cpu")(array)


def test_an_image_with_damaged_exif_can_be_given_from_python(photo, checkpoint, tmp_path):
    photo.save(tmp_path / "a.jpg", exif=b"Exif\0\0no TIFF header")
    segmenter = Segmenter(checkpoint, "cpu")
    assert np.array_equal(
        segmenter(Image.open(tmp_path / "a.jpg")), segmenter(dataset.read_image(tmp_path / "a.jpg"))
    )


def test_bare_state_dicts_with_prefixes_predict_the_same_and_say_so(photos, run, weights, tmp_path, capsys):
    bare = {f"module.{key}": value for key, value in weights.items()} | {
        "module.base_model.classifier.1.bias": torch.zeros(9)
    }
    torch.save(bare, tmp_path / "bare.pth")
    assert run(photos / "0.png", "--output", tmp_path / "a.png") == 0
    assert (
        run(
            photos / "0.png",
            "--output",
            tmp_path / "b.png",
            "--image_size",
            64,
            checkpoint=tmp_path / "bare.pth",
        )
        == 0
    )
    assert np.array_equal(Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png"))
    assert "holds weights alone" in capsys.readouterr().out


# --- Composites and class tables ----------------------------------------------------------------------------


def test_composites_are_scored_against_their_right_half(scenes, run_dir, run, tmp_path, capsys):
    assert run(scenes / "val", "--composite", "--output", tmp_path, checkpoint=run_dir / "best.pth") == 0
    output = capsys.readouterr().out
    scores = metrics.SegmentationMetrics(N_CLASSES)
    paths = dataset.list_images(scenes / "val")
    for path in paths:
        label, predictions = (
            dataset.read_composite(path, None)[1],
            np.asarray(Image.open(tmp_path / f"{path.stem}.png")),
        )
        assert f"{path.stem}.png: dice {np.mean(label == predictions):.4f}" in output
        scores.update(torch.tensor(predictions)[None], torch.tensor(label)[None])
    figures = scores.compute()
    assert (
        f"All {len(paths)} composites together: dice {figures['dice']:.4f}, "
        f"mean IoU {figures['mean_iou']:.4f}"
        in output
    )


@pytest.fixture
def other_table(weights, config, tmp_path):
    """A checkpoint whose class 3 is a house, in pink."""
    names, colors = config["class_names"].copy(), config["class_colors"].copy()
    names[3], colors[3] = "house", [255, 0, 200]
    torch.save(
        {"model": weights, "config": config | {"class_names": names, "class_colors": colors}},
        tmp_path / "other.pth",
    )
    return tmp_path / "other.pth"


def test_masks_have_the_names_and_colours_of_the_checkpoint(photos, run, other_table, tmp_path, capsys):
    assert run(photos / "0.png", "--output", tmp_path / "mask.png", checkpoint=other_table) == 0
    palette = Image.open(tmp_path / "mask.png").getpalette()
    assert palette[9:12] == [255, 0, 200] and palette[12:15] == list(dataset.CLASSES[4].color)
    assert Segmenter(other_table, "cpu").class_names[3] == "house"


def test_composites_of_another_class_table_are_refused(scenes, other_table, tmp_path, fails):
    fails(
        predict.main,
        [scenes / "val", "--composite", "--checkpoint", other_table, "--output", tmp_path / "masks"],
        "class 3 is house",
        "(255, 0, 200)",
        f"in CLASSES of dataset.py it is {dataset.CLASSES[3].name} {dataset.CLASSES[3].color}",
    )
    assert not (tmp_path / "masks").exists()


def test_composites_of_more_classes_than_dataset_py_has_are_refused(
    scenes, checkpoint, tmp_path, monkeypatch, fails
):
    monkeypatch.setattr(dataset, "CLASSES", dataset.CLASSES[:19])
    fails(
        predict.main,
        [scenes / "val", "--composite", "--checkpoint", checkpoint, "--output", tmp_path / "masks"],
        f"class 19 is {dict(enumerate(Segmenter(checkpoint, 'cpu').class_names))[19]}",
        "in CLASSES of dataset.py it is missing",
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"class_names": ["road"]},
        {"class_colors": [[0, 0, 0]]},
        {"class_colors": [[0, 0, 300]] * N_CLASSES},
        {"class_names": 5},
        {"class_colors": "red"},
        {"class_names": [1] * N_CLASSES},
        {"class_colors": [[0, 0]] * N_CLASSES},
    ],
    ids=str,
)
def test_a_table_that_does_not_fit_the_network_is_refused(changes, photos, save_odd, tmp_path, fails):
    fails(
        predict.main,
        [photos, "--checkpoint", save_odd(**changes), "--output", tmp_path / "masks"],
        "odd.pth",
        f"{N_CLASSES} classes",
        "CLASSES of dataset.py",
    )


@pytest.mark.parametrize("size", [100, 0, -64, 64.0, "64", None, True], ids=repr)
def test_a_checkpoint_of_an_impossible_image_size_is_refused(size, photos, save_odd, tmp_path, fails):
    fails(
        predict.main,
        [photos, "--checkpoint", save_odd(image_size=size), "--output", tmp_path / "masks"],
        "odd.pth",
        "multiples of 32",
    )


def test_a_checkpoint_without_a_dict_for_its_config_counts_as_bare(photos, run, weights, tmp_path):
    torch.save({"model": weights, "config": None}, tmp_path / "odd.pth")
    assert (
        run(
            photos / "0.png",
            "--output",
            tmp_path / "masks",
            "--image_size",
            64,
            checkpoint=tmp_path / "odd.pth",
        )
        == 0
    )


def test_photos_come_through_a_pipe_too(photos, run, tmp_path):
    if not os.path.isdir("/dev/fd"):
        pytest.skip("needs /dev/fd")
    reader, writer = os.pipe()
    with ThreadPoolExecutor(1) as pool, open(reader, "rb"):
        with open(writer, "wb") as file:
            pool.submit(file.write, (photos / "0.png").read_bytes()).result(30)
        assert run(f"/dev/fd/{reader}", "--output", tmp_path / "mask.png") == 0


# --- Which files --------------------------------------------------------------------------------------------


def test_a_folder_in_a_folder_out_in_batches_in_natural_order(photo, run, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    sizes = [(40 + 7 * i, 90 - 5 * i) for i in range(11)]
    for i, size in enumerate(sizes):
        photo.resize(size).save(folder / f"{i}.jpg")
    photo.save(folder / "5.png")
    (folder / "notes.txt").write_text("no photo")
    assert run(folder, "--output", tmp_path / "masks", "--overlay") == 0
    for i, size in enumerate(sizes):
        name = "5.jpg" if i == 5 else str(i)  # 5.jpg and 5.png would meet in one 5.png
        assert Image.open(tmp_path / "masks" / f"{name}.png").size == size
        overlay = Image.open(tmp_path / "masks" / f"{name}_overlay.png")
        assert overlay.mode == "RGB" and overlay.height > size[1]
    output = capsys.readouterr().out
    assert "12 of 12 photos segmented" in output
    assert [line.split(" -> ")[0].rsplit(os.sep)[-1] for line in output.splitlines()[1:3]] == [
        "1.jpg",
        "2.jpg",
    ]


@pytest.mark.usefixtures("heeding_signals")
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_in_the_middle_keeps_the_masks_so_far(signal_number, photos, checkpoint, monkeypatch, fails):
    write = predict.write_own

    def stop_at_the_second(path, image):
        if path.name == "1.png":
            signal.raise_signal(signal_number)
        write(path, image)

    monkeypatch.setattr(predict, "write_own", stop_at_the_second)
    masks = photos.with_name("masks")
    argv = [photos, "--output", masks, "--checkpoint", checkpoint, "--device", "cpu"]
    words = [f"stopped by {signal_number.name}", "are whole", "the same command"]
    fails(predict.main, argv, *words, status=128 + signal_number)
    assert set(content(masks)) == {"0.png"}


@pytest.mark.parametrize("flags", [[], ["--overlay"]])
def test_the_photos_own_folder_can_be_used_again_and_again(flags, photos, run, capsys):
    for path in list(photos.iterdir()):
        path.rename(path.with_suffix(".jpg"))
    assert run(photos, "--output", photos, *flags) == 0
    first = content(photos)
    assert len(first) == 3 * (2 + len(flags))
    assert run(photos, "--output", photos, *flags) == 0
    assert content(photos) == first
    assert f"Leaving out {3 * (1 + len(flags))} masks" in capsys.readouterr().out


def test_masks_of_earlier_runs_are_replaced(photos, run, tmp_path):
    for _ in range(2):
        assert run(photos, "--output", tmp_path / "masks", "--overlay") == 0
        assert run(photos / "0.png", "--output", tmp_path / "mask.png") == 0


def test_composites_lie_beside_their_masks_unharmed(own_scenes, run, run_dir, capsys):
    before = content(own_scenes / "val")
    for _ in range(2):
        assert (
            run(
                own_scenes / "val",
                "--composite",
                "--output",
                own_scenes / "val",
                checkpoint=run_dir / "best.pth",
            )
            == 0
        )
    assert content(own_scenes / "val").items() >= before.items()


@pytest.mark.parametrize("output", ["masks", "masks.2024", "new/masks.v2", "a.b.c", "there.png"])
def test_an_output_that_is_no_images_name_is_a_folder(output, photos, run, tmp_path):
    if output == "there.png":
        (tmp_path / output).mkdir()
    assert run(photos / "0.png", "--output", tmp_path / output) == 0
    assert (tmp_path / output / "0.png").is_file()


def test_a_photo_given_twice_is_segmented_once(photos, run, tmp_path, capsys):
    (tmp_path / "link").symlink_to(photos)
    assert (
        run(
            photos,
            photos / "0.png",
            photos / ".." / "photos" / "1.png",
            tmp_path / "link",
            "--output",
            tmp_path / "masks",
        )
        == 0
    )
    assert "3 of 3 photos" in capsys.readouterr().out


def test_a_link_of_another_name_is_a_photo_of_its_own(photos, run, tmp_path):
    (photos / "again.png").symlink_to(photos / "0.png")
    assert run(photos, "--output", tmp_path / "masks") == 0
    assert (tmp_path / "masks" / "again.png").is_file()


def test_hidden_photos_are_read_when_named(photos, run, tmp_path):
    (photos / "0.png").rename(photos / ".0.png")
    assert (
        run(photos / ".0.png", "--output", tmp_path / "masks") == 0
        and (tmp_path / "masks" / ".0.png").is_file()
    )


def arrange(folder, name):
    """The folder, changed so that a command line would do harm."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, "PNG")
    return path


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize(
    "case",
    [
        ([], ["photos", "--output", "photos"], ["photos/0.png is there", "choose another --output"]),
        ([], ["photos/0.png", "--output", "photos/0.png"], ["photos/0.png is there"]),
        ([], ["photos/0.png", "--output", "photos/1.png"], ["photos/1.png is there"]),
        (["x.jpg", "x_overlay.png"], ["x.jpg", "--output", ".", "--overlay"], ["x_overlay.png is there"]),
        (["x.jpg", "x_overlay.png"], ["x.jpg", "--output", "x_overlay.png"], ["x_overlay.png is there"]),
        (
            ["in/x.jpg", "in/x_overlay.png"],
            ["in", "--output", "masks", "--overlay"],
            ["masks/x_overlay.png", "one file"],
        ),
        (["in/x.jpg", "out/x.png"], ["in", "--output", "out"], ["out/x.png is there"]),
        (["a/x.jpg", "b/x.jpg"], ["a", "b", "--output", "masks"], ["one file, masks/x.jpg.png"]),
        (["a/x.jpg", "b/X.jpg"], ["a", "b", "--output", "masks"], ["X.jpg.png", "where case does not count"]),
        (["a/\u00e9.jpg", "b/e\u0301.jpg"], ["a", "b", "--output", "masks"], ["one file"]),
        (
            ["in/a.jpg", "in/a.png", "in/a.jpg.jpg"],
            ["in", "--output", "masks"],
            ["masks/a.jpg.png", "one file"],
        ),
        (["out/0.png/file.txt"], ["photos", "--output", "out"], ["out/0.png is there"]),
        ([], ["photos", "--output", "mask.png"], ["mask.png is one file", "name one"]),
        ([], ["photos/0.png", "photos/1.png", "--output", "mask.jpg"], ["mask.jpg is one file"]),
        ([], ["photos/0.png", "--output", "mask.jpg"], ["only PNG keeps", "name it mask.png"]),
        ([], ["photos/0.png", "--output", "mask.webp"], ["only PNG keeps"]),
        ([f"in/{'x' * 240}.jpg"], ["in", "--output", "masks"], ["more than 230 bytes"]),
        (["out"], ["photos", "--output", "out"], ["--output out", "it is a file"]),
        ([], ["empty", "--output", "masks"], ["empty holds no images"]),
        ([], ["photos/gone", "--output", "masks"], ["photos/gone: no such file"]),
    ],
)
def test_outputs_are_checked_before_the_first_is_written(case, checkpoint, tmp_path, monkeypatch, fails):
    extra, argv, words = case
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in extra:
        arrange(tmp_path, name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    fails(predict.main, [*argv, "--checkpoint", checkpoint, "--device", "cpu"], *words)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_mask_is_not_taken_for_a_photo(photos, run, checkpoint, tmp_path, fails):
    run(photos, "--output", tmp_path / "masks")
    good = ["--checkpoint", checkpoint, "--output", tmp_path / "more"]
    fails(predict.main, [tmp_path / "masks" / "0.png", *good], "is a mask or overlay of predict.py")
    with pytest.raises(SystemExit):
        predict.main([str(word) for word in [tmp_path / "masks", *good]])
    assert not (tmp_path / "more").exists()


# --- Mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["0", "-32", "100", "256.0", "x", ""])
def test_an_image_size_out_of_range_is_a_usage_error(size, photos, checkpoint, tmp_path, fails):
    fails(
        predict.main,
        [photos, "--checkpoint", checkpoint, "--output", tmp_path / "m", f"--image_size={size}"],
        "--image_size",
        "multiple of 32",
        status=2,
    )


def test_an_image_size_other_than_the_checkpoints_is_refused(photos, checkpoint, run, tmp_path, fails):
    fails(
        predict.main,
        [photos, "--checkpoint", checkpoint, "--output", tmp_path / "m", "--image_size", 96],
        "--image_size 96",
        "trained at 64",
        "leave the flag out",
    )
    assert run(photos / "0.png", "--output", tmp_path / "m", "--image_size", 64) == 0


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize(
    ("name", "words"),
    [("gone.pth", "gone.pth"), ("text.jpg", "text.jpg"), ("other.pth", "missing"), ("nan.pth", "NaN")],
)
def test_checkpoints_that_are_none_end_in_one_line(name, words, checkpoint, tmp_path, fails):
    (tmp_path / "text.jpg").write_text("this is no checkpoint")
    broken = torch.load(checkpoint, weights_only=True)
    broken["model"]["out.bias"][3] = torch.nan  # its masks would be background all over
    torch.save(broken, tmp_path / "nan.pth")
    torch.save({"out.weight": torch.zeros(20, 24, 1, 1)}, tmp_path / "other.pth")
    argv = [tmp_path / "photos", "--checkpoint", tmp_path / name, "--output", tmp_path / "m"]
    fails(predict.main, argv, name, words)


def test_a_mistyped_flag_is_named(photos, checkpoint, fails):
    fails(
        predict.main,
        [photos, "--chekpoint", checkpoint, "--checkpoint", checkpoint, "--output", "m"],
        "did you mean --checkpoint?",
        status=2,
    )


@pytest.mark.parametrize(
    "case",
    [
        ("photo.heic", b"x", "does not read .heic"),
        ("photo.dng", b"II*\0", "does not read .dng"),
        ("photo.jpg", b"damaged", "cannot be read"),
        ("photo.png", b"", "cannot be read"),
    ],
)
def test_a_bad_photo_among_good_ones_is_named_and_costs_none_of_them(case, photos, run, tmp_path, capsys):
    name, data, words = case
    (photos / name).write_bytes(data)
    assert run(photos, "--output", tmp_path / "masks") == 1
    captured = capsys.readouterr()
    assert "skipped 1 of 4" in captured.err and name in captured.err and words in captured.err
    assert "3 of 4 photos segmented" in captured.out and len(list((tmp_path / "masks").iterdir())) == 3


def test_a_photo_that_is_no_composite_is_named(photos, run, tmp_path, capsys):
    assert run(photos / "0.png", "--composite", "--output", tmp_path / "mask.png") == 1
    assert "twice as wide as high" in capsys.readouterr().err


# --- The log ------------------------------------------------------------------------------------------------


def broken_stream(kind):
    if kind == "missing":
        return None
    if kind == "closed":
        stream = open(os.devnull, "w")
        stream.close()
        return stream
    if kind == "ascii":
        return io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    if kind == "full disk":
        return open("/dev/full", "w") if os.path.exists("/dev/full") else pytest.skip("needs /dev/full")
    reader, writer = os.openpty() if kind == "terminal that hung up" else os.pipe()
    os.close(reader)
    return open(writer, "w")


@pytest.mark.parametrize(
    "kind", ["missing", "closed", "ascii", "full disk", "pipe without reader", "terminal that hung up"]
)
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_takes_nothing_ends_no_run(name, kind, photos, run, monkeypatch):
    (photos / "0.png").rename(photos / os.fsdecode(b"\xff\xe9.png"))  # a name that no encoding has
    (photos / "damaged.png").write_bytes(b"")  # a line for stderr
    stream = broken_stream(kind)
    monkeypatch.setattr(sys, name, stream)
    masks = photos.with_name("masks")
    assert run(photos, "--output", masks) == 1
    assert sorted(os.listdir(os.fsencode(masks))) == [b"1.png", b"2.png", b"\xff\xe9.png"]
    if kind not in ("missing", "closed"):
        stream.flush()  # as Python does when it exits, with status 120 if it fails


def test_a_name_that_the_log_cannot_encode_is_escaped(photos, run, tmp_path, monkeypatch):
    (photos / "0.png").rename(photos / "caf\u00e9.png")
    stream = broken_stream("ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert run(photos / "caf\u00e9.png", "--output", tmp_path / "masks") == 0
    assert b"caf\\xe9.png -> " in stream.buffer.getvalue()


def test_real_processes_end_well_with_streams_that_take_nothing(photos, config, tmp_path):
    checkpoint = tmp_path / "whole.pth"
    with backbone(efficientnet_b0):  # as a new interpreter has it
        weights = models.EfficientSegNet(N_CLASSES, "none").state_dict()
    torch.save({"model": weights, "config": config}, checkpoint)
    argv = [sys.executable, "-u", ROOT / "predict.py", photos, "--checkpoint", checkpoint, "--output"]
    processes = {}
    for name, redirection in (("piped", "| head -n 1"), ("closed", ">&- 2>&-")):  # at once: imports take long
        command = f'"$0" "$@" {redirection}; exit ${{PIPESTATUS[0]}}'
        processes[name] = subprocess.Popen(["bash", "-c", command, *map(str, argv), str(tmp_path / name)],
                                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for name, process in processes.items():
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0 and errors == "", errors
        assert len(list((tmp_path / name).iterdir())) == 3


def test_help_into_a_closed_pipe_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", broken_stream("pipe without reader"))
    with pytest.raises(SystemExit) as end:
        predict.main(["--help"])
    sys.stdout.flush()
    assert end.value.code == 0


def test_a_terminal_gets_a_progress_bar(photos, run, tmp_path, monkeypatch):
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    reader, writer = os.openpty()
    fcntl.ioctl(
        writer, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0)
    )  # rows and columns; else it has none
    with open(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert run(photos, "--output", tmp_path / "masks") == 0
        assert select.select([reader], [], [], 10)[0] and b"Segmenting" in os.read(reader, 10000)
    os.close(reader)


# --- Damaged bytes ------------------------------------------------------------------------------------------


def mutate(data, chance):
    """A file of an image, damaged: bytes changed, cut out, doubled, or the end missing."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        place = (
            chance.randrange(len(data)) if chance.random() < 0.5 else chance.randrange(min(len(data), 200))
        )
        kind = chance.randrange(4)
        if kind == 0:
            data[place] = chance.randrange(256)
        elif kind == 1:
            del data[place : place + chance.randint(1, 20)]
        elif kind == 2:
            data[place:place] = data[place : place + chance.randint(1, 50)]
        else:
            del data[max(place, 1) :]
        if not data:
            break
    return bytes(data)


def test_a_thousand_damaged_files_neither_crash_nor_hang_it(photo, run, tmp_path, capsys):
    chance, photos, n_files = random.Random(0), tmp_path / "photos", 1000
    photos.mkdir()
    small = photo.resize((48, 32))
    exif = Image.Exif()
    exif[274] = 6
    originals = []
    for name, options in (
        ("a.jpg", {"exif": exif}),
        ("b.jpg", {"progressive": True}),
        ("c.png", {"exif": exif}),
        ("d.png", {}),
        ("e.tif", {"exif": exif}),
        ("f.webp", {"exif": exif}),
        ("g.gif", {}),
        ("h.tif", {"compression": "tiff_lzw"}),
    ):
        (small.quantize(16) if name == "d.png" else small).save(tmp_path / name, **options)
        originals.append((tmp_path / name).read_bytes())
    suffixes = ("jpg", "jpg", "png", "png", "tif", "webp", "gif", "tif")
    for i in range(n_files):
        (photos / f"{i}.{suffixes[i % 8]}").write_bytes(mutate(originals[i % 8], chance))
    assert run(photos, "--output", tmp_path / "masks") == 1
    captured = capsys.readouterr()
    n_masks = len(list((tmp_path / "masks").iterdir()))
    assert f"skipped {n_files - n_masks} of {n_files}" in captured.err and "Traceback" not in captured.err
    assert 0 < n_masks < n_files
    with capsys.disabled():
        print(
            f"\nfuzz: {n_files} damaged files, {n_masks} still readable and segmented, "
            f"{n_files - n_masks} refused by name"
        )
