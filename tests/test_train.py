"""train.py: the whole path on synthetic scenes, resuming, many processes, and every mistake in one line."""
import csv
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import metrics
import predict
import train
from conftest import ROOT, SMALL, start
from predict import Segmenter

HEADER = "epoch,learning_rate,train_loss,train_dice,val_loss,val_dice,val_mean_dice,val_mean_iou,seconds,images_per_second"


def arguments(data, output, *more):
    return ["--data_dir", str(data), "--output_dir", str(output), *SMALL, *map(str, more)]


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def same_weights(a, b):
    return all(torch.equal(left, right) for left, right in zip(weights(a).values(), weights(b).values(), strict=True))


# --- A run and what it leaves -------------------------------------------------------------------------------------------


def test_a_run_leaves_all_its_files_and_nothing_else(run_dir):
    assert sorted(path.name for path in run_dir.iterdir()) == sorted(train.RUN_FILES)
    rows = list(csv.DictReader(open(run_dir / "history.csv")))
    assert ",".join(rows[0]) == HEADER and [row["epoch"] for row in rows] == ["1", "2"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    for name in ("curves", "predictions", "confusion_matrix"):
        assert np.asarray(Image.open(run_dir / f"{name}.png").convert("L")).std() > 10
    assert len((run_dir / "per_class.csv").read_text().splitlines()) == 21
    config = json.loads((run_dir / "config.json").read_text())
    assert config["n_classes"] == 20 and config["image_size"] == 64 and config["class_names"][11] == "sky"


def test_checkpoints_hold_plain_types_and_each_tensor_once(run_dir):
    last, best = (torch.load(run_dir / name, weights_only=True) for name in ("last.pth", "best.pth"))
    assert set(last) == {"model", "optimizer", "scheduler", "scaler", "epoch", "best_dice", "history", "config"}
    assert set(best) == {"model", "epoch", "best_dice", "config"}
    assert {key.split(".")[0].rstrip("12345") for key in best["model"]} == {"encoder", "decoder", "out"}
    assert last["history"][-1]["epoch"] == last["epoch"] == 2


def test_training_lowers_the_loss_and_the_checkpoint_predicts_the_same_after_reloading(scenes, tmp_path):
    train.main(arguments(scenes, tmp_path / "run", "--num_epochs", 6, "--batch_size", 2, "--learning_rate", 3e-3))
    rows = list(csv.DictReader(open(tmp_path / "run" / "history.csv")))
    assert float(rows[-1]["train_loss"]) < 0.8 * float(rows[0]["train_loss"])
    photo = dataset.read_image(scenes / "val" / "1.jpg").crop((0, 0, 256, 256))
    first, second = (Segmenter(tmp_path / "run" / "best.pth", "cpu")(photo) for _ in range(2))
    assert first.shape == (256, 256) and np.array_equal(first, second) and len(np.unique(first)) > 2


def test_evaluating_the_best_checkpoint_repeats_its_figures(scenes, run_dir, capsys):
    train.main(["--evaluate", str(run_dir / "best.pth"), "--data_dir", str(scenes), "--device", "cpu"])
    best = max(float(row["val_dice"]) for row in csv.DictReader(open(run_dir / "history.csv")))
    assert f"dice {best:.4f}" in capsys.readouterr().out


def test_decoding_on_the_fly_trains_to_the_same_weights(scenes, run_dir, tmp_path):
    train.main(arguments(scenes, tmp_path / "run", "--num_epochs", 2, "--no_cache", "--num_workers", 2))
    assert same_weights(tmp_path / "run" / "last.pth", run_dir / "last.pth")


def test_short_memory_chooses_to_decode_on_the_fly_and_says_so(scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dataset, "available_memory", lambda: 10_000)
    train.main(arguments(scenes, tmp_path / "run", "--num_epochs", 1, "--num_workers", 0))
    assert "decoding on the fly (--no_cache)" in capsys.readouterr().out


def test_finetuning_moves_the_encoder_and_resumes(scenes, tmp_path):
    train.main(arguments(scenes, tmp_path / "run", "--num_epochs", 1, "--finetune_encoder"))
    before = weights(tmp_path / "run" / "last.pth")["encoder3.0.block.0.0.weight"]
    train.main(["--resume", str(tmp_path / "run" / "last.pth"), "--num_epochs", "2"])
    assert not torch.equal(before, weights(tmp_path / "run" / "last.pth")["encoder3.0.block.0.0.weight"])


def test_the_log_of_a_run_in_a_file_has_no_carriage_returns(scenes, tmp_path):
    log = tmp_path / "log"
    process = start(train.main, arguments(scenes, tmp_path / "run", "--num_epochs", 2), log)
    process.join(120)
    text = log.read_text()
    assert process.exitcode == 0 and "\r" not in text, text
    lines = text.splitlines()
    assert [line.split()[0] for line in lines if "*" in line][0] == "1/2"
    for word in ("Device", "825,108 trainable", "4,007,548 frozen", "4 images a step", "traffic light", "last.pth"):
        assert word in text
    assert len(lines) < 60


def test_the_demo_runs_without_network(tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    monkeypatch.setattr(dataset, "DEMO_SPLITS", {"train": 4, "val": 2})
    train.main(["--demo", "--num_epochs", "1", "--image_size", "64", "--device", "cpu"])
    output = capsys.readouterr().out
    assert "goes on with random encoder weights" in output and "no network" in output
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "best.pth").exists() and len(list((tmp_path / "data" / "demo" / "train").glob("*.jpg"))) == 4


def test_compile_trains_or_says_why_not(scenes, tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", refuse)
    train.main(arguments(scenes, tmp_path / "run", "--num_epochs", 1, "--compile"))
    assert "no compiler here" in capsys.readouterr().out


# --- A run is never lost ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    train.main(arguments(scenes, folder, "--num_epochs", 4, "--batch_size", 2))
    return folder


def test_a_run_killed_at_random_moments_ends_with_the_same_weights(scenes, uninterrupted, tmp_path):
    """kill -9, resume, until the four epochs are done: bit for bit the weights and history of the run left alone."""
    moments, output, kills = random.Random(0), tmp_path / "run", 0
    argv = arguments(scenes, output, "--num_epochs", 4, "--batch_size", 2)
    while True:
        process = start(train.main, argv, tmp_path / "log")
        process.join(moments.uniform(0.5, 4) if kills < 8 else 120)
        if process.exitcode is not None:
            assert process.exitcode == 0, (tmp_path / "log").read_text()
            break
        process.kill()
        process.join()
        kills += 1
        if (output / "last.pth").exists():
            epoch = torch.load(output / "last.pth", weights_only=True)["epoch"]  # it loads, whatever the moment
            if epoch == 4:
                break
            argv = ["--resume", output / "last.pth"]
        else:
            shutil.rmtree(output, ignore_errors=True)
    assert kills > 0 and same_weights(output / "last.pth", uninterrupted / "last.pth")
    timeless = [[{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in
                 torch.load(folder / "last.pth", weights_only=True)["history"]] for folder in (output, uninterrupted)]
    assert timeless[0] == timeless[1]


def kill_while_saving(argv):
    """Train, but die by kill -9 in the middle of writing the second last.pth."""
    written = 0
    real_write = os.fdopen

    def write_and_die(path, content):
        nonlocal written
        if Path(path).name == "last.pth":
            written += 1
            if written == 2:
                with open(Path(path).with_name(".last.pth.tmp"), "wb") as file:
                    file.write(bytes(content)[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        real(path, content)

    import utils
    real, utils.write_file = utils.write_file, write_and_die
    train.main(argv)


def test_kill_in_the_middle_of_a_save_leaves_a_checkpoint_to_resume(scenes, uninterrupted, tmp_path):
    output = tmp_path / "run"
    process = start(kill_while_saving, arguments(scenes, output, "--num_epochs", 4, "--batch_size", 2), tmp_path / "log")
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert torch.load(output / "last.pth", weights_only=True)["epoch"] == 1
    train.main(["--resume", str(output / "last.pth")])
    assert same_weights(output / "last.pth", uninterrupted / "last.pth")
    assert sorted(path.name for path in output.iterdir()) == sorted(train.RUN_FILES)


@pytest.mark.parametrize("signal_number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on(scenes, tmp_path, signal_number, status):
    log, output = tmp_path / "log", tmp_path / "run"
    process = start(train.main, arguments(scenes, output, "--num_epochs", 500), log)
    while not (output / "last.pth").exists():
        time.sleep(0.05)
        assert process.is_alive(), log.read_text()
    os.kill(process.pid, signal_number)
    process.join(60)
    text = log.read_text()
    assert process.exitcode == status and "Traceback" not in text, text
    assert text.splitlines()[-1].endswith(f"--resume {output / 'last.pth'}")


def limit_file_size(argv):
    """The disk as full as it gets without root: no file may grow beyond 22 MB, enough for best.pth and not for last.pth."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (22_000_000, 22_000_000))
    train.main(argv)


def test_a_full_disk_ends_in_a_line_and_keeps_the_previous_checkpoint(scenes, run_dir, tmp_path):
    output = Path(shutil.copytree(run_dir, tmp_path / "run"))
    process = start(limit_file_size, ["--resume", output / "last.pth", "--num_epochs", 4], tmp_path / "log")
    process.join(120)
    text = (tmp_path / "log").read_text()
    assert process.exitcode == 1 and "Traceback" not in text, text
    assert "last.pth could not be written" in text.splitlines()[-1]
    assert torch.load(output / "last.pth", weights_only=True)["epoch"] == 2
    assert not list(output.glob(".*"))


def test_more_epochs_extend_a_finished_run_along_the_longer_schedule(scenes, run_dir, tmp_path):
    output = Path(shutil.copytree(run_dir, tmp_path / "run"))
    train.main(["--resume", str(output / "last.pth"), "--num_epochs", "4"])
    rates = [float(row["learning_rate"]) for row in csv.DictReader(open(output / "history.csv"))]
    assert len(rates) == 4 and rates[1] == pytest.approx(1e-5)  # the short run had ended low
    assert rates[2] > rates[1] and rates[3] == pytest.approx(1e-5)  # the longer cosine goes on from its own middle


def test_resuming_from_a_bare_state_dict_starts_a_new_run_from_its_weights(run_dir, scenes, tmp_path, capsys):
    torch.save({f"module.{key}": value for key, value in weights(run_dir / "best.pth").items()}, tmp_path / "bare.pth")
    train.main(["--resume", str(tmp_path / "bare.pth"), *arguments(scenes, tmp_path / "run", "--num_epochs", 1)])
    assert "holds weights alone" in capsys.readouterr().out
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["epoch"] == 1
