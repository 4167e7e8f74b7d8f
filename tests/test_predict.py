"""predict.py: what the network says, which files are read and written, what a mistake costs."""
import io
import os
import random
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models import efficientnet_b0

import dataset
import metrics
import model as models
import predict
import train
import utils
from conftest import backbone, shallow_efficientnet
from predict import Segmenter

ROOT = Path(predict.__file__).parent
N_CLASSES = len(dataset.CLASSES)
CONFIG = {"image_size": 64, "class_names": [entry.name for entry in dataset.CLASSES],
          "class_colors": [list(entry.color) for entry in dataset.CLASSES]}

SCORES = "dice {dice:.4f}, mean_iou {mean_iou:.4f}"


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
def checkpoint(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "best.pth"
    torch.save({"model": weights, "config": CONFIG}, path)
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
def run(checkpoint):
    """predict.main with a checkpoint; returns the exit status."""
    def main(*argv, checkpoint=checkpoint):
        try:
            predict.main([*argv, "--checkpoint", checkpoint, "--device", "cpu"])
        except SystemExit as end:
            return end.code
        return 0

    return main


def content(folder):
    """Every file below a folder: path and bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def read_ids(path):
    return np.asarray(Image.open(path))


# --- What the network says ----------------------------------------------------------------------------------


def test_a_mask_is_a_palette_png_of_the_upright_photo_and_a_line_says_what_it_holds(
        photo, run, tmp_path, capsys):
    exif = Image.Exif()
    exif[274] = 6  # it was taken upright, and lies on its side in the file
    photo.save(tmp_path / "rotated.jpg", exif=exif)
    assert run(tmp_path / "rotated.jpg", "--output", tmp_path / "mask.png") == 0
    mask = Image.open(tmp_path / "mask.png")
    ids = np.asarray(mask)
    assert mask.mode == "P" and mask.size == (97, 211) and len(np.unique(ids)) > 3
    assert np.array_equal(mask.convert("RGB"), dataset.colorize(ids))  # opens in the classes' colours
    counts = sorted(((np.sum(ids == i), name) for i, name in enumerate(CONFIG["class_names"])), reverse=True)
    shares = ", ".join(f"{name} {count / ids.size:.1%}" for count, name in counts[:3])
    expected = f"{tmp_path / 'rotated.jpg'} -> {tmp_path / 'mask.png'}: {shares} of the mask"
    assert expected in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("flip", [False, True])
def test_predictions_are_the_best_of_the_stretched_logits(flip, photo, weights, checkpoint):
    network = models.EfficientSegNet(N_CLASSES, None).eval().double()
    network.load_state_dict(weights)
    square = np.array(photo.resize((64, 64), Image.Resampling.BILINEAR))
    inputs = dataset.normalize(torch.from_numpy(square).permute(2, 0, 1)[None]).double()
    with torch.no_grad():
        logits = network(inputs)
        if flip:
            logits = (logits + network(inputs.flip(3)).flip(3)) / 2
    expected = F.interpolate(logits, size=(97, 211), mode="bilinear", align_corners=False)[0].argmax(0)
    segmenter = Segmenter(checkpoint, "cpu", flip=flip)
    segmenter.runtime = utils.Runtime(segmenter.runtime.device, None, "float32, to compare")
    predictions = segmenter(photo)
    assert len(np.unique(predictions)) > 1 and np.mean(predictions == expected.numpy()) > 0.999


def test_flip_is_a_flag(photos, run, checkpoint, tmp_path):
    assert run(photos / "0.png", "--output", tmp_path / "mask.png", "--flip") == 0
    expected = Segmenter(checkpoint, "cpu", flip=True)(Image.open(photos / "0.png"))
    assert np.array_equal(read_ids(tmp_path / "mask.png"), expected)
    assert not np.array_equal(Segmenter(checkpoint, "cpu")(Image.open(photos / "0.png")), expected)


def test_arrays_and_images_give_the_same_predictions(photo, checkpoint):
    segmenter = Segmenter(checkpoint, "cpu")
    predictions = segmenter(np.asarray(photo))
    assert predictions.dtype == np.uint8 and np.array_equal(predictions, segmenter(photo))


def test_an_array_of_another_type_is_refused(checkpoint):
    with pytest.raises(TypeError, match="Cannot handle this data type"):
        Segmenter(checkpoint, "cpu")(np.zeros((4, 4, 3)))


def test_bare_state_dicts_with_prefixes_predict_the_same_and_say_so(photos, run, weights, tmp_path, capsys):
    torch.save({f"module.{key}": value for key, value in weights.items()}, tmp_path / "bare.pth")
    assert run(photos / "0.png", "--output", tmp_path / "a.png") == 0
    assert run(photos / "0.png", "--output", tmp_path / "b.png", "--image_size", 64,
               checkpoint=tmp_path / "bare.pth") == 0
    assert np.array_equal(read_ids(tmp_path / "a.png"), read_ids(tmp_path / "b.png"))
    assert "holds weights alone" in capsys.readouterr().out


def test_an_overlay_is_the_photo_under_the_classes_colours_above_a_legend(photos, run, tmp_path):
    assert run(photos / "0.png", "--output", tmp_path, "--overlay") == 0
    photo, overlay = (np.asarray(Image.open(path)) for path in (photos / "0.png", tmp_path / "0_overlay.png"))
    height, width, _ = photo.shape
    expected = 0.45 * photo + 0.55 * dataset.colorize(read_ids(tmp_path / "0.png"))
    assert np.abs(overlay[:height, :width] - expected).max() <= 1
    assert overlay.shape[0] > height and len(np.unique(overlay[height:])) > 2


# --- Composites and class tables ----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"score_background": True}, {"ignore_background": True}], ids=str)
def test_composites_are_scored_as_train_py_scores_them(settings, run_dir, run, tmp_path, capsys):
    saved = torch.load(run_dir / "best.pth", weights_only=True)
    saved["config"]["settings"] |= settings
    torch.save(saved, tmp_path / "best.pth")
    val = Path(saved["config"]["settings"]["data_dir"], "val")
    assert run(val, "--composite", "--output", tmp_path, checkpoint=tmp_path / "best.pth") == 0
    output = capsys.readouterr().out
    totals = metrics.SegmentationMetrics(N_CLASSES, **settings)
    for path in dataset.find_images(val)[0]:
        label, predictions = dataset.read_composite(path, None)[1], read_ids(tmp_path / f"{path.stem}.png")
        scores = metrics.SegmentationMetrics(N_CLASSES, **settings)
        for one in (scores, totals):
            one.update(torch.tensor(predictions), torch.tensor(label))
        assert f"{path.stem}.png: {SCORES.format(**scores.compute())}; " in output
    assert f"All composites together: {SCORES.format(**totals.compute())}" in output
    train.main(["--evaluate", tmp_path / "best.pth", "--device", "cpu"])
    figures = dict(re.findall(r"(\w+) (\d\.\d+)", capsys.readouterr().out.splitlines()[-1]))
    for name in ("dice", "mean_iou"):
        assert totals.compute()[name] == pytest.approx(float(figures[name]), abs=2e-4)


def test_composites_without_the_flag_are_refused_and_wide_photos_are_not(
        scenes, photo, run, tmp_path, capsys):
    photo.resize((192, 96)).save(tmp_path / "wide.png")
    composite = scenes / "val" / "1.jpg"
    assert run(composite, tmp_path / "wide.png", "--output", tmp_path / "masks") == 1
    error = capsys.readouterr().err
    assert str(composite) in error and "pass --composite" in error and error.count("\n") == 1
    assert list(content(tmp_path / "masks")) == ["wide.png"]


@pytest.fixture
def other_table(weights, tmp_path):
    """A checkpoint whose class 3 is a house, in pink."""
    config = CONFIG | {name: [*CONFIG[name][:3], value, *CONFIG[name][4:]]
                       for name, value in (("class_names", "house"), ("class_colors", [255, 0, 200]))}
    torch.save({"model": weights, "config": config}, tmp_path / "other.pth")
    return tmp_path / "other.pth"


def test_masks_have_the_names_and_colours_of_the_checkpoint(photos, run, other_table, tmp_path):
    assert run(photos / "0.png", "--output", tmp_path / "mask.png", checkpoint=other_table) == 0
    palette = Image.open(tmp_path / "mask.png").getpalette()
    assert palette[9:12] == [255, 0, 200] and palette[12:15] == list(dataset.CLASSES[4].color)
    assert Segmenter(other_table, "cpu").class_names[3] == "house"


def test_composites_of_another_class_table_are_refused(scenes, other_table, tmp_path, fails):
    argv = [scenes / "val", "--composite", "--checkpoint", other_table, "--output", tmp_path / "masks"]
    fails(predict.main, argv, "class 3 is house", "(255, 0, 200)", "in dataset.py it is "
          f"{dataset.CLASSES[3].name} {dataset.CLASSES[3].color}")
    assert not (tmp_path / "masks").exists()


def test_a_table_that_does_not_fit_the_network_is_refused(photos, weights, tmp_path, fails):
    torch.save({"model": weights, "config": CONFIG | {"class_names": ["road"]}}, tmp_path / "odd.pth")
    argv = [photos, "--checkpoint", tmp_path / "odd.pth", "--output", tmp_path / "masks"]
    fails(predict.main, argv, "odd.pth", f"{N_CLASSES} classes", "CLASSES of dataset.py")


# --- Which files --------------------------------------------------------------------------------------------


def test_folders_are_read_with_their_subfolders_and_masks_mirror_them(photo, run, tmp_path, capsys):
    names = ["2.jpg", "10.jpg", "berlin/a.jpg", "berlin/mitte/b.webp"]
    others = ["notes.txt", "berlin/c.heic"]
    for name in [*names, ".hidden.jpg"]:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        photo.save(tmp_path / "photos" / name)
    for name in others:
        (tmp_path / "photos" / name).write_bytes(b"no photo that is read")
    assert run(tmp_path / "photos", "--output", tmp_path / "masks", "--overlay") == 0
    stems = [os.path.splitext(name)[0] for name in names]
    assert set(content(tmp_path / "masks")) == {
        f"{stem}{end}.png" for stem in stems for end in ("", "_overlay")}
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("Left out")]
    assert "2 files" in line and all(str(tmp_path / "photos" / name) in line for name in others)
    assert [line.split(" -> ")[0] for line in lines if " -> " in line] == [
        str(tmp_path / "photos" / name) for name in names]  # 2 before 10
    assert lines[-1].startswith("4 photos, ") and lines[-1].endswith("0 problems")


@pytest.mark.usefixtures("photos")
def test_a_checkpoint_and_an_output_that_are_left_out(checkpoint, tmp_path, monkeypatch, fails, capsys):
    monkeypatch.chdir(tmp_path)
    fails(predict.main, ["photos"], "there is no runs/*/best.pth", "--checkpoint FILE")
    for age, name in enumerate(("newest", "a", "z")):
        path = tmp_path / "runs" / name / "best.pth"
        path.parent.mkdir(parents=True)
        path.write_bytes(checkpoint.read_bytes() if name == "newest" else b"")
        os.utime(path, (10**9 - age, 10**9 - age))
    predict.main(["photos", "--device", "cpu"])
    assert f"Checkpoint  {Path('runs/newest/best.pth')}" in capsys.readouterr().out
    assert set(content(tmp_path / "masks")) == {"0.png", "1.png", "2.png"}


def test_home_is_known_in_every_path(photos, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "best.pth").write_bytes(checkpoint.read_bytes())
    predict.main(["~/photos", "--checkpoint", "~/best.pth", "--output", "~/masks", "--device", "cpu"])
    assert set(content(tmp_path / "masks")) == {"0.png", "1.png", "2.png"}


@pytest.mark.usefixtures("heeding_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_in_the_middle_keeps_the_masks_so_far(number, photos, checkpoint, monkeypatch, fails):
    write = utils.write_file

    def stop_at_the_second(path, content):
        if Path(path).name == "1.png":
            signal.raise_signal(number)
        write(path, content)

    monkeypatch.setattr(utils, "write_file", stop_at_the_second)
    masks = photos.with_name("masks")
    words = [f"stopped by {number.name}", "are whole", "the same command"]
    fails(predict.main, [photos, "--output", masks, "--checkpoint", checkpoint, "--device", "cpu"], *words,
          status=128 + number)
    assert set(content(masks)) == {"0.png"}


def test_masks_of_earlier_runs_are_replaced_and_never_taken_for_photos(photos, run, capsys):
    for path in list(photos.iterdir()):
        path.rename(path.with_suffix(".jpg"))
    assert run(photos, "--output", photos, "--overlay") == 0
    first = content(photos)
    (photos / "0.png").write_bytes(first["1.png"])
    assert len(first) == 9 and run(photos, "--output", photos, "--overlay") == 0
    assert content(photos) == first  # masks of masks would be new files
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Left out"))
    assert "6 files" in line and str(photos / "0.png") in line
    assert run(photos / "0.png", "--output", photos / "masks") == 1
    assert "0.png is a mask or overlay of predict.py" in capsys.readouterr().err and content(photos) == first


@pytest.mark.parametrize("output", ["masks.2024", "there.png"])
def test_an_output_that_is_no_images_name_is_a_folder(output, photos, run, tmp_path):
    (tmp_path / "there.png").mkdir()
    assert run(photos / "0.png", "--output", tmp_path / output) == 0
    assert (tmp_path / output / "0.png").is_file()


def test_a_photo_given_twice_is_segmented_once(photos, run, tmp_path, capsys):
    (tmp_path / "link").symlink_to(photos)
    again = [photos / "0.png", photos / ".." / "photos" / "1.png", tmp_path / "link"]
    assert run(photos, *again, "--output", tmp_path / "masks") == 0
    assert "3 photos, " in capsys.readouterr().out


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize("case", [
    ([], ["photos", "--output", "photos"], ["photos/0.png is there", "choose another --output"]),
    ([], ["photos/0.png", "--output", "photos/1.png"], ["photos/1.png is there"]),
    (["x.jpg", "x_overlay.png"], ["x.jpg", "--output", ".", "--overlay"], ["x_overlay.png is there"]),
    (["in/x.jpg", "in/x_overlay.jpg"], ["in", "--overlay"], ["one file", "masks/x_overlay.png"]),
    (["in/a.jpg", "in/a.png"], ["in"], ["two outputs would be one file", "masks/a.png"]),
    (["a/x.jpg", "b/X.jpg"], ["a", "b"], ["one file, masks/x.png and masks/X.png"]),  # on some systems
    ([], ["photos", "--output", "mask.png"], ["--output mask.png", "name a folder"]),
    ([], ["photos/0.png", "--output", "mask.jpg"], ["--output mask.jpg", "which alone keeps ids"]),
    (["empty/.hidden.jpg"], ["empty"], ["empty holds no photos"]),
    ([], ["photos/gone"], ["photos/gone", "No such file"]),
])
def test_outputs_are_checked_before_the_first_is_written(case, checkpoint, tmp_path, monkeypatch, fails):
    extra, argv, words = case
    monkeypatch.chdir(tmp_path)
    for path in map(Path, extra):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    before = content(tmp_path)
    fails(predict.main, [*argv, "--checkpoint", checkpoint, "--device", "cpu"], *words)
    assert content(tmp_path) == before


# --- Mistakes and what else goes wrong ----------------------------------------------------------------------


def test_an_image_size_other_than_the_checkpoints_is_refused(photos, checkpoint, run, tmp_path, fails):
    argv = [photos / "0.png", "--output", tmp_path / "m", "--checkpoint", checkpoint, "--image_size"]
    fails(predict.main, [*argv, 100], "--image_size", "multiple of 32", status=2)
    fails(predict.main, [*argv, 96], "--image_size 96", "trained at 64", "leave the flag out")
    assert run(*argv[:3], "--image_size", 64) == 0


def test_a_checkpoint_that_is_none_ends_in_one_line(photos, tmp_path, fails):
    (tmp_path / "text.pth").write_text("this is no checkpoint")
    argv = [photos, "--checkpoint", tmp_path / "text.pth", "--output", tmp_path / "masks"]
    fails(predict.main, argv, "text.pth cannot be loaded")
    assert not (tmp_path / "masks").exists()


def test_a_bad_photo_among_good_ones_is_named_and_costs_none_of_them(photos, run, tmp_path, capsys):
    (photos / "01.jpg").write_bytes(b"damaged")
    assert run(photos, "--output", tmp_path / "masks") == 1
    captured = capsys.readouterr()
    assert str(photos / "01.jpg") in captured.err and captured.err.count("\n") == 1
    assert captured.out.splitlines()[-1].endswith("1 problem")
    assert set(content(tmp_path / "masks")) == {"0.png", "1.png", "2.png"}


def test_a_photo_that_is_no_composite_is_named(photos, run, tmp_path, capsys):
    assert run(photos / "0.png", "--composite", "--output", tmp_path / "mask.png") == 1
    assert "0.png: 211x97 pixels; a composite is twice as wide as high" in capsys.readouterr().err


def test_an_overlay_that_cannot_be_drawn_costs_no_mask(photos, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("PIL.ImageFont.load_default", Mock(side_effect=ImportError("no _imagingft")))
    assert run(photos, "--overlay", "--output", tmp_path / "masks") == 1
    assert set(content(tmp_path / "masks")) == {"0.png", "1.png", "2.png"}
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    for path in photos.iterdir():  # each is named, on the way or at the end
        assert f"{path}: no overlay (no _imagingft)" in captured.out + captured.err


def test_no_more_photos_are_in_memory_than_cores_read_ahead(photo, run, tmp_path, monkeypatch):
    n_cores, n_photos, read, ahead, alive = 2, 12, dataset.read_image, [], []
    (tmp_path / "photos").mkdir()
    for i in range(n_photos):
        photo.save(tmp_path / "photos" / f"{i}.jpg")

    def counting(path):
        image = read(path)
        alive.append(weakref.ref(image))
        n_masks = len(list((tmp_path / "masks").glob("*.png")))
        ahead.append((len(alive) - n_masks, sum(one() is not None for one in alive)))
        return image

    monkeypatch.setattr(utils, "available_cpus", lambda: n_cores)
    monkeypatch.setattr(dataset, "read_image", counting)
    assert run(tmp_path / "photos", "--output", tmp_path / "masks") == 0
    assert len(ahead) == n_photos
    assert all(n_read <= n_cores + 1 and n_kept <= n_cores + 2 for n_read, n_kept in ahead), ahead


def test_a_name_that_the_log_cannot_encode_is_escaped(photos, run, tmp_path, monkeypatch):
    (photos / "0.png").rename(photos / "caf\u00e9.png")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert run(photos / "caf\u00e9.png", "--output", tmp_path / "masks") == 0
    assert b"caf\\xe9.png -> " in stream.buffer.getvalue()


@pytest.fixture(scope="module", autouse=True)
def real_process(photo, tmp_path_factory):
    """predict.py in an interpreter without docstrings, beside the other tests, as that starts slowly."""
    folder = tmp_path_factory.mktemp("real")
    photo.save(folder / "a.png")
    with backbone(efficientnet_b0):  # as a new interpreter has it
        weights = models.EfficientSegNet(N_CLASSES, "none").state_dict()
    torch.save({"model": weights, "config": CONFIG}, folder / "best.pth")
    code = ("import contextlib, sys, predict\n"
            "with contextlib.suppress(SystemExit): predict.main(['--help'])\n"
            "predict.main(sys.argv[1:]); sys.exit('matplotlib' in sys.modules)")
    argv = [folder / "a.png", "--checkpoint", folder / "best.pth", "--output", folder / "masks", "--overlay"]
    reader, writer = os.pipe()
    os.close(reader)  # as that of `predict.py ... | head` is once it has its lines
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}  # a notebook's
    with subprocess.Popen([sys.executable, "-OO", "-c", code, *argv], cwd=ROOT, env=environment,
                          stdout=writer, stderr=subprocess.PIPE, text=True) as process:
        os.close(writer)
        yield process, folder / "masks"
        process.kill()


def test_a_real_process_needs_no_docstrings_no_reader_and_no_matplotlib(real_process):
    process, masks = real_process
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and errors == "", errors
    assert set(content(masks)) == {"a.png", "a_overlay.png"}


def damage(data, chance):
    """A file of an image with bytes changed, cut out or doubled, mostly its header's, or without its end."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(min(len(data), chance.choice((200, 10**6))))
        part = data[place : place + chance.randint(1, 30)]
        data[place : place + len(part)] = chance.choice((b"", 2 * part, chance.randbytes(len(part))))
    return bytes(data[: len(data) // chance.choice((1, 1, 1, 2))])


def test_damaged_files_neither_crash_nor_hang_it(photo, run, tmp_path, capsys):
    chance, exif = random.Random(0), Image.Exif()
    exif[274] = 6
    (tmp_path / "photos").mkdir()
    suffixes = ("jpg", "png", "tif", "webp", "gif")
    for i in range(150):
        buffer = io.BytesIO()
        photo.resize((48, 32)).save(buffer, Image.EXTENSION[f".{suffixes[i % 5]}"], exif=exif)
        (tmp_path / "photos" / f"{i}.{suffixes[i % 5]}").write_bytes(damage(buffer.getvalue(), chance))
    assert run(tmp_path / "photos", "--output", tmp_path / "masks") == 1
    lines = capsys.readouterr().out.splitlines()
    skipped = {path.stem for path in (tmp_path / "photos").iterdir()
               if any(f"skipped {path}" in line for line in lines)}
    segmented = {path.stem for path in (tmp_path / "masks").iterdir()}
    assert skipped and segmented and not skipped & segmented and len(skipped | segmented) == 150
