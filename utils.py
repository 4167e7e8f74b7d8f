"""What both command lines share: arguments, errors, devices, processes, whole files and pictures.

It knows no other file of the project: class names and colours arrive as arguments.
"""
import argparse
import contextlib
import csv
import ctypes
import difflib
import io
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw, ImageFont

PASCAL_REMEDY = "pip install torch==2.7.1 torchvision==0.22.1"  # the last release with kernels for sm_50 to sm_61


class UserError(Exception):
    """Something that the user can put right. The message is one line with the value, what was expected and the remedy."""


# --- Command line -------------------------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are one line and name the nearest flag for a mistyped one."""

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            nearest = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            self.error(f"unknown argument {flag}" + (f"; did you mean {nearest[0]}?" if nearest else ""))
        return parsed

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def positive_int(text: str) -> int:
    """argparse type."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number of 1 or more")
    return int(text)


def positive_float(text: str) -> float:
    """argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0, such as 0.001")
    return value


@contextlib.contextmanager
def user_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turn UserError and the given kinds of exception into one line on stderr and exit status 1."""
    try:
        yield
    except (UserError, *kinds) as error:
        message = str(error).strip()
        if message.startswith("Caught "):  # a DataLoader's worker failed: torch puts its traceback before the message
            message = message.splitlines()[-1].partition(": ")[2]
        rank = f"[rank {dist.get_rank()}] " if dist.is_initialized() else ""
        print(f"{Path(sys.argv[0]).name}: error: {rank}{' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(1) from error


# --- Devices and processes ----------------------------------------------------------------------------------------------


def select_device(name: str) -> torch.device:
    """The device that --device names; "auto" is the first of cuda, mps and cpu that can be used.

    Raises:
        UserError: no such device, or the torch build has no kernels for the GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: torch {torch.__version__} finds no CUDA GPU here; install the NVIDIA driver or "
                            "pass --device cpu")
        index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, numbered from 0; pass a lower number "
                            "or start fewer processes")
        check_gpu_architecture(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index),
                               torch.cuda.get_arch_list())
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} finds no Apple GPU here; pass --device cpu")
    if device.type not in ("cpu", "mps"):
        raise UserError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
    return device


def check_gpu_architecture(name: str, capability: tuple[int, int], architectures: Sequence[str]) -> None:
    """UserError if this torch build has no kernels for a GPU.

    Machine code for sm_XY runs on capabilities X.Z with Z >= Y; PTX for compute_XY on every later one too.

    Args:
        capability: the GPU's compute capability, such as (6, 1).
        architectures: those of the build, as torch.cuda.get_arch_list() gives them, such as ["sm_75", "compute_90"].
    """
    major, minor = capability
    for architecture in architectures:
        kind, _, version = architecture.rstrip("abcdef").rpartition("_")
        built = divmod(int(version), 10)
        if (built[0] == major and built[1] <= minor) or (kind == "compute" and built <= capability):
            return
    remedy = PASCAL_REMEDY if capability < (7, 5) else "pip install --upgrade torch torchvision"
    raise UserError(f"{name} has compute capability {major}.{minor}, and torch {torch.__version__} has no kernels for it "
                    f"(built for {', '.join(architectures)}); run: {remedy}, or pass --device cpu")


def select_amp(choice: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The dtype of automatic mixed precision, or None for float32, and the reason as words for the log."""
    if choice != "auto":
        dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[choice]
        return dtype, f"--amp {choice}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"compute capability {major}.{minor} has bf16"
        if major == 7:
            return torch.float16, f"compute capability {major}.{minor} has fp16 tensor cores and no bf16"
        return None, f"compute capability {major}.{minor} runs fp16 convolutions slower than float32"
    if device.type == "cpu" and cpu_has_bf16():
        return torch.bfloat16, "the CPU has AMX or AVX512-BF16"
    return None, f"this {device.type.upper()} has no native bf16"


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 natively; elsewhere torch emulates it, ten times slower than float32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def keep_freed_memory() -> None:
    """Let a step on the CPU reuse the memory of the step before; without effect where the C library is not glibc.

    By default malloc returns a step's activations to the system, which clears the same pages again for the next step: 15,000
    page faults at batch 4, more than a twentieth of the time. The two settings are M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never give the top of the heap back
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: take blocks up to 32 MiB, the most that glibc allows, from the heap


@dataclass(frozen=True)
class Runtime:
    """Where and how a network runs: device, precision, and this process's place among those that torchrun started."""

    device: torch.device
    amp_dtype: torch.dtype | None  # None is float32 throughout
    amp_reason: str
    rank: int = 0
    world_size: int = 1

    @classmethod
    def start(cls, device_name: str, amp: str) -> "Runtime":
        """Choose device and precision and, under torchrun, join the other processes. UserError as in select_device."""
        device = select_device(device_name)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # shapes are fixed, so the search for the fastest kernels pays
        if device.type == "cpu":
            keep_freed_memory()
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if world_size > 1 and not dist.is_initialized():
            # The others wait at their first collective while rank 0 downloads weights or draws the demo.
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=60))
        return cls(device, *select_amp(amp, device), rank, world_size)

    def wait(self) -> None:
        """Until every process is here."""
        if dist.is_initialized():
            dist.barrier()

    def close(self) -> None:
        """Leave the other processes, once all have done their work."""
        self.wait()
        if dist.is_initialized() and dist.get_backend() == "nccl":  # gloo needs none, and torch 2.7's may hang in it
            dist.destroy_process_group()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def log(self, message: str = "") -> None:
        """Print on rank 0, at once, so that a log file can be followed."""
        if self.rank == 0:
            print(message, flush=True)

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{torch.get_num_threads()} threads"
        precision = str(self.amp_dtype or torch.float32).removeprefix("torch.")
        return f"{self.device} ({name}), {precision} ({self.amp_reason})"


# --- Whole files --------------------------------------------------------------------------------------------------------


def write_file(path: str | Path, content: bytes | memoryview) -> None:
    """Write a file so that it is whole at every moment: under a temporary name beside it, to the disk, then renamed.

    Raises:
        UserError: the disk is full or the folder not writable; a previous file of that name is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before the bytes do, and a power cut between them
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({error.strerror}); free some space or choose another folder. What was "
                        "there before is whole") from error


def write_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """A dict of tensors and plain types, as torch.load(weights_only=True) reads it."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_file(path, buffer.getbuffer())


def write_json(path: str | Path, content: dict) -> None:
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def write_csv(path: str | Path, rows: Sequence[dict]) -> None:
    """Rows of equal keys as comma-separated values with a header; floats with 6 digits, NaN as an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: format_cell(value) for key, value in row.items()})
    write_file(path, text.getvalue().encode())


def format_cell(value: object) -> object:
    if not isinstance(value, float):
        return value
    return "" if value != value else f"{value:.6g}"


def make_dir(path: Path, flag: str) -> None:
    """Make the folder that a flag names, and fail now rather than after the work if nothing can be written there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be made ({error.strerror}); choose a folder you can write to") from error
    probe = path / ".probe"
    write_file(probe, b"")
    probe.unlink()


# --- Pictures -----------------------------------------------------------------------------------------------------------

TRAIN_STYLE = {"color": "#0072B2", "linestyle": "--", "label": "train"}  # blue and vermilion of Okabe and Ito's palette,
VAL_STYLE = {"color": "#D55E00", "linestyle": "-", "label": "validation"}  # which colour-blind readers can tell apart


def save_figure(figure: Figure, path: str | Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_file(path, buffer.getbuffer())


def write_image(path: str | Path, image: Image.Image) -> None:
    """A PNG, whatever the name ends in."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    write_file(path, buffer.getbuffer())


def plot_curves(history: Sequence[dict], path: str | Path) -> None:
    """Loss and dice over the epochs, training and validation in one panel each, from the rows of history.csv."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(epochs) < 30 else None
    for axes, name, label in zip(figure.subplots(1, 2), ("loss", "dice"), ("cross entropy per pixel", "dice (pixel accuracy)")):
        for split, style in (("train", TRAIN_STYLE), ("val", VAL_STYLE)):
            axes.plot(epochs, [row[f"{split}_{name}"] for row in history], marker=marker, markersize=3.5, **style)
        axes.set(xlabel="epoch", ylabel=label, title=name.capitalize())
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    save_figure(figure, path)


def plot_predictions(
    images: np.ndarray, labels: np.ndarray, predictions: np.ndarray, names: Sequence[str], palette: np.ndarray, path: str | Path
) -> None:
    """Photo, truth and prediction of a few samples, a row each, above a legend of the classes that occur.

    Args:
        images: uint8 (N, H, W, 3).
        labels, predictions: uint8 (N, H, W).
        names, palette: the class names and their colours, uint8 (n_classes, 3).
    """
    present = np.union1d(labels, predictions)
    n_legend_rows = -(-len(present) // 6)
    figure = Figure(figsize=(8, 2.75 * len(images) + 0.3 + 0.25 * n_legend_rows), layout="constrained")
    grid = figure.subplots(len(images), 3, squeeze=False)
    for row, pictures in zip(grid, zip(images, palette[labels], palette[predictions])):
        for axes, picture in zip(row, pictures):
            axes.imshow(picture, interpolation="nearest")
            axes.axis("off")
    for axes, title in zip(grid[0], ("photo", "truth", "prediction")):
        axes.set_title(title)
    handles = [Patch(facecolor=palette[i] / 255, edgecolor="0.3", linewidth=0.5, label=names[i]) for i in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    save_figure(figure, path)


def plot_confusion_matrix(confusion: np.ndarray, names: Sequence[str], path: str | Path) -> None:
    """The confusion matrix (n_classes, n_classes), rows truth, each row in percent of its pixels; empty rows stay blank."""
    totals = confusion.sum(axis=1, keepdims=True)
    shares = np.divide(100 * confusion, totals, out=np.full(confusion.shape, np.nan), where=totals > 0)
    side = 2.2 + 0.36 * len(names)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.5:  # a cell of 0% says more as a blank
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7.5, color="white" if share > 55 else "black")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="prediction", ylabel="truth", title="Where each class's pixels went, % of the row")
    axes.spines[:].set_visible(False)
    figure.colorbar(picture, ax=axes, shrink=0.6, label="% of the true class's pixels")
    save_figure(figure, path)


def draw_overlay(photo: Image.Image, label: np.ndarray, names: Sequence[str], palette: np.ndarray) -> Image.Image:
    """The class colours blended over a photo, with a legend of the classes present below it.

    Args:
        photo: RGB, W x H.
        label: uint8 (H, W).
        names, palette: the class names and their colours, uint8 (n_classes, 3).
    """
    blended = Image.blend(photo, Image.fromarray(palette[label]), alpha=0.55)
    W, H = blended.size
    present = np.unique(label)
    font = ImageFont.load_default(size=max(11, min(W, 1600) // 45))
    line = round(font.size * 1.6)
    column = max(font.getlength(names[i]) for i in present) + 2 * line
    n_columns = max(1, int(W // column))
    canvas = Image.new("RGB", (max(W, round(column)), H + line * (-(-len(present) // n_columns)) + line // 2), "white")
    canvas.paste(blended)
    draw = ImageDraw.Draw(canvas)
    for place, i in enumerate(present):
        x, y = place % n_columns * column + line // 4, H + line // 4 + place // n_columns * line
        draw.rectangle((x, y + line * 0.15, x + line * 0.8, y + line * 0.85), fill=tuple(palette[i].tolist()), outline="gray")
        draw.text((x + line * 1.1, y + line * 0.5), names[i], fill="black", font=font, anchor="lm")
    return canvas
