"""What both command lines share: arguments, errors, devices, processes, whole files and pictures.

It knows no other file of the project: class names and colours arrive as arguments.
"""
import argparse
import contextlib
import csv
import difflib
import errno
import io
import itertools
import math
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from tqdm.auto import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PASCAL_REMEDY = "pip install torch==2.7.1 torchvision==0.22.1"  # the last with kernels for sm_50 to sm_61
RENAME_SECONDS = 5.0  # how long a checkpoint's rename is tried
WRITE_REMEDIES = {
    errno.ENOSPC: "free some space", errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the file size limit", errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "the folder is gone; make it again",
} | dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder you can write to")
TEMPORARY_SUFFIX = ".tmp"
LOST_PEER = "closed by peer|reset by peer|Broken pipe"  # what gloo says when another rank has gone

# Class names in a script that matplotlib's font lacks are drawn as boxes.
warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from")


class UserError(Exception):
    """Something that the user can put right: one line with the value, what was expected and the remedy."""


class SharedError(UserError):
    """A UserError that every process of a job meets at the same place; rank 0 alone prints it."""


# --- Command line -------------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """argparse without abbreviations; an error is one line that names the flag nearest to a mistyped one."""

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def _print_message(self, message: str, file: IO | None = None) -> None:
        say(message.rstrip("\n"), "stdout" if file is sys.stdout else "stderr")

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        words = sys.argv[1:] if args is None else args
        if any(re.fullmatch("(--.*=)?", word) for word in words):
            self.error("one of the arguments is empty; is a variable of the shell not set?")
        if unknown:
            flag = unknown[0].split("=")[0]
            nearest = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            self.error(f"unknown argument {flag}" + (f"; did you mean {nearest[0]}?" if nearest else ""))
        return parsed

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def whole_number(lowest: int, highest: float = math.inf, multiple: int = 1) -> Callable[[str], int]:
    """An argparse type: multiples of a number from `lowest` to `highest`."""
    kind = f"multiple of {multiple}" if multiple > 1 else "whole number"
    limit = f", at most {highest}" if highest < math.inf else ""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if lowest <= int(text) <= highest and int(text) % multiple == 0:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text}: expected a {kind} of {lowest} or more{limit}")

    return parse


def positive_float(text: str) -> float:
    """An argparse type: numbers above 0 that float32 holds."""
    limits = torch.finfo(torch.float32)
    with contextlib.suppress(ValueError):
        if limits.tiny <= float(text) <= limits.max:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: expected a number above 0 that float32 holds, "
                                     "such as 0.001")


def device_name(text: str) -> str:
    """An argparse type: auto, cpu, cuda, cuda:N or mps."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", text, re.ASCII):
        return text
    raise argparse.ArgumentTypeError(f"{text}: expected auto, cpu, cuda, cuda:N or mps")


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn UserError, the given kinds and the loss of another rank into one line on stderr and status 1."""
    try:
        yield
    except (UserError, *kinds) as error:
        rank, shared = own_rank(), isinstance(error, SharedError)
        if rank == 0 or not shared:
            who = f"[rank {rank}] " if rank else ""
            say(f"{Path(sys.argv[0]).name}: error: {who}{' '.join(str(error).split())}", "stderr")
        if shared and dist.is_initialized():
            dist.barrier()  # a process that ended before rank 0 had printed would take the job down
        raise SystemExit(1) from error
    except RuntimeError as error:
        if not dist.is_initialized() or not re.search(LOST_PEER, str(error)):
            raise
        say(f"{Path(sys.argv[0]).name}: error: [rank {own_rank()}] another process of this job ended; its "
            "line says why", "stderr")
        raise SystemExit(1) from error


def say(message: str = "", stream_name: str = "stdout") -> None:
    """Print a line at once, above any progress bar, on sys.stdout or sys.stderr. It never fails.

    What the stream cannot encode is written as backslash escapes, and what it does not take (the reader of a
    pipe has gone, the disk is full, there is no terminal any more) is lost.
    """
    stream, text = getattr(sys, stream_name), f"{message}\n"  # None if the program was started without one
    try:
        with tqdm.external_write_mode(stream):
            try:
                stream.write(text)
            except UnicodeEncodeError:
                stream.write(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding))
            stream.flush()
    except (AttributeError, OSError, ValueError):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            # Else Python writes at its exit what the stream still holds, fails and ends with status 120.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def progress_bar(*args, disable: bool = False, **options) -> tqdm:
    """tqdm on the terminal, gone when finished; nothing if sys.stderr is no terminal, closed or missing."""
    try:
        disable = disable or not sys.stderr.isatty()
    except (AttributeError, ValueError):
        disable = True
    return tqdm(*args, leave=False, disable=disable, **options)


@contextlib.contextmanager
def memory_errors(advice: Callable[[], str]) -> Iterator[None]:
    """Turn what is raised when memory runs out into a UserError; `advice` says at what, and what to try."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and not re.search("allocate memory|out of memory|not enough memory", str(error)):
            raise
        raise UserError(f"the device ran out of memory at {advice()}") from error


@contextlib.contextmanager
def stoppable(remedy: str = "nothing was finished, so start again") -> Iterator[None]:
    """End at Ctrl-C or SIGTERM with the usual exit status and a line: the interrupt's notes or the remedy."""
    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    in_main_thread = threading.current_thread() is threading.main_thread()  # signals reach no other
    previous = signal.signal(signal.SIGTERM, stop) if in_main_thread else None
    try:
        yield
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        notes = "; ".join(getattr(interrupt, "__notes__", [remedy]))
        if own_rank() == 0:
            say(f"\nstopped by {signal.Signals(number).name}; {notes}", "stderr")
        raise SystemExit(128 + number) from interrupt
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def first_line(error: Exception) -> str:
    """What an error says, short enough for a line of the log."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


# --- Devices and processes ----------------------------------------------------------------------------------


def is_torchrun() -> bool:
    """Whether torchrun's whole set of variables stands; a stray RANK of a scheduler does not count."""
    numbers = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    return "MASTER_ADDR" in os.environ and all(number.isdecimal() for number in numbers)


def own_rank() -> int:
    """This process's place among those of its job."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if is_torchrun() else 0


def local_processes() -> int:
    """How many processes of this job share the machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if is_torchrun() else 1


def available_cpus() -> int:
    """Cores this process may use: its share of those that the processes of torchrun have together."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // local_processes(), 1)


def memory_share() -> float:
    """Bytes of host memory that this process may take beside its neighbours, as `available_memory`."""
    return available_memory() / local_processes()


def available_memory(root: Path = Path("/")) -> float:
    """Bytes to be had without swapping or exceeding the limit of a container or a job of a scheduler.

    inf if the system does not tell.
    """
    try:
        memory = re.search(r"^MemAvailable: +(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
        available = int(memory[1]) * 1024
    except (OSError, TypeError):  # not Linux
        with contextlib.suppress(AttributeError, OSError, ValueError):  # but macOS: all that there is
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return math.inf
    own = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError, TypeError):  # from systems without control groups, or with old ones
        groups = (root / "proc/self/cgroup").read_text()
        own /= re.search(r"^0::/(.*)", groups, re.MULTILINE)[1]
    for group in (own, *own.parents):  # a limit holds for all groups below it
        with contextlib.suppress(OSError, ValueError):  # no control group, or one whose limit is "max"
            limit, used, details = ((group / name).read_text()
                                    for name in ("memory.max", "memory.current", "memory.stat"))
            file_cache = re.findall(r"^inactive_file (\d+)", details, re.MULTILINE)  # given up in need
            available = min(available, int(limit) - int(used) + sum(map(int, file_cache)))
    return available


def select_device(name: str) -> torch.device:
    """The device that --device names; "auto" is the first of cuda, mps and cpu that can be used.

    Each process of torchrun gets a GPU of its own. UserError if there is no such device, or the torch build
    has no kernels for the GPU.
    """
    mps = torch.backends.mps.is_available() and not is_torchrun()  # gloo exchanges no tensors of it
    there = {"cuda": torch.cuda.is_available(), "mps": mps, "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    try:
        kind, _, number = device_name(name).partition(":")
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--device {error}") from error
    if not there[kind]:
        raise UserError(f"--device {name}: torch {torch.__version__} finds no such GPU here; pass --device "
                        "cpu, or install the driver that cuda needs")
    if kind != "cuda":
        return torch.device(kind)
    if number and is_torchrun():
        raise UserError(f"--device {name}: torchrun gives each process a GPU of its own; pass --device cuda")
    index = int(os.environ.get("LOCAL_RANK", 0)) if is_torchrun() else int(number or 0)
    n_gpus = torch.cuda.device_count()
    if index >= n_gpus:
        raise UserError(f"--device {name}: there are {n_gpus} GPUs, numbered from 0; pass a lower number or "
                        "start fewer processes")
    if not torch.version.hip:  # AMD's architectures have other names
        check_gpu_architecture(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index),
                               torch.cuda.get_arch_list())
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def check_gpu_architecture(name: str, capability: tuple[int, int], architectures: Sequence[str]) -> None:
    """UserError if this torch build has no kernels for a GPU of this compute capability, such as (6, 1).

    Machine code for sm_XY runs on capabilities X.Z with Z >= Y; PTX for compute_XY on every later one too.
    The build's `architectures` are as torch.cuda.get_arch_list() gives them, such as ["sm_75", "compute_90"].
    """
    major, minor = capability
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
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"compute capability {major}.{minor} has bf16"
        if " GTX 16" in torch.cuda.get_device_name(device):  # 7.5 as well, but without tensor cores
            return None, "GTX 16xx is known for NaN in fp16"
        if major == 7:
            return torch.float16, f"compute capability {major}.{minor} has fp16 tensor cores and no bf16"
        return None, f"compute capability {major}.{minor} runs fp16 convolutions slower than float32"
    if device.type == "cpu" and cpu_has_bf16():
        return torch.bfloat16, "the CPU has AMX or AVX512-BF16"
    return None, f"this {device.type.upper()} has no native bf16"


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bf16 natively; elsewhere torch emulates it, 10 times slower than float32."""
    try:
        return re.search(r"^flags.* (amx_bf16|avx512_bf16)\b", cpuinfo.read_text(), re.MULTILINE) is not None
    except OSError:  # not Linux
        return False


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
        device = select_device(device_name)
        world_size = int(os.environ["WORLD_SIZE"]) if is_torchrun() else 1
        if world_size > 1 and not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=60))  # rank 0's download takes a while
        return cls(device, *select_amp(amp, device), own_rank(), world_size)

    def gather(self, value: object) -> list:
        """A value of every process, by rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_rank_0(self, action: Callable, *kinds: type[Exception]) -> object:
        """What an action returns on rank 0, None on the others, which wait.

        If it ends in an error of these kinds, all meet it as a SharedError.
        """
        value = problem = None
        try:
            value = action() if self.rank == 0 else None
        except kinds as error:
            problem = error
        if message := self.gather(problem and str(problem))[0]:
            raise SharedError(message) from problem
        return value

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

    def log(self, message: str = "") -> None:
        """Print on rank 0, at once, so that a log file can be followed."""
        if self.rank == 0:
            say(message)

    def __str__(self) -> str:
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else f"{torch.get_num_threads()} threads"
        precision = str(self.amp_dtype or torch.float32).removeprefix("torch.")
        return f"{self.device} ({name}), {precision} ({self.amp_reason})"


# --- Whole files --------------------------------------------------------------------------------------------


def write_file(path: str | Path, content: bytes | memoryview, *,
               patience: float = 0, exclusive: bool = False) -> None:
    """Write a file so that it is whole at every moment: under a temporary name beside it, then renamed.

    A rename that fails is tried again for `patience` seconds; an `exclusive` write replaces no file.
    UserError if it fails: the disk is full, the folder not writable, ...
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            flush_to_disk(file)  # else the rename may reach it before the bytes, and a power cut between
        put_in_place(temporary, path, patience, exclusive)
    except OSError as error:
        reason, remedy = error.strerror or error, WRITE_REMEDIES.get(error.errno, "choose another folder")
        raise UserError(f"{path} could not be written ({reason}); {remedy}. "
                        "What was there before is whole") from error
    finally:
        remove([temporary])  # still there after an error or Ctrl-C


def temporary_name(path: Path) -> Path:
    """Beside a file, and this process's own."""
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")


def flush_to_disk(file: IO) -> None:
    """os.fsync, where the file system has it."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise


def put_in_place(source: Path, target: Path, patience: float, exclusive: bool) -> None:
    """Rename a file; an OSError where it fails, after some patience, or an exclusive name is taken."""
    if exclusive:
        with contextlib.suppress(OSError):  # from file systems without hard links
            return os.link(source, target)
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "another process wrote it first")
    for _ in range(round(patience / 0.1)):  # scanners, indexers and network drives hold files for a moment
        with contextlib.suppress(OSError):
            return os.replace(source, target)
        time.sleep(0.1)
    os.replace(source, target)


def remove(paths: Iterable[Path]) -> None:
    """Delete files as far as that is possible: a clean-up that fails is no reason to fail."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def remove_if_empty(folder: Path) -> None:
    """Delete a folder that holds nothing; any other stays."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def write_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """A dict of tensors and plain types, for torch.load(weights_only=True). UserError as in write_file."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_file(path, buffer.getbuffer(), patience=RENAME_SECONDS)


def write_csv(path: str | Path, rows: Sequence[dict]) -> None:
    """Rows of equal keys below a header; floats with 6 digits, NaN empty. UserError as in write_file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: format_cell(value) for key, value in row.items()} for row in rows)
    write_file(path, text.getvalue().encode())


def format_cell(value: object) -> object:
    return f"{value:.6g}".replace("nan", "") if isinstance(value, float) else value


def make_dir(path: Path, flag: str) -> None:
    """Make the folder that a flag names; UserError before the work if nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if os.path.isfile(path) else error.strerror
        raise UserError(f"{flag} {path} cannot be made ({reason}); "
                        "choose a folder you can write to") from error
    probe = path / ".probe"
    write_file(probe, b"")
    remove([probe])


def make_new_dir(path: Path) -> Path:
    """Make a folder that was not there, with a number behind its name if that is taken."""
    for number in itertools.count(1):
        new = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            new.mkdir(parents=True)
            return new
        except OSError as error:
            if not os.path.lexists(new):  # what stands in the way is above it
                raise UserError(f"{new} cannot be made ({error.strerror}: {error.filename}); pass "
                                "--output_dir with a folder you can write to") from error


@contextlib.contextmanager
def locked_dir(path: Path, flag: str) -> Iterator[bool]:
    """Make a folder if need be and hold it against other processes; whether the system has such locks.

    UserError if another process holds it or nothing can be written there.
    """
    make_dir(path, flag)
    locked = False
    with contextlib.ExitStack() as at_end:
        try:
            descriptor = os.open(path, os.O_RDONLY)  # an OSError on Windows, whose folders are not opened
            at_end.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError as error:
            raise UserError(f"{flag} {path}: another process is at work there; wait for it, or choose "
                            "another folder") from error
        except OSError:  # a file system without locks
            pass
        yield locked


# --- Pictures -----------------------------------------------------------------------------------------------


def save_figure(path: str | Path, figure: Figure) -> None:
    """Write a figure as a PNG. UserError as in write_file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_file(path, buffer.getbuffer())


def plot_curves(history: Sequence[dict], image_size: int) -> Figure:
    """Loss and dice over the epochs, a panel each with training and validation, from history.csv's rows."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    epochs = [row["epoch"] for row in history]
    panels = {"loss": "cross entropy per pixel", "dice": "dice (pixel accuracy)"}
    curves = (("train", ".--", f"train, at {image_size}x{image_size}"),
              ("val", ".-", "validation, at the composites' size"))
    for axes, (name, ylabel) in zip(figure.subplots(1, 2), panels.items()):
        for split, style, label in curves:
            axes.plot(epochs, [row[f"{split}_{name}"] for row in history], style, label=label)
        axes.set(xlabel="epoch", ylabel=ylabel, title=name.capitalize(),
                 xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    return figure


def plot_predictions(samples: Sequence[tuple], names: Sequence[str], palette: np.ndarray) -> Figure:
    """Photo, truth and prediction of a few samples, a row each, above a legend of the classes that occur.

    A sample is an image, uint8 (h, w, 3), with its label and predictions, uint8 (H, W) both. Each class has a
    name and a row of the palette, uint8 (n_classes, 3).
    """
    present = np.unique(np.concatenate([array.ravel() for sample in samples for array in sample[1:]]))
    height = 2.75 * len(samples) + 0.3 + 0.25 * math.ceil(len(present) / 6)
    figure = Figure(figsize=(8, height), layout="constrained")
    grid = figure.subplots(len(samples), 3, squeeze=False)
    for row, (image, label, predictions) in zip(grid, samples):
        for axes, picture in zip(row, (image, palette[label], palette[predictions])):
            axes.imshow(picture, interpolation="nearest")
            axes.axis("off")
    for axes, title in zip(grid[0], ("photo", "truth", "prediction")):
        axes.set_title(title)
    handles = [Patch(facecolor=palette[i] / 255, edgecolor="0.3", label=names[i]) for i in present]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ in a name is a dollar
    return figure
