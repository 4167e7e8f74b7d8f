"""train.py: which flags act, what is remembered, how a run goes on, and what counts."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dataset

import predict
import train
from conftest import ROOT, SMALL, hurry, rows_of
from metrics import segmentation_loss


@pytest.fixture(autouse=True)
def hurry_in_an_empty_folder(run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with hurry():
        yield


def run(*argv):
    train.main([*argv, *SMALL])


def test_the_demo_has_a_recipe_where_no_flag_says_otherwise_and_remembers_it(capsys):
    args, _ = train.parse_args(["--demo", "--num_epochs", 1])
    assert (args.learning_rate, args.num_epochs, args.batch_size, args.image_size) == (1e-2, 1, 2, 128)
    run("--demo", "--num_epochs", 1, "--output_dir", "run")
    args, _ = train.parse_args(["--resume", "run/last.pth", "--num_epochs", 2])
    assert (args.data_dir, args.learning_rate, args.batch_size) == (train.DEMO_DIR, 1e-2, 2)
    line = capsys.readouterr().out.splitlines()[-1].strip()
    predict.main([word.strip('"') for word in line.split()[2:]])  # the line can be pasted
    assert os.path.exists("masks/1_overlay.png")


def test_one_command_starts_and_goes_on(scenes, capsys):
    argv = ["--data_dir", scenes, "--output_dir", "run", "--resume", "auto"]
    for n_epochs, words in ((1, "none in run: a new run"), (2, "goes on after 1 epoch\n"),
                            (2, "2 epochs are done")):
        try:
            run(*argv, "--num_epochs", n_epochs)
        except SystemExit as end:
            assert end.code == 0
        assert words in capsys.readouterr().out
    run(*argv[:4], "--num_epochs", 3, "--resume", "run/last.pth")  # --encoder_weights is given and the same
    out = capsys.readouterr().out
    assert len(rows_of(Path("run"))) == 3 and all(name in out for name in train.COLUMNS)
    assert list(json.load(open("run/config.json")))[0] == "settings"


def test_best_pth_is_chosen_by_the_figure_that_is_asked_for(scenes):
    run("--data_dir", scenes, "--output_dir", "run", "--num_epochs", 3, "--best_by", "mean_iou")
    best = torch.load("run/best.pth", weights_only=True)
    figures = [float(row["val_mean_iou"]) for row in rows_of(Path("run"))]
    assert best["best"]["figure"] == pytest.approx(max(figures), rel=1e-5)
    assert best["best"]["epoch"] == figures.index(max(figures)) + 1


def test_ignored_background_teaches_nothing_and_counts_nowhere(scenes, capsys):
    gradients = []
    for filling in (0.0, 5.0):
        logits = torch.linspace(-1, 1, 2 * 20 * 8 * 8).view(2, 20, 8, 8).clone()
        labels = torch.arange(128).view(2, 8, 8) % 20
        logits[:, 3][labels == 0] = filling  # what the network says where nobody drew
        logits.requires_grad_()
        segmentation_loss(logits, labels, ignore_background=True)[0].backward()
        assert not logits.grad.movedim(1, -1)[labels == 0].any()
        gradients.append(logits.grad)
    assert torch.equal(*gradients) and gradients[0].any()
    run("--data_dir", scenes, "--output_dir", "run", "--num_epochs", 1, "--ignore_background")
    train.main(["--evaluate", "run/best.pth", "--flip", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "scored with the mirrored photos" in out
    assert "background          -       -         -            0.00%" in out


def test_a_scored_background_is_the_checkpoints(scenes, monkeypatch, capsys, fails):
    monkeypatch.setattr(dataset, "SCORE_BACKGROUND", True)
    run("--data_dir", scenes, "--output_dir", "run", "--num_epochs", 1)
    fails(train.main, ["--demo", "--ignore_background"], "SCORE_BACKGROUND")
    monkeypatch.setattr(dataset, "SCORE_BACKGROUND", False)
    train.main(["--evaluate", "run/best.pth", "--device", "cpu", "--data_dir", scenes])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("background"))
    assert "-" not in row


def test_drawings_surroundings_and_missing_docstrings_end_no_run(scenes, tmp_path):
    argv = [sys.executable, "-OO", ROOT / "train.py", "--data_dir", scenes, "--output_dir", tmp_path / "run",
            "--num_epochs", "1", *SMALL]
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / "run" / "curves.png").exists()
