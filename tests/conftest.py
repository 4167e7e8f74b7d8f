"""What several test files share: synthetic scenes on disk, a trained run, real processes that start fast."""
import contextlib
import csv
import gc
import io
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

# Two threads that wait for each other on tensors as small as the tests' take twice the time of one.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torchvision.models import efficientnet_b0  # noqa: E402
from torchvision.models.efficientnet import EfficientNet, MBConvConfig  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the scripts lie flat in the repository's root
# Python 3.11's fork server finds what it is to import ahead in no other way.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

import metrics  # noqa: E402
import model as models  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402
from draw_demo import write_scenes  # noqa: E402

# A fork server that has imported torch once starts a process in milliseconds, an interpreter in seconds.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["train", "predict", "pytest"])
HEIGHT = 128  # of composites: less to read and to score than 256
SMALL = ["--encoder_weights", "none", "--image_size", "64", "--device", "cpu"]  # an epoch takes a second
# (expansion, kernel, stride, in, out, repeats) of features[1..7], table 1 of the EfficientNet paper
B0_STAGES = [(1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3),
             (6, 5, 1, 80, 112, 3), (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1)]


def shallow_efficientnet(weights=None, **options):
    """efficientnet_b0 without repeats and expansions: built, saved and loaded in a third of the time."""
    if weights:
        return efficientnet_b0(weights=weights, **options)  # there to be downloaded
    stages = [MBConvConfig(1, *shape, num_layers=1) for _, *shape, _ in B0_STAGES]
    return EfficientNet(stages, dropout=0.2, last_channel=1280, **options)


@contextlib.contextmanager
def backbone(build):
    """Networks that are made meanwhile take their encoder from build()."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "efficientnet_b0", build)
        yield


@contextlib.contextmanager
def hurry():
    """Take depth, pictures and waiting for the disk out of runs that are not tested for them."""
    with backbone(shallow_efficientnet), pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "write_picture", lambda path, draw: utils.write_file(path, b"picture"))
        patch.setattr(os, "fsync", lambda descriptor: None)  # no test cuts the power
        yield


def run_in_process(main, argv, log, environment):
    """Body of a child process: the command line with its output in a file."""
    os.environ.update(environment)
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(fd, "wb", 0), write_through=True) for fd in (1, 2))
    with hurry():
        main([str(argument) for argument in argv])


def start(main, argv, log, **environment):
    """Start main(argv) as a real process; its output goes to `log`."""
    process = FORKSERVER.Process(target=run_in_process, args=(main, argv, log, environment), daemon=True)
    process.start()
    return process


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def run_ranks(main, argv, n_ranks, folder, seconds=180):
    """Run the processes that torchrun would start, to their end; their exit statuses and logs."""
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(n_ranks),
                 "LOCAL_WORLD_SIZE": str(n_ranks)}
    logs = [folder / f"rank{rank}of{n_ranks}" for rank in range(n_ranks)]
    processes = [start(main, argv, log, RANK=str(rank), LOCAL_RANK=str(rank), **variables)
                 for rank, log in enumerate(logs)]
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes], [log.read_text() for log in logs]


def rows_of(run):
    """The history of a run's folder."""
    with open(run / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def make_trainer(finetune=False, amp="off", n_steps=10, device="cpu"):
    """For a new network, the same at every call."""
    torch.manual_seed(0)
    runtime = utils.Runtime.start(device, amp)
    network = models.EfficientSegNet(20, "none", finetune_encoder=finetune)
    network.to(runtime.device, memory_format=torch.channels_last)
    scores = metrics.SegmentationMetrics(20, runtime.device)
    return train.Trainer(network.train(), scores, 1e-3, n_steps, runtime)


def plain_loss(logits, labels):
    """metrics.segmentation_loss written down plainly, for autograd."""
    probabilities, labels = logits.softmax(1), labels.long()
    truth = F.one_hot(labels, logits.shape[1]).permute(0, 3, 1, 2)
    dice = [2 * (p * t).sum() / (p.sum() + t.sum())
            for p, t in zip(probabilities.unbind(1), truth.unbind(1)) if t.any()]
    return F.cross_entropy(logits, labels) + 1 - sum(dice) / len(dice)


def pytest_configure():
    multiprocessing.forkserver.ensure_running()  # it imports on another core while the first tests run


def pytest_collection_finish():
    gc.freeze()  # what has been imported, a million objects, is not searched for garbage again and again


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A data folder with 8 training and 7 validation composites of synthetic scenes. Not to be changed."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, {"train": 8, "val": 7}, HEIGHT)
    return folder


@pytest.fixture
def own_scenes(scenes, tmp_path):
    """A copy of `scenes` to damage."""
    return Path(shutil.copytree(scenes, tmp_path / "data"))


@pytest.fixture(scope="session")
def run_dir(scenes, tmp_path_factory):
    """A finished run of two epochs on `scenes`, with a shallow encoder. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with backbone(shallow_efficientnet):
        train.main(["--data_dir", str(scenes), "--output_dir", str(folder), "--num_epochs", "2", *SMALL])
    return folder


@pytest.fixture
def heeding_signals():
    """SIGINT interrupts even in a shell's background job, which ignores it, and SIGTERM kills no tests."""
    previous = {number: signal.signal(number, signal.default_int_handler)
                for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.fixture
def fails(capsys):
    """Check that a command line ends in one clear line on stderr with the given status and words."""
    def check(main, argv, *words, status=1):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in argv])
        error = capsys.readouterr().err
        assert end.value.code == status, error
        lines = [line for line in error.splitlines() if line.strip()]
        assert len(lines) == 1 and "Traceback" not in error, error
        for word in words:
            assert str(word) in error, f"{word!r} is not in {error!r}"

    return check
