"""What both command lines share: arguments, errors, devices, processes, whole files and pictures."""
import argparse
import contextlib
import csv
import io
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm.auto import tqdm

HAS_CUDA = torch.version.cuda is not None or torch.version.hip is not None
NO_CUDA = f"torch {torch.__version__} is built without CUDA; for a GPU see README's Install"
PASCAL_REMEDY = "pip install torch==2.7.1 torchvision==0.22.1"  # the last with kernels for sm_50 to sm_70
RENAME_TRIES = 50  # a tenth of a second apart: on Windows scanners hold files for a moment


class UserError(Exception):
    """Something that the user can put right: one line with the value, what was expected and the remedy."""


# --- Command line -------------------------------------------------------------------------------------------

class ArgumentParser(argparse.ArgumentParser):
    """argparse without abbreviations, of anything that str() makes; an error is one line and status 2."""

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        return super().parse_args(args and [str(word) for word in args], namespace)

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def number(kind: type, lowest: float, highest: float = 10**9, multiple: int = 1) -> Callable[[str], float]:
    """An argparse type: an int or a float from `lowest` to `highest`, and a multiple of a number."""
    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if lowest <= value <= highest and (multiple == 1 or value % multiple == 0):
                return value
        what = f"multiple of {multiple}" if multiple > 1 else "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text}: expected a {what} of {lowest} to {highest}")

    return parse


def file_path(text: str) -> Path:
    """An argparse type: a path, in which ~ is home; an empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; is a variable of the shell not set?")
    return Path(os.path.expanduser(text))


def device_name(text: str) -> str:
    """An argparse type: auto, cpu, cuda, cuda:N or mps."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text}: expected auto, cpu, cuda, cuda:N or mps")
    return text


@contextlib.contextmanager
def one_line_errors(at_stop: str) -> Iterator[None]:
    """Around a main(): what the user can put right, and a signal to stop, end in one line on stderr.

    Status 1, or 128 + the signal's number. The error's __notes__, or `at_stop`, say how to go on.
    """
    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # of a name that the terminal cannot show
    previous = None
    with contextlib.suppress(ValueError):  # in a thread, which no signal reaches
        previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        status, message = 1, describe_error(error)
        if isinstance(error, KeyboardInterrupt):
            number = error.args[0] if error.args else signal.SIGINT
            status, message = 128 + number, f"stopped by {signal.Signals(number).name}"
            error.__notes__ = getattr(error, "__notes__", [at_stop])
        elif not message:
            raise
        rank = f"[rank {os.environ['RANK']}] " if is_torchrun() else ""
        line = "; ".join([message, *getattr(error, "__notes__", [])])
        say(f"{Path(sys.argv[0]).name}: error: {rank}{' '.join(line.split())}", "stderr")
        raise SystemExit(status) from error
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def describe_error(error: BaseException) -> str | None:
    """What a user can put right, or None for a bug, which keeps its traceback."""
    text = str(error)
    if isinstance(error, (UserError, OSError)):
        return text
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory|not enough memory", text):
        return "memory ran out; try a smaller --batch_size or --image_size, --no_cache, or fewer programs"
    if dist.is_initialized() and re.search("closed by peer|reset by peer|Broken pipe", text):  # gloo's
        return "another process of this job ended; its line says why"
    return None


def say(message: str = "", stream_name: str = "stdout") -> None:
    """Print a line at once, above any progress bar; a stream whose reader has gone gets nothing more."""
    stream = getattr(sys, stream_name)  # None where the program was started without one
    try:
        with tqdm.external_write_mode(stream):
            if stream:
                print(message, file=stream, flush=True)
    except (OSError, ValueError):
        setattr(sys, stream_name, None)


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a line of the log."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def counted(number: int, noun: str) -> str:
    """1 epoch, 2 epochs."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


# --- Devices and processes ----------------------------------------------------------------------------------

def is_torchrun() -> bool:
    """Whether torchrun's whole set of variables stands; a scheduler's stray RANK does not count."""
    numbers = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    return "MASTER_ADDR" in os.environ and all(number.isdecimal() for number in numbers)


def local_processes() -> int:
    """How many processes of this job share the machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if is_torchrun() else 1


def available_cpus() -> int:
    """Cores this process may use: its share of those that the processes of torchrun have together."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // local_processes(), 1)


def free_memory(root: Path = Path("/")) -> float:
    """Bytes of host memory that this process may take beside its neighbours; inf where nothing tells."""
    free = math.inf
    with contextlib.suppress(OSError, TypeError):  # not Linux
        meminfo = (root / "proc/meminfo").read_text()
        free = 1024 * int(re.search(r"^MemAvailable: +(\d+)", meminfo, re.MULTILINE)[1])
    for names in (("memory.max", "memory.current", "memory.stat"),  # a container's limit, version 2 and 1
                  ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat")):
        with contextlib.suppress(OSError, TypeError, ValueError):  # not this version, or a limit of "max"
            limit, used, details = ((root / "sys/fs/cgroup" / name).read_text() for name in names)
            file_cache = re.search(r"^inactive_file (\d+)", details, re.MULTILINE)[1]  # given up in need
            free = min(free, int(limit) - int(used) + int(file_cache))
    return free / local_processes()


def select_device(name: str) -> torch.device:
    """The device that --device names; "auto" is the first of cuda, mps and cpu that can be used.

    Each process of torchrun gets a GPU of its own. UserError if there is no such device, or the torch build
    has no kernels for the GPU.
    """
    mps = torch.backends.mps.is_available() and not is_torchrun()  # gloo exchanges no tensors of it
    there = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    kind, _, number = (next(filter(there.get, there)) if name == "auto" else name).partition(":")
    if not there.get(kind):
        reason = NO_CUDA if kind == "cuda" and not HAS_CUDA else "no such GPU is found; install its driver"
        raise UserError(f"--device {name}: {reason}, or pass --device cpu")
    if kind != "cuda":
        return torch.device(kind)
    if number and is_torchrun():
        raise UserError(f"--device {name}: torchrun gives each process a GPU of its own; pass --device cuda")
    index = int(os.environ.get("LOCAL_RANK", 0)) if is_torchrun() else int(number or 0)
    if index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there is {counted(torch.cuda.device_count(), 'GPU')}, numbered "
                        "from 0; pass a lower number or start fewer processes")
    if not torch.version.hip:  # AMD's architectures have other names
        check_gpu_architecture(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index),
                               torch.cuda.get_arch_list())
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def check_gpu_architecture(name: str, capability: tuple[int, int], architectures: Sequence[str]) -> None:
    """UserError if a build for `architectures`, such as ["sm_75", "compute_90"], has no kernels for a GPU."""
    major, minor = capability  # sm_XY runs on X.Z with Z >= Y; PTX for compute_XY on every later one too
    for architecture in architectures:
        kind, _, version = architecture.rstrip("abcdef").rpartition("_")
        built = divmod(int(version), 10)
        if (built[0] == major and built[1] <= minor) or (kind == "compute" and built <= capability):
            return
    remedy = PASCAL_REMEDY if capability < (7, 5) else "pip install --upgrade torch torchvision"
    raise UserError(f"{name} has compute capability {major}.{minor}, and torch {torch.__version__} has no "
                    f"kernels for it (built for {', '.join(architectures)}); run: {remedy}, or pass "
                    "--device cpu")


def select_amp(choice: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The dtype of automatic mixed precision, or None for float32, and the reason as words for the log."""
    if choice != "auto":
        return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[choice], f"--amp {choice}"
    if device.type == "cpu" and cpu_has_bf16():
        return torch.bfloat16, "the CPU has AMX or AVX512-BF16"
    if device.type != "cuda":
        return None, f"this {device.type.upper()} has no native bf16"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return torch.bfloat16, f"compute capability {major}.{minor} has bf16"
    if major == 7 and " GTX 16" not in torch.cuda.get_device_name(device):  # 7.5 without tensor cores
        return torch.float16, f"compute capability {major}.{minor} has fp16 tensor cores and no bf16"
    return None, "fp16 is slower than float32 on this card, or known for NaN"


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bf16 natively; elsewhere torch emulates it, 10 times slower than float32."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""  # not Linux
    return re.search(r"^flags.* (amx_bf16|avx512_bf16)\b", text, re.MULTILINE) is not None


@dataclass(frozen=True)
class Runtime:
    """Where and how a network runs: device, precision, and this process's place among those of torchrun."""

    device: torch.device
    amp_dtype: torch.dtype | None  # None is float32 throughout
    amp_reason: str
    rank: int = 0
    world_size: int = 1

    @classmethod
    def start(cls, device_name: str, amp: str) -> "Runtime":
        """Choose device and precision and, under torchrun, join the others. UserError as in select_device."""
        device, rank, world_size = select_device(device_name), 0, 1
        if is_torchrun():
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if world_size > 1 and not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=60))  # rank 0's download takes a while
        return cls(device, *select_amp(amp, device), rank, world_size)

    def close(self) -> None:
        """Leave the other processes, once all have done their work."""
        if dist.is_initialized():
            dist.barrier()
            if dist.get_backend() == "nccl":  # gloo needs none, and torch 2.7's may hang in it
                dist.destroy_process_group()

    def autocast(self) -> torch.autocast:
        """A context in the runtime's precision; a cache of casts saves nothing and breaks CUDA graphs."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None,
                              cache_enabled=False)

    def log(self, message: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            say(message)

    def progress(self, what: str, total: int, unit: str = "image") -> tqdm:
        """A bar on rank 0's terminal, gone when finished; nothing where stderr is none."""
        shown = self.rank == 0 and sys.stderr and sys.stderr.isatty()
        return tqdm(desc=what, total=total, unit=unit, leave=False, disable=not shown)

    def __str__(self) -> str:
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else f"{torch.get_num_threads()} threads"
        precision = str(self.amp_dtype or torch.float32).removeprefix("torch.")
        hint = f". {NO_CUDA}" if self.device.type == "cpu" and not HAS_CUDA else ""
        return f"{self.device} ({name}), {precision} ({self.amp_reason}){hint}"


# --- Whole files --------------------------------------------------------------------------------------------

def write_file(path: str | Path, content: bytes | memoryview) -> None:
    """Write a file under a temporary name and rename it: it, or what was there, is whole at every moment.

    Folders that are missing are made. OSError if it fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may find the name on the disk without the bytes
        for _ in range(RENAME_TRIES):
            with contextlib.suppress(PermissionError):
                return os.replace(temporary, path)
            time.sleep(0.1)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a write alone names no file
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # still there after an error or Ctrl-C


def write_json(path: str | Path, content: dict) -> None:
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def write_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """A dict of tensors and plain types, for torch.load(weights_only=True)."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_file(path, buffer.getbuffer())


def write_csv(path: str | Path, rows: Sequence[dict]) -> None:
    """Rows of equal keys below a header; floats with 6 digits, NaN empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.6g}".replace("nan", "") if isinstance(value, float) else value
                      for key, value in row.items()} for row in rows)
    write_file(path, text.getvalue().encode())


# --- Pictures -----------------------------------------------------------------------------------------------

def write_picture(path: str | Path, draw: Callable[[Any], None]) -> None:
    """Let `draw` fill a matplotlib Figure, and write it as a PNG; raises whatever matplotlib does."""
    backend = os.environ.pop("MPLBACKEND", None)  # a notebook's, which may be missing here; none is needed
    try:
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    figure, buffer = Figure(layout="constrained"), io.BytesIO()
    draw(figure)
    figure.savefig(buffer, format="png", dpi=120)
    write_file(path, buffer.getbuffer())


def draw_curves(figure: Any, history: Sequence[dict], image_size: int) -> None:
    """Loss and dice over the epochs, in training and validation, from history.csv's rows."""
    figure.set_size_inches(8, 3.6)
    epochs = [row["epoch"] for row in history]
    panels = {"loss": "cross entropy per pixel", "dice": "dice (pixel accuracy)"}
    for axes, (name, ylabel) in zip(figure.subplots(1, 2), panels.items()):
        lines = [axes.plot(epochs, [row[f"{split}_{name}"] for row in history], style)[0]
                 for split, style in (("train", ".--"), ("val", ".-"))]
        axes.set(xlabel="epoch", ylabel=ylabel, title=name.capitalize(),
                 xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.25)
    labels = (f"train, at {image_size}x{image_size}", "validation, at the composites' size")
    figure.legend(lines, labels, loc="outside lower center", ncols=2, frameon=False)  # covers no curve


def draw_predictions(figure: Any, samples: Sequence[tuple], names: Sequence[str],
                     palette: np.ndarray) -> None:
    """Photo uint8 (h, w, 3), truth and prediction uint8 (H, W) of each sample, and a legend of their classes.

    Each class has a name and a row of the palette, uint8 (n_classes, 3).
    """
    from matplotlib.patches import Patch

    present = np.unique(np.concatenate([array.ravel() for sample in samples for array in sample[1:]]))
    figure.set_size_inches(8, 2.75 * len(samples) + 0.3 + 0.25 * math.ceil(len(present) / 6))
    grid = figure.subplots(len(samples), 3, squeeze=False)
    for row, (image, label, predictions) in zip(grid, samples):
        for axes, picture in zip(row, (image, palette[label], palette[predictions])):
            axes.imshow(picture, interpolation="nearest")
            axes.axis("off")
    for axes, title in zip(grid[0], ("photo", "truth", "prediction")):
        axes.set_title(title)
    handles = [Patch(facecolor=palette[i] / 255, edgecolor="0.3", label=names[i]) for i in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
