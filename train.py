"""Train EfficientSegNet on street-scene composites: one process on a CPU or GPU, or one a GPU under torchrun.

The recipe is main(), top to bottom. What a run leaves in its folder is named in RUN_FILES.
"""
import contextlib
import copy
import math
import os
import platform
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from tqdm.auto import tqdm

import dataset
import metrics
import model as models
import utils
from utils import Runtime, UserError

RUN_FILES = ("config.json", "history.csv", "curves.png", "predictions.png", "confusion_matrix.png", "per_class.csv", "best.pth",
             "last.pth")
RECIPE = ("num_epochs", "batch_size", "learning_rate", "num_classes", "data_dir", "demo", "image_size", "encoder_weights",
          "finetune_encoder", "amp", "seed", "no_cache")  # the flags that a checkpoint remembers for --resume
WEIGHT_DECAY = 0.01  # AdamW's default
ENCODER_LEARNING_RATE = 0.3  # of the decoders', for --finetune_encoder: its features are good already
# With a frozen encoder a pixel counts in the training loss as the share of its class to this power: 3.4 times as much of a motorcycle
# as of the road. In 15 epochs at 128x128 that cost 0.004 dice and gained 0.032 mean IoU.
CLASS_WEIGHT_POWER = -0.2
# Background is whatever has no class of its own, and a fine-tuned network calls too many hard pixels that. Counting it less in the
# training loss finds more of every other class: in whole runs at no cost in dice, while five epochs at 128x128 give 0.008 dice for
# 0.005 pixel accuracy without background and 0.004 mean IoU.
FINETUNE_BACKGROUND_WEIGHT = 0.25
WARMUP = 0.05  # of all steps: fresh decoders behind trained features get large, useless gradients at first
FINAL_LEARNING_RATE = 0.01  # of the peak
EVALUATION_BATCH = 16  # no activations are kept, so four times the training batch fits in less memory
CPU_EVALUATION_BATCH = 8  # a CPU gains nothing from larger ones, whose activations leave its caches
PREDICTION_SAMPLES = 4  # rows of predictions.png
BAR_SECONDS = 1.0  # how often the host waits for the device to show loss and dice


def get_args_parser() -> utils.ArgumentParser:
    parser = utils.ArgumentParser(description=__doc__.split("\n")[0], epilog="""examples:
  python train.py --demo                                        synthetic scenes, no download, about two minutes
  python train.py --data_dir data/cityscapes_data               the defaults on the real composites
  python train.py --resume runs/x/last.pth                      go on after an interruption, with the same flags
  python train.py --resume runs/x/last.pth --num_epochs 20      go on for longer
  python train.py --evaluate runs/x/best.pth                    score a checkpoint on val/
  torchrun --nproc_per_node=8 train.py --batch_size 4           eight GPUs, 32 images a step""")
    recipe = parser.add_argument_group("recipe (--resume remembers these; a flag given with --resume wins)")
    recipe.add_argument("--num_epochs", type=utils.positive_int, default=10, metavar="N",
                        help="passes over train/, %(default)s if left out")
    recipe.add_argument("--batch_size", type=utils.positive_int, default=4, metavar="N",
                        help="images a step in each process, %(default)s if left out")
    recipe.add_argument("--learning_rate", type=utils.positive_float, default=1e-3, metavar="RATE",
                        help="AdamW's peak learning rate, %(default)s if left out; a cosine brings it down to 1%% of that")
    recipe.add_argument("--num_classes", type=utils.positive_int, default=len(dataset.CLASSES), metavar="N",
                        help="ids in the labels are below this, at most and if left out %(default)s")
    recipe.add_argument("--image_size", type=int, default=256, metavar="PIXELS",
                        help="side of the square that photo and label are resized to, a multiple of 32, %(default)s if left out")
    recipe.add_argument("--finetune_encoder", action="store_true",
                        help="train the encoder too, at 0.3 of the learning rate; a step takes about 1.7 times as long")
    recipe.add_argument("--encoder_weights", default="imagenet", metavar="imagenet|none|FILE",
                        help="torchvision's download (if left out), random, or an efficientnet_b0 state_dict")
    recipe.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto",
                        help="mixed precision; auto (if left out) takes what the device is fast at")
    recipe.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, shuffle and augmentation, %(default)s if left out")
    data = parser.add_argument_group("data")
    data.add_argument("--data_dir", type=Path, default=Path("data/cityscapes_data"), metavar="FOLDER",
                      help="holds train/ and val/ with composites, %(default)s if left out")
    data.add_argument("--demo", action="store_true", help="draw synthetic street scenes under data/demo and train on them")
    data.add_argument("--no_cache", action="store_true",
                      help="decode on the fly instead of once into memory (4 bytes a pixel); chosen by itself if memory is short")
    data.add_argument("--num_workers", type=int, default=None, metavar="N",
                      help="DataLoader processes that decode with --no_cache, one a core if left out")
    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", type=Path, metavar="FOLDER", help="where the results go, runs/<date-time> if left out")
    run.add_argument("--resume", type=Path, metavar="FILE", help="continue the run of this last.pth in its own folder")
    run.add_argument("--evaluate", type=Path, metavar="FILE", help="score this checkpoint on val/ and train nothing")
    run.add_argument("--device", default="auto", metavar="auto|cpu|cuda|cuda:N|mps", help="auto (if left out) prefers a GPU")
    run.add_argument("--compile", action="store_true", help="torch.compile: one to two minutes at the start, less time a step")
    run.add_argument("--sync_batch_norm", action="store_true", help="share batch-norm statistics between GPUs (torchrun)")
    return parser


def parse_args(argv: list[str] | None) -> tuple[Namespace, dict | None]:
    """The flags, and the checkpoint of --resume or --evaluate, whose recipe takes the place of the defaults."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    path = args.resume or args.evaluate
    checkpoint = models.load_checkpoint(path) if path else None
    if checkpoint:
        config = checkpoint["config"]
        n_classes = len(checkpoint["model"]["out.weight"])
        parser.set_defaults(**{key: value for key, value in config.get("settings", {}).items() if key in RECIPE})
        parser.set_defaults(num_classes=n_classes, image_size=config.get("image_size", args.image_size))
        if args.resume and "optimizer" in checkpoint:
            parser.set_defaults(output_dir=args.resume.parent)
        args = parser.parse_args(argv)
        if args.num_classes != n_classes:
            raise UserError(f"--num_classes {args.num_classes}: {path} has {n_classes} classes; leave the flag out")
    if args.image_size < 32 or args.image_size % 32:
        raise UserError(f"--image_size {args.image_size}: expected a positive multiple of 32, such as 128 or 256")
    if args.num_classes > len(dataset.CLASSES):
        raise UserError(f"--num_classes {args.num_classes}: labels have ids 0..{len(dataset.CLASSES) - 1}; "
                        f"pass {len(dataset.CLASSES)}, or add classes to CLASSES in dataset.py")
    args.data_dir = Path("data/demo") if args.demo else Path(args.data_dir)
    args.output_dir = args.output_dir or Path("runs", datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    return args, checkpoint


def load_splits(args: Namespace, splits: tuple[str, ...], runtime: Runtime) -> dict[str, dataset.CompositeDataset]:
    """The composites of each split, in memory if they fit there."""
    n_composites = sum(len(dataset.list_composites(args.data_dir / split)) for split in splits)
    copies = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each process of this machine keeps its own
    needed = n_composites * 4 * args.image_size**2 * copies
    available = dataset.available_memory()
    cache = not args.no_cache
    if cache and available is not None and needed > 0.8 * available:
        cache = False
        runtime.log(f"Memory      {needed / 1e9:.2f} GB for the data, {available / 1e9:.2f} GB free: decoding on the fly (--no_cache)")
    loaded = {split: dataset.CompositeDataset(args.data_dir / split, args.image_size, args.num_classes, cache=cache,
                                              show_progress=runtime.rank == 0) for split in splits}
    runtime.log(f"Data        {' and '.join(f'{len(data):,} {split}' for split, data in loaded.items())} composites of {args.data_dir} at "
                f"{args.image_size}x{args.image_size}, " + (f"{needed / 1e9:.2f} GB in memory" if cache else "decoded on the fly"))
    return loaded


def make_loader(data: dataset.CompositeDataset, batch_size: int, sampler, args: Namespace, runtime: Runtime,
                drop_last: bool = False) -> DataLoader:
    """Batches of uint8 images and labels; the data set gathers a whole batch at once, so there is nothing to collate."""
    workers = 0 if data.cache else dataset.available_cpus() if args.num_workers is None else args.num_workers
    return DataLoader(data, batch_size, sampler=sampler, drop_last=drop_last, num_workers=workers, collate_fn=dataset.keep_batch,
                      pin_memory=runtime.device.type == "cuda", persistent_workers=workers > 0)


def make_val_loader(data: dataset.CompositeDataset, args: Namespace, runtime: Runtime) -> DataLoader:
    """Batches of this rank's share of a split: every image on exactly one rank, unlike DistributedSampler, which pads."""
    batch_size = CPU_EVALUATION_BATCH if runtime.device.type == "cpu" else EVALUATION_BATCH
    return make_loader(data, batch_size, range(runtime.rank, len(data), runtime.world_size), args, runtime)


def build_model(args: Namespace, checkpoint: dict | None, runtime: Runtime) -> models.EfficientSegNet:
    """The network on the CPU, from a checkpoint or from encoder weights and random decoders."""
    torch.manual_seed(args.seed)
    if checkpoint:
        return models.model_from_checkpoint(checkpoint, args.resume or args.evaluate, finetune_encoder=args.finetune_encoder)
    weights = args.encoder_weights if runtime.rank == 0 else "none"  # rank 0 alone downloads; share_weights hands its own on
    try:
        return models.EfficientSegNet(args.num_classes, weights, finetune_encoder=args.finetune_encoder)
    except models.WeightsError as error:
        if not (args.demo and weights == "imagenet"):
            raise
        runtime.log(f"Demo        goes on with random encoder weights: {error}")
        args.encoder_weights = "none"
        return models.EfficientSegNet(args.num_classes, "none", finetune_encoder=args.finetune_encoder)


def place_model(model: models.EfficientSegNet, args: Namespace, runtime: Runtime) -> models.EfficientSegNet:
    """The network on its device, sharing batch-norm statistics between GPUs if asked; UserError where torch cannot share them."""
    model.to(runtime.device, memory_format=torch.channels_last)
    if args.sync_batch_norm and runtime.device.type != "cuda":
        raise UserError(f"--sync_batch_norm: torch offers it on CUDA GPUs alone, and this is {runtime.device}; leave it out")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if args.sync_batch_norm and runtime.world_size > 1 else model


def build_optimizer(model: models.EfficientSegNet, args: Namespace, n_steps: int):
    """AdamW on the trainable parameters alone, and its schedule.

    The learning rate rises over the first WARMUP of all steps and then follows half a cosine to FINAL_LEARNING_RATE of the peak,
    reached at the run's last step: a run of few epochs gains most from its low end, and needs no patience or milestones to tune.
    It is a function of step / n_steps, so --resume with more epochs goes on along the curve of the longer run.
    """
    groups = [{"params": model.decoder_parameters(), "lr": args.learning_rate}]
    if args.finetune_encoder:
        groups.append({"params": model.encoder_parameters(), "lr": args.learning_rate * ENCODER_LEARNING_RATE})
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True)
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert trainable == {parameter for group in optimizer.param_groups for parameter in group["params"]}

    def factor(step: int) -> float:
        progress = min(step / n_steps, 1)
        if progress < WARMUP:
            return max(progress, 1 / n_steps) / WARMUP
        cosine = 0.5 + 0.5 * math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP))
        return FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def compile_model(model: nn.Module, args: Namespace, runtime: Runtime) -> nn.Module:
    """torch.compile, tried on one training step; the model itself where that fails."""
    state = copy.deepcopy(model.state_dict())  # the trial moves the decoders' batch-norm statistics
    images = torch.zeros((args.batch_size, 3, args.image_size, args.image_size), device=runtime.device)
    try:
        # reduce-overhead replays a step as one CUDA graph: at small batches the launches cost more than the arithmetic
        compiled = torch.compile(model, mode="reduce-overhead" if runtime.device.type == "cuda" else "default")
        with runtime.autocast():
            compiled(images.contiguous(memory_format=torch.channels_last)).float().sum().backward()
    except Exception as error:  # no compiler, no Triton, an operator without lowering: a dozen types, and none of them fatal
        runtime.log(f"Compile     not possible here ({str(error).strip().splitlines()[0][:120]}); going on without")
        compiled = model
    model.zero_grad()
    model.load_state_dict(state)
    return compiled


def build_class_weights(class_pixels: np.ndarray, args: Namespace, runtime: Runtime) -> Tensor:
    """How much a pixel of each class counts in the training loss, float32 (num_classes,).

    Args:
        class_pixels: pixels of each class in the training labels, int64 (num_classes,).
    """
    if args.finetune_encoder:
        weights = np.ones(args.num_classes)
        weights[metrics.BACKGROUND] = FINETUNE_BACKGROUND_WEIGHT
    else:
        weights = class_pixels.clip(min=1) ** CLASS_WEIGHT_POWER
        weights /= np.average(weights, weights=class_pixels)  # 1 on average, so that the loss keeps its scale
    return torch.tensor(weights, dtype=torch.float32, device=runtime.device)


def train_one_epoch(network: nn.Module, loader: DataLoader, optimizer, scheduler, scaler, class_weights: Tensor,
                    generator: torch.Generator | None, totals: metrics.SegmentationMetrics, bar: tqdm, runtime: Runtime) -> None:
    """One pass over the loader, augmented if there is a generator, counted in `totals` (its loss without the class weights) and shown
    by the bar.

    Raises:
        UserError: the loss is no longer a finite number.
    """
    network.train()
    losses = torch.zeros(len(loader), device=runtime.device)
    shown = time.monotonic()
    for step, batch in enumerate(loader):
        images, labels = dataset.split_batch(batch.to(runtime.device, non_blocking=True))
        images = dataset.normalize(images)
        if generator:
            images, labels = dataset.augment(images, labels, generator)
        with runtime.autocast():
            logits = network(images)
        pixel_losses = metrics.cross_entropy(logits, labels, reduction="none")
        scaler.scale((class_weights[labels.long()] * pixel_losses).mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        loss = losses[step] = pixel_losses.detach().mean()
        totals.update(logits.argmax(1), labels, loss)

        bar.update(len(images) * runtime.world_size)
        if time.monotonic() - shown > BAR_SECONDS or step + 1 == len(loader):
            check_losses(losses[: step + 1], scheduler)  # the host waits for the device here, and nowhere else
            figures = totals.compute()
            bar.set_postfix(loss=f"{figures['loss']:.3f}", dice=f"{figures['dice']:.3f}")
            shown = time.monotonic()


def check_losses(losses: Tensor, scheduler) -> None:
    """UserError with the first step whose loss is infinite or not a number."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        step = bad[0].item()
        raise UserError(f"the loss became {losses[step].item()} at step {step + 1} of the epoch (learning rate now "
                        f"{scheduler.get_last_lr()[0]:.2g}); try a tenth of --learning_rate, or --amp off. "
                        "The checkpoints of the epochs before are kept")


@torch.inference_mode()
def evaluate(network: nn.Module, loader: DataLoader, n_classes: int, runtime: Runtime) -> metrics.SegmentationMetrics:
    """The confusion matrix and loss of a split, each image counted once, summed over the ranks."""
    network.eval()
    totals = metrics.SegmentationMetrics(n_classes, runtime.device)
    for batch in loader:
        images, labels = dataset.split_batch(batch.to(runtime.device, non_blocking=True))
        with runtime.autocast():
            logits = network(dataset.normalize(images))
        totals.update(logits.argmax(1), labels, metrics.cross_entropy(logits, labels))
    totals.all_reduce()
    return totals


def describe_run(args: Namespace) -> dict:
    """What a checkpoint and config.json say beside the weights: plain types only."""
    return {
        "n_classes": args.num_classes,
        "image_size": args.image_size,
        "class_names": [entry.name for entry in dataset.CLASSES[: args.num_classes]],
        "class_colors": [list(entry.color) for entry in dataset.CLASSES[: args.num_classes]],
        "mean": list(dataset.MEAN),
        "std": list(dataset.STD),
        "settings": {name: value if isinstance(value := getattr(args, name), (bool, int, float)) else str(value) for name in RECIPE},
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "torchvision": torchvision.__version__},
    }


def restore(checkpoint: dict, optimizer, scheduler, scaler, steps_per_epoch: int, args: Namespace) -> None:
    """Bring optimizer, schedule and scaler to where the checkpoint's run was.

    The schedule's place is counted in epochs: with another number of processes an epoch has another number of steps.
    """
    try:
        peaks = scheduler.base_lrs
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        scheduler.base_lrs, scheduler.last_epoch = peaks, checkpoint["epoch"] * steps_per_epoch
        for group, peak, factor in zip(optimizer.param_groups, peaks, scheduler.lr_lambdas):
            group["lr"] = peak * factor(scheduler.last_epoch)
        scaler.load_state_dict(checkpoint["scaler"] if checkpoint["scaler"] and scaler.is_enabled() else scaler.state_dict())
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"--resume {args.resume}: its optimizer does not fit this run ({error}); leave the recipe's flags out, "
                        "--finetune_encoder above all, or pass a last.pth") from error
    if checkpoint["epoch"] >= args.num_epochs and all((args.output_dir / name).exists() for name in RUN_FILES):
        raise UserError(f"--resume {args.resume}: the run has finished its {checkpoint['epoch']} epochs; pass --num_epochs "
                        f"{checkpoint['epoch'] + 10}, say, to go on")


def fit(model: models.EfficientSegNet, data: dict, checkpoint: dict | None, args: Namespace, runtime: Runtime) -> None:
    """Train, and after each epoch score, save and then draw; at the end report on the best epoch."""
    # DistributedSampler adds the epoch to its seed; the factor keeps (seed 0, epoch 1) and (seed 1, epoch 0) apart.
    sampler = DistributedSampler(data["train"], runtime.world_size, runtime.rank, seed=args.seed * 1_000_003)
    # A left-over batch of one image would disturb the batch-norm statistics, and a compiled network would compile twice.
    loader = make_loader(data["train"], args.batch_size, sampler, args, runtime, drop_last=len(sampler) > args.batch_size)
    val_loader = make_val_loader(data["val"], args, runtime)
    optimizer, scheduler = build_optimizer(model, args, args.num_epochs * len(loader))
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp_dtype is torch.float16)
    class_weights = build_class_weights(data["train"].class_pixels, args, runtime)
    history, best_dice = [], -1.0
    if checkpoint and "optimizer" in checkpoint:
        restore(checkpoint, optimizer, scheduler, scaler, len(loader), args)
        history, best_dice = checkpoint["history"], checkpoint["best_dice"]
    share_weights(model, runtime)
    model.fold_encoder()
    network = compiled = compile_model(model, args, runtime) if args.compile else model
    if runtime.world_size > 1:
        network = DistributedDataParallel(compiled, broadcast_buffers=False)

    config = describe_run(args)
    if runtime.rank == 0:
        utils.write_json(args.output_dir / "config.json", config | {"runtime": str(runtime), "world_size": runtime.world_size})
    log_plan(model, len(loader), args, runtime)

    images_per_epoch = min(len(loader) * args.batch_size, len(sampler)) * runtime.world_size  # one short batch if there is but one
    started, first_epoch = time.monotonic(), len(history) + 1
    for epoch in range(first_epoch, args.num_epochs + 1):
        epoch_started = time.monotonic()
        sampler.set_epoch(epoch)
        seed = np.random.SeedSequence((args.seed, epoch, runtime.rank)).generate_state(1, np.uint64)[0] >> 1
        # With a frozen encoder augmentation only costs: flips 0.005 dice, with brightness and contrast 0.010, in runs at 128x128.
        generator = torch.Generator(runtime.device).manual_seed(int(seed)) if args.finetune_encoder else None
        totals = metrics.SegmentationMetrics(args.num_classes, runtime.device)
        with tqdm(total=images_per_epoch, desc=f"Epoch {epoch}/{args.num_epochs}", unit="image",
                  leave=False, disable=None if runtime.rank == 0 else True) as bar:
            train_one_epoch(network, loader, optimizer, scheduler, scaler, class_weights, generator, totals, bar, runtime)
        train_seconds = time.monotonic() - epoch_started
        totals.all_reduce()
        share_weights(model, runtime)  # batch-norm statistics differ between the ranks; rank 0's are saved and scored
        train_figures = totals.compute()
        val_figures = evaluate(compiled, val_loader, args.num_classes, runtime).compute()
        if not math.isfinite(val_figures["loss"]):
            raise UserError(f"the validation loss became {val_figures['loss']} in epoch {epoch}; try a tenth of --learning_rate, or "
                            "--amp off. The checkpoints of the epochs before are kept")
        history.append(history_row(epoch, scheduler.get_last_lr()[0], train_figures, val_figures, time.monotonic() - epoch_started,
                                   images_per_epoch / train_seconds))
        is_best = val_figures["dice"] > best_dice
        best_dice = max(best_dice, val_figures["dice"])
        if runtime.rank == 0:
            checkpoint = {"model": model.state_dict(), "epoch": epoch, "best_dice": best_dice, "config": config}
            progress = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "scaler": scaler.state_dict(),
                        "history": history}
            save_epoch(args.output_dir, checkpoint, progress, is_best)
        left = (time.monotonic() - started) / (epoch - first_epoch + 1) * (args.num_epochs - epoch)
        runtime.log(format_epoch(history[-1], args.num_epochs, is_best, left))

    report_best(model, compiled, data["val"], val_loader, args, runtime)


def history_row(epoch: int, learning_rate: float, train: dict, val: dict, seconds: float, images_per_second: float) -> dict:
    """A row of history.csv from an epoch's figures on both splits."""
    return {
        "epoch": epoch, "learning_rate": learning_rate, "train_loss": train["loss"], "train_dice": train["dice"], "val_loss": val["loss"],
        "val_dice": val["dice"], "val_mean_dice": val["mean_dice"], "val_mean_iou": val["mean_iou"], "seconds": seconds,
        "images_per_second": images_per_second,
    }


def log_plan(model: models.EfficientSegNet, n_steps: int, args: Namespace, runtime: Runtime) -> None:
    """What the run is about to do, in three lines, and the head of the table of epochs."""
    n_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    n_frozen = sum(parameter.numel() for parameter in model.parameters()) - n_trainable
    runtime.log(f"Model       {n_trainable:,} trainable and {n_frozen:,} frozen parameters, encoder weights: {args.encoder_weights}")
    runtime.log(f"Training    {args.num_epochs} epochs of {n_steps} steps, {args.batch_size} x {runtime.world_size} = "
                f"{args.batch_size * runtime.world_size} images a step, learning rate up to {args.learning_rate:g}, seed {args.seed}")
    runtime.log(f"Output      {args.output_dir}\n\n{EPOCH_HEADER}")


def report_best(model: models.EfficientSegNet, compiled: nn.Module, val: dataset.CompositeDataset, val_loader: DataLoader,
                args: Namespace, runtime: Runtime) -> None:
    """Score best.pth, print its table per class, and write what shows how it does; all ranks take part."""
    if runtime.rank == 0:
        best = models.load_checkpoint(args.output_dir / "best.pth")
        model.load_state_dict(best["model"])
        runtime.log(f"\nbest.pth, of epoch {best['epoch']}, on {args.data_dir / 'val'}:")
    share_weights(model, runtime)
    totals = evaluate(compiled, val_loader, args.num_classes, runtime)
    if runtime.rank == 0:
        rows = log_scores(totals, args, runtime)
        utils.write_csv(args.output_dir / "per_class.csv", rows)
        draw_results(model, val, totals, args, runtime)  # a compiled one would compile again for this batch size
        runtime.log("\nWritten:\n" + "\n".join(f"  {args.output_dir / name}" for name in RUN_FILES))


def save_epoch(output_dir: Path, checkpoint: dict, progress: dict, is_best: bool) -> None:
    """Write what an epoch leaves, the picture last. best.pth goes before last.pth: after a kill between them the epoch is done again."""
    if is_best:
        utils.write_checkpoint(output_dir / "best.pth", checkpoint)
    utils.write_checkpoint(output_dir / "last.pth", checkpoint | progress)
    utils.write_csv(output_dir / "history.csv", progress["history"])
    utils.plot_curves(progress["history"], output_dir / "curves.png")


def share_weights(model: nn.Module, runtime: Runtime) -> None:
    """Give every rank rank 0's parameters and batch-norm statistics."""
    if runtime.world_size > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


EPOCH_HEADER = "  epoch  learning rate  train loss   dice   val loss   dice  mean dice  mean IoU  images/s   time   left"


def format_epoch(row: dict, num_epochs: int, is_best: bool, left: float) -> str:
    """One aligned line an epoch under EPOCH_HEADER; a star marks the best epoch so far."""
    seconds, left = (str(timedelta(seconds=round(value))).removeprefix("0:") for value in (row["seconds"], left))
    return (f"{row['epoch']:>3}/{num_epochs:<3}  {row['learning_rate']:>12.2e}  {row['train_loss']:>10.4f} {row['train_dice']:>6.4f}"
            f"  {row['val_loss']:>9.4f} {row['val_dice']:>6.4f}{'*' if is_best else ' '} {row['val_mean_dice']:>9.4f}"
            f"  {row['val_mean_iou']:>8.4f}  {row['images_per_second']:>8.1f}  {seconds:>5}  {left:>5}")


def log_scores(totals: metrics.SegmentationMetrics, args: Namespace, runtime: Runtime) -> list[dict]:
    """Print the figures of a split, per class and together, and return the rows of per_class.csv."""
    per_class = {name: values.tolist() for name, values in totals.per_class().items()}
    n_pixels = sum(per_class["pixels"])
    rows = []
    runtime.log("class            dice     iou  accuracy  share of pixels")
    for i, entry in enumerate(dataset.CLASSES[: args.num_classes]):
        row = {name: values[i] for name, values in per_class.items()}
        rows.append({"class": entry.name, **row, "pixels": int(row["pixels"])})
        dice, iou, accuracy = (f"{row[name]:.4f}" if math.isfinite(row[name]) else "-" for name in ("dice", "iou", "accuracy"))
        runtime.log(f"{entry.name:<14} {dice:>6}  {iou:>6}  {accuracy:>8}  {row['pixels'] / n_pixels:>15.2%}")
    runtime.log("\n" + "  ".join(f"{name} {value:.4f}" for name, value in totals.compute().items()))
    return rows


def draw_results(model: nn.Module, val: dataset.CompositeDataset, totals: metrics.SegmentationMetrics, args: Namespace,
                 runtime: Runtime) -> None:
    """confusion_matrix.png, and predictions.png of a few samples spread over val/."""
    names = [entry.name for entry in dataset.CLASSES[: args.num_classes]]
    utils.plot_confusion_matrix(totals.confusion.cpu().numpy(), names, args.output_dir / "confusion_matrix.png")
    samples = np.linspace(0, len(val) - 1, min(PREDICTION_SAMPLES, len(val))).round().astype(int).tolist()
    images, labels = dataset.split_batch(val.__getitems__(samples))
    with torch.inference_mode(), runtime.autocast():
        predictions = model(dataset.normalize(images.to(runtime.device))).argmax(1).cpu()
    utils.plot_predictions(images.permute(0, 2, 3, 1).numpy(), labels.numpy(), predictions.numpy(), names, dataset.PALETTE,
                           args.output_dir / "predictions.png")


@contextlib.contextmanager
def interruptible(args: Namespace, runtime: Runtime) -> Iterator[None]:
    """End an interrupted run with the line that tells how to go on, and one without device memory with a smaller batch."""
    def stop(signal_number: int, frame) -> None:
        raise KeyboardInterrupt(signal.Signals(signal_number).name)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        last = args.output_dir / "last.pth"
        remedy = f"go on with: python train.py --resume {last}" if last.exists() else "no epoch was finished, so start again"
        if runtime.rank == 0:
            print(f"\nstopped by {interrupt.args[0] if interrupt.args else 'SIGINT'}; {remedy}", file=sys.stderr)
        raise SystemExit(128 + (signal.SIGTERM if interrupt.args else signal.SIGINT)) from interrupt
    except torch.OutOfMemoryError as error:
        remedy = f"--batch_size {args.batch_size // 2}" if args.batch_size > 1 else f"--image_size {args.image_size // 64 * 32}"
        raise UserError(f"{runtime.device} ran out of memory at --batch_size {args.batch_size}, --image_size {args.image_size}; "
                        f"try {remedy}") from error
    finally:
        signal.signal(signal.SIGTERM, previous)


def claim_output_dir(args: Namespace, resumed: bool) -> None:
    """Make the run's folder; UserError if another run lives there."""
    found = [name for name in RUN_FILES if (args.output_dir / name).exists()]
    if found and not resumed:
        raise UserError(f"--output_dir {args.output_dir} holds a run already ({found[0]}); choose another folder, or go on with it: "
                        f"--resume {args.output_dir / 'last.pth'}")
    utils.make_dir(args.output_dir, "--output_dir")


def main(argv: list[str] | None = None) -> None:
    """The command line; SystemExit with status 1 and one line on stderr for what a user can put right."""
    with utils.user_errors(dataset.DatasetError, models.WeightsError):
        args, checkpoint = parse_args(argv)
        runtime = Runtime.start(args.device, args.amp)
        with interruptible(args, runtime):
            runtime.log(f"Device      {runtime}")
            if checkpoint and "optimizer" not in checkpoint and (args.resume or not checkpoint["config"]):
                runtime.log(f"Checkpoint  {args.resume or args.evaluate} holds weights alone: class names and image size are the "
                            f"defaults{', and a new run starts from them' if args.resume else ''}")
            if args.demo:
                if runtime.rank == 0:
                    dataset.write_demo(args.data_dir)
                runtime.wait()
            data = load_splits(args, ("val",) if args.evaluate else ("train", "val"), runtime)
            model = place_model(build_model(args, checkpoint, runtime), args, runtime)
            if args.evaluate:
                model.fold_encoder()
                log_scores(evaluate(model, make_val_loader(data["val"], args, runtime), args.num_classes, runtime), args, runtime)
            else:
                if runtime.rank == 0:
                    claim_output_dir(args, resumed=checkpoint is not None and "optimizer" in checkpoint)
                fit(model, data, checkpoint, args, runtime)
            runtime.close()


if __name__ == "__main__":
    main()
