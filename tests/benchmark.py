"""Speed and memory of this repository against a plain loop, measured in the same run: python tests/benchmark.py --help

The plain loop is what training scripts for this network commonly do: float32, contiguous memory, a DataLoader that opens each
composite with Pillow and decodes its label with the colour table every epoch, and the encoder inside autograd.
"""
import argparse
import multiprocessing
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))

import dataset  # noqa: E402
import metrics  # noqa: E402
import train  # noqa: E402
from model import EfficientSegNet  # noqa: E402
from predict import Segmenter  # noqa: E402
from utils import Runtime, write_checkpoint  # noqa: E402


class PlainDataset(Dataset):
    """Opens and decodes a composite at every access, with the nearest of the 29 colours from a table."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        levels = np.arange(0, 256, 8) + 4
        rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 1, 3)
        self.table = dataset.COLOR_TO_ID[((rgb - dataset.COLORS.astype(int)) ** 2).sum(axis=2).argmin(axis=1)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        composite = np.asarray(Image.open(self.paths[index]).convert("RGB"))
        r, g, b = (composite[:, 256:] >> 3).astype(int).transpose(2, 0, 1)
        image = torch.from_numpy(composite[:, :256].copy()).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (dataset.MEAN, dataset.STD))
        return (image - mean) / std, torch.from_numpy(self.table[(r * 32 + g) * 32 + b]).long()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


PLAIN_WORKS = {}  # in the plain loop's own process: what it can be asked to do, by name


def start_plain_loop(paths: list[Path], batch_sizes: tuple[int, ...], device: torch.device) -> None:
    """Prepare the process of the plain loop."""
    model = EfficientSegNet(20, "none", finetune_encoder=True).to(device)  # the encoder inside autograd
    for batch_size in batch_sizes:
        PLAIN_WORKS[f"training, batch {batch_size}"] = plain_epoch(model, paths, batch_size, device)
    PLAIN_WORKS["evaluation"] = plain_evaluation(model, paths, device)


def run_plain_loop(name: str, device: torch.device) -> None:
    PLAIN_WORKS[name]()
    wait(device)


def peak_memory() -> tuple[int, int]:
    """Bytes of this process's memory and of the device's at most so far."""
    device_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, device_bytes


def compare(plain, this, n_images: int, device: torch.device, repeats: int) -> tuple[float, float, float, float]:
    """Run both by turns, so that a slow minute of the machine meets both; one run of each goes first unmeasured.

    Returns:
        Median images a second of the plain loop and of this, the median of their ratios, and the ratios' spread (highest less
        lowest, in percent of the median).
    """
    rates = []
    for _ in range(repeats + 1):
        for work in (plain, this):
            wait(device)
            started = time.perf_counter()
            work()
            wait(device)
            rates.append(n_images / (time.perf_counter() - started))
    plain_rates, this_rates = rates[2::2], rates[3::2]
    ratios = [fast / slow for fast, slow in zip(this_rates, plain_rates)]
    ratio = statistics.median(ratios)
    return statistics.median(plain_rates), statistics.median(this_rates), ratio, 100 * (max(ratios) - min(ratios)) / ratio


def rate(work, n_images: int, device: torch.device, repeats: int) -> float:
    """Median images a second of `work()`; one run goes first unmeasured."""
    rates = []
    for _ in range(repeats + 1):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        rates.append(n_images / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def plain_epoch(model, paths, batch_size, device):
    loader = DataLoader(PlainDataset(paths), batch_size, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.decoder_parameters(), lr=1e-3)

    def work():
        model.train()
        total_loss = correct = 0
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            total_loss += loss.item()
            correct += (logits.argmax(1) == labels).sum().item()

    return work


def fast_epoch(model, data, batch_size, runtime):
    """What train.train_one_epoch does, without its bar."""
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True, collate_fn=dataset.keep_batch,
                        pin_memory=runtime.device.type == "cuda")
    optimizer = torch.optim.AdamW(model.decoder_parameters(), lr=1e-3, fused=True)
    class_weights = torch.ones(20, device=runtime.device)

    def work():
        model.train()
        totals = metrics.SegmentationMetrics(20, runtime.device)
        for batch in loader:
            images, labels = dataset.split_batch(batch.to(runtime.device, non_blocking=True))
            with runtime.autocast():
                logits = model(dataset.normalize(images))
            losses = metrics.cross_entropy(logits, labels, reduction="none")
            (class_weights[labels.long()] * losses).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            totals.update(logits.argmax(1), labels, losses.detach().mean())
        totals.compute()

    return work


def bare_network(model, batch_size, n_steps, runtime):
    """The network, its loss and its optimizer on one fixed random batch: what an epoch would cost if nothing else did."""
    images = torch.randn(batch_size, 3, 256, 256, device=runtime.device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(20, (batch_size, 256, 256), device=runtime.device)
    optimizer = torch.optim.AdamW(model.decoder_parameters(), lr=1e-3, fused=True)

    def work():
        model.train()
        for _ in range(n_steps):
            with runtime.autocast():
                logits = model(images)
            metrics.cross_entropy(logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return work


def encoder_alone(model, batch_size, n_steps, runtime):
    """The share of a step that caching the frozen encoder's features would save."""
    images = torch.randn(batch_size, 3, 256, 256, device=runtime.device).contiguous(memory_format=torch.channels_last)

    def work():
        for _ in range(n_steps):
            with runtime.autocast():
                model.encode(images)

    return work


def loss_curves(data, runtime, n_steps):
    """Losses of the plain and of the fast step from the same weights on the same batches, and of the fast one in another order.

    Returns:
        float64 (3, n_steps).
    """
    state, curves = EfficientSegNet(20, "none").state_dict(), []
    for fast, order in ((False, 0), (True, 0), (True, 1)):
        model = EfficientSegNet(20, None)
        model.load_state_dict(state)
        model.to(runtime.device, memory_format=torch.channels_last if fast else torch.contiguous_format)
        optimizer = torch.optim.AdamW(model.decoder_parameters(), lr=1e-3, fused=fast)
        if fast:
            model.fold_encoder()
        batches = torch.Generator().manual_seed(order)
        losses = []
        for _ in range(n_steps):
            batch = data.__getitems__(torch.randint(len(data), (4,), generator=batches).tolist())
            images, labels = dataset.split_batch(batch.to(runtime.device))
            images = dataset.normalize(images)
            if fast:
                with runtime.autocast():
                    logits = model(images)
                loss = metrics.cross_entropy(logits, labels)
            else:
                loss = F.cross_entropy(model(images.contiguous()), labels.long())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    return np.array(curves)


def write_composites(folder: Path, splits: dict[str, int]) -> None:
    """16 synthetic scenes a split, and copies of them: what a picture shows does not change the time it takes."""
    dataset.write_demo(folder, {split: 16 for split in splits})
    for split, count in splits.items():
        for number in range(17, count + 1):
            shutil.copy(folder / split / f"{number % 16 + 1}.jpg", folder / split / f"{number}.jpg")


def whole_runs(folder: Path, device: torch.device) -> None:
    """Wall time and peak device memory of `train.py`, 15 epochs over 2,975 composites with 250 for validation, start-up included."""
    write_composites(folder, {"train": 2975, "val": 250})
    for flags in (["--batch_size", "4"], ["--batch_size", "4", "--compile"], ["--batch_size", "16"], ["--batch_size", "16", "--compile"]):
        command = ["train.py", "--num_epochs", "15", "--encoder_weights", "none", "--data_dir", str(folder), "--device", str(device), *flags]
        program = ("import runpy, sys, torch; sys.argv = sys.argv[1:]; sys.path.insert(0, '.'); runpy.run_path('train.py', run_name='__main__');"
                   "print('peak', torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)")
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program, *command, "--output_dir", str(folder / "".join(flags))],
                              cwd=Path(__file__).parent.parent, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if done.returncode:
            sys.exit(done.stderr)
        peak = int(done.stdout.rsplit("peak", 1)[1])
        print(f"15 epochs, {' '.join(flags):<28}{seconds:>8.1f} s   peak device memory {peak / 2**20:.0f} MiB", flush=True)


def plain_evaluation(model, paths, device):
    loader = DataLoader(PlainDataset(paths), 4)

    def work():
        model.eval()
        correct = 0
        with torch.no_grad():
            for images, labels in loader:
                correct += (model(images.to(device)).argmax(1) == labels.to(device)).sum().item()

    return work


def fast_evaluation(model, data, runtime):
    """What train.evaluate does, without the loss, which the plain loop has not."""
    batch_size = train.CPU_EVALUATION_BATCH if runtime.device.type == "cpu" else train.EVALUATION_BATCH
    loader = DataLoader(data, batch_size, collate_fn=dataset.keep_batch, pin_memory=runtime.device.type == "cuda")

    def work():
        model.eval()
        totals = metrics.SegmentationMetrics(20, runtime.device)
        with torch.inference_mode():
            for batch in loader:
                images, labels = dataset.split_batch(batch.to(runtime.device, non_blocking=True))
                with runtime.autocast():
                    logits = model(dataset.normalize(images))
                totals.update(logits.argmax(1), labels)
        totals.compute()

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images and repeats, batch 4 alone: within a minute")
    parser.add_argument("--whole_runs", action="store_true",
                        help="time 15 epochs over 2,975 composites instead, batch 4 and 16, with and without --compile (for a GPU)")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    runtime = Runtime.start(args.device, "auto")
    device, cpu = runtime.device, torch.device("cpu")
    n_images, repeats, batch_sizes = (12, 1, (4,)) if args.quick else (48, 5, (4, 16))

    print(f"{platform.processor() or platform.machine()}, {dataset.available_cpus()} cores, {runtime}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}; "
          f"{n_images} synthetic composites at 256x256, median of {repeats}\n")
    print(f"{'':<44}{'plain loop':>11}{'this':>9}{'ratio':>7}{'spread':>8}")

    def report(name: str, plain: float, this: float, ratio: float, spread: float) -> None:
        print(f"{name:<44}{plain:>11.1f}{this:>9.1f}{ratio:>7.2f}{spread:>7.0f}%", flush=True)

    def report_part(name: str, value: float) -> None:
        print(f"{name:<44}{'':>11}{value:>9.1f}", flush=True)

    # The plain loop runs in a process of its own: memory settings belong to a process, and so does its peak.
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as plain:
        if args.whole_runs:
            return whole_runs(Path(folder), device)
        write_composites(Path(folder), {"train": n_images, "many": 256 if args.quick else 1024})
        paths, many = (dataset.list_images(Path(folder, split)) for split in ("train", "many"))
        plain.apply(start_plain_loop, (paths, batch_sizes, device))

        data = dataset.CompositeDataset(Path(folder, "train"), show_progress=False)
        model = EfficientSegNet(20, "none").to(device, memory_format=torch.channels_last).fold_encoder()

        def report_against_plain(name: str, work, n_images: int) -> None:
            report(f"{name}, images/s", *compare(lambda: plain.apply(run_plain_loop, (name, device)), work, n_images, device, repeats))

        for batch_size in batch_sizes:
            n_steps = len(paths) // batch_size
            epoch = fast_epoch(model, data, batch_size, runtime)
            report_against_plain(f"training, batch {batch_size}", epoch, n_steps * batch_size)
            if batch_size == 4:
                peaks = zip(("process", "device"), plain.apply(peak_memory), peak_memory())
                for name, part in (("bare network", bare_network), ("frozen encoder", encoder_alone)):
                    share = compare(part(model, batch_size, n_steps, runtime), epoch, n_steps * batch_size, device, repeats)[2]
                    report_part(f"  of which the {name}, % of the time", 100 * share)
        report_against_plain("evaluation", fast_evaluation(model, data, runtime), len(paths))
        plain_many = PlainDataset(many)
        report("reading the data set, images/s", *compare(
            lambda: [plain_many[i] for i in range(len(many))],
            lambda: dataset.CompositeDataset(Path(folder, "many"), show_progress=False), len(many), cpu, repeats))
        label_rgb = np.asarray(Image.open(paths[0]))[:, 256:]
        decoding = rate(lambda: [dataset.decode_label(label_rgb) for _ in range(20)], 20, cpu, repeats)
        report_part("  of which decode_label, ms", 1000 / decoding)
        for memory, plain_peak, this_peak in peaks:
            if plain_peak:
                print(f"{f'peak memory of the {memory}, batch 4, MiB':<44}{plain_peak / 2**20:>11.0f}{this_peak / 2**20:>9.0f}{this_peak / plain_peak:>7.2f}")

        plain_curve, fast_curve, other_order = loss_curves(data, runtime, 2 if args.quick else 40)
        print(f"loss after {len(plain_curve)} steps: plain {plain_curve[-4:].mean():.4f}, this {fast_curve[-4:].mean():.4f}; largest difference at "
              f"one step {np.abs(plain_curve - fast_curve).max():.4f}, with another order of the batches {np.abs(other_order - fast_curve).max():.4f}")

        write_checkpoint(Path(folder, "model.pth"), {"model": model.state_dict(), "config": {"image_size": 256}})
        segmenter = Segmenter(Path(folder, "model.pth"), args.device)
        photo = Image.fromarray(dataset.draw_scene(0)[0]).resize((2048, 1024))
        report_part("predicting a photo of 2048x1024, ms", 1000 / rate(lambda: segmenter(photo), 1, device, 5))


if __name__ == "__main__":
    main()
