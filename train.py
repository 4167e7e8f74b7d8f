"""Train EfficientSegNet on street-scene composites: one process on a CPU or GPU, or one a GPU under torchrun.

The recipe is main() and what it calls, from the end of this file upwards. RUN_FILES names what a run leaves.
"""
import contextlib
import copy
import json
import math
import os
import platform
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from shlex import quote

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.utils.data import BatchSampler
from tqdm.auto import tqdm

import dataset
import metrics
import model as models
import utils
from dataset import Split
from utils import Runtime, SharedError, UserError

DEMO_DIR = Path(__file__).parent / "images" / "demo"
REPORT_FILES = ("predictions.png", "confusion_matrix.png", "per_class.csv")  # how best.pth does
RUN_FILES = ("config.json", "history.csv", "curves.png", *REPORT_FILES, "best.pth", "last.pth")
RECIPE = ("num_epochs", "batch_size", "learning_rate", "num_classes", "data_dir", "demo", "image_size",
          "encoder_weights", "finetune_encoder", "amp", "seed", "no_cache")  # what a checkpoint remembers
OWN_ENTRIES = {"settings", "image_size", "class_names", "class_colors"}  # by them a config is known
EVALUATION_FLAGS = {"evaluate", "data_dir", "demo", "num_classes", "image_size", "num_workers", "device",
                    "amp", "flip"}
WEIGHT_DECAY = 0.01  # AdamW's default
ENCODER_LEARNING_RATE = 0.3  # of the decoders', for --finetune_encoder: its features are good already
WARMUP = 0.05  # of all steps: fresh decoders behind trained features get large, useless gradients at first
AVERAGED = 0.3  # share of the steps so far: the average settles, so the learning rate need not fall
EVALUATION_BATCH = {"cpu": 4, "cuda": 16, "mps": 16}  # at 256x256; larger ones leave a CPU's caches
PREDICTION_SAMPLES = 4  # rows of predictions.png
BAR_SECONDS = 1.0  # how often the host waits for the device to show loss and dice
GRAPH_WARMUP = 3  # steps before a CUDA graph is captured: cuDNN chooses kernels, AdamW makes its state
MEMORY_SHARE = 0.8  # of the free memory that features may take
READ_SHARE = 0.5  # that images and labels may take: labels are there twice while they are put together


# --- Arguments ----------------------------------------------------------------------------------------------


EXAMPLES = """examples:
  python train.py --demo                                        synthetic scenes, no download
  python train.py --data_dir data/cityscapes_data               the defaults on the real composites
  python train.py --resume runs/x/last.pth                      go on after an interruption, flags as before
  python train.py --resume runs/x/last.pth --num_epochs 60      go on for longer
  python train.py --resume runs/x/best.pth --finetune_encoder   a new run from these weights
  python train.py --evaluate runs/x/best.pth                    score a checkpoint on val/
  torchrun --nproc_per_node=8 train.py --batch_size 4           eight GPUs, 32 images a step"""


def get_args_parser() -> utils.ArgumentParser:
    parser = utils.ArgumentParser(description=__doc__.split("\n")[0], epilog=EXAMPLES)
    recipe = parser.add_argument_group("recipe (--resume remembers these; a flag given with --resume wins)")
    data = recipe.add_mutually_exclusive_group()
    data.add_argument("--data_dir", type=Path, default=Path("data/cityscapes_data"), metavar="FOLDER",
                      help="holds train/ and val/ with composites, %(default)s if left out")
    data.add_argument("--demo", action="store_true", help="the synthetic street scenes in images/demo")
    add = recipe.add_argument
    add("--num_epochs", type=utils.whole_number(1, 10**6), default=30, metavar="N",
        help="passes over train/, %(default)s if left out")
    add("--batch_size", type=utils.whole_number(1), default=4, metavar="N",
        help="images a step in each process, %(default)s if left out")
    add("--learning_rate", type=utils.positive_float, default=3e-3, metavar="RATE",
        help=f"AdamW's, reached after {WARMUP:.0%}% of the steps and then kept, %(default)s if left out")
    n_classes = len(dataset.CLASSES)
    add("--num_classes", type=utils.whole_number(2, n_classes), default=n_classes, metavar="N",
        help="ids in the labels are below this, at most and if left out %(default)s")
    add("--image_size", type=utils.whole_number(32, 8192, multiple=32), default=256, metavar="PIXELS",
        help="side of the square that photos are resized to, a multiple of 32, %(default)s if left out")
    add("--finetune_encoder", action="store_true",
        help=f"train the encoder too, at {ENCODER_LEARNING_RATE} of the learning rate, in every step")
    add("--encoder_weights", default="imagenet", metavar="imagenet|none|FILE",
        help="torchvision's download (if left out), random, or an efficientnet_b0 state_dict")
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto",
        help="mixed precision; auto (if left out) takes what the device is fast at")
    add("--seed", type=utils.whole_number(0, 2**63 - 1), default=0, metavar="N",
        help="of weights, shuffle and augmentation, %(default)s if left out")
    add("--no_cache", action="store_true",
        help="keep nothing in memory: decode and encode in every step; chosen by itself if memory is short")
    run = parser.add_argument_group("run")
    mode = run.add_mutually_exclusive_group()
    mode.add_argument("--resume", type=Path, metavar="FILE",
                      help="continue the run of a last.pth, or start a new one from another file's weights")
    mode.add_argument("--evaluate", type=Path, metavar="FILE", help="score this on val/, train nothing")
    add = run.add_argument
    add("--flip", action="store_true",
        help="with --evaluate: average with the mirrored photo, at twice the time")
    add("--output_dir", type=Path, metavar="FOLDER", help="a new folder, runs/<date-time> if left out")
    add("--num_workers", type=utils.whole_number(0, 512), default=utils.available_cpus(), metavar="N",
        help="processes that read composites, at the start and, with --no_cache, in every step; one a core "
             "(%(default)s) if left out")
    add("--device", type=utils.device_name, default="auto", metavar="auto|cpu|cuda|cuda:N|mps",
        help="auto (if left out) prefers a GPU")
    add("--compile", action="store_true",
        help="torch.compile: a minute or two at the start, less time a step on some machines")
    return parser


def parse_args(argv: Sequence[str] | None) -> tuple[Namespace, dict | None]:
    """The flags, and the checkpoint of --resume or --evaluate: its recipe takes the place of the defaults.

    args.continues says whether its run goes on; weights alone start a new run or are scored.
    """
    dataset.project_decoder()  # is the class table sound?
    parser = get_args_parser()
    defaults = vars(parser.parse_args([]))
    parsed = vars(parser.parse_args(argv, Namespace(**dict.fromkeys(defaults))))  # None for what is left out
    given = {name: value for name, value in parsed.items() if value is not None}
    if "evaluate" in given and (useless := given.keys() - EVALUATION_FLAGS):
        parser.error(f"--{min(useless)} changes nothing with --evaluate; leave it out")
    if "resume" in given and "encoder_weights" in given:
        parser.error("--encoder_weights changes nothing with --resume FILE, which holds it; leave it out")
    if "flip" in given and "evaluate" not in given:
        parser.error("--flip belongs to --evaluate; leave it out")
    path, checkpoint, remembered = given.get("resume") or given.get("evaluate"), None, {}
    if path:
        checkpoint = models.load_checkpoint(path)
        if not is_own(checkpoint["config"]):
            checkpoint["config"] = {}
        remembered = recall_recipe(checkpoint, path)
    if "data_dir" in given or "demo" in given:  # either wins over both that are remembered
        remembered |= {"data_dir": defaults["data_dir"], "demo": False}
    args = Namespace(**defaults | remembered | given)
    args.data_dir = DEMO_DIR if args.demo else Path(args.data_dir)
    args.continues = False
    if checkpoint:
        has_state = {"optimizer", "history"} <= checkpoint.keys()
        args.continues = bool(args.resume and checkpoint["config"] and has_state)
        check_checkpoint(checkpoint, path, args)
    return args, checkpoint


def recall_recipe(checkpoint: dict, path: Path) -> dict:
    """The flags that a checkpoint remembers."""
    settings = checkpoint["config"].get("settings", {"encoder_weights": f"those of {path}"})
    remembered = {name: value for name, value in settings.items() if name in RECIPE}
    return remembered | {"num_classes": len(checkpoint["model"]["out.weight"])}


def is_own(config: object) -> bool:
    """Whether this program wrote a config; the entries of another's may mean anything."""
    return isinstance(config, dict) and OWN_ENTRIES <= config.keys()


def check_checkpoint(checkpoint: dict, path: Path, args: Namespace) -> None:
    """UserError if a checkpoint's class ids mean something else here, or its run cannot be continued."""
    config, n_classes = checkpoint["config"], len(checkpoint["model"]["out.weight"])
    if args.num_classes != n_classes:
        raise UserError(f"--num_classes {args.num_classes}: {path} has {n_classes} classes; "
                        "leave the flag out")
    dataset.check_classes(config.get("class_names", []), config.get("class_colors", []), path)
    if n_classes > len(dataset.CLASSES):
        raise UserError(f"{path} has {n_classes} classes, and CLASSES in dataset.py "
                        f"{len(dataset.CLASSES)}; add what is missing there")
    if not args.continues:
        return
    if not {"best", "average"} <= checkpoint.keys():
        raise UserError(f"--resume {path}: an older version of this program wrote it; start a new run from "
                        "its weights: --resume the best.pth beside it")
    own = path.resolve()
    in_own_folder = not args.output_dir or args.output_dir.resolve() == own.parent
    if in_own_folder and own.name != "last.pth":
        raise UserError(f"--resume {path}: only a last.pth goes on in its own folder; pass --output_dir")
    unreported = in_own_folder and not all((own.parent / name).is_file() for name in RUN_FILES)
    if checkpoint["epoch"] >= args.num_epochs and not unreported:
        raise UserError(f"--resume {path}: the run has finished its {checkpoint['epoch']} epochs; pass "
                        f"--num_epochs {checkpoint['epoch'] + 10}, say, to go on")


# --- Data ---------------------------------------------------------------------------------------------------


def load_splits(names: Sequence[str], args: Namespace, runtime: Runtime) -> dict[str, Split]:
    """This process's share of train/ and val/, read and checked, kept in memory if all shares fit there.

    DatasetError without composites; SharedError if they are fewer than processes, one in any process's share
    is bad, or all are background.
    """
    folder, splits = args.data_dir, {}
    paths = {name: dataset.list_composites(folder / name) for name in names}
    for name in names:
        if name == "train" and len(paths[name]) < runtime.world_size:
            raise SharedError(f"{folder / name} holds {len(paths[name])} composites for {runtime.world_size} "
                              "processes; start fewer")
        share = paths[name][runtime.rank :: runtime.world_size]
        composites = dataset.CompositeDataset(share, args.image_size, args.num_classes,
                                              resize_labels=name == "train")
        splits[name] = Split(composites, args.num_workers)
    own = sum(split.composites.kept_bytes() for split in splits.values())
    room = READ_SHARE * utils.memory_share()
    fits, needed = all(runtime.gather(own < room)), sum(runtime.gather(own))
    for name, split in splits.items():
        with progress(f"Reading {name}", len(split), runtime) as bar:
            own_problems = split.read(fits and not args.no_cache, bar)
        problems = sum(runtime.gather(own_problems), [])
        if problems:
            others = f" (and {len(problems) - 1} other composites have problems)" if len(problems) > 1 else ""
            raise SharedError(problems[0] + others)
        if not any(runtime.gather(split.has_foreground)):
            raise SharedError(f"{folder / name}: every pixel of its labels is {dataset.CLASSES[0].name}; are "
                              "they labels in the colours of CLASSES in dataset.py?")
    how = ("decoded in every step" if args.no_cache else f"{needed / 1e9:.2f} GB in memory" if fits
           else f"decoded in every step, for {needed / 1e9:.2f} GB do not fit in memory")
    counts = " and ".join(f"{len(paths[name]):,} {name}" for name in names)
    runtime.log(f"Data        {counts} composites of {folder} at {args.image_size}x{args.image_size}, {how}")
    return splits


def progress(what: str, total: int, runtime: Runtime) -> tqdm:
    """A bar on rank 0."""
    return utils.progress_bar(desc=what, total=total, unit="image", disable=runtime.rank > 0)


def keep_features(trainer: "Trainer", splits: dict[str, Split], batch_size: int,
                  earlier: list | None) -> list | None:
    """Encode both splits once and keep the features, if possible as `earlier`, before a resume.

    Returns [device, dtype] of the features, or None where they fit nowhere: the encoder runs in every step.
    """
    runtime, n_images = trainer.runtime, sum(map(len, splits.values()))
    like = trainer.encode(splits["train"].images[:1])
    needed, computed = n_images * sum(one.nbytes for one in like), like[0].dtype
    free = {"cpu": MEMORY_SHARE * utils.memory_share()}
    if runtime.device.type == "cuda":
        peak = trainer.trial_peak(like, batch_size)
        labels = sum(split.labels.nbytes for split in splits.values() if isinstance(split.labels, Tensor))
        free = {"cuda": max(MEMORY_SHARE * (torch.cuda.mem_get_info()[0] - peak) - labels, 0)} | free
    everywhere = runtime.gather(dataset.storage_options(needed, computed, free))
    options = [option for option in everywhere[0] if all(option in others for others in everywhere)]
    gigabytes = sum(runtime.gather(needed)) / 1e9
    if not options:
        runtime.log(f"Features    {gigabytes:.2f} GB fit nowhere: the encoder runs in every step")
        return None
    device, dtype = chosen = earlier if earlier in options else options[0]
    like = [one.to(runtime.device if device == "cuda" else "cpu", getattr(torch, dtype)) for one in like]
    where = "GPU memory" if device == "cuda" else "host memory"
    if device == "cpu" and "cuda" in free:
        where += f", for the GPU has {free['cuda'] / 1e9:.2f} GB to spare"
    if like[0].dtype != computed:
        gigabytes /= 2
        where += f", half of what {computed} takes, which does not fit"
    runtime.log(f"Features    {gigabytes:.2f} GB as {dtype} in {where}")
    with progress("Encoding", n_images, runtime) as bar:
        for split in splits.values():
            split.keep_features(trainer.encode, like, bar)
    return chosen


# --- One step -----------------------------------------------------------------------------------------------


def learning_rate_factor(done: float) -> float:
    """The learning rate as a share of --learning_rate, from the share of all steps done with this one, 0..1.

    It rises over the first WARMUP of the steps and stays: what is scored is an average of weights, and needs
    no low rate at the end to settle (after Izmailov et al., 2018, arXiv:1803.05407).
    """
    return min(done / WARMUP, 1.0)


@contextlib.contextmanager
def fastest_kernels() -> Iterator[None]:
    """cuDNN tries its kernels on every new shape, which can pay in training alone: batches have one shape."""
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False


class Trainer:
    """A network and all that its training changes: optimizer, loss scaler, place in the schedule, figures.

    Attributes:
        average: what is scored and used: weights and batch-norm statistics, by name, averaged over the last
            AVERAGED of the steps so far (after Shamir and Zhang, 2013, arXiv:1212.1824).

    Args:
        network: on the runtime's device, with its weights; the same on every rank.
        learning_rate: the decoders', once warm.
        n_steps: of the whole run.
    """

    def __init__(self, network: models.EfficientSegNet, learning_rate: float, n_steps: int,
                 runtime: Runtime) -> None:
        self.network, self.runtime, self.n_steps, self.steps_done = network, runtime, n_steps, 0
        self.encoder = network
        if not network.finetune_encoder:
            self.encoder = models.fold_batch_norms(copy.deepcopy(network))
        self.decode = network.decode
        self.generator: torch.Generator | None = None  # of augmentation
        self.learning_rate = 0.0  # the decoders', in the last step
        self.scores = metrics.SegmentationMetrics(network.out.out_channels, runtime.device)
        self.trained = {key: value for key, value in network.state_dict().items() if value.is_floating_point()
                        and (network.finetune_encoder or not key.startswith("encoder"))}
        self.average = {key: value.clone() for key, value in self.trained.items()}
        self.averaging_rate = torch.tensor(0.0, device=runtime.device)
        self.peaks, parameters = [learning_rate], [network.decoder_parameters()]
        if network.finetune_encoder:
            self.peaks.append(learning_rate * ENCODER_LEARNING_RATE)
            parameters.append(network.encoder_parameters())
        cuda = runtime.device.type == "cuda"
        groups = [{"params": some, "lr": torch.tensor(0.0, device=runtime.device)} for some in parameters]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True, capturable=cuda)
        self.parameters = sum(parameters, [])
        assert set(self.parameters) == {one for one in network.parameters() if one.requires_grad}
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp_dtype is torch.float16)
        # No host in between: on one GPU a step can be one launch instead of hundreds.
        one_launch = cuda and runtime.world_size == 1
        self.update = CudaGraph(self._update, runtime) if one_launch else self._update

    def step(self, inputs: Tensor | Sequence[Tensor], labels: Tensor) -> None:
        """One training step, whose figures are added to `self.scores`.

        `inputs` are uint8 images (B, 3, S, S) or the encoder's five feature maps, `labels` uint8 (B, S, S).
        """
        self.steps_done += 1
        factor = learning_rate_factor(self.steps_done / self.n_steps)
        self.learning_rate = self.peaks[0] * factor
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"].fill_(peak * factor)
        self.averaging_rate.fill_(1 / max(AVERAGED * self.steps_done, 1))
        if isinstance(inputs, Tensor):
            if self.generator:
                inputs, labels = dataset.augment(inputs, labels, self.generator)
            inputs = [inputs] if self.network.finetune_encoder else self.encode(inputs)
        self.update(*inputs, labels)

    def encode(self, images: Tensor) -> list[Tensor]:
        """Features of images (B, 3, S, S) of 0..255, on the device; outside autograd unless fine-tuned."""
        images = dataset.normalize(dataset.move(images, self.runtime.device))
        with self.runtime.autocast():
            return self.encoder.encode(images)

    def _update(self, *tensors: Tensor) -> None:
        """What a step does on the device, from features and labels; if the encoder trains, from images."""
        *inputs, labels = tensors
        self.optimizer.zero_grad(set_to_none=True)
        features = self.encode(*inputs) if self.network.finetune_encoder else inputs
        logits = decode_kept(self.decode, features, self.runtime)
        loss, cross_entropy, predictions = metrics.segmentation_loss(logits, labels)
        self.scaler.scale(loss).backward()
        self.average_gradients()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for key, average in self.average.items():
            average.lerp_(self.trained[key], self.averaging_rate)
        self.scores.update(predictions, labels, cross_entropy)

    def fold(self, tensors: dict[str, Tensor]) -> models.EfficientSegNet:
        """A copy of the network for evaluation, with these in place of what is trained."""
        stages = [] if self.network.finetune_encoder else self.network.encoder_stages()
        folded = {id(ours): theirs for ours, theirs in zip(stages, self.encoder.encoder_stages())}
        network = copy.deepcopy(self.network, folded)  # takes over a frozen encoder's stages, folded once
        network.load_state_dict({key: tensors[key] for key in self.trained}, strict=False)
        return models.fold_batch_norms(network)

    def average_gradients(self) -> None:
        """Over all ranks, in one exchange."""
        if self.runtime.world_size > 1:
            gradients = [parameter.grad for parameter in self.parameters]
            flat = torch.cat([one.flatten() for one in gradients])
            dist.all_reduce(flat)
            flat /= self.runtime.world_size
            for one, part in zip(gradients, flat.split([one.numel() for one in gradients])):
                one.copy_(part.view_as(one))

    @fastest_kernels()
    def trial_peak(self, like: Sequence[Tensor], batch_size: int) -> int:
        """Bytes of GPU memory that a step takes beside what is there, tried on a copy of the network."""
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        twin = Trainer(copy.deepcopy(self.network), 1.0, 1, self.runtime)
        _, _, H, W = like[0].shape
        labels = torch.zeros((batch_size, 4 * H, 4 * W), dtype=torch.uint8, device=self.runtime.device)
        twin._update(*(one.expand(batch_size, -1, -1, -1) for one in like), labels)
        peak = torch.cuda.max_memory_allocated() - before
        torch.cuda.empty_cache()  # so that what is free can be read off the driver
        return peak

    def compile_decode(self, image_size: int, batch_size: int) -> None:
        """torch.compile, tried on one pass; a line says if it is not possible."""
        images = torch.zeros((batch_size, 3, image_size, image_size), dtype=torch.uint8)
        state = copy.deepcopy(self.network.state_dict())
        features = self.encode(images)
        try:
            compiled = torch.compile(self.network.decode)
            with self.runtime.autocast():
                compiled(features).float().sum().backward()
            self.decode = compiled
        except Exception as error:  # no compiler, no Triton, an operator without lowering: none is fatal
            self.runtime.log(f"Compile     not possible here ({utils.first_line(error)}); going on without")
        self.network.load_state_dict(state)  # the trial moved batch-norm statistics

    def state_dict(self) -> dict:
        """What last.pth keeps of it."""
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "average": self.average}

    def load_state_dict(self, state: dict, steps_done: int) -> None:
        """Go on from a state_dict(), at this step of this run's schedule.

        KeyError, TypeError or ValueError if the state is of another kind of run.
        """
        self.network.load_state_dict(state["model"])
        for key, average in self.average.items():
            average.copy_(state["average"][key])
        own = [{key: group[key] for key in ("lr", "fused", "capturable")}
               for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, kept in zip(self.optimizer.param_groups, own):
            group.update(kept)  # of this device
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.steps_done = steps_done


def decode_kept(decode: Callable, features: Sequence[Tensor], runtime: Runtime) -> Tensor:
    """Logits of features, which a network in float32 may have kept as float16."""
    if not runtime.amp_dtype:
        features = [one.float() if one.dtype == torch.float16 else one for one in features]
    with runtime.autocast():
        return decode(features)


class CudaGraph:
    """A function of tensors whose shapes never change, replayed as one CUDA graph after its first calls.

    What it changes elsewhere (weights, optimizer state, figures) it changes in place. Where it cannot be
    captured it is called as it is, and a line says so.
    """

    def __init__(self, function: Callable[..., None], runtime: Runtime) -> None:
        self.function, self.runtime, self.calls, self.graph, self.static = function, runtime, 0, None, ()
        self.stream = torch.cuda.Stream()

    def __call__(self, *tensors: Tensor) -> None:
        self.calls += 1
        if self.calls == GRAPH_WARMUP + 1:
            self.capture(tensors)
        if self.graph:
            for static, tensor in zip(self.static, tensors):
                static.copy_(tensor)
            self.graph.replay()
        else:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # a capture is warmed up on another stream than the default
                self.function(*tensors)
            torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, tensors: Sequence[Tensor]) -> None:
        """Record the function; nothing is computed yet."""
        graph, self.static = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in tensors]
        try:
            # A thread that reads may go on meanwhile; a capture that fails would leave its own stream behind.
            with torch.cuda.stream(torch.cuda.current_stream()), \
                    torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.function(*self.static)
            self.graph = graph
        except RuntimeError as error:
            self.runtime.log(f"CUDA graph  not possible here ({utils.first_line(error)}); going on without")


# --- What a run leaves --------------------------------------------------------------------------------------


def describe_run(args: Namespace, runtime: Runtime) -> dict:
    """What checkpoints and config.json say beside the weights, in plain types. DatasetError without val/."""
    classes = dataset.CLASSES[: args.num_classes]
    scored = dataset.list_composites(args.data_dir / "val")
    return {
        "n_classes": args.num_classes,
        "image_size": args.image_size,
        "class_names": [str(entry.name) for entry in classes],  # numpy has subclasses of str
        "class_colors": [list(map(int, entry.color)) for entry in classes],
        "void_colors": [list(map(int, color)) for color in dataset.VOID_COLORS.values()],
        "mean": list(dataset.MEAN), "std": list(dataset.STD),
        "settings": {name: getattr(args, name) for name in RECIPE} | {"data_dir": str(args.data_dir)},
        "scored_on": {path.name: os.path.getsize(path) if os.path.isfile(path) else None for path in scored},
        "loss": metrics.LOSS,
        "features": None,  # [device, dtype] where they are kept
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__),
                     "torchvision": torchvision.__version__},
        "runtime": str(runtime),
        "world_size": runtime.world_size,
    }


@contextlib.contextmanager
def claimed_folder(args: Namespace, config: dict) -> Iterator[Path]:
    """The run's folder, which belongs to this process while the context lasts.

    A run that ends before its first epoch removes what it wrote. UserError if another run lives there or
    nothing can be written there.
    """
    own = args.resume.resolve().parent if args.continues else None
    folder = args.output_dir or own
    made = not (folder and os.path.exists(folder))
    if not folder:
        folder = utils.make_new_dir(Path("runs", datetime.now().strftime("%Y-%m-%d_%H-%M-%S")))
    if folder.resolve() in [(args.data_dir / name).resolve() for name in ("train", "val")]:
        raise UserError(f"--output_dir {folder}: the composites lie there; choose another folder")
    with utils.locked_dir(folder, "--output_dir") as locked, contextlib.ExitStack() as at_end:
        if made:
            at_end.callback(utils.remove_if_empty, folder)
        present = [name for name in RUN_FILES if (folder / name).exists()]
        goes_on = folder.resolve() == own
        abandoned = False  # alone, its config.json was left by a run killed before its first epoch's end
        if locked and present == ["config.json"]:
            with contextlib.suppress(OSError, ValueError):
                abandoned = is_own(json.loads((folder / "config.json").read_bytes()))
        if present and not goes_on and not abandoned:
            remedy = (f"go on with it: --resume {quote(str(folder / 'last.pth'))}" if "last.pth" in present
                      else "remove that file")
            raise UserError(f"--output_dir {folder} holds a run already ({present[-1]}); "
                            f"choose another folder, or {remedy}")
        for name in RUN_FILES:  # what a process that was killed was writing
            utils.remove(folder.glob(f".{name}.*{utils.TEMPORARY_SUFFIX}"))
        if not present:
            utils.write_file(folder / "config.json", as_json(config), exclusive=True)
        try:
            yield folder
        except KeyboardInterrupt as interrupt:
            if (folder / "last.pth").exists():
                remedy = f"go on with it: --resume {quote(str(folder / 'last.pth'))}"
                interrupt.__notes__ = [remedy]  # add_note came with Python 3.11
            raise
        finally:
            if not goes_on and not (folder / "last.pth").exists():
                utils.remove(folder / name for name in RUN_FILES)


def as_json(content: dict) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


class Run:
    """One run's claimed folder and what the run has reached; on ranks other than 0 it writes nothing."""

    def __init__(self, folder: Path | None, config: dict, runtime: Runtime) -> None:
        self.folder, self.config, self.runtime = folder, config, runtime
        self.history: list[dict] = []
        self.best = {"model": {}, "epoch": 0, "best_dice": -1.0, "config": config}  # as best.pth holds it

    def restore(self, checkpoint: dict, path: Path) -> None:
        """Take over what a last.pth says of the epochs before. UserError if no best epoch can come of it."""
        self.history, best = checkpoint["history"], checkpoint["best"]
        measure = ("scored_on", "class_names", "class_colors", "void_colors", "image_size")
        if all(checkpoint["config"].get(key) == self.config[key] for key in measure):
            model = checkpoint["model"] | checkpoint["average"] | best["model"]
            self.best |= {key: checkpoint[key] for key in ("best_dice", "config")} | best | {"model": model}
            self.write(utils.write_checkpoint, "best.pth", self.best)
        elif checkpoint["epoch"] >= self.config["settings"]["num_epochs"]:
            raise UserError(f"--resume {path}: the run has finished its {checkpoint['epoch']} epochs, and "
                            "was scored on other data; pass more --num_epochs, or its --data_dir")
        else:
            self.runtime.log("Resume      what scores are measured on has changed: "
                             "the best epoch is sought anew")

    def save_epoch(self, trainer: Trainer, row: dict) -> bool:
        """Write what an epoch leaves, the pictures last, and return whether it is the best so far.

        best.pth goes before last.pth: after a kill between them the epoch is done again.
        """
        self.history.append(row)
        state = trainer.state_dict()
        scored = state["model"] | state["average"]
        is_best = row["val_dice"] > self.best["best_dice"]
        if is_best:
            copied = {key: value.cpu().clone() for key, value in scored.items()}
            self.best |= {"model": copied, "epoch": row["epoch"], "best_dice": row["val_dice"],
                          "config": self.config}
            self.write(utils.write_checkpoint, "best.pth", self.best)
        if self.runtime.rank == 0:
            if is_best:  # what an earlier end of this run said of another best.pth
                utils.remove(self.folder / name for name in REPORT_FILES)
            differing = {key: value for key, value in self.best["model"].items()
                         if not torch.equal(value, scored[key].cpu())}
            self.write(utils.write_checkpoint, "last.pth", state | {
                "epoch": row["epoch"], "best_dice": self.best["best_dice"], "history": self.history,
                "config": self.config, "best": self.best | {"model": differing}})
            self.write(utils.write_file, "config.json", as_json(self.config))
            self.write_history()
        return is_best

    def write_history(self) -> None:
        self.write(utils.write_csv, "history.csv", self.history)
        curves = utils.plot_curves(self.history, self.config["image_size"])
        self.write(utils.save_figure, "curves.png", curves)

    def write(self, write: Callable, name: str, content: object) -> None:
        """Write one of RUN_FILES. Only a checkpoint that cannot be written ends the run."""
        try:
            if self.runtime.rank == 0:
                write(self.folder / name, content)
        except UserError as error:
            if name.endswith(".pth"):
                raise
            utils.say(f"warning: {error}; the run goes on", "stderr")


# --- Epochs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a run goes through its data; the same on every rank."""

    num_epochs: int
    batch_size: int
    steps: int  # an epoch, as many as the smallest share of the data has batches
    seed: int

    @classmethod
    def make(cls, args: Namespace, n_images: int, runtime: Runtime) -> "Plan":
        """For so many training images in all; a batch is no larger than a rank's share."""
        smallest = n_images // runtime.world_size
        batch_size = min(args.batch_size, smallest)
        return cls(args.num_epochs, batch_size, smallest // batch_size, args.seed)

    def generator(self, epoch: int, rank: int, device: torch.device | str = "cpu") -> torch.Generator:
        """The same for an epoch that a run reaches in one go or resumed."""
        seeds = np.random.SeedSequence((self.seed, epoch, rank)).generate_state(1, np.uint64)
        return torch.Generator(device).manual_seed(int(seeds[0] >> 1))

    def batches(self, n_images: int, epoch: int, rank: int) -> list[list[int]]:
        """The indices of each batch of an epoch; those left over are others in each epoch."""
        order = torch.randperm(n_images, generator=self.generator(epoch, rank)).tolist()
        return list(BatchSampler(order, self.batch_size, drop_last=True))[: self.steps]


def fit(trainer: Trainer, plan: Plan, splits: dict[str, Split], run: Run) -> None:
    """Train, and after each epoch score, save and then draw."""
    runtime, network = trainer.runtime, trainer.network
    images_per_epoch = plan.steps * plan.batch_size * runtime.world_size
    for epoch in range(len(run.history) + 1, plan.num_epochs + 1):
        started = time.monotonic()
        if network.finetune_encoder:
            trainer.generator = plan.generator(epoch, runtime.rank, runtime.device)
        order = plan.batches(len(splits["train"]), epoch, runtime.rank)
        with progress(f"Epoch {epoch}/{plan.num_epochs}", images_per_epoch, runtime) as bar:
            train = train_one_epoch(trainer, splits["train"].batches(order, runtime.device), epoch, bar)
        train_seconds = time.monotonic() - started
        for weights in (network.state_dict(), trainer.average):
            share_weights(weights, runtime)  # batch-norm statistics differ between ranks; rank 0's count
        val = evaluate(trainer.fold(trainer.average), splits["val"], runtime).compute()
        check_loss(val["loss"], "validation loss", epoch, trainer)
        row = {"epoch": epoch, "learning_rate": trainer.learning_rate,
               "train_loss": train["loss"], "train_dice": train["dice"],
               **{f"val_{name}": val[name] for name in ("loss", "dice", "mean_dice", "mean_iou")},
               "seconds": time.monotonic() - started,
               "images_per_second": images_per_epoch / train_seconds}
        is_best = run.save_epoch(trainer, row)
        runtime.log(format_epoch(row, plan.num_epochs, is_best))


@fastest_kernels()
def train_one_epoch(trainer: Trainer, batches: Iterator[tuple], epoch: int, bar: tqdm) -> dict[str, float]:
    """One pass over the batches, shown by the bar; the figures over all ranks. UserError as in check_loss."""
    trainer.network.train()
    trainer.scores.reset()
    shown = time.monotonic()
    for inputs, labels in batches:
        trainer.step(inputs, labels)
        bar.update(len(labels) * trainer.runtime.world_size)
        if time.monotonic() - shown > BAR_SECONDS:  # the host waits for the device here, and nowhere else
            figures = trainer.scores.compute()
            if trainer.runtime.world_size == 1:  # several ranks check together, at the epoch's end
                check_loss(figures["loss"], "loss", epoch, trainer)
            bar.set_postfix(loss=f"{figures['loss']:.3f}", dice=f"{figures['dice']:.3f}")
            shown = time.monotonic()
    trainer.scores.all_reduce()
    figures = trainer.scores.compute()
    check_loss(figures["loss"], "loss", epoch, trainer)
    return figures


def check_loss(loss: float, what: str, epoch: int, trainer: Trainer) -> None:
    """SharedError if a loss, the same on all ranks, is infinite or not a number."""
    if not math.isfinite(loss):
        kept = ". The checkpoints of the epochs before are kept" if epoch > 1 else ""
        raise SharedError(f"the {what} became {loss} in epoch {epoch}, at step {trainer.steps_done} of the "
                          f"run or before (learning rate {trainer.learning_rate:.2g}); try a tenth of "
                          f"--learning_rate, or --amp off{kept}")


@torch.inference_mode()
def evaluate(network: nn.Module, split: Split, runtime: Runtime,
             flip: bool = False) -> metrics.SegmentationMetrics:
    """The confusion matrix and loss of a split at its composites' own size, each image once, over all ranks.

    The network is as fold_batch_norms returns it; `flip` averages the logits with those of the mirrored
    images, which must not be kept as features.
    """
    scores = metrics.SegmentationMetrics(network.out.out_channels, runtime.device)
    n_pixels = max(split.composites.image_size, 256) ** 2  # of larger images fewer, as they take more memory
    batch_size = max(EVALUATION_BATCH[runtime.device.type] * 256**2 // n_pixels, 1)
    order = BatchSampler(range(len(split)), batch_size, drop_last=False)
    for inputs, labels in split.batches(order, runtime.device):
        logits = compute_logits(network, inputs, runtime)
        if flip:
            logits = (logits + compute_logits(network, inputs.flip(3), runtime).flip(3)) / 2
        if isinstance(labels, Tensor) and labels.shape[1:] == logits.shape[2:]:
            _, loss, predictions = metrics.segmentation_loss(logits, labels)
            scores.update(predictions, labels, loss)
        else:  # image by image, so that memory does not grow with the size of the labels
            for one, label in zip(logits, labels):
                predictions, loss = metrics.score_stretched(one, label.shape, label)
                scores.update(predictions, label, loss)
    scores.all_reduce()
    return scores


def compute_logits(network: nn.Module, inputs: Tensor | Sequence[Tensor], runtime: Runtime) -> Tensor:
    """Logits float32 (B, n_classes, S, S) of uint8 images (B, 3, S, S), or of features as they are kept."""
    if not isinstance(inputs, Tensor):
        return decode_kept(network.decode, inputs, runtime).float()
    with runtime.autocast():
        return network(dataset.normalize(inputs)).float()


EPOCH_HEADER = ("  epoch  learning rate  train loss   dice   val loss   dice  mean dice  mean IoU  images/s"
                "   time   left")
EPOCH_LINE = ("{epoch:>3}/{num_epochs:<3}  {learning_rate:>12.2e}  {train_loss:>10.4f} {train_dice:>6.4f}  "
              "{val_loss:>9.4f} {val_dice:>6.4f}{star} {val_mean_dice:>9.4f}  {val_mean_iou:>8.4f}  "
              "{images_per_second:>8.1f}  {time:>5}  {left:>5}")


def format_epoch(row: dict, num_epochs: int, is_best: bool) -> str:
    """EPOCH_LINE for a row of the history; a star marks the best epoch so far."""
    time_taken, left = (str(timedelta(seconds=round(n_epochs * row["seconds"]))).removeprefix("0:")
                        for n_epochs in (1, num_epochs - row["epoch"]))
    return EPOCH_LINE.format(**row, num_epochs=num_epochs, star="*" if is_best else " ", time=time_taken,
                             left=left)


def report_best(trainer: Trainer, val: Split, run: Run) -> None:
    """Score the best epoch, print its table per class, and draw how it does; all ranks take part."""
    network = trainer.fold(run.best["model"])
    scores = evaluate(network, val, trainer.runtime)
    if trainer.runtime.rank > 0:
        return
    names = run.config["class_names"]
    utils.say(f"\nbest.pth, of epoch {run.best['epoch']}, on val/:\n{scores.table(names)}")
    run.write_history()  # where a kill came before it
    run.write(utils.write_csv, "per_class.csv", scores.rows(names))
    run.write(utils.save_figure, "confusion_matrix.png", scores.plot(names))
    if samples := predict_samples(network, val, trainer.runtime):
        figure = utils.plot_predictions(samples, names, dataset.project_decoder().colors)
        run.write(utils.save_figure, "predictions.png", figure)
    else:
        utils.say("warning: no predictions.png: its composites cannot be read any more", "stderr")
    written = [str(run.folder / name) for name in RUN_FILES if (run.folder / name).is_file()]
    utils.say("\n  ".join(["\nWritten:", *written]))


def predict_samples(network: nn.Module, val: Split, runtime: Runtime) -> list[tuple]:
    """(image, label, predictions) of a few samples spread over a split, read from disk as far as possible."""
    indices = np.linspace(0, len(val) - 1, min(PREDICTION_SAMPLES, len(val))).round().astype(int)
    images, labels, _ = next(val.composites.load([indices.tolist()], workers=0))
    with torch.inference_mode():
        logits = compute_logits(network, images.to(runtime.device), runtime)
    predictions = [metrics.score_stretched(one, label.shape)[0] for one, label in zip(logits, labels)]
    return [(image.permute(1, 2, 0).numpy(), label.numpy(), predicted.cpu().numpy())
            for image, label, predicted in zip(images, labels, predictions)]


# --- A whole run --------------------------------------------------------------------------------------------


def build_network(args: Namespace, checkpoint: dict | None, runtime: Runtime) -> models.EfficientSegNet:
    """The network on its device, from a checkpoint or with random decoders, alike on all ranks."""
    torch.manual_seed(args.seed)
    if checkpoint:
        network = models.model_from_checkpoint(checkpoint, args.resume or args.evaluate,
                                               finetune_encoder=args.finetune_encoder)
    else:
        build = partial(models.EfficientSegNet, args.num_classes, finetune_encoder=args.finetune_encoder)
        download = partial(build, args.encoder_weights)
        try:
            network = runtime.on_rank_0(download, models.WeightsError) or build("none")  # until shared
        except SharedError as error:
            if not (args.demo and args.encoder_weights == "imagenet"):
                raise
            runtime.log(f"Demo        goes on with random encoder weights: {error}")
            args.encoder_weights = "none"
            network = build("none")
    network.to(runtime.device, memory_format=torch.channels_last)
    share_weights(network.state_dict(), runtime)
    return network


def share_weights(weights: dict[str, Tensor], runtime: Runtime) -> None:
    """Give every rank rank 0's parameters and batch-norm statistics."""
    if runtime.world_size > 1:
        for tensor in weights.values():
            dist.broadcast(tensor, src=0)


def train_network(network: models.EfficientSegNet, run: Run, checkpoint: dict | None,
                  args: Namespace) -> None:
    """From the data to the report."""
    runtime = run.runtime
    splits = load_splits(("train", "val"), args, runtime)
    plan = Plan.make(args, sum(runtime.gather(len(splits["train"]))), runtime)
    if args.finetune_encoder and args.image_size == 32 and plan.batch_size == 1:
        raise SharedError("--finetune_encoder: the encoder's last batch norms would see one pixel a step at "
                          "--image_size 32 and one photo a step; pass --image_size 64")
    trainer = Trainer(network, args.learning_rate, plan.num_epochs * plan.steps, runtime)
    earlier = None
    if args.continues:
        try:
            trainer.load_state_dict(checkpoint, checkpoint["epoch"] * plan.steps)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"--resume {args.resume}: its optimizer does not fit this run ({error}); leave "
                            "the recipe's flags out, --finetune_encoder above all, or pass a best.pth to "
                            "start anew") from error
        run.restore(checkpoint, args.resume)
        earlier = checkpoint["config"]["features"]
    if splits["train"].images is not None and not args.finetune_encoder:
        run.config["features"] = keep_features(trainer, splits, plan.batch_size, earlier)
    if args.continues and run.config["features"] != earlier:
        runtime.log("Resume      features were kept otherwise before: the last bits will differ")
    if args.continues and run.config["loss"] != checkpoint["config"].get("loss"):
        runtime.log(f"Resume      the epochs before had another loss; now it is {run.config['loss']}")
    if args.compile:
        trainer.compile_decode(args.image_size, plan.batch_size)
    n_trainable = sum(parameter.numel() for parameter in trainer.parameters)
    n_frozen = sum(parameter.numel() for parameter in network.parameters()) - n_trainable
    runtime.log(f"Model       {n_trainable:,} trainable and {n_frozen:,} frozen parameters, encoder weights: "
                f"{args.encoder_weights}")
    runtime.log(f"Training    {plan.num_epochs} epochs of {plan.steps} steps, {plan.batch_size} x "
                f"{runtime.world_size} = {plan.batch_size * runtime.world_size} images a step, "
                f"learning rate up to {args.learning_rate:g}, seed {plan.seed}")
    runtime.log(f"Output      {run.folder}\n\n{EPOCH_HEADER}")
    fit(trainer, plan, splits, run)
    report_best(trainer, splits["val"], run)


def memory_advice(config: dict, args: Namespace) -> str:
    """At what memory ran out, and what to try first."""
    cause, remedies = f"--image_size {args.image_size}", []
    if not args.evaluate:
        cause += f", --batch_size {args.batch_size}"
        if "cuda" in (config.get("features") or ()):
            remedies.append("--no_cache (the features lie there)")
        if args.batch_size > 1:
            remedies.append(f"--batch_size {args.batch_size // 2}")
    if not remedies and args.image_size > 32:
        remedies.append(f"--image_size {args.image_size // 64 * 32}")
    return f"{cause}; try " + ", or ".join([*remedies, "again without other programs there"])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; SystemExit with status 1 and one line on stderr for what a user can put right."""
    with utils.user_errors(dataset.DatasetError, models.WeightsError), utils.stoppable():
        args, checkpoint = parse_args(argv)
        config = {}  # filled as it becomes known
        with utils.memory_errors(partial(memory_advice, config, args)), contextlib.ExitStack() as claimed:
            runtime = Runtime.start(args.device, args.amp)
            runtime.log(f"Device      {runtime}")
            if checkpoint and not args.continues:
                start = "a new run starts from its weights; " if args.resume else ""
                own_size = checkpoint["config"].get("image_size") == args.image_size
                known = ("classes and image size are its own" if own_size else
                         f"taking the first {args.num_classes} of CLASSES and --image_size {args.image_size}")
                runtime.log(f"Checkpoint  {args.resume or args.evaluate}: {start}{known}")
            config |= describe_run(args, runtime)
            network = build_network(args, checkpoint, runtime)
            config["settings"]["encoder_weights"] = args.encoder_weights  # as they were to be had
            if args.evaluate:
                val = load_splits(["val"], args, runtime)["val"]
                scores = evaluate(models.fold_batch_norms(network), val, runtime, args.flip)
                runtime.log(scores.table(config["class_names"]))
            else:
                claim = claimed_folder(args, config)
                folder = runtime.on_rank_0(lambda: claimed.enter_context(claim), UserError)
                run = Run(folder, config, runtime)
                train_network(network, run, checkpoint, args)
        runtime.close()


if __name__ == "__main__":
    main()
