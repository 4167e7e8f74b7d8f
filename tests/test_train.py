"""train.py: the whole path on synthetic scenes, one step and its parts, resuming, and many processes."""
import copy
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.run import main as torchrun

import dataset
import metrics
import model as models
import train
import utils
from conftest import (
    HEIGHT, ROOT, SMALL, free_port, hurry, make_trainer, plain_loss, rows_of, run_ranks, start)
from predict import Segmenter, main as predict
from utils import Runtime

HEADER = ("epoch,learning_rate,train_loss,train_dice,val_loss,val_dice,val_mean_dice,val_mean_iou,seconds,"
          "images_per_second")


def arguments(data, output, *more):
    return ["--data_dir", str(data), "--output_dir", str(output), *SMALL, *map(str, more)]


def load(path):
    return torch.load(path, weights_only=True)


def weights(path):
    """All that is trained or averaged, by names of its own."""
    checkpoint = load(path)
    average = checkpoint.get("average", {})
    return checkpoint["model"] | {f"average {key}": value for key, value in average.items()}


def same_weights(a, b):
    pairs = zip(weights(a).values(), weights(b).values(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


@pytest.fixture(autouse=True)
def in_a_hurry(run_dir):
    """The pictures of run_dir are drawn and looked at."""
    with hurry():
        yield


# --- A run and what it leaves -------------------------------------------------------------------------------


def test_a_run_leaves_all_its_files_and_nothing_else(run_dir):
    assert sorted(path.name for path in run_dir.iterdir()) == sorted(train.RUN_FILES)


def test_history_has_a_row_of_finite_figures_for_each_epoch(run_dir):
    rows = rows_of(run_dir)
    assert ",".join(rows[0]) == HEADER and [row["epoch"] for row in rows] == ["1", "2"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())


@pytest.mark.parametrize("name", ["curves", "predictions", "confusion_matrix"])
def test_pictures_are_no_empty_canvas(run_dir, name):
    assert np.asarray(Image.open(run_dir / f"{name}.png").convert("L")).std() > 10


def test_config_and_table_name_the_classes(run_dir):
    assert len((run_dir / "per_class.csv").read_text().splitlines()) == 21
    config = json.loads((run_dir / "config.json").read_text())
    assert config["n_classes"] == 20 and config["image_size"] == 64 and config["class_names"][11] == "sky"


def test_checkpoints_hold_plain_types_and_each_tensor_once(run_dir):
    last, best = load(run_dir / "last.pth"), load(run_dir / "best.pth")
    assert set(last) == {"model", "average", "optimizer", "scaler", "epoch", "best", "history", "config"}
    assert set(best) == {"model", "best", "config"} and best["best"]["epoch"] <= 2
    assert {key.split(".")[0].rstrip("12345") for key in best["model"]} == {"encoder", "decoder", "out"}
    assert last["history"][-1]["epoch"] == last["epoch"] == 2


def test_training_lowers_the_loss_and_a_checkpoint_always_predicts_the_same(uninterrupted, scenes):
    rows = rows_of(uninterrupted)
    assert float(rows[-1]["train_loss"]) < 0.8 * float(rows[0]["train_loss"])
    photo = dataset.read_image(scenes / "val" / "1.jpg").crop((0, 0, HEIGHT, HEIGHT))
    first, second = (Segmenter(uninterrupted / "best.pth", "cpu")(photo) for _ in range(2))
    assert first.shape == (HEIGHT, HEIGHT) and np.array_equal(first, second) and len(np.unique(first)) > 2


@pytest.mark.parametrize("name, choose", [("best.pth", max), ("last.pth", lambda values: list(values)[-1])])
def test_evaluating_a_checkpoint_repeats_its_figures(scenes, run_dir, capsys, name, choose):
    """Those of the averaged weights, which last.pth holds beside the others."""
    train.main(["--evaluate", str(run_dir / name), "--data_dir", str(scenes), "--device", "cpu"])
    dice = choose(float(row["val_dice"]) for row in rows_of(run_dir))
    assert f"dice {dice:.4f}" in capsys.readouterr().out


def figures_line(text):
    return next(line for line in text.splitlines() if line.startswith("dice "))


@pytest.mark.parametrize("flip", [[], ["--flip"]])
@pytest.mark.parametrize("heights", [(128, 128, 160), (64, 64, 64)])
def test_evaluate_and_predict_agree_at_any_size(own_scenes, run_dir, capsys, flip, heights):
    """The checkpoint sees 64x64; the labels have 64x64, or 128x128 and some 160x160 pixels."""
    for path, height in zip(sorted((own_scenes / "val").iterdir()), itertools.cycle(heights)):
        composite = Image.open(path).resize((2 * height, height), Image.Resampling.NEAREST)
        composite.save(path.with_suffix(".png"))
        path.unlink()
    chosen = ["--device", "cpu", *flip]
    train.main(["--evaluate", str(run_dir / "best.pth"), "--data_dir", str(own_scenes), *chosen])
    scored = figures_line(capsys.readouterr().out).split()
    predict([str(own_scenes / "val"), "--composite", "--checkpoint", str(run_dir / "best.pth"),
             "--output", str(own_scenes / "masks"), *chosen])
    together = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("All "))
    found = re.search(r"dice ([\d.]+), mean_iou ([\d.]+)", together).groups()
    assert [*map(float, found)] == pytest.approx([float(scored[1]), float(scored[5])], abs=2e-4)  # bf16


def test_flip_changes_the_figures(scenes, run_dir, capsys):
    lines = []
    for flip in ([], ["--flip"]):
        train.main(["--evaluate", str(run_dir / "best.pth"), "--data_dir", str(scenes),
                    "--device", "cpu", *flip])
        lines.append(figures_line(capsys.readouterr().out))
    assert lines[0] != lines[1]


def test_kept_features_and_encoding_in_every_step_give_the_same_figures(scenes, run_dir, tmp_path):
    train.main(arguments(scenes, tmp_path / "run", "--num_epochs", 2, "--no_cache", "--num_workers", 1))
    for kept, fresh in zip(rows_of(run_dir), rows_of(tmp_path / "run")):
        for name in ("train_loss", "train_dice", "val_loss", "val_dice", "val_mean_iou"):
            assert float(kept[name]) == pytest.approx(float(fresh[name]), abs=0.01), name


@pytest.mark.parametrize("free", [10_000, 1_000_000])  # features and labels take 0.69 MB in bf16
def test_memory_is_taken_where_it_is_and_a_line_says_so(scenes, tmp_path, capsys, monkeypatch, free):
    monkeypatch.setattr(utils, "free_memory", lambda: free)
    train.main(arguments(scenes, tmp_path / "run", "--num_epochs", 1, "--num_workers", 0, "--amp", "bf16"))
    words = "kept in host memory" if free > 10**5 else "read in every step, for they do not fit into memory"
    assert words in capsys.readouterr().out


def test_only_finetuning_augments(scenes, tmp_path, monkeypatch):
    def augment(*_):
        raise NotImplementedError

    monkeypatch.setattr(dataset, "augment", augment)
    train.main(arguments(scenes, tmp_path / "frozen", "--num_epochs", 1))
    with pytest.raises(NotImplementedError):
        train.main(arguments(scenes, tmp_path / "finetuned", "--num_epochs", 1, "--finetune_encoder"))


def test_finetuning_moves_the_encoder_and_a_resume_is_exact(scenes, tmp_path):
    """Augmentation included. The rate is constant from the first step on, so --num_epochs does not matter."""
    for name, n_epochs in (("whole", 2), ("run", 1)):
        argv = arguments(scenes, tmp_path / name, "--num_epochs", n_epochs, "--finetune_encoder")
        train.main(argv)
    before = weights(tmp_path / "run" / "last.pth")["encoder3.0.block.0.0.weight"]
    train.main(["--resume", str(tmp_path / "run" / "last.pth"), "--num_epochs", "2"])
    assert not torch.equal(before, weights(tmp_path / "run" / "last.pth")["encoder3.0.block.0.0.weight"])
    assert same_weights(tmp_path / "run" / "last.pth", tmp_path / "whole" / "last.pth")


def test_two_seeds_give_other_weights_and_one_seed_the_same(scenes, run_dir, tmp_path):
    for name, seed in (("again", 0), ("other", 1)):
        train.main(arguments(scenes, tmp_path / name, "--num_epochs", 2, "--seed", seed))
    assert same_weights(tmp_path / "again" / "last.pth", run_dir / "last.pth")
    assert not same_weights(tmp_path / "other" / "last.pth", run_dir / "last.pth")


def test_the_log_of_a_run_in_a_file_has_no_carriage_returns(scenes, tmp_path):
    log = tmp_path / "log"
    process = start(train.main, arguments(scenes, tmp_path / "run", "--num_epochs", 2), log)
    process.join(120)
    text = log.read_text()
    assert process.exitcode == 0 and "\r" not in text, text
    lines = text.splitlines()
    assert [line.split()[0] for line in lines if "*" in line][0] == "1/2"
    for word in ("Device", "825,108 trainable", "4 images a step", "traffic light", "best.pth"):
        assert word in text
    assert len(lines) < 60


def refuse_download(monkeypatch, folder):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    monkeypatch.setattr("torch.hub.urlopen", refuse)


def test_the_demo_runs_from_any_folder_without_network(tmp_path, monkeypatch, capsys):
    refuse_download(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    train.main(["--demo", "--num_epochs", "1", "--image_size", "64", "--device", "cpu"])
    output = capsys.readouterr().out
    assert "goes on with random encoder weights" in output and "no network" in output
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "best.pth").exists() and not (tmp_path / "data").exists()


def test_without_network_only_the_demo_goes_on(scenes, tmp_path, monkeypatch, fails):
    refuse_download(monkeypatch, tmp_path)
    argv = ["--data_dir", scenes, "--output_dir", tmp_path / "run", "--device", "cpu"]
    fails(train.main, argv, "ImageNet weights could not be loaded", "no network", "--encoder_weights FILE")
    assert not (tmp_path / "run").exists()


# --- One step -----------------------------------------------------------------------------------------------


def make_batch(n_images=2, size=64):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (n_images, 3, size, size), dtype=torch.uint8, generator=generator)
    return images, torch.randint(20, (n_images, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("step, factor", [(1, 0.2), (4, 0.8), (5, 1), (50, 1), (100, 1)])
def test_the_learning_rate_rises_in_the_first_twentieth_and_stays(step, factor):
    trainer, (images, labels) = make_trainer(), make_batch()
    trainer.n_steps, trainer.steps_done = 100, step - 1
    trainer.step([images], labels)
    assert trainer.learning_rate == trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * factor)


@pytest.mark.parametrize("finetune", [False, True])
def test_a_step_is_adamw_on_the_loss_and_reports_cross_entropy(finetune):
    """Against network and loss written down plainly in float64, and AdamW on the trainer's own gradients."""
    trainer, (images, labels) = make_trainer(finetune), make_batch()
    plain = copy.deepcopy(trainer.network).double().train()
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    gradients = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(parameter.grad.clone() for parameter in trainer.parameters))
    trainer.generator = torch.Generator().manual_seed(3) if finetune else None
    trainer.step([images], labels)

    if finetune:
        images, labels = dataset.augment(images, labels, torch.Generator().manual_seed(3))
    logits, labels = plain(dataset.normalize(images).double()), labels.long()
    plain_loss(logits, labels).backward()
    figures = trainer.scores.compute()
    assert figures["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert figures["dice"] == pytest.approx((logits.argmax(1) == labels).float().mean().item(), abs=1e-3)
    parts = [plain.decoder_parameters(), *([plain.encoder_parameters()] if finetune else [])]
    rates = [1e-3, 1e-3 * train.ENCODER_LEARNING_RATE]
    index = 0
    for parameters, rate in zip(parts, rates):
        for parameter in parameters:
            gradient = gradients[index].double()
            largest = parameter.grad.abs().max()
            if largest > 1e-6:  # a bias before a batch norm has none but rounding
                assert (gradient - parameter.grad).abs().max() < 0.01 * largest
            # AdamW's first step, of a running mean and square that are the gradient's own
            step = rate * gradient / (gradient.abs() + 1e-8)
            expected = before[index].double() * (1 - rate * train.WEIGHT_DECAY) - step
            found = trainer.parameters[index].double()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3 * rate)
            index += 1
    assert index == len(gradients)


def test_features_and_images_are_two_ways_into_one_step():
    images, labels = make_batch()
    by_images, by_features = make_trainer(), make_trainer()
    by_images.step([images], labels)
    by_features.step(by_features.make_inputs(images), labels)
    for left, right in zip(by_images.network.parameters(), by_features.network.parameters()):
        assert torch.equal(left, right)


@pytest.mark.parametrize("finetune", [False, True])
def test_averages_span_a_share_of_the_steps_so_far(finetune):
    trainer, (images, labels) = make_trainer(finetune, n_steps=30), make_batch()
    names = ["decoder1.conv_block.0.weight", "decoder5.conv_block.1.running_var", "encoder1.0.0.weight"]
    expected = {}
    for step in range(1, 13):
        trainer.step([images], labels)
        for name in names:
            value = trainer.network.state_dict()[name]
            rate = 1 / max(train.AVERAGED * step, 1)
            expected[name] = value.clone() if rate == 1 else expected[name].lerp(value, rate)
    for name in names:
        if name.startswith("encoder") and not finetune:
            assert name not in trainer.average and name not in trainer.state_dict()["average"]
        else:
            torch.testing.assert_close(trainer.average[name], expected[name])
            assert not torch.equal(trainer.average[name], trainer.network.state_dict()[name])


@pytest.mark.parametrize("finetune", [False, True])
def test_what_is_scored_is_a_folded_copy_with_other_weights(finetune):
    trainer, (images, _) = make_trainer(finetune), make_batch()
    state = copy.deepcopy(trainer.network.state_dict())
    for key, value in trainer.average.items():
        if key.endswith("bias"):
            value += 0.1
    folded, plain = trainer.fold(), copy.deepcopy(trainer.network).eval()
    plain.load_state_dict(trainer.average, strict=False)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in folded.modules())
    with torch.no_grad():
        logits, expected = (network(dataset.normalize(images)) for network in (folded, plain))
    assert (logits - expected).abs().mean() < 1e-3 * expected.std()
    assert all(torch.equal(value, state[key]) for key, value in trainer.network.state_dict().items())
    assert trainer.network.training


def test_fp16_scales_the_loss_and_steps_alike():
    """Not fast on a CPU, but the same arithmetic as on a GPU of capability 7."""
    images, labels = make_batch()
    plain, scaled = make_trainer(), make_trainer(amp="fp16")
    assert scaled.scaler.is_enabled() and not plain.scaler.is_enabled()
    for trainer in (plain, scaled):
        for _ in range(3):
            trainer.step([images], labels)
    assert scaled.state_dict()["scaler"]["scale"] > 1
    assert scaled.scores.compute()["loss"] == pytest.approx(plain.scores.compute()["loss"], rel=0.02)


def test_a_step_in_bf16_is_nearly_that_in_float32():
    images, labels = make_batch()
    plain, rounded = make_trainer(), make_trainer(amp="bf16")
    for trainer in (plain, rounded):
        trainer.step([images], labels)
    assert all(one.dtype == torch.bfloat16 for one in rounded.make_inputs(images))
    assert all(parameter.dtype == torch.float32 for parameter in rounded.parameters)
    assert rounded.scores.compute()["loss"] == pytest.approx(plain.scores.compute()["loss"], rel=0.02)


def test_a_step_whose_fp16_gradients_overflow_is_left_out():
    trainer, (images, labels) = make_trainer(amp="fp16"), make_batch()
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    before = [parameter.clone() for parameter in trainer.parameters]
    trainer.step([images], labels)
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.parameters))
    assert trainer.state_dict()["scaler"]["scale"] == pytest.approx(0.5e38)


def test_trainer_state_goes_on_where_it_was():
    images, labels = make_batch()
    one, two = make_trainer(), make_trainer()
    for _ in range(4):
        one.step([images], labels)
    for _ in range(2):
        two.step([images], labels)
    state, three = two.state_dict(), make_trainer()
    three.load_state_dict(state, steps_done=2)
    for _ in range(2):
        three.step([images], labels)
    for left, right in zip(one.network.state_dict().values(), three.network.state_dict().values()):
        assert torch.equal(left, right)


# --- A run is never lost ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    with hurry():
        train.main(arguments(scenes, folder, "--num_epochs", 4, "--batch_size", 2))
    return folder


def without_times(run):
    timed = ("seconds", "images_per_second")
    return [{name: value for name, value in row.items() if name not in timed}
            for row in load(run / "last.pth")["history"]]


def test_a_run_killed_at_random_moments_ends_with_the_same_weights(scenes, uninterrupted, tmp_path):
    """kill -9, start or resume again, until the four epochs are done: bit for bit the run left alone."""
    moments, output, kills, longest = random.Random(0), tmp_path / "run", 0, 1.5  # seconds
    argv = arguments(scenes, output, "--num_epochs", 4, "--batch_size", 2)
    while True:
        process = start(train.main, argv, tmp_path / "log")
        process.join(moments.uniform(0.1, 1) * longest if kills < 8 else 120)
        if process.exitcode is not None:
            assert process.exitcode == 0, (tmp_path / "log").read_text()
            if kills:
                break
            longest /= 2  # this machine was done before the first kill: once more, and kill sooner
            shutil.rmtree(output)
            continue
        process.kill()
        process.join()
        kills += 1
        if (output / "last.pth").exists():
            epoch = load(output / "last.pth")["epoch"]  # it loads, whatever the moment
            if epoch == 4:
                break
            argv = ["--resume", output / "last.pth"]
        elif (output / "best.pth").exists():  # killed between the two
            (output / "best.pth").unlink()
    assert kills > 0 and same_weights(output / "last.pth", uninterrupted / "last.pth")
    assert without_times(output) == without_times(uninterrupted)


def kill_while_saving(argv):
    """Train, but die by kill -9 in the middle of writing the second last.pth."""
    written = 0

    def write_and_die(path, content, *rest, **options):
        nonlocal written
        if Path(path).name == "last.pth":
            written += 1
            if written == 2:
                with open(Path(path).with_name(".last.pth.tmp"), "wb") as file:
                    file.write(bytes(content)[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        real(path, content, *rest, **options)

    real, utils.write_file = utils.write_file, write_and_die
    train.main(argv)


def test_kill_in_the_middle_of_a_save_leaves_a_checkpoint_to_resume(scenes, uninterrupted, tmp_path):
    output = tmp_path / "run"
    argv = arguments(scenes, output, "--num_epochs", 4, "--batch_size", 2)
    process = start(kill_while_saving, argv, tmp_path / "log")
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert load(output / "last.pth")["epoch"] == 1
    train.main(["--resume", str(output / "last.pth")])
    assert same_weights(output / "last.pth", uninterrupted / "last.pth")
    assert same_weights(output / "best.pth", uninterrupted / "best.pth")
    assert sorted(path.name for path in output.iterdir()) == sorted(train.RUN_FILES)


def train_in_the_foreground(argv):
    """Ctrl-C reaches it even if the tests themselves run as a shell's background job that ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    train.main(argv)


@pytest.mark.parametrize("signal_number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on(scenes, tmp_path, signal_number, status):
    log, output = tmp_path / "log", tmp_path / "my run"
    process = start(train_in_the_foreground, arguments(scenes, output, "--num_epochs", 500), log)
    while not (output / "last.pth").exists():
        time.sleep(0.05)
        assert process.is_alive(), log.read_text()
    os.kill(process.pid, signal_number)
    process.join(60)
    text = log.read_text()
    assert process.exitcode == status and "Traceback" not in text, text
    assert text.splitlines()[-1].endswith(f'go on with it: --resume "{output / "last.pth"}"')


def limit_file_size(argv):
    """As full as a disk gets without root: no file over a size, enough for best.pth, not for last.pth."""
    size, *argv = argv
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
    train.main(argv)


def test_a_full_disk_ends_in_a_line_and_keeps_the_previous_checkpoint(scenes, run_dir, tmp_path):
    output = Path(shutil.copytree(run_dir, tmp_path / "run"))
    size = (output / "best.pth").stat().st_size + 1_000_000
    argv = [size, "--resume", output / "last.pth", "--num_epochs", 4]
    process = start(limit_file_size, argv, tmp_path / "log")
    process.join(120)
    text = (tmp_path / "log").read_text()
    assert process.exitcode == 1 and "Traceback" not in text, text
    assert "last.pth" in text.splitlines()[-1] and "File too large" in text.splitlines()[-1]
    assert "go on with it: --resume" in text.splitlines()[-1]
    assert load(output / "last.pth")["epoch"] == 2
    assert not list(output.glob(".*"))


def test_more_epochs_extend_a_finished_run_at_its_learning_rate(run_dir, tmp_path):
    output = Path(shutil.copytree(run_dir, tmp_path / "run"))
    train.main(["--resume", str(output / "last.pth"), "--num_epochs", "4"])
    peak = train.get_args_parser().get_default("learning_rate")
    assert [float(row["learning_rate"]) for row in rows_of(output)] == pytest.approx([peak] * 4)


def test_resuming_from_a_bare_state_dict_starts_a_new_run_from_its_weights(run_dir, scenes, tmp_path, capsys):
    bare = {f"module.{key}": value for key, value in weights(run_dir / "best.pth").items()}
    torch.save(bare, tmp_path / "bare.pth")
    argv = ["--data_dir", scenes, "--output_dir", tmp_path / "run", "--num_epochs", 1, "--image_size", 64,
            "--device", "cpu"]
    train.main(["--resume", str(tmp_path / "bare.pth"), *map(str, argv)])
    output = capsys.readouterr().out
    assert "bare.pth: a new run starts from its weights" in output and "at 64x64" in output
    assert load(tmp_path / "run" / "last.pth")["epoch"] == 1


def test_two_stages_a_frozen_run_and_then_the_encoder_too(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", str(run_dir / "best.pth"), "--finetune_encoder", "--num_epochs", "1"])
    output = capsys.readouterr().out
    assert "a new run starts from its weights" in output and f"weights: {run_dir / 'best.pth'}" in output
    (first,) = [line for line in output.splitlines() if line.startswith("  0/1")]
    assert f"{max(float(row['val_dice']) for row in rows_of(run_dir)):.4f}" in first
    (run,) = (tmp_path / "runs").iterdir()
    config = load(run / "last.pth")["config"]
    assert config["image_size"] == 64 and config["settings"]["finetune_encoder"]


# --- Many processes -----------------------------------------------------------------------------------------


def test_any_number_of_ranks_scores_a_split_alike(scenes, run_dir, tmp_path):
    """7 composites over 1, 2 and 3 ranks: the same table, digit for digit, printed by rank 0 alone."""
    tables = []
    for n_ranks in (1, 2, 3):
        argv = ["--evaluate", run_dir / "best.pth", "--data_dir", scenes, "--device", "cpu"]
        statuses, logs = run_ranks(train.main, argv, n_ranks, tmp_path)
        assert statuses == [0] * n_ranks, logs
        tables.append(logs[0].split("class  ")[1])
        assert all("dice" not in log for log in logs[1:])
    assert tables[0] == tables[1] == tables[2] and "bicycle" in tables[0]


def take_one_step(argv):
    """The real step on this rank's share of four images; rank 0 saves what it did to the weights.

    Batch-norm statistics are frozen, and all is in float64: rounding in float32 the random encoder's last
    stage would make a thousandth of.
    """
    torch.set_num_threads(1)  # on some CPUs the last bits of a convolution depend on it
    torch.set_default_dtype(torch.float64)
    runtime = Runtime.start("cpu", "off")
    torch.manual_seed(0)
    network = models.EfficientSegNet(20, "none").eval()
    scores = metrics.SegmentationMetrics(20, ignore_background=argv[1])
    trainer = train.Trainer(network, scores, 1e-3, 1, runtime)
    features = [torch.randn(4, *one.shape[1:]) for one in network.encode(torch.zeros(1, 3, 64, 64))]
    labels = torch.randint(20, (4, 64, 64), dtype=torch.uint8)
    labels[0] = 0  # other numbers of pixels count on each rank
    gradients = {}
    trainer.optimizer.register_step_pre_hook(lambda *_: gradients.update(
        {name: parameter.grad.clone() for name, parameter in network.named_parameters()
         if parameter.requires_grad}))
    share = slice(runtime.rank, None, runtime.world_size)
    trainer.step([one[share] for one in features], labels[share])
    if runtime.rank == 0:
        torch.save(gradients, argv[0])
    runtime.close()


@pytest.mark.parametrize("ignore_background", [False, True])
def test_two_ranks_with_batch_two_take_the_step_of_one_with_batch_four(tmp_path, ignore_background):
    gradients = []
    for n_ranks in (1, 2):
        argv = [tmp_path / f"{n_ranks}.pth", ignore_background]
        statuses, logs = run_ranks(take_one_step, argv, n_ranks, tmp_path)
        assert statuses == [0] * n_ranks, logs
        gradients.append(load(tmp_path / f"{n_ranks}.pth"))
    assert len(gradients[0]) == 32
    for name, gradient in gradients[0].items():
        atol = 1e-6 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=atol)


def note_what_is_read(argv):
    """Train, and write down which composites this rank read; rank 2 has too little memory to keep its own."""
    folder, real = Path(argv[0]), dataset.Split.keep
    utils.free_memory = lambda: 10_000 if os.environ["RANK"] == "2" else 10**9

    def keep(self, encode, device, bar):
        with open(folder / f"read{os.environ['RANK']}", "a") as file:
            file.writelines(f"{path.parent.name}/{path.name} {device}\n" for path in self.paths)
        return real(self, encode, device, bar)

    dataset.Split.keep = keep
    train.main(argv[1:])


def test_each_rank_reads_its_own_share_and_none_is_left_out(own_scenes, tmp_path):
    scenes = own_scenes
    for number in range(3, 8):  # rank 2 has no validation image
        (scenes / "val" / f"{number}.jpg").unlink()
    argv = [tmp_path, *arguments(scenes, tmp_path / "run", "--num_epochs", 1, "--batch_size", 2,
                                 "--num_workers", 0)]
    statuses, logs = run_ranks(note_what_is_read, argv, 3, tmp_path)
    assert statuses == [0, 0, 0], logs
    lines = [(tmp_path / f"read{rank}").read_text().splitlines() for rank in range(3)]
    assert all(("None" in line) == (rank == 2) for rank in range(3) for line in lines[rank])
    shares = [[line.split()[0] for line in some] for some in lines]
    composites = [f"{path.parent.name}/{path.name}" for path in scenes.rglob("*.jpg")]
    assert sorted(sum(shares, [])) == sorted(composites)
    assert [sum("train" in name for name in share) for share in shares] == [3, 3, 2]
    assert "1 epoch of 1 step, 2 x 3 = 6 images a step" in logs[0] and "GB a process" in logs[0]


def test_steps_are_those_of_the_smallest_share_and_left_over_images_change():
    generators = [train.make_generator(0, epoch, 0) for epoch in range(1, 20)]
    drawn = [sum(train.draw_batches(11, 4, 2, generator), []) for generator in generators]
    left_over = [set(range(11)) - set(some) for some in drawn]
    assert all(len(left) == 3 for left in left_over) and set.union(*left_over) == set(range(11))


def test_the_rank_that_meets_a_problem_says_it(own_scenes, tmp_path):
    (own_scenes / "train" / "2.jpg").write_bytes(b"damaged")  # rank 1's share
    statuses, logs = run_ranks(train.main, arguments(own_scenes, tmp_path / "run"), 2, tmp_path)
    assert statuses == [1, 1] and not (tmp_path / "run").exists()
    assert "error: [rank 1]" in logs[1] and "2.jpg: cannot identify image" in logs[1]
    assert "error: [rank 0] another process of this job ended; its line says why" in logs[0]
    assert "Traceback" not in logs[0] + logs[1]


def test_more_processes_than_composites_are_refused(scenes, tmp_path):
    shutil.copytree(scenes / "val", tmp_path / "data" / "val")
    (tmp_path / "data" / "train").mkdir()
    shutil.copy(scenes / "train" / "1.jpg", tmp_path / "data" / "train")
    statuses, logs = run_ranks(train.main, arguments(tmp_path / "data", tmp_path / "run"), 2, tmp_path)
    assert statuses == [1, 1] and "1 composite for 2 processes; start fewer" in logs[0]


def test_torchrun_trains(scenes, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    torchrun(["--nproc_per_node=2", f"--master_port={free_port()}", "train.py",
              *map(str, arguments(scenes, tmp_path / "run", "--num_epochs", 1, "--batch_size", 2))])
    printed = capfd.readouterr().out
    assert "2 x 2 = 4 images a step" in printed and printed.count("Device ") == 1
    assert "825,108 trainable and 4,007,548 frozen parameters" in printed
    assert not any(key.startswith("module.") for key in weights(tmp_path / "run" / "last.pth"))


def lose_a_rank(folder, *argv):
    """Train, and write down this rank's process; rank 1 dies in the second epoch."""
    rank, real = int(os.environ["RANK"]), train.Trainer.end_epoch
    (folder / f"process{rank}").write_text(str(os.getpid()))

    def end_epoch(trainer, row, *rest):
        if row["epoch"] == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(trainer, row, *rest)

    train.Trainer.end_epoch = end_epoch
    with hurry():
        try:
            train.main(argv)
        except SystemExit as ended:
            if ended.code == 1:  # rank 0 lost its peer; torchrun, which looks every 0.1 s, is to see who died
                time.sleep(10)
            raise


def test_a_rank_that_dies_takes_the_job_down_and_the_run_resumes(scenes, tmp_path):
    output = tmp_path / "run"
    argv = arguments(scenes, output, "--num_epochs", 300, "--batch_size", 2)
    # what torchrun is a command line for, here with processes that start fast
    config = LaunchConfig(1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
                          start_method="forkserver")
    with pytest.raises(ChildFailedError, match="SIGKILL"):
        elastic_launch(config, lose_a_rank)(tmp_path, *argv)
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"process{rank}").read_text()), 0)  # is it still there?
    epoch = load(output / "last.pth")["epoch"]
    assert epoch < 3
    train.main(["--resume", str(output / "last.pth"), "--num_epochs", str(epoch + 1)])
    assert load(output / "last.pth")["epoch"] == epoch + 1


@pytest.mark.parametrize("variables", [
    {"WORLD_SIZE": "4"}, {"RANK": "3"}, {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1"},
    {"WORLD_SIZE": "", "RANK": "x", "MASTER_ADDR": "here", "MASTER_PORT": ""},
])
def test_stray_variables_of_a_scheduler_are_no_processes(scenes, run_dir, capsys, monkeypatch, variables):
    for name, value in (variables | {"LOCAL_WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    train.main(["--evaluate", str(run_dir / "best.pth"), "--data_dir", str(scenes), "--device", "cpu"])
    assert "dice" in capsys.readouterr().out and not torch.distributed.is_initialized()
    assert utils.local_processes() == 1


def test_train_runs_in_a_thread(scenes, tmp_path):
    argv = arguments(scenes, tmp_path / "run", "--num_epochs", 1)
    thread = threading.Thread(target=train.main, args=(argv,))
    thread.start()
    thread.join(120)
    assert (tmp_path / "run" / "last.pth").exists()


def test_the_command_that_older_guides_give_still_works():
    argv = "--num_epochs 10 --batch_size 4 --learning_rate 1e-3 --num_classes 20".split()
    args, checkpoint = train.parse_args(argv)
    assert checkpoint is None and (args.num_epochs, args.batch_size) == (10, 4)
    assert (args.learning_rate, args.num_classes) == (1e-3, 20)


def test_the_four_modules_know_no_other_file_of_the_project():
    for name, allowed in (("model", {"utils"}), ("dataset", {"utils"}), ("metrics", set()), ("utils", set())):
        source = (ROOT / f"{name}.py").read_text()
        imported = re.findall(r"^ *(?:import|from) (\w+)", source, re.MULTILINE)
        assert {"model", "dataset", "metrics", "utils", "train", "predict"} & set(imported) == allowed, name
        assert "from utils import UserError\n" in source or not allowed


def test_nothing_is_unpickled_without_weights_only():
    for path in ROOT.glob("*.py"):
        source = path.read_text()
        assert source.count("torch.load(") == source.count("weights_only=True"), path
        assert "weights_only=False" not in source and "pickle.load" not in source, path
        assert "shell=True" not in source and "os.system" not in source, path
