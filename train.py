"""Train EfficientSegNet on street-scene composites: one process on a CPU or GPU, or one a GPU under torchrun.

The recipe is main() and what it calls, from the end of this file upwards. RUN_FILES names what a run leaves.
"""
import contextlib
import copy
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import BatchSampler
from tqdm.auto import tqdm

import dataset
import metrics
import model as models
import utils
from dataset import Split
from utils import Runtime, UserError, counted

DEMO_DIR = Path(__file__).parent / "images" / "demo"
DEMO_RECIPE = {"learning_rate": 1e-2, "num_epochs": 40, "batch_size": 2, "image_size": 128}  # for 40 scenes
REPORT_FILES = ("predictions.png", "confusion_matrix.png", "per_class.csv")  # how best.pth does
RUN_FILES = ("config.json", "history.csv", "curves.png", *REPORT_FILES, "best.pth", "last.pth")
NOT_REMEMBERED = {"resume", "evaluate", "flip", "output_dir", "num_workers", "device", "auto", "continues"}
IN_EVALUATION = {"evaluate", "flip", "num_workers", "device", "data_dir", "num_classes", "image_size", "amp",
                 "ignore_background"}  # flags that act there
WEIGHT_DECAY = 0.01  # AdamW's default
ENCODER_LEARNING_RATE = 0.3  # of the decoders', for --finetune_encoder: its features are good already
WARMUP = 0.05  # of all steps: fresh decoders behind trained features get large, useless gradients at first
AVERAGED = 0.3  # share of the steps so far: the average settles, so the learning rate need not fall
EVALUATION_BATCH = {"cpu": 4, "cuda": 16, "mps": 16}  # at 256x256; larger ones leave a CPU's caches
BAR_SECONDS = 1.0  # how often the host waits for the device to show loss and dice
GRAPH_WARMUP = 3  # steps before a CUDA graph is captured: cuDNN chooses kernels, AdamW makes its state
NO_BEST = {"epoch": 0, "figure": -1.0, "confusion": None, "loss_sums": None}
GPU_SHARE, HOST_SHARE = 0.5, 0.8  # of the free memory, that inputs and labels may fill


# --- Arguments ----------------------------------------------------------------------------------------------

EXAMPLES = """examples:
  python train.py --demo                                            synthetic scenes, no download
  python train.py --resume runs/demo/last.pth --num_epochs 60       go on, flags as before but for this one
  python train.py --resume runs/demo/best.pth --finetune_encoder    a new run from these weights
  python train.py --evaluate runs/demo/best.pth                     score a checkpoint on val/
  torchrun --nproc_per_node=8 train.py --batch_size 4               eight GPUs, 32 images a step"""


def get_args_parser() -> utils.ArgumentParser:
    parser = utils.ArgumentParser(description="Train EfficientSegNet on composites.", epilog=EXAMPLES)
    whole, path, n_classes = partial(utils.number, int), utils.file_path, len(dataset.CLASSES)
    recipe = parser.add_argument_group("recipe (--resume remembers these; a flag given with --resume wins)")
    data, add = recipe.add_mutually_exclusive_group(), recipe.add_argument
    data.add_argument("--data_dir", type=path, default="data/cityscapes_data", metavar="FOLDER",
                      help="holds train/ and val/ with composites (%(default)s)")
    data.add_argument("--demo", action="store_const", dest="data_dir", const=DEMO_DIR,
                      help=f"the scenes in images/demo; where no flag says otherwise {DEMO_RECIPE}")
    add("--num_epochs", type=whole(1), default=30, help="passes over train/ (%(default)s)")
    add("--batch_size", type=whole(1), default=4, help="images a step in each process (%(default)s)")
    add("--learning_rate", type=utils.number(float, 1e-37, 1e37), default=3e-3, help="AdamW's (%(default)s)")
    add("--num_classes", type=whole(2, n_classes), default=n_classes, help="ids are below it (%(default)s)")
    add("--image_size", type=whole(64, 8192, multiple=32), default=256, help="pixels a side (%(default)s)")
    add("--finetune_encoder", action="store_true",
        help=f"train the encoder too, at {ENCODER_LEARNING_RATE} of the learning rate, in every step")
    add("--encoder_weights", type=lambda text: str(path(text)), default="imagenet",
        help="imagenet, none (random) or FILE, an efficientnet_b0 state_dict (%(default)s)")
    add("--ignore_background", action="store_true",
        help="pixels of class 0 teach nothing and count in no figure, for labels that are drawn in part")
    add("--best_by", choices=("dice", "mean_dice", "mean_iou"), default="dice",
        help="figure by which best.pth is chosen (%(default)s)")
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto",
        help="mixed precision; auto takes what the device is fast at (%(default)s)")
    add("--seed", type=whole(0, 2**63 - 1), default=0, help="of weights, shuffle, augmentation (%(default)s)")
    add("--no_cache", action="store_true", help="read and encode in every step, as if memory were short")
    run = parser.add_argument_group("run")
    mode, add = run.add_mutually_exclusive_group(), run.add_argument
    mode.add_argument("--resume", type=path, metavar="FILE|auto",
                      help="continue the run of a last.pth, or start a new one from another file's weights; "
                           "auto: from the last.pth in --output_dir, or anew if there is none")
    mode.add_argument("--evaluate", type=path, metavar="FILE", help="score this on val/, train nothing")
    add("--flip", action="store_true", help="with --evaluate: average with the mirrored photo")
    add("--output_dir", type=path, metavar="FOLDER", help="new, runs/<date-time> if left out")
    add("--num_workers", type=whole(0, 512), default=min(utils.available_cpus(), 8),
        help="threads that read composites, at the start and, with --no_cache, in every step (%(default)s)")
    add("--device", type=utils.device_name, default="auto",
        help="auto (a GPU if there is one), cpu, cuda, cuda:N or mps (%(default)s)")
    return parser


def parse_args(argv: Sequence[str] | None) -> tuple[Namespace, dict | None]:
    """The flags, and the checkpoint of --resume or --evaluate: its recipe takes the place of the defaults.

    args.continues says whether its run goes on; weights alone start a new run or are scored.
    """
    dataset.project_decoder()  # is the class table sound?
    parser = get_args_parser()
    defaults = vars(parser.parse_args([])) | {"score_background": dataset.SCORE_BACKGROUND}
    parsed = vars(parser.parse_args(argv, Namespace(**dict.fromkeys(defaults))))  # None for what is left out
    given = {name: value for name, value in parsed.items() if value is not None}
    useless = given.keys() - IN_EVALUATION if "evaluate" in given else given.keys() & {"flip"}
    if useless:
        how = "with" if "evaluate" in given else "without"
        parser.error(f"--{min(useless)} changes nothing {how} --evaluate; leave it out")
    if auto := given.get("resume") == Path("auto"):
        if "output_dir" not in given:
            parser.error("--resume auto goes on with the last.pth in --output_dir; name that folder")
        last = given["output_dir"] / "last.pth"
        given["resume"] = last if last.exists() else None
    path, checkpoint, remembered = given.get("resume") or given.get("evaluate"), None, {}
    if path:
        checkpoint = models.load_checkpoint(path)
        settings = checkpoint["config"].get("settings", {"encoder_weights": f"those of {path}"})
        remembered = {name: settings[name] for name in settings.keys() & defaults.keys() - NOT_REMEMBERED}
        remembered["num_classes"] = len(checkpoint["model"]["out.weight"])
        if given.get("encoder_weights") not in (None, remembered.get("encoder_weights")):
            raise UserError(f"--encoder_weights: {path} holds its encoder, begun with "
                            f"{remembered.get('encoder_weights')}; leave the flag out")
    demo = DEMO_RECIPE if given.get("data_dir") == DEMO_DIR else {}
    args = Namespace(**defaults | demo | remembered | given, auto=auto)
    args.data_dir = Path(args.data_dir)
    args.continues = bool(args.resume) and args.resume.resolve().name == "last.pth"
    if args.ignore_background and args.score_background:
        raise UserError("--ignore_background: SCORE_BACKGROUND of dataset.py or the checkpoint is True; "
                        "leave the flag out")
    if checkpoint:
        check_checkpoint(checkpoint, path, args)
    return args, checkpoint


def check_checkpoint(checkpoint: dict, path: Path, args: Namespace) -> None:
    """UserError if a checkpoint's class ids mean something else here, or its run cannot be continued."""
    config, n_classes = checkpoint["config"], len(checkpoint["model"]["out.weight"])
    dataset.check_classes(config.get("class_names", []), config.get("class_colors", []), path)
    if args.num_classes != n_classes or n_classes > len(dataset.CLASSES):
        raise UserError(f"{path} has {n_classes} classes, --num_classes is {args.num_classes}, CLASSES in "
                        f"dataset.py has {len(dataset.CLASSES)}; leave the flag out, or add what is missing")
    if not args.continues:
        return
    if "measured_on" not in config or "optimizer" not in checkpoint:
        raise UserError(f"--resume {path}: no run to continue, or one of an older version; start a new run "
                        "from its weights: --resume the best.pth beside it")
    n_done, folder = checkpoint["epoch"], path.resolve().parent
    if n_done >= args.num_epochs and all((folder / name).exists() for name in RUN_FILES):
        message = f"--resume {path}: its {counted(n_done, 'epoch')} are done; pass more --num_epochs to go on"
        if not args.auto:
            raise UserError(message)
        utils.say(message)
        raise SystemExit(0)  # a job that is queued again has nothing left to do


# --- Data ---------------------------------------------------------------------------------------------------

def open_splits(names: Sequence[str], args: Namespace, runtime: Runtime) -> tuple[dict, dict]:
    """This process's Split of each, not read yet, and the paths of all their composites."""
    splits, paths = {}, {}
    for name in names:
        paths[name], others = dataset.list_composites(args.data_dir / name)
        if others:
            runtime.log(f"Left out    {counted(len(others), 'file')} of kinds not read, such as {others[0]}")
        share = paths[name][runtime.rank :: runtime.world_size]
        splits[name] = Split(share, args.image_size, args.num_classes, resize_labels=name == "train",
                             n_threads=args.num_workers)
    runtime.log(f"Data        {' and '.join(f'{len(paths[name]):,} {name}' for name in names)} composites of "
                f"{args.data_dir} at {args.image_size}x{args.image_size}")
    return splits, paths


def keep_inputs(trainer: "Trainer", splits: dict[str, Split], no_cache: bool) -> None:
    """Read and check both splits, and keep them on the GPU, in host memory or nowhere, as they fit."""
    runtime, size = trainer.runtime, splits["train"].image_size
    like = trainer.make_inputs(torch.zeros((1, 3, size, size), dtype=torch.uint8))
    per_image = sum(one.nbytes for one in like)
    n_bytes = sum(len(split) * per_image + split.label_bytes() for split in splits.values())
    cuda = runtime.device.type == "cuda"
    if no_cache:
        device, how = None, "read in every step"
    elif cuda and n_bytes <= GPU_SHARE * torch.cuda.mem_get_info(runtime.device)[0]:
        device, how = runtime.device, "kept in GPU memory"
    elif n_bytes <= HOST_SHARE * utils.free_memory():
        device, how = torch.device("cpu"), "kept in host memory"
    else:
        device, how = None, "read in every step, for they do not fit into memory"
    what = "photos" if trainer.network.finetune_encoder else "features"
    runtime.log(f"Memory      {what} and labels, {n_bytes / 1e9:.2f} GB a process, {how}")
    with runtime.progress("Reading", sum(map(len, splits.values()))) as bar:
        for name, split in splits.items():
            split.keep(trainer.make_inputs, device, bar)
            check_foreground(split, name, runtime)


def check_foreground(split: Split, name: str, runtime: Runtime) -> None:
    """UserError if every pixel that has been read, in all processes, is background."""
    found = torch.tensor(float(split.has_foreground), device=runtime.device)
    if runtime.world_size > 1:
        dist.all_reduce(found)
    if not found:
        raise UserError(f"{name}/: every pixel of its labels is {dataset.CLASSES[0].name}; are they in the "
                        "colours of CLASSES in dataset.py?")


# --- One step -----------------------------------------------------------------------------------------------

def encode(network: nn.Module, images: Tensor, runtime: Runtime) -> list[Tensor]:
    """Features of images (B, 3, S, S) of 0..255."""
    images = dataset.normalize(dataset.move(images, runtime.device))
    with runtime.autocast():
        return network.encode(images)


def compute_logits(network: nn.Module, inputs: Sequence[Tensor], runtime: Runtime) -> Tensor:
    """Logits (B, n_classes, S, S) of inputs: one tensor of images, or the five feature maps."""
    features = inputs if len(inputs) > 1 else encode(network, inputs[0], runtime)
    with runtime.autocast():
        return network.decode(features)


class Trainer:
    """A network, the same on every rank, and all that its training changes.

    Attributes:
        average: what is scored and used: weights and batch-norm statistics, by name, averaged over the last
            AVERAGED of the steps so far (after Shamir and Zhang, 2013, arXiv:1212.1824).
        history: a dict an epoch, the rows of history.csv.
        best: epoch, figure and the counts of SegmentationMetrics of the best epoch so far.
        scores: the training figures, which say what counts.
        generator: of augmentation; None for none.
    """

    def __init__(self, network: models.EfficientSegNet, scores: metrics.SegmentationMetrics,
                 learning_rate: float, n_steps: int, runtime: Runtime) -> None:
        self.network, self.scores, self.runtime = network, scores, runtime
        self.n_steps, self.steps_done, self.learning_rate = n_steps, 0, 0.0  # the last step's rate
        self.history: list[dict] = []
        self.best, self.generator = dict(NO_BEST), None
        finetune, cuda = network.finetune_encoder, runtime.device.type == "cuda"
        self.encoder = network if finetune else models.fold_batch_norms(copy.deepcopy(network))
        self.trained = {key: value for key, value in network.state_dict().items() if value.is_floating_point()
                        and (finetune or not key.startswith("encoder"))}
        self.average = {key: value.clone() for key, value in self.trained.items()}
        self.averaging_rate = torch.tensor(0.0, device=runtime.device)
        self.peaks, parameters = [learning_rate], [network.decoder_parameters()]
        if finetune:
            self.peaks.append(learning_rate * ENCODER_LEARNING_RATE)
            parameters.append(network.encoder_parameters())
        groups = [{"params": some, "lr": torch.tensor(0.0, device=runtime.device)} for some in parameters]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True, capturable=cuda)
        self.parameters = sum(parameters, [])
        assert set(self.parameters) == {one for one in network.parameters() if one.requires_grad}
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.amp_dtype is torch.float16)
        # No host in between: on one GPU a step can be one launch instead of hundreds.
        one_launch = cuda and runtime.world_size == 1
        self.update = CudaGraph(self._update, runtime) if one_launch else self._update

    def make_inputs(self, images: Tensor) -> list[Tensor]:
        """What is kept of uint8 images (B, 3, S, S): features, or themselves where the encoder trains."""
        return [images] if self.network.finetune_encoder else encode(self.encoder, images, self.runtime)

    def step(self, inputs: Sequence[Tensor], labels: Tensor) -> None:
        """One training step, whose figures are added to `self.scores`.

        `inputs` are a tensor of uint8 images (B, 3, S, S) or the encoder's five feature maps, `labels` are
        uint8 (B, S, S), all on the device.
        """
        self.steps_done += 1
        # Averaged weights need no low rate in the end (after Izmailov et al., 2018, arXiv:1803.05407).
        factor = min(self.steps_done / self.n_steps / WARMUP, 1.0)
        self.learning_rate = self.peaks[0] * factor
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"].fill_(peak * factor)
        self.averaging_rate.fill_(1 / max(AVERAGED * self.steps_done, 1))
        if len(inputs) == 1:
            images = inputs[0]
            if self.generator:
                images, labels = dataset.augment(images, labels, self.generator)
            inputs = self.make_inputs(images)
        self.update(*inputs, labels)

    def _update(self, *tensors: Tensor) -> None:
        """What a step does on the device, from features and labels; if the encoder trains, from images."""
        *inputs, labels = tensors
        self.optimizer.zero_grad(set_to_none=True)
        logits, ignore = compute_logits(self.network, inputs, self.runtime), self.scores.ignore_background
        loss, cross_entropy, predictions = metrics.segmentation_loss(logits, labels, ignore)
        self.scaler.scale(loss).backward()
        self.average_gradients()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for key, average in self.average.items():
            average.lerp_(self.trained[key], self.averaging_rate)
        self.scores.update(predictions, labels, cross_entropy)

    def average_gradients(self) -> None:
        """Over all ranks, in one exchange."""
        if self.runtime.world_size > 1:
            gradients = [parameter.grad for parameter in self.parameters]
            flat = torch.cat([one.flatten() for one in gradients])
            dist.all_reduce(flat)
            flat /= self.runtime.world_size
            for one, part in zip(gradients, flat.split([one.numel() for one in gradients])):
                one.copy_(part.view_as(one))

    def fold(self) -> models.EfficientSegNet:
        """A copy of the network for evaluation, with the averages in place of what is trained."""
        stages = [] if self.network.finetune_encoder else self.network.encoder_stages()
        folded = {id(ours): theirs for ours, theirs in zip(stages, self.encoder.encoder_stages())}
        network = copy.deepcopy(self.network, folded)  # takes over a frozen encoder's stages, folded once
        network.load_state_dict(self.average, strict=False)
        return models.fold_batch_norms(network)

    def end_epoch(self, row: dict, scores: metrics.SegmentationMetrics, best_by: str) -> bool:
        """Add an epoch's row and validation to the history; whether it is the best so far."""
        self.history.append(row)
        is_best = row[f"val_{best_by}"] > self.best["figure"]
        if is_best:
            self.best = {"epoch": row["epoch"], "figure": row[f"val_{best_by}"],
                         "confusion": scores.confusion.cpu(), "loss_sums": scores.loss_sums.cpu()}
        return is_best

    def state_dict(self) -> dict:
        """What last.pth keeps of it."""
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "average": self.average, "epoch": len(self.history),
                "history": self.history, "best": self.best}

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
        self.history, self.best, self.steps_done = state["history"], state["best"], steps_done


class CudaGraph:
    """A function of tensors whose shapes never change, replayed as one CUDA graph after its first calls.

    It changes weights, optimizer state and figures in place. Where it cannot be captured a line says so.
    """

    def __init__(self, function: Callable[..., None], runtime: Runtime) -> None:
        self.function, self.runtime, self.calls, self.graph = function, runtime, 0, None
        self.stream = torch.cuda.Stream()

    def __call__(self, *tensors: Tensor) -> None:
        self.calls += 1
        if self.calls == GRAPH_WARMUP + 1:
            self.capture(tensors)
        if self.graph:
            for static, tensor in zip(self.static, tensors):
                static.copy_(tensor)
            return self.graph.replay()
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


# --- Epochs -------------------------------------------------------------------------------------------------

def make_generator(seed: int, epoch: int, rank: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The same for an epoch that a run reaches in one go or resumed."""
    seeds = np.random.SeedSequence((seed, epoch, rank)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(seeds[0] >> 1))


def draw_batches(n_images: int, batch_size: int, steps: int, generator: torch.Generator) -> list[list[int]]:
    """The indices of each batch of an epoch; those left over are others in each epoch."""
    order = torch.randperm(n_images, generator=generator).tolist()
    return list(BatchSampler(order, batch_size, drop_last=True))[:steps]


def fit(trainer: Trainer, splits: dict[str, Split], batch_size: int, folder: Path, config: dict) -> None:
    """Train, and after each epoch score, save and then draw."""
    runtime, network, settings = trainer.runtime, trainer.network, config["settings"]
    seed, num_epochs = settings["seed"], settings["num_epochs"]
    steps = trainer.n_steps // num_epochs  # an epoch
    n_images = steps * batch_size * runtime.world_size
    for epoch in range(len(trainer.history) + 1, num_epochs + 1):
        started = time.monotonic()
        if network.finetune_encoder:
            trainer.generator = make_generator(seed, epoch, runtime.rank, runtime.device)
        generator = make_generator(seed, epoch, runtime.rank)
        order = draw_batches(len(splits["train"]), batch_size, steps, generator)
        with runtime.progress(f"Epoch {epoch}/{num_epochs}", n_images) as bar:
            train = train_one_epoch(trainer, splits["train"].batches(order, runtime.device), bar)
        rate = n_images / (time.monotonic() - started)
        for weights in (network.state_dict(), trainer.average):
            share_weights(weights, runtime)  # batch-norm statistics differ between ranks; rank 0's count
        scores = evaluate(trainer.fold(), splits["val"], trainer.scores, runtime)
        val = scores.compute()
        check_loss(val["loss"], "validation loss", trainer)
        row = {"epoch": epoch, "learning_rate": trainer.learning_rate,
               "train_loss": train["loss"], "train_dice": train["dice"],
               **{f"val_{name}": val[name] for name in ("loss", "dice", "mean_dice", "mean_iou")},
               "seconds": time.monotonic() - started, "images_per_second": rate}
        is_best = trainer.end_epoch(row, scores, settings["best_by"])
        if runtime.rank == 0:
            save_epoch(trainer, folder, config, is_best)
        runtime.log(format_epoch(row, num_epochs, is_best))


def train_one_epoch(trainer: Trainer, batches: Iterator[tuple], bar: tqdm) -> dict[str, float]:
    """One pass over the batches, shown by the bar; the figures over all ranks. UserError as in check_loss."""
    torch.backends.cudnn.benchmark = True  # it tries its kernels on every new shape: batches have one
    trainer.network.train()
    trainer.scores.reset()
    shown = time.monotonic()
    for inputs, labels in batches:
        trainer.step(inputs, labels)
        bar.update(len(labels) * trainer.runtime.world_size)
        if time.monotonic() - shown > BAR_SECONDS:  # the host waits for the device here, and nowhere else
            figures = trainer.scores.compute()
            if trainer.runtime.world_size == 1:  # several ranks check together, at the epoch's end
                check_loss(figures["loss"], "loss", trainer)
            bar.set_postfix(loss=f"{figures['loss']:.3f}", dice=f"{figures['dice']:.3f}")
            shown = time.monotonic()
    torch.backends.cudnn.benchmark = False
    trainer.scores.all_reduce()
    figures = trainer.scores.compute()
    check_loss(figures["loss"], "loss", trainer)
    return figures


def check_loss(loss: float, what: str, trainer: Trainer) -> None:
    """UserError if a loss is infinite or not a number."""
    if not math.isfinite(loss):
        raise UserError(f"the {what} became {loss} in epoch {len(trainer.history) + 1}, at step "
                        f"{trainer.steps_done} or before; try a tenth of --learning_rate, or --amp off")


@torch.inference_mode()
def evaluate(network: nn.Module, split: Split, like: metrics.SegmentationMetrics, runtime: Runtime,
             flip: bool = False) -> metrics.SegmentationMetrics:
    """Figures, which count as others do, of a split at its composites' own size, over all ranks.

    The network is as fold_batch_norms returns it; `flip` averages the logits with those of the mirrored
    images, which must not be kept as features.
    """
    scores, ignore = copy.deepcopy(like), like.ignore_background
    scores.reset()
    n_pixels = max(split.image_size, 256) ** 2  # of larger images fewer, as they take more memory
    batch_size = max(EVALUATION_BATCH[runtime.device.type] * 256**2 // n_pixels, 1)
    order = BatchSampler(range(len(split)), batch_size, drop_last=False)
    with runtime.progress("Scoring", len(split)) as bar:
        for inputs, labels in split.batches(order, runtime.device):
            logits = compute_logits(network, inputs, runtime).float()
            if flip:
                mirrored = compute_logits(network, [one.flip(3) for one in inputs], runtime).float()
                logits = (logits + mirrored.flip(3)) / 2
            if isinstance(labels, Tensor) and labels.shape[1:] == logits.shape[2:]:
                _, loss, predictions = metrics.segmentation_loss(logits, labels, ignore)
                scores.update(predictions, labels, loss)
            else:  # image by image, so that memory does not grow with the size of the labels
                for one, label in zip(logits, labels):
                    predictions, loss = metrics.score_stretched(one, label.shape, label, ignore)
                    scores.update(predictions, label, loss)
            bar.update(len(labels))
    scores.all_reduce()
    return scores


COLUMNS = {"learning_rate": ".2e", "train_loss": ".4f", "train_dice": ".4f", "val_loss": ".4f",
           "val_dice": ".4f", "val_mean_dice": ".4f", "val_mean_iou": ".4f", "images_per_second": ".1f"}
EPOCH_HEADER = "  ".join(["   epoch ", *COLUMNS, "   time", "   left"])


def format_epoch(row: dict, num_epochs: int, is_best: bool) -> str:
    """A line below EPOCH_HEADER for a row of the history; a star marks the best so far."""
    cells = [f"{row['epoch']:>3}/{num_epochs:<4}{'*' if is_best else ' '}"]
    cells += [(format(row[name], spec) if name in row else "-").rjust(len(name))
              for name, spec in COLUMNS.items()]
    if "seconds" in row:
        cells += [f"{str(timedelta(seconds=round(n * row['seconds']))).removeprefix('0:'):>7}"
                  for n in (1, num_epochs - row["epoch"])]
    return "  ".join(cells)


# --- What a run leaves --------------------------------------------------------------------------------------

def describe_run(args: Namespace, val_paths: Sequence[Path], runtime: Runtime) -> dict:
    """What checkpoints and config.json say beside the weights, in plain types."""
    classes, folder = dataset.CLASSES[: args.num_classes], args.data_dir / "val"
    table = {"image_size": args.image_size, "class_names": [entry.name for entry in classes],
             "class_colors": [list(entry.color) for entry in classes]}
    measured_on = table | {  # the figures of two epochs can be compared if all of it is the same
        "best_by": args.best_by, "background": [args.score_background, args.ignore_background],
        "further_colors": [list(map(list, entry.further.values())) for entry in classes],
        "val": {path.relative_to(folder).as_posix(): path.stat().st_size for path in val_paths}}
    settings = {name: value for name, value in vars(args).items() if name not in NOT_REMEMBERED}
    machine = f"{runtime}, {counted(runtime.world_size, 'rank')}, torch {torch.__version__}"
    return {"settings": settings | {"data_dir": str(args.data_dir)}, "n_classes": args.num_classes, **table,
            "mean": dataset.MEAN, "std": dataset.STD, "machine": machine, "measured_on": measured_on}


def choose_folder(args: Namespace) -> Path:
    """The run's folder, not made yet; UserError if it belongs to another run."""
    own = args.resume.resolve().parent if args.continues else None
    folder = args.output_dir or own or Path("runs", datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    present = [name for name in RUN_FILES if (folder / name).exists()]
    if present == ["config.json"] and b'"measured_on"' in (folder / "config.json").read_bytes():
        present = []  # of a run that ended before its first epoch did
    if present and folder.resolve() != own:
        raise UserError(f"--output_dir {folder} holds {present[-1]} of another run; choose another folder, "
                        "or go on with a last.pth there by --resume")
    return folder


def save_epoch(trainer: Trainer, folder: Path, config: dict, is_best: bool) -> None:
    """Write what an epoch leaves, best.pth before last.pth: after a kill between them the epoch is redone."""
    state = trainer.state_dict()
    if is_best:
        for name in REPORT_FILES:  # what an earlier end of this run said of another best.pth
            with contextlib.suppress(OSError):  # of a table that is open in Excel, say
                (folder / name).unlink()
        best = {"model": state["model"] | state["average"], "best": trainer.best, "config": config}
        utils.write_checkpoint(folder / "best.pth", best)
    utils.write_checkpoint(folder / "last.pth", state | {"config": config})
    write_or_warn(utils.write_json, folder / "config.json", config)
    write_history(trainer, folder, config)


def write_history(trainer: Trainer, folder: Path, config: dict) -> None:
    write_or_warn(utils.write_csv, folder / "history.csv", trainer.history)
    curves = partial(utils.draw_curves, history=trainer.history, image_size=config["image_size"])
    write_or_warn(utils.write_picture, folder / "curves.png", curves)


def write_or_warn(write: Callable, path: Path, content: object) -> None:
    """Write a file that is for looking at: whatever fails, a line warns and the run goes on."""
    try:
        write(path, content)
    except Exception as error:  # of matplotlib and its surroundings, which may raise anything
        utils.say(f"warning: no {path} ({utils.first_line(error)}); the run goes on", "stderr")


def find_best(trainer: Trainer, config: dict, path: Path, folder: Path) -> None:
    """Take over the best epoch from the best.pth beside last.pth, or seek it anew, and say so.

    It must be last.pth's, or of the next epoch after a kill between the two, and measured alike.
    """
    found = models.load_checkpoint(path) if path.exists() else {"config": {}}
    best, n_done = found.get("best", NO_BEST), len(trainer.history)
    is_own = best["epoch"] == n_done + 1 or all(best[key] == trainer.best[key] for key in ("epoch", "figure"))
    if is_own and found["config"].get("measured_on") == config["measured_on"]:
        trainer.best = best
        if folder.resolve() != path.parent:
            utils.write_file(folder / "best.pth", path.read_bytes())
        return
    trainer.best = dict(NO_BEST)
    trainer.runtime.log("Resume      the best epoch is sought anew, for best.pth or what is measured changed")
    if n_done >= config["settings"]["num_epochs"]:
        raise UserError(f"{path.parent}: {counted(n_done, 'epoch')} done, none best; pass more --num_epochs")


def report_best(trainer: Trainer, val: Split, folder: Path, config: dict) -> None:
    """Print the best epoch's table per class, and write how it does."""
    names, scores, path = config["class_names"], copy.deepcopy(trainer.scores), folder / "best.pth"
    scores.confusion, scores.loss_sums = trainer.best["confusion"], trainer.best["loss_sums"]
    utils.say(f"\nbest.pth, of epoch {trainer.best['epoch']}, on val/:\n{scores.table(names)}")

    @torch.inference_mode()
    def draw(figure: object) -> None:
        network = models.model_from_checkpoint(models.load_checkpoint(path), path).to(trainer.runtime.device)
        indices = np.linspace(0, len(val) - 1, min(4, len(val))).round().astype(int)
        (images,), labels = next(val.load([indices.tolist()]))
        logits = compute_logits(models.fold_batch_norms(network), [images], trainer.runtime)
        samples = [(image, label.numpy(), metrics.score_stretched(one, label.shape)[0].cpu().numpy())
                   for image, label, one in zip(images.permute(0, 2, 3, 1).numpy(), labels, logits)]
        utils.draw_predictions(figure, samples, names, dataset.project_decoder().colors)

    write_history(trainer, folder, config)  # where a kill came before it
    write_or_warn(utils.write_csv, folder / "per_class.csv", scores.rows(names))
    write_or_warn(utils.write_picture, folder / "confusion_matrix.png", partial(scores.draw, names=names))
    write_or_warn(utils.write_picture, folder / "predictions.png", draw)
    program = "predict.py" if Path("predict.py").exists() else Path(__file__).with_name("predict.py")
    val_dir = Path(config["settings"]["data_dir"], "val")
    command = f'python "{program}" "{val_dir}" --composite --overlay --checkpoint "{path}"'
    utils.say(f"\nMasks of val/:\n  {command}")


# --- A whole run --------------------------------------------------------------------------------------------

def build_network(args: Namespace, checkpoint: dict | None, runtime: Runtime) -> models.EfficientSegNet:
    """The network on its device, alike on all ranks; rank 0 says where its weights come from."""
    torch.manual_seed(args.seed)
    build = partial(models.EfficientSegNet, args.num_classes, finetune_encoder=args.finetune_encoder)
    source = str(args.resume or args.evaluate or args.encoder_weights)
    if checkpoint:
        network = models.model_from_checkpoint(checkpoint, source, finetune_encoder=args.finetune_encoder)
    else:
        try:
            network = build(source if runtime.rank == 0 else "none")  # rank 0 alone downloads
        except models.WeightsError as error:
            if not (args.data_dir == DEMO_DIR and source == "imagenet"):
                raise
            runtime.log(f"Demo        goes on with random encoder weights: {error}")
            source, network = "none", build("none")
    network.to(runtime.device, memory_format=torch.channels_last)
    share_weights(network.state_dict(), runtime)
    n_trainable, n_frozen = (sum(one.numel() for one in network.parameters() if one.requires_grad == trained)
                             for trained in (True, False))
    runtime.log(f"Model       {n_trainable:,} trainable and {n_frozen:,} frozen parameters, "
                f"{'' if checkpoint else 'encoder '}weights: {source}")
    return network


def share_weights(weights: dict[str, Tensor], runtime: Runtime) -> None:
    """Give every rank rank 0's parameters and batch-norm statistics."""
    if runtime.world_size > 1:
        for tensor in weights.values():
            dist.broadcast(tensor, src=0)


def train_network(args: Namespace, checkpoint: dict | None, scores: metrics.SegmentationMetrics,
                  runtime: Runtime) -> None:
    """From the data to the report."""
    folder = choose_folder(args)
    splits, paths = open_splits(("train", "val"), args, runtime)
    smallest = len(paths["train"]) // runtime.world_size  # of the processes' shares
    if not smallest:
        raise UserError(f"{args.data_dir / 'train'} holds {counted(len(paths['train']), 'composite')} for "
                        f"{runtime.world_size} processes; start fewer")
    batch_size = min(args.batch_size, smallest)
    steps = smallest // batch_size  # an epoch
    config = describe_run(args, paths["val"], runtime)
    network = build_network(args, checkpoint, runtime)
    trainer = Trainer(network, scores, args.learning_rate, args.num_epochs * steps, runtime)
    if args.continues:
        try:
            trainer.load_state_dict(checkpoint, checkpoint["epoch"] * steps)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"--resume {args.resume}: its optimizer does not fit this run ({error}); leave "
                            "the recipe's flags out, or pass a best.pth to start anew") from error
    keep_inputs(trainer, splits, args.no_cache)
    runtime.log(f"Training    {counted(args.num_epochs, 'epoch')} of {counted(steps, 'step')}, "
                f"{batch_size} x {runtime.world_size} = "
                f"{counted(batch_size * runtime.world_size, 'image')} a step, learning rate up to "
                f"{args.learning_rate:g}, seed {args.seed}\nOutput      {folder}")
    if runtime.rank == 0:
        folder.mkdir(parents=True, exist_ok=bool(args.output_dir or args.continues))
        if args.continues:
            find_best(trainer, config, args.resume.resolve().with_name("best.pth"), folder)
        else:
            utils.write_json(folder / "config.json", config)
    runtime.log(f"\n{EPOCH_HEADER}")
    try:
        if checkpoint and not args.continues:  # training that starts below its weights must be seen
            val = evaluate(trainer.fold(), splits["val"], scores, runtime).compute()
            row = {"epoch": 0} | {f"val_{name}": value for name, value in val.items()}
            runtime.log(format_epoch(row, args.num_epochs, is_best=False))
        fit(trainer, splits, batch_size, folder, config)
        if runtime.rank == 0:
            report_best(trainer, splits["val"], folder, config)
    except (Exception, KeyboardInterrupt) as error:
        if (folder / "last.pth").exists():
            error.__notes__ = [f'go on with it: --resume "{folder / "last.pth"}"']
        raise


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; SystemExit with status 1 and one line on stderr for what a user can put right."""
    with utils.one_line_errors("nothing is lost: start again with the same command"):
        args, checkpoint = parse_args(argv)
        runtime = Runtime.start(args.device, args.amp)
        runtime.log(f"Device      {runtime}")
        if checkpoint:
            what = (f"goes on after {counted(checkpoint['epoch'], 'epoch')}" if args.continues else
                    "is scored" + " with the mirrored photos" * args.flip if args.evaluate else
                    "a new run starts from its weights")
            runtime.log(f"Checkpoint  {args.resume or args.evaluate}: {what}")
        elif args.auto:
            runtime.log(f"Checkpoint  none in {args.output_dir}: a new run")
        scores = metrics.SegmentationMetrics(args.num_classes, runtime.device, args.score_background,
                                             args.ignore_background)
        if args.evaluate:
            splits, _ = open_splits(["val"], args, runtime)
            network = models.fold_batch_norms(build_network(args, checkpoint, runtime))
            scores = evaluate(network, splits["val"], scores, runtime, args.flip)
            check_foreground(splits["val"], "val", runtime)
            runtime.log(scores.table([entry.name for entry in dataset.CLASSES[: args.num_classes]]))
        else:
            train_network(args, checkpoint, scores, runtime)
        runtime.close()


if __name__ == "__main__":
    main()
