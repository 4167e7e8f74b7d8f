"""train.py: the whole path on synthetic scenes, resuming, many processes, and every mistake in one line."""
import copy
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
import torch.nn.functional as F
from PIL import Image
from tqdm.auto import tqdm

import dataset
import metrics
import train
from conftest import ROOT, SMALL, start
from predict import Segmenter
from utils import Runtime

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
    train.main(arguments(scenes, tmp_path / "run", "--num_epochs", 2, "--no_cache", "--num_workers", 1))
    assert same_weights(tmp_path / "run" / "last.pth", run_dir / "last.pth")


def test_short_memory_chooses_to_decode_on_the_fly_and_says_so(scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dataset, "available_memory", lambda: 10_000)
    train.main(arguments(scenes, tmp_path / "run", "--num_epochs", 1, "--num_workers", 0))
    assert "decoding on the fly (--no_cache)" in capsys.readouterr().out


def test_only_finetuning_augments(scenes, tmp_path, monkeypatch):
    def augment(*_):
        raise NotImplementedError

    monkeypatch.setattr(dataset, "augment", augment)
    train.main(arguments(scenes, tmp_path / "frozen", "--num_epochs", 1))
    with pytest.raises(NotImplementedError):
        train.main(arguments(scenes, tmp_path / "finetuned", "--num_epochs", 1, "--finetune_encoder"))


def test_finetuning_moves_the_encoder_and_resumes(scenes, tmp_path):
    train.main(arguments(scenes, tmp_path / "run", "--num_epochs", 1, "--finetune_encoder"))
    before = weights(tmp_path / "run" / "last.pth")["encoder3.0.block.0.0.weight"]
    train.main(["--resume", str(tmp_path / "run" / "last.pth"), "--num_epochs", "2"])
    assert not torch.equal(before, weights(tmp_path / "run" / "last.pth")["encoder3.0.block.0.0.weight"])


def test_with_a_frozen_encoder_rare_classes_count_more():
    args, runtime = train.get_args_parser().parse_args(["--num_classes", "3"]), Runtime.start("cpu", "off")
    often, seldom, never = train.build_class_weights(np.array([900, 100, 0]), args, runtime).tolist()
    assert seldom / often == pytest.approx(9 ** -train.CLASS_WEIGHT_POWER) and math.isfinite(never)
    assert 0.9 * often + 0.1 * seldom == pytest.approx(1)  # the mean over the pixels


@pytest.mark.parametrize("flags", [[], ["--finetune_encoder"]])
def test_class_weights_and_augmentation_shape_the_step_but_not_the_reported_loss(flags):
    args, runtime = train.get_args_parser().parse_args(flags), Runtime.start("cpu", "off")
    class_weights = train.build_class_weights(np.arange(1, 21), args, runtime)
    if args.finetune_encoder:
        assert class_weights.tolist() == [train.FINETUNE_BACKGROUND_WEIGHT] + [1] * 19
    batch = torch.randint(20, (2, 8, 8, 4), dtype=torch.uint8)
    network, totals = torch.nn.Conv2d(3, 20, 1), metrics.SegmentationMetrics(20)
    before = copy.deepcopy(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    generator, again = (torch.Generator().manual_seed(3) if args.finetune_encoder else None for _ in range(2))
    train.train_one_epoch(network, [batch], optimizer, scheduler, torch.amp.GradScaler(enabled=False), class_weights, generator, totals,
                          tqdm(disable=True), runtime)

    images, labels = dataset.split_batch(batch)
    images = dataset.normalize(images)
    if args.finetune_encoder:
        images, labels = dataset.augment(images, labels, again)
    labels = labels.long()
    losses = F.cross_entropy(before(images), labels, reduction="none")
    assert totals.compute()["loss"] == pytest.approx(losses.mean().item())
    F.cross_entropy(before(images), labels, class_weights, reduction="sum").div(labels.numel()).backward()
    for old, new in zip(before.parameters(), network.parameters()):
        torch.testing.assert_close(new, old - old.grad)


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
    moments, output, kills, longest = random.Random(0), tmp_path / "run", 0, 4.0  # seconds
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


def train_in_the_foreground(argv):
    """Ctrl-C reaches it even if the tests themselves run as a shell's background job, which ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    train.main(argv)


@pytest.mark.parametrize("signal_number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on(scenes, tmp_path, signal_number, status):
    log, output = tmp_path / "log", tmp_path / "run"
    process = start(train_in_the_foreground, arguments(scenes, output, "--num_epochs", 500), log)
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


def test_a_run_stopped_between_its_last_epoch_and_its_report_still_gets_the_report(scenes, run_dir, tmp_path):
    output = Path(shutil.copytree(run_dir, tmp_path / "run"))
    for name in ("per_class.csv", "predictions.png"):
        (output / name).unlink()
    train.main(["--resume", str(output / "last.pth")])
    assert same_weights(output / "last.pth", run_dir / "last.pth")
    assert (output / "per_class.csv").read_text() == (run_dir / "per_class.csv").read_text() and (output / "predictions.png").exists()


def test_resuming_from_a_bare_state_dict_starts_a_new_run_from_its_weights(run_dir, scenes, tmp_path, capsys):
    torch.save({f"module.{key}": value for key, value in weights(run_dir / "best.pth").items()}, tmp_path / "bare.pth")
    train.main(["--resume", str(tmp_path / "bare.pth"), *arguments(scenes, tmp_path / "run", "--num_epochs", 1)])
    assert "holds weights alone" in capsys.readouterr().out
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["epoch"] == 1


# --- Many processes -----------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def start_ranks(main, argv, n_ranks, folder):
    """The processes that torchrun would start, and their logs."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks)}
    logs = [folder / f"rank{rank}of{n_ranks}" for rank in range(n_ranks)]
    return [start(main, argv, log, RANK=str(rank), LOCAL_RANK=str(rank), **address) for rank, log in enumerate(logs)], logs


def test_any_number_of_ranks_scores_a_split_alike(scenes, run_dir, tmp_path):
    """7 composites over 1, 2 and 3 ranks: the same table, digit for digit, printed by rank 0 alone."""
    tables = []
    for n_ranks in (1, 2, 3):
        argv = ["--evaluate", run_dir / "best.pth", "--data_dir", scenes, "--device", "cpu"]
        processes, logs = start_ranks(train.main, argv, n_ranks, tmp_path)
        for process, log in zip(processes, logs):
            process.join(180)
            assert process.exitcode == 0, log.read_text()
        tables.append(logs[0].read_text().split("class  ")[1])
        assert all("dice" not in log.read_text() for log in logs[1:])
    assert tables[0] == tables[1] == tables[2] and "bicycle" in tables[0]


def take_one_step(argv):
    """One SGD step on this rank's share of four images, batch-norm statistics frozen; rank 0 saves the gradients.

    In float64, because a random encoder's last stage makes a thousandth out of the rounding errors of float32.
    """
    import model as models
    from utils import Runtime
    runtime = Runtime.start("cpu", "off")
    torch.set_num_threads(1)  # on some CPUs the last bits of a convolution depend on it, and with them the random encoder's calibration
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 64, 64).double(), torch.randint(20, (4, 64, 64))
    network = models.EfficientSegNet(20, "none").double().eval()
    wrapped = torch.nn.parallel.DistributedDataParallel(network) if runtime.world_size > 1 else network
    share = slice(runtime.rank, None, runtime.world_size)
    metrics.cross_entropy(wrapped(images[share]), labels[share]).backward()
    if runtime.rank == 0:
        torch.save({name: p.grad for name, p in network.named_parameters() if p.requires_grad}, argv[0])
    runtime.close()


def test_two_ranks_with_batch_two_take_the_step_of_one_with_batch_four(tmp_path):
    gradients = []
    for n_ranks in (1, 2):
        processes, logs = start_ranks(take_one_step, [tmp_path / f"{n_ranks}.pth"], n_ranks, tmp_path)
        for process, log in zip(processes, logs):
            process.join(120)
            assert process.exitcode == 0, log.read_text()
        gradients.append(torch.load(tmp_path / f"{n_ranks}.pth", weights_only=True))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-6)


def torchrun(*argv):
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", "train.py", *argv]


def test_torchrun_trains_and_one_process_resumes(scenes, tmp_path):
    output = tmp_path / "run"
    command = torchrun(*arguments(scenes, output, "--num_epochs", 1, "--batch_size", 2))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2 x 2 = 4 images a step" in done.stdout and done.stdout.count("Device ") == 1
    assert not any(key.startswith("module.") for key in weights(output / "last.pth"))
    train.main(["--resume", str(output / "last.pth"), "--num_epochs", "2"])
    assert torch.load(output / "last.pth", weights_only=True)["epoch"] == 2


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the rank's process in /proc, which Linux alone has")
def test_a_rank_that_dies_takes_the_job_down_and_the_run_resumes(scenes, tmp_path):
    output, log = tmp_path / "run", tmp_path / "log"
    with open(log, "w") as file:
        job = subprocess.Popen(torchrun(*arguments(scenes, output, "--num_epochs", 300, "--batch_size", 2)), cwd=ROOT, stdout=file,
                               stderr=subprocess.STDOUT)
    while not (output / "last.pth").exists():
        time.sleep(0.1)
        assert job.poll() is None, log.read_text()
    children = [child for task in Path(f"/proc/{job.pid}/task").iterdir() for child in (task / "children").read_text().split()]
    ranks = [int(child) for child in children if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert job.wait(120) != 0 and "SIGKILL" in log.read_text()
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    epoch = torch.load(output / "last.pth", weights_only=True)["epoch"]
    train.main(["--resume", str(output / "last.pth"), "--num_epochs", str(epoch + 1)])
    assert torch.load(output / "last.pth", weights_only=True)["epoch"] == epoch + 1


# --- Mistakes -----------------------------------------------------------------------------------------------------------


def test_mistakes_end_in_one_line_before_any_training(scenes, own_scenes, run_dir, tmp_path, fails):
    (tmp_path / "file").write_text("")
    (tmp_path / "no_val" / "train").mkdir(parents=True)
    shutil.copy(scenes / "train" / "1.jpg", tmp_path / "no_val" / "train")
    (own_scenes / "val" / "4.jpg").write_bytes(b"damaged")
    torch.save({"features.0.0.weight": torch.zeros(1)}, tmp_path / "other_net.pth")
    torch.save({"out.weight": torch.zeros(20, 24, 1, 1)}, tmp_path / "other_architecture.pth")
    checkpoint = torch.load(run_dir / "last.pth", weights_only=True)
    torch.save(checkpoint | {"optimizer": {"state": {}, "param_groups": []}}, tmp_path / "other_optimizer.pth")
    whole = (run_dir / "last.pth").read_bytes()
    (tmp_path / "truncated.pth").write_bytes(whole[:100_000])
    (tmp_path / "newer.pth").write_bytes(newer_torch(run_dir / "last.pth", tmp_path / "copy.pth"))
    output = tmp_path / "run"
    good = ["--data_dir", scenes, "--output_dir", output, *SMALL]
    rows = [
        (["--data_dir", tmp_path / "nowhere", "--output_dir", output], 1, ["nowhere", "is missing", "--demo", "pix2pix"]),
        (["--data_dir", tmp_path / "no_val", "--output_dir", output], 1, ["no_val/val", "is missing"]),
        (["--data_dir", own_scenes, "--output_dir", output, *SMALL], 1, ["val/4.jpg", "replace or remove it"]),
        ([*good, "--num_classes", "19"], 1, ["1.jpg", "class id 19 (bicycle)", "--num_classes 20"]),
        ([*good, "--num_classes", "21"], 1, ["--num_classes 21", "0..19"]),
        ([*good, "--num_classes", "0"], 2, ["--num_classes", "1 or more"]),
        ([*good, "--batch_size", "0"], 2, ["--batch_size", "1 or more"]),
        ([*good, "--learning_rate", "-0.1"], 2, ["--learning_rate", "above 0"]),
        ([*good, "--image_size", "0"], 1, ["--image_size 0", "positive multiple of 32"]),
        ([*good, "--image_size", "100"], 1, ["--image_size 100", "positive multiple of 32"]),
        ([*good, "--device", "cuda:77"], 1, ["--device cuda:77"]),
        ([*good, "--device", "toaster"], 1, ["--device toaster", "expected auto, cpu"]),
        ([*good, "--encoder_weights", tmp_path / "other_net.pth"], 1, ["other_net.pth", "efficientnet_b0"]),
        ([*good, "--encoder_weights", tmp_path / "absent.pth"], 1, ["absent.pth", "check the path"]),
        (["--data_dir", scenes, "--output_dir", run_dir, *SMALL], 1, ["holds a run already", "--resume"]),
        (["--data_dir", scenes, "--output_dir", tmp_path / "file" / "run", *SMALL], 1, ["cannot be made"]),
        (["--resume", tmp_path / "absent.pth"], 1, ["absent.pth", "check the path"]),
        (["--resume", tmp_path], 1, ["cannot be read"]),
        (["--resume", tmp_path / "truncated.pth"], 1, ["truncated.pth", "undamaged"]),
        (["--resume", tmp_path / "newer.pth"], 1, ["newer.pth", "update torch"]),
        (["--resume", tmp_path / "other_architecture.pth", "--data_dir", scenes, "--output_dir", tmp_path / "r"], 1, ["missing"]),
        (["--resume", tmp_path / "other_optimizer.pth"], 1, ["other_optimizer.pth", "does not fit"]),
        (["--resume", run_dir / "last.pth"], 1, ["finished its 2 epochs", "--num_epochs 12"]),
        (["--resume", run_dir / "last.pth", "--num_classes", "7"], 1, ["--num_classes 7", "20 classes"]),
        (["--evaluate", tmp_path / "file"], 1, [tmp_path / "file"]),
        ([*good, "--num_epoch", "3"], 2, ["did you mean --num_epochs?"]),
        ([*good, "--sync_batch_norm"], 1, ["--sync_batch_norm", "CUDA GPUs alone"]),
    ]
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    for argv, status, words in rows:
        fails(train.main, argv, *words, status=status)
        assert not (output / "history.csv").exists()
    assert before == {path: path.read_bytes() for path in run_dir.iterdir()}


def newer_torch(checkpoint, copy):
    """A checkpoint whose archive says that a torch of the far future wrote it."""
    import zipfile
    with zipfile.ZipFile(checkpoint) as old, zipfile.ZipFile(copy, "w") as new:
        for entry in old.infolist():
            new.writestr(entry, b"99\n" if entry.filename.endswith("/version") else old.read(entry))
    return copy.read_bytes()


def test_a_loss_that_is_no_number_stops_at_its_step_and_keeps_the_last_checkpoint(scenes, run_dir, tmp_path, fails, monkeypatch):
    output = Path(shutil.copytree(run_dir, tmp_path / "run"))
    real, calls = metrics.cross_entropy, []

    def diverge(*args, **options):
        calls.append(1)
        return real(*args, **options) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(metrics, "cross_entropy", diverge)
    fails(train.main, ["--resume", output / "last.pth", "--num_epochs", "3"], "became nan at step 2", "--learning_rate", "--amp off")
    assert torch.load(output / "last.pth", weights_only=True)["epoch"] == 2


def test_running_out_of_device_memory_names_a_batch_that_may_fit(scenes, tmp_path, fails, monkeypatch):
    def refuse(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(metrics, "cross_entropy", refuse)
    fails(train.main, arguments(scenes, tmp_path / "run", "--batch_size", 6), "ran out of memory", "--batch_size 6", "try --batch_size 3")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write and read everywhere")
def test_folders_and_files_without_permission_are_named(own_scenes, tmp_path, fails):
    (tmp_path / "locked").mkdir(mode=0o500)
    fails(train.main, arguments(own_scenes, tmp_path / "locked" / "run"), "locked", "choose a folder you can write to")
    (own_scenes / "train" / "2.jpg").chmod(0)
    fails(train.main, arguments(own_scenes, tmp_path / "run"), "2.jpg", "Permission denied")


def test_nothing_is_unpickled_without_weights_only():
    for path in ROOT.glob("*.py"):
        source = path.read_text()
        assert source.count("torch.load(") == source.count("weights_only=True"), path
        assert "weights_only=False" not in source and "pickle.load" not in source, path
        assert "shell=True" not in source and "os.system" not in source, path
