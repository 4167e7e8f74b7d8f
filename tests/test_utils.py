"""utils.py: arguments, devices, files that are whole at every moment, pictures."""
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import utils
from utils import UserError


def make_parser():
    parser = utils.ArgumentParser(prog="tool.py")
    parser.add_argument("--batch_size", type=utils.positive_int, default=4)
    parser.add_argument("--learning_rate", type=utils.positive_float, default=1e-3)
    return parser


@pytest.mark.parametrize("arguments, message", [
    (["--batch_sise", "3"], "unknown argument --batch_sise; did you mean --batch_size?"),
    (["--batch", "3"], "unknown argument --batch"),
    (["--zzz"], "unknown argument --zzz (see --help)"),
    (["--batch_size", "0"], "0: expected a whole number of 1 or more"),
    (["--batch_size", "2.5"], "2.5: expected a whole number"),
    (["--learning_rate", "-1"], "-1: expected a number above 0"),
    (["--learning_rate", "nan"], "nan: expected a number above 0"),
    (["--learning_rate", "fast"], "fast: expected a number above 0"),
])
def test_wrong_arguments_end_in_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        make_parser().parse_args(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


def test_user_errors_become_one_line_and_status_1(capsys):
    with pytest.raises(SystemExit) as end, utils.user_errors(KeyError):
        raise UserError("first\nsecond")
    assert end.value.code == 1 and capsys.readouterr().err.endswith("error: first second\n")
    with pytest.raises(ZeroDivisionError), utils.user_errors(KeyError):  # a bug keeps its traceback
        1 / 0


@pytest.mark.parametrize("capability, architectures, served", [
    ((6, 1), ["sm_50", "sm_60", "sm_70"], True),  # GTX 1080 on torch 2.7: sm_60 serves 6.1
    ((6, 1), ["sm_75", "sm_80", "sm_90"], False),  # and on torch 2.8
    ((8, 0), ["sm_75", "sm_86"], False),  # a higher minor version does not serve a lower card
    ((9, 0), ["sm_80", "sm_90a"], True),
    ((12, 0), ["sm_90", "compute_90"], True),  # PTX is compiled for later cards
])
def test_builds_serve_equal_major_and_not_higher_minor(capability, architectures, served):
    if served:
        utils.check_gpu_architecture("card", capability, architectures)
    else:
        with pytest.raises(UserError, match="pip install"):
            utils.check_gpu_architecture("card", capability, architectures)


def test_pascal_on_a_newer_torch_is_told_which_torch_to_install():
    with pytest.raises(UserError, match=r"6\.1.*torch==2\.7\.1 torchvision==0\.22\.1"):
        utils.check_gpu_architecture("GeForce GTX 1080", (6, 1), ["sm_75", "sm_90"])


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:99", "gpu", "meta", "mps"])
def test_devices_that_are_not_here_are_refused(name):
    if name in ("cuda", "cuda:0") and torch.cuda.is_available() or name == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(UserError, match=f"--device {name}"):
        utils.select_device(name)


@pytest.mark.parametrize("capability, dtype", [((6, 1), None), ((7, 0), torch.float16), ((7, 5), torch.float16),
                                               ((8, 6), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_auto_precision_is_what_the_card_is_fast_at(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert utils.select_amp("auto", torch.device("cuda:0"))[0] is dtype
    assert utils.select_amp("off", torch.device("cuda:0"))[0] is None


def test_auto_precision_on_the_cpu_follows_its_instructions(monkeypatch):
    for has_bf16 in (True, False):
        monkeypatch.setattr(utils, "cpu_has_bf16", lambda: has_bf16)
        assert utils.select_amp("auto", torch.device("cpu"))[0] is (torch.bfloat16 if has_bf16 else None)


def test_a_failed_write_leaves_the_previous_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    utils.write_file(path, b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        utils.write_file(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["last.pth"]


def test_csv_keeps_six_digits_and_leaves_nan_empty(tmp_path):
    utils.write_csv(tmp_path / "a.csv", [{"class": "traffic light", "dice": 0.123456789, "iou": float("nan"), "pixels": 12345678}])
    assert (tmp_path / "a.csv").read_text() == "class,dice,iou,pixels\ntraffic light,0.123457,,12345678\n"
    utils.write_json(tmp_path / "a.json", {"a": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output .*file"):
        utils.make_dir(tmp_path / "file" / "below", "--output")


def test_pictures_are_drawn(tmp_path):
    names, palette = [f"class {i}" for i in range(20)], np.random.default_rng(0).integers(256, size=(20, 3), dtype=np.uint8)
    row = {"epoch": 1, "train_loss": 2.0, "val_loss": 2.5, "train_dice": 0.5, "val_dice": 0.4}
    utils.plot_curves([row], tmp_path / "curves.png")
    utils.plot_confusion_matrix(np.eye(20), names, tmp_path / "confusion.png")
    labels = np.arange(20, dtype=np.uint8).reshape(1, 4, 5)
    utils.plot_predictions(np.zeros((1, 4, 5, 3), np.uint8), labels, labels, names, palette, tmp_path / "predictions.png")
    for name in ("curves", "confusion", "predictions"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png")).std() > 5  # not an empty canvas
    photo = Image.new("RGB", (40, 30), "white")
    overlay = utils.draw_overlay(photo, np.zeros((30, 40), np.uint8), names, palette)
    assert overlay.height > 30 and np.abs(np.asarray(overlay)[10, 10] - (0.45 * 255 + 0.55 * palette[0])).max() <= 1
