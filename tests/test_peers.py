"""tests/peers.py, where the library that it installs is there."""
import csv
import subprocess
import sys

import pytest

from conftest import ROOT, SMALL
from peers import PACKAGES


@pytest.mark.skipif(not PACKAGES.exists(), reason="needs the library that tests/peers.py installs")
@pytest.mark.parametrize("flags", [["unet"], ["unet", "--finetune_encoder"], ["fpn", "--finetune_encoder"]])
def test_a_peer_trains_resumes_and_is_scored(scenes, tmp_path, flags):
    def run(*argv):
        command = [sys.executable, ROOT / "tests" / "peers.py", flags[0], *argv]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    folder = tmp_path / "run"
    run("--data_dir", scenes, "--output_dir", folder, "--num_epochs", "1", *SMALL, *flags[1:])
    run("--resume", folder / "last.pth", "--num_epochs", "2")
    history = list(csv.DictReader((folder / "history.csv").read_text().splitlines()))
    best = max(float(row["val_dice"]) for row in history)
    assert len(history) == 2 and f"dice {best:.4f}" in run("--evaluate", folder / "best.pth")
