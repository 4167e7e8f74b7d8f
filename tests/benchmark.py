"""Speed and memory of this repository against others, measured in one run: python tests/benchmark.py --help

A row compares two sides that ran by turns: the medians of their figures, the median of their ratios, and the
ratios' spread, highest less lowest in percent of the median. Composites are copies of those in images/demo,
weights are random; neither changes how long a step takes.
"""
import argparse
import contextlib
import copy
import csv
import importlib.util
import io
import itertools
import math
import multiprocessing
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.segmentation import lraspp_mobilenet_v3_large
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # the scripts lie flat in the repository's root

import dataset  # noqa: E402
import metrics  # noqa: E402
import model as models  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402

WHOLE_RUN = {"train": 2975, "val": 250}  # composites
N_EPOCHS = 15  # of a whole run
N_CLASSES = len(dataset.CLASSES)
Timed = Callable[[], tuple[int, float]]  # does some work and tells how many images and seconds it took


@dataclass(frozen=True)
class Settings:
    """What every section is told."""

    few: Path  # a data folder
    many: Path  # one of so many composites that threads have something to read
    device: str
    precisions: dict[str, str]  # the choices of --amp to measure, by dtype
    batch_sizes: tuple[int, ...]
    n_images: int  # in an epoch against the plain loop; half as many elsewhere
    repeats: int

    @property
    def few_repeats(self) -> int:
        """Of what takes long."""
        return self.repeats // 2


def copy_demo(folder: Path, counts: dict[str, int]) -> Path:
    """Make a data folder of so many composites in train/ and val/, copies of those in images/demo."""
    for split, count in counts.items():
        (folder / split).mkdir(parents=True)
        sources = itertools.cycle(dataset.list_composites(train.DEMO_DIR / split)[0])
        for number, source in zip(range(count), sources):
            shutil.copy(source, folder / split / f"{number}.jpg")
    return folder


# --- Measuring ----------------------------------------------------------------------------------------------


def wait() -> None:
    """For the GPU, where this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(work: Callable[[], int]) -> Timed:
    """Work that returns a number of images, to be timed at every call."""
    def call() -> tuple[int, float]:
        wait()
        started = time.perf_counter()
        n_images = work()
        wait()
        return n_images, time.perf_counter() - started

    return call


def by_turns(sides: dict[str, Timed], repeats: int) -> dict[str, list[float]]:
    """Images a second of each side, called by turns so that a slow minute of the machine meets them all."""
    rates = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            n_images, seconds = side()
            if turn:  # the first warms up
                rates[name].append(n_images / seconds)
    return rates


def print_title(title: str, base: str, this: str = "this") -> None:
    print(f"\n{title:<58}{base:>14}{this:>10}{'ratio':>8}{'spread':>8}", flush=True)


def print_row(name: str, base: Sequence[float], this: Sequence[float]) -> None:
    ratios = [ours / theirs for ours, theirs in zip(this, base)]
    ratio = statistics.median(ratios)
    spread = f"{(max(ratios) - min(ratios)) / ratio:>8.0%}" if len(ratios) > 1 else ""
    medians = f"{statistics.median(base):>14.1f}{statistics.median(this):>10.1f}"
    print(f"  {name:<56}{medians}{ratio:>8.2f}{spread}", flush=True)


def compare(sides: dict[str, Timed], repeats: int, name: str = "{}, images/s") -> dict[str, list[float]]:
    """A row for every side against the first; what by_turns returns."""
    rates = by_turns(sides, repeats)
    base, *others = rates.values()
    for side, rate in zip(list(sides)[1:], others):
        print_row(name.format(side), base, rate)
    return rates


def peak_memory() -> tuple[float, float]:
    """MiB that this process has held at most, of the host's memory (NaN if not on Linux) and of the GPU's."""
    try:  # getrusage's figure would begin at what the process that started this one had held
        host = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    except OSError:
        host = math.nan
    return host, torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_initialized() else 0.0


WORKS: dict[str, Timed] = {}  # in a process of a Side: what it can be asked to do


def start_process(environment: dict[str, str], threads: int | None) -> None:
    os.environ.update(environment)
    if threads:
        torch.set_num_threads(threads)


def call_work(name: str) -> tuple[int, float]:
    return WORKS[name]()


class Side:
    """Processes that do one side's work, as peak memory, threads and ranks belong to a process.

    Args:
        n_processes: joined as torchrun joins them.
        threads: of each; torch's default if None.
    """

    def __init__(self, n_processes: int = 1, threads: int | None = None) -> None:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = str(server.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(n_processes),
                  "LOCAL_WORLD_SIZE": str(n_processes)}
        self.pools = []
        for rank in map(str, range(n_processes)):
            environment = shared | {"RANK": rank, "LOCAL_RANK": rank} if n_processes > 1 else {}
            self.pools.append(ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start_process,
                                                  (environment, threads)))
            self.pools[-1].submit(wait)  # so that it imports torch while the others do

    def call(self, function: Callable, *args) -> list:
        """What a function returns in each process; all call it at once."""
        futures = [pool.submit(function, *args) for pool in self.pools]
        return [future.result() for future in futures]

    def work(self, name: str) -> Timed:
        """One of WORKS, done by all processes together."""
        def call() -> tuple[int, float]:
            n_images, seconds = zip(*self.call(call_work, name))
            return sum(n_images), max(seconds)

        return call

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_) -> None:
        for pool in self.pools:
            pool.shutdown()


# --- This repository ----------------------------------------------------------------------------------------


class Setup:
    """What train.py has before its first epoch, built by its own functions from its own flags."""

    def __init__(self, folder: Path, device: str, *flags: str) -> None:
        argv = ["--data_dir", str(folder), "--device", device, "--encoder_weights", "none", *flags]
        self.args, _ = train.parse_args(argv)
        self.runtime = utils.Runtime.start(self.args.device, self.args.amp)
        with contextlib.redirect_stdout(io.StringIO()):
            self.network = train.build_network(self.args, None, self.runtime)
        self.read()

    def read(self) -> int:
        """Both splits, encoded unless the encoder is fine-tuned; how many composites they have."""
        self.splits = {}  # first gives up what it has
        for name in ("train", "val"):
            paths = dataset.list_composites(self.args.data_dir / name)[0]
            self.splits[name] = dataset.Split(paths[self.runtime.rank :: self.runtime.world_size],
                                              self.args.image_size, N_CLASSES, name == "train",
                                              self.args.num_workers)
        with contextlib.redirect_stdout(io.StringIO()):
            train.keep_inputs(self.trainer(), self.splits, no_cache=False)
        assert self.splits["train"].inputs, "there is not enough memory to keep what is read"
        return sum(map(len, self.splits.values()))

    def scores(self) -> metrics.SegmentationMetrics:
        return metrics.SegmentationMetrics(N_CLASSES, self.runtime.device)

    def trainer(self) -> train.Trainer:
        """A new one for the same network, as one takes batches of one size."""
        return train.Trainer(self.network, self.scores(), self.args.learning_rate, 10**6, self.runtime)

    def batches(self, batch_size: int, n_images: int) -> Iterator[tuple]:
        """Of an epoch of so many images."""
        generator = train.make_generator(0, 1, self.runtime.rank)
        order = train.draw_batches(len(self.splits["train"]), batch_size, n_images // batch_size, generator)
        return self.splits["train"].batches(order, self.runtime.device)

    def epoch(self, trainer: train.Trainer, batch_size: int, n_images: int) -> Timed:
        """Of at least one step."""
        n_images = max(n_images // batch_size, 1) * batch_size
        assert n_images <= len(self.splits["train"])

        def work() -> int:
            bar = tqdm(disable=True)
            train.train_one_epoch(trainer, self.batches(batch_size, n_images), bar)
            return n_images

        return timed(work)

    def bare_steps(self, batch_size: int, n_images: int) -> Timed:
        """Decode, loss and optimizer of an epoch, on one fixed batch and without its figures."""
        trainer, n_steps = self.trainer(), n_images // batch_size
        trainer.scores = SimpleNamespace(update=lambda *_: None, ignore_background=False)
        inputs, labels = next(self.batches(batch_size, batch_size))

        def work() -> int:
            self.network.train()
            for _ in range(n_steps):
                trainer.step(inputs, labels)
            return n_steps * batch_size

        return timed(work)

    @cached_property
    def folded(self) -> nn.Module:
        """Made by the first validation, unmeasured: beside few composites it would seem to take long."""
        return models.fold_batch_norms(copy.deepcopy(self.network))

    def validate(self) -> int:
        train.evaluate(self.folded, self.splits["val"], self.scores(), self.runtime).compute()
        return len(self.splits["val"])


def prepare_this(settings: Settings, device: str, amp: str) -> tuple[int, float]:
    """Fill WORKS with what train.py does.

    Returns:
        this process's number of composites, and the MiB that their features and labels take.
    """
    setup = Setup(settings.many, device, "--amp", amp)
    WORKS.update({"validation": timed(setup.validate), "reading and encoding": timed(setup.read)})
    n_images = settings.n_images // setup.runtime.world_size
    for size in settings.batch_sizes:
        WORKS[f"training, batch {size}"] = setup.epoch(setup.trainer(), size, n_images)
        WORKS[f"bare steps, batch {size}"] = setup.bare_steps(size, n_images)
    splits = setup.splits.values()
    n_bytes = sum(one.nbytes for split in splits for one in (*split.inputs, *split.labels))
    return sum(map(len, splits)), n_bytes / 2**20


# --- The plain loop -----------------------------------------------------------------------------------------


class PlainDataset(Dataset):
    """Opens a composite and decodes its label, by a table of the nearest colours, at every access."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        ids, colors = zip(*((index, color) for index, entry in enumerate(dataset.CLASSES)
                            for color in (entry.color, *entry.further.values())))
        levels = np.arange(0, 256, 8) + 4
        rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 1, 3)
        self.table = np.array(ids)[((rgb - np.array(colors)) ** 2).sum(axis=2).argmin(axis=1)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """image float32 (3, 256, 256), ImageNet-normalised, and label int64 (256, 256)."""
        composite = np.asarray(Image.open(self.paths[index]).convert("RGB"))
        r, g, b = (composite[:, 256:] >> 3).astype(int).transpose(2, 0, 1)
        image = torch.from_numpy(composite[:, :256].copy()).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (dataset.MEAN, dataset.STD))
        return (image - mean) / std, torch.from_numpy(self.table[(r * 32 + g) * 32 + b]).long()


def prepare_plain(settings: Settings) -> None:
    """Fill WORKS with what training scripts for this network commonly do, by the defaults of torch.

    float32, contiguous tensors, composites opened and decoded in every epoch, the encoder inside autograd.
    The network is computed as it is drawn, each layer by itself.
    """
    device = utils.select_device(settings.device)
    network = models.EfficientSegNet(N_CLASSES, "none", finetune_encoder=True).to(device)
    decoder = network.decoder1
    decoder.forward = lambda x: decoder.conv_block(decoder.upsampler(x))  # in two steps, as it is drawn
    paths = dataset.list_composites(settings.many / "train")[0][: settings.n_images]
    for size in settings.batch_sizes:
        optimizer = torch.optim.AdamW(network.decoder_parameters(), lr=1e-3)
        loader = DataLoader(PlainDataset(paths), size, shuffle=True, drop_last=True)
        WORKS[f"training, batch {size}"] = timed(partial(plain_epoch, network, loader, device, optimizer))
    loader = DataLoader(PlainDataset(dataset.list_composites(settings.many / "val")[0]), 4)
    WORKS["validation"] = timed(partial(plain_epoch, network, loader, device))


def plain_epoch(network: nn.Module, loader: DataLoader, device: torch.device,
                optimizer: torch.optim.Optimizer | None = None) -> int:
    """Training, or validation without an optimizer."""
    network.train(optimizer is not None)
    for stage in network.encoder_stages():
        stage.eval()  # frozen, though inside autograd
    total_loss = correct = n_images = 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        with torch.set_grad_enabled(optimizer is not None):
            logits = network(images)
            loss = F.cross_entropy(logits, labels)
        if optimizer:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        total_loss += loss.item()
        correct += (logits.argmax(1) == labels).sum().item()
        n_images += len(labels)
    return n_images


# --- Sections -----------------------------------------------------------------------------------------------


def compare_loop(settings: Settings) -> None:
    """Training, validation, memory and a whole run against the plain loop."""
    with contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(Side()) for name in ("plain loop", *settings.precisions)}
        sides["plain loop"].call(prepare_plain, settings)
        kept = {name: sides[name].call(prepare_this, settings, settings.device, amp)[0]
                for name, amp in settings.precisions.items()}

        def compare_all(work: str) -> dict[str, list[float]]:
            works = {name: side.work(work) for name, side in sides.items()}
            return compare(works, settings.repeats, f"{work}, {{}}, images/s")

        print_title("256x256", "plain loop")
        # Training goes first and settles the batch-norm statistics: before that logits are extreme, and
        # exponentials that underflow take ten times as long.
        training, validation = compare_all("training, batch 4"), compare_all("validation")
        report_memory(sides, kept)
        start = {name: sides[name].work("reading and encoding") for name in kept}
        for name, rates in by_turns(start, settings.few_repeats).items():
            base = whole_run(training["plain loop"], validation["plain loop"], [math.inf])
            print_row(f"whole run (computed), {name}, images/s", base,
                      whole_run(training[name], validation[name], rates))
            print(f"    its composites are read and encoded at {statistics.median(rates):.1f} a second")
        for size in settings.batch_sizes[1:]:
            compare_all(f"training, batch {size}")

        print_title("Epochs of training against their decode, loss and optimizer", "those alone", "epoch")
        for name, size in itertools.product(kept, settings.batch_sizes):
            works = {work: sides[name].work(work)
                     for work in (f"bare steps, batch {size}", f"training, batch {size}")}
            compare(works, settings.repeats, f"{{}}, {name}, images/s")


def report_memory(sides: dict[str, Side], kept: dict[str, tuple[int, float]]) -> None:
    """Peaks so far, and what grows with the data."""
    peaks = {name: side.call(peak_memory)[0] for name, side in sides.items()}
    for (place, what), name in itertools.product(enumerate(("process", "GPU")), kept):
        if plain := peaks["plain loop"][place]:
            print_row(f"peak memory of the {what}, {name}, MiB", [plain], [peaks[name][place]])
    for name, (n_images, mebibytes) in kept.items():
        total = sum(WHOLE_RUN.values())
        print(f"    in it features and labels of {n_images} composites, {name}: {mebibytes:.0f} MiB; "
              f"of {total:,}: {mebibytes / n_images * total:,.0f} MiB")


def whole_run(training: list[float], validation: list[float], start: list[float]) -> list[float]:
    """Images a second over N_EPOCHS of WHOLE_RUN in each turn, from those of its parts."""
    n_images = sum(WHOLE_RUN.values())
    once = n_images / statistics.median(start)
    seconds = [once + N_EPOCHS * (WHOLE_RUN["train"] / one + WHOLE_RUN["val"] / other)
               for one, other in zip(training, validation)]
    return [N_EPOCHS * n_images / one for one in seconds]


def compare_growth(settings: Settings) -> None:
    """Training at other sizes of image and of batch."""
    epochs = {}
    for side, batch_sizes in ((256, (4, 1, 16)), (128, (4,)), (512, (4,))):
        setup = Setup(settings.few, settings.device, "--image_size", str(side))
        for size in batch_sizes:
            epoch = setup.epoch(setup.trainer(), size, settings.n_images // 2)
            epochs[f"{side}x{side}, batch {size}"] = epoch
    print_title("Training as images and batches grow", "256, batch 4")
    compare(epochs, settings.repeats)


def compare_processes(settings: Settings) -> None:
    """Two processes of one thread against one, on the CPU."""
    with Side(1, threads=1) as one, Side(2, threads=1) as two:
        sides = {"one": one, "two": two}
        kept = [[sum(mebibytes for _, mebibytes in side.call(prepare_this, settings, "cpu", "auto"))]
                for side in sides.values()]
        print_title("Processes of one thread each, on the CPU", *sides)
        for work, repeats in (("training, batch 4", settings.repeats), ("validation", settings.repeats),
                              ("reading and encoding", settings.few_repeats)):
            works = {name: side.work(work) for name, side in sides.items()}
            compare(works, repeats, f"{work}, images/s")
        peaks = [[sum(host for host, _ in side.call(peak_memory))] for side in sides.values()]
        print_row("features and labels kept, all together, MiB", *kept)
        print_row("peak memory, all together, MiB", *peaks)


def compare_peers(settings: Settings) -> None:
    """Training against other networks with a frozen encoder."""
    images = Setup(settings.few, settings.device, "--finetune_encoder")  # which keeps images
    setup = Setup(settings.few, settings.device)
    print_title("Other networks, frozen encoder, same precision, channels_last", "theirs")
    for size in settings.batch_sizes:
        n_images = settings.n_images // 2
        sides = {"this": setup.epoch(setup.trainer(), size, n_images)}
        for name, network, encoder in build_peers():
            batches = partial(images.batches, size, n_images)
            sides[name] = timed(peer_epoch(network, encoder, batches, images.runtime))
        rates = by_turns(sides, settings.repeats)
        for name in list(rates)[1:]:
            print_row(f"{name}, batch {size}, images/s", rates[name], rates["this"])
    print("    They encode in every step, from images in memory. LR-ASPP is cut at 1/8 of the size.")
    if len(sides) == 2:
        print("    segmentation_models_pytorch is not installed; its Unet and FPN are left out.")


def build_peers() -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Names, networks and their encoders."""
    network = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=N_CLASSES)
    yield "torchvision LR-ASPP", network, network.backbone
    if importlib.util.find_spec("segmentation_models_pytorch"):
        import segmentation_models_pytorch as smp

        encoders = ("timm-efficientnet-b0", "efficientnet-b0")
        for kind, encoder in itertools.product((smp.Unet, smp.FPN), encoders):
            network = kind(encoder, encoder_weights=None, classes=N_CLASSES)
            yield f"smp {kind.__name__} {encoder}", network, network.encoder


def peer_epoch(network: nn.Module, encoder: nn.Module, batches: Callable[[], Iterator[tuple]],
               runtime: utils.Runtime) -> Callable[[], int]:
    """Another network in a step like Trainer's, with this repository's loss, precision and memory format."""
    network.to(runtime.device, memory_format=torch.channels_last)
    encoder.requires_grad_(False)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def work() -> int:
        network.train()
        encoder.eval()
        n_images = 0
        for (images,), labels in batches():
            with runtime.autocast():
                logits = network(dataset.normalize(images))
            logits = logits["out"] if isinstance(logits, dict) else logits  # torchvision's or smp's
            loss, _, _ = metrics.segmentation_loss(logits, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            n_images += len(labels)
        return n_images

    return work


def compare_finetuning(settings: Settings) -> None:
    """What DepthwiseConv2d of model.py gives, on a CPU with bf16."""
    plain, ours = (Setup(settings.few, settings.device, "--finetune_encoder") for _ in range(2))
    if plain.runtime.device.type != "cpu" or not plain.runtime.amp_dtype:
        print("\nFine-tuning: DepthwiseConv2d is an nn.Conv2d here")
        return
    for module in plain.network.modules():
        if isinstance(module, models.DepthwiseConv2d):
            module.__class__ = nn.Conv2d
    print_title("Fine-tuning", "nn.Conv2d")
    epochs = {name: setup.epoch(setup.trainer(), 4, settings.n_images // 2)
              for name, setup in (("nn.Conv2d", plain), ("DepthwiseConv2d", ours))}
    compare(epochs, settings.repeats, "training, batch 4, {}, images/s")


SECTIONS = {"loop": compare_loop, "growth": compare_growth, "processes": compare_processes,
            "peers": compare_peers, "finetuning": compare_finetuning}
QUICK_SECTIONS = 4  # the last takes too long for --quick


# --- Whole runs ---------------------------------------------------------------------------------------------


def run_train() -> None:
    """In a process of `time_run`: train.py, and the process's peaks after that."""
    train.main(sys.argv[1:])
    print("peaks", *peak_memory())


def time_run(flags: Sequence[str], output_dir: Path) -> None:
    """Print a row for `train.py` with some flags; when it prints its lines tells how long its parts took."""
    program = [sys.executable, "-c", "import benchmark; benchmark.run_train()", *flags]
    started, marks, lines = time.perf_counter(), {}, []
    with subprocess.Popen([*program, "--output_dir", str(output_dir)], cwd=Path(__file__).parent, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            lines.append(line)
            marks.setdefault(line.split(" ")[0], time.perf_counter() - started)
    if process.returncode:
        sys.exit("".join(lines))
    with open(output_dir / "history.csv", newline="") as file:
        history = list(csv.DictReader(file))
    epochs = sum(float(row["seconds"]) for row in history)
    start, read, end = (marks[word] for word in ("Memory", "Training", "peaks"))
    seconds = (start, read - start, epochs, end - read - epochs, end)
    rate = statistics.median(float(row["images_per_second"]) for row in history)
    host, gpu = map(float, lines[-1].split()[1:])
    print("".join(f"{one:>8.1f}" for one in seconds) + f"{rate:>10.1f}{host:>8.0f}{gpu:>8.0f}", flush=True)
    print("".join(f"  {line}" for line in lines if line.startswith(("CUDA", "warning"))), end="")


def time_whole_runs(folder: Path, n_composites: int, device: str) -> None:
    """A table of `train.py` with the flags that change its speed."""
    counts = {"train": n_composites, "val": math.ceil(WHOLE_RUN["val"] * n_composites / WHOLE_RUN["train"])}
    print(f"\ntrain.py, {N_EPOCHS} epochs of {n_composites:,} composites and {counts['val']} for validation: "
          "seconds, images/s in training, peak MiB")
    columns = ("start", "read", "epochs", "rest", "total")
    print(f"{'':<34}" + "".join(f"{one:>8}" for one in columns) + f"{'images/s':>10}{'process':>8}{'GPU':>8}")
    shared = ["--num_epochs", str(N_EPOCHS), "--encoder_weights", "none", "--device", device,
              "--data_dir", str(copy_demo(folder / "data", counts))]
    for choice in ("--batch_size 4", "--batch_size 16", "--batch_size 4 --no_cache",
                   "--batch_size 4 --finetune_encoder"):
        print(f"{choice:<34}", end="", flush=True)
        time_run([*shared, *choice.split()], folder / choice)
    print("read: and encode; rest: writing after each epoch, the report after the last")


def profile_step(folder: Path, device: str) -> None:
    """Where the time of training goes."""
    setup = Setup(copy_demo(folder / "few", {"train": 32, "val": 4}), device)
    epoch = setup.epoch(setup.trainer(), 4, 32)
    epoch()
    with torch.profiler.profile() as profiler:
        epoch()
    print("\n8 steps of batch 4, with what an epoch has beside them")
    kind = "cpu" if setup.runtime.device.type == "cpu" else "device"
    events = profiler.key_averages()
    print(events.table(sort_by=f"self_{kind}_time_total", row_limit=15, max_name_column_width=50))


# --- Command line -------------------------------------------------------------------------------------------


def machine() -> str:
    """The processor's name, as far as the system tells."""
    with contextlib.suppress(OSError, TypeError):
        return re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1]
    return platform.processor() or platform.machine()


def get_args_parser() -> utils.ArgumentParser:
    parser = utils.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION",
                        help=f"{', '.join(SECTIONS)}; all if left out")
    parser.add_argument("--quick", action="store_true",
                        help="less of all, and not the last section unless named: within a minute")
    parser.add_argument("--whole_runs", type=utils.number(int, 1), nargs="?", const=WHOLE_RUN["train"],
                        metavar="N", help="time train.py instead, with and without --no_cache and "
                                          "--finetune_encoder, on N composites, %(const)s if left out, and "
                                          "profile an epoch")
    parser.add_argument("--device", default="auto", help="as for train.py")
    return parser


def make_settings(folder: Path, runtime: utils.Runtime, args: argparse.Namespace) -> Settings:
    """With data folders made in `folder`."""
    scale = 8 if runtime.device.type == "cuda" else 1  # an epoch that ends at once cannot be timed
    n_train, n_val = (16, 8) if args.quick else (256, 64)
    batch_sizes, n_images, repeats = ((4,), 16 * scale, 2) if args.quick else ((4, 16), 64 * scale, 5)
    few = copy_demo(folder / "few", {"train": max(n_images // 2, 16), "val": 4})
    many = copy_demo(folder / "many", {"train": n_train * scale, "val": n_val * scale})
    fast = {str(runtime.amp_dtype).removeprefix("torch."): "auto"} if runtime.amp_dtype else {}
    return Settings(few, many, args.device, {"float32": "off"} | fast, batch_sizes, n_images, repeats)


def main() -> None:
    """The command line."""
    parser = get_args_parser()
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"{min(unknown)}: expected {', '.join(SECTIONS)}")
    runtime = utils.Runtime.start(args.device, "auto")
    print(f"{machine()}, {utils.available_cpus()} cores; {runtime}\nPython {platform.python_version()}, "
          f"torch {torch.__version__}, torchvision {torchvision.__version__}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.whole_runs:
            time_whole_runs(folder, args.whole_runs, args.device)
            profile_step(folder, args.device)
            return
        settings = make_settings(folder, runtime, args)
        print(f"medians of {settings.repeats}, by turns")
        for section in args.sections or list(SECTIONS)[: QUICK_SECTIONS if args.quick else None]:
            SECTIONS[section](settings)


if __name__ == "__main__":
    main()
