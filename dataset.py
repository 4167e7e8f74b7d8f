"""Composites on disk to batches on the device: the class table, the label decoder, the data set, augmentation, demo scenes.

A composite is one picture twice as wide as high, the photo on its left and the colour-coded label on its right. Run as a
program, this file makes composites from the original Cityscapes download: python dataset.py --help
"""
import argparse
import functools
import itertools
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm


class SegmentationClass(NamedTuple):
    name: str
    color: tuple[int, int, int]


# The index is the class id. Names and colours are those of the official Cityscapes scripts (Cordts et al., 2016,
# arXiv:1604.01685); background gathers what the benchmark does not score.
CLASSES = tuple(SegmentationClass(*entry) for entry in (
    ("background", (0, 0, 0)), ("road", (128, 64, 128)), ("sidewalk", (244, 35, 232)), ("building", (70, 70, 70)),
    ("wall", (102, 102, 156)), ("fence", (190, 153, 153)), ("pole", (153, 153, 153)), ("traffic light", (250, 170, 30)),
    ("traffic sign", (220, 220, 0)), ("vegetation", (107, 142, 35)), ("terrain", (152, 251, 152)), ("sky", (70, 130, 180)),
    ("person", (220, 20, 60)), ("rider", (255, 0, 0)), ("car", (0, 0, 142)), ("truck", (0, 0, 70)), ("bus", (0, 60, 100)),
    ("train", (0, 80, 100)), ("motorcycle", (0, 0, 230)), ("bicycle", (119, 11, 32)),
))
# Official colours of what is not scored, all background here. Without them in the search a nearest-colour decoder turns void
# into bicycle and fence.
VOID_COLORS = {
    "dynamic": (111, 74, 0), "ground": (81, 0, 81), "parking": (250, 170, 160), "rail track": (230, 150, 140),
    "guard rail": (180, 165, 180), "bridge": (150, 100, 100), "tunnel": (150, 120, 90), "caravan": (0, 0, 90),
    "trailer": (0, 0, 110),
}
CLASS_NAMES = [entry.name for entry in CLASSES]
PALETTE = np.array([entry.color for entry in CLASSES], dtype=np.uint8)  # (20, 3)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in 0..1: what the encoder was trained with
MIN_CROP = 1.0  # scale-and-crop is off: windows down to 0.8 cost 0.007 dice in short runs, and 0.014 with --finetune_encoder
PHOTOMETRIC = 0.2  # largest relative change of brightness and of contrast
MIN_PALETTE_SHARE = 0.45  # of a label's pixels in an official colour: Cityscapes' labels have 0.62 and more, photos up to 0.32
COMPOSITE_SUFFIXES = (".jpg", ".jpeg", ".png")
DATA_HELP = (
    "Expected: a folder with train/ and val/, each full of 256x512 composites (photo left, colour-coded label right), JPEG or PNG. "
    "The data set is published as pix2pix's 'cityscapes' archive and on Kaggle as 'cityscapes-image-pairs'. Pass its folder with "
    "--data_dir, or pass --demo to train on synthetic scenes without any download"
)


class DatasetError(Exception):
    """A file or folder of the data set that cannot be used. The message names it and the remedy."""


# --- Labels -------------------------------------------------------------------------------------------------------------

COLORS = np.array([*PALETTE, *VOID_COLORS.values()], dtype=np.uint8)  # (29, 3)
COLOR_TO_ID = np.array([*range(len(CLASSES)), *[0] * len(VOID_COLORS)], dtype=np.uint8)  # (29,)
ANY_COLOR = np.int32((1 << len(COLORS)) - 1)  # as a set of colours, a bit each
VOID_BITS = np.int32(sum(1 << index for index in range(len(CLASSES), len(COLORS))))
SURE_DISTANCE = 12  # in RGB: flat areas stay within 6 of their colour at quality 95
LUMA_WEIGHT = 4  # 4:2:0 keeps luma sharp and blurs chroma, so luma tells better on which side of an edge a pixel lies
# Some things are too thin to hold one pure pixel. Few mixtures of two other colours look like the orange and yellow of these, and the
# grey of poles is a mixture's too, but seldom at their brightness.
STANDALONE = (CLASS_NAMES.index("traffic light"), CLASS_NAMES.index("traffic sign"))
POLE, POLE_DISTANCE = CLASS_NAMES.index("pole"), 25  # in to_features


def colorize(label: np.ndarray) -> np.ndarray:
    """Class ids uint8 (H, W) to the official colours, uint8 (H, W, 3)."""
    return PALETTE[label]


class ColorTables(NamedTuple):
    """What the decoder knows of each RGB value, 6 bits a channel; a set of colours is a bit mask over COLORS."""

    nearest: np.ndarray  # index into COLORS, uint8 (64**3,)
    sure: np.ndarray  # the colour it surely is, or no bit, int32 (64**3,)
    rim: np.ndarray  # 6 bits do not tell whether it is sure, bool (64**3,)
    alone: np.ndarray  # the colours that it may be where none of them surely stands beside it, int32 (64**3,)
    ranking: np.ndarray  # indices into COLORS, the nearest in to_features first, uint8 (29, 64**3)


@functools.cache
def color_tables() -> ColorTables:
    """Built once, in a third of a second."""
    levels = np.arange(64, dtype=np.float32) * 4 + 1.5
    rgb = np.stack(np.meshgrid(levels, levels, levels, indexing="ij")).reshape(3, -1)  # (3, 64**3)
    features = to_features(rgb)
    keys = np.empty((rgb.shape[1], len(COLORS)), dtype=np.int32)  # distance above, index below, so that one sort ranks them
    nearest, distance = np.zeros(len(keys), dtype=np.uint8), np.full(len(keys), np.inf, dtype=np.float32)
    for index, color in enumerate(COLORS.astype(np.float32)[:, :, None]):
        keys[:, index] = ((features - to_features(color)) ** 2).sum(axis=0).astype(np.int32) * 32 + index
        to_color = np.sqrt(((rgb - color) ** 2).sum(axis=0))
        nearest[to_color < distance] = index
        distance = np.minimum(distance, to_color)
    bit = np.int32(1) << nearest
    alone = np.where(np.isin(nearest, STANDALONE), bit, 0)
    alone[keys[:, POLE] // 32 < POLE_DISTANCE**2] |= 1 << POLE
    alone[table_index(COLORS)] |= 1 << np.arange(len(COLORS))  # an exact colour is no chance
    keys.sort(axis=1)
    return ColorTables(
        nearest,
        sure=np.where(distance < SURE_DISTANCE, bit, 0),
        rim=np.abs(distance - SURE_DISTANCE) < 2.6,  # half the diagonal of a cell
        alone=alone,
        ranking=np.ascontiguousarray((keys & 31).T, dtype=np.uint8),
    )


def table_index(rgb: np.ndarray) -> np.ndarray:
    """uint8 (..., 3) to the index into the tables, int32 (...)."""
    index = (rgb[..., 0] >> 2).astype(np.int32)
    for channel in (1, 2):
        index <<= 6
        index |= rgb[..., channel] >> 2
    return index


def to_features(rgb: np.ndarray) -> np.ndarray:
    """float32 (3, N) to JPEG's luma, weighted, and its two chroma channels, float32 (3, N)."""
    r, g, b = rgb
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return np.stack([LUMA_WEIGHT * y, 0.564 * (b - y), 0.713 * (r - y)])


def match_colors(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel of uint8 (H, W, 3) its table_index and the bit of the colour it surely is, or 0; both int32 (H, W)."""
    tables, index = color_tables(), table_index(rgb)
    found = tables.sure.take(index)
    rim = np.flatnonzero(tables.rim.take(index))
    color = tables.nearest.take(index.ravel().take(rim))
    difference = rgb.reshape(-1, 3).take(rim, axis=0).astype(np.int32) - COLORS.take(color, axis=0)
    found.ravel()[rim] = np.where((difference**2).sum(axis=1) < SURE_DISTANCE**2, np.int32(1) << color, 0)
    return index, found


def palette_share(rgb: np.ndarray) -> float:
    """Share of the pixels of uint8 (H, W, 3) whose colour is surely an official one."""
    return float(np.mean(match_colors(rgb)[1] != 0))


def decode_label(rgb: np.ndarray) -> np.ndarray:
    """Colour-coded label uint8 (H, W, 3) to class ids uint8 (H, W), undoing what shrinking and JPEG did to its edges.

    A pixel near an official colour has that class; void colours are 0. A mixed colour may resemble a third class, so its pixel gets
    the nearest among the colours that surely stand within two pixels (the reach of 4:2:0 chroma) or, where none does, anywhere in
    the picture.
    """
    return settle_edges(*match_colors(rgb))


def settle_edges(index: np.ndarray, found: np.ndarray) -> np.ndarray:
    """decode_label for what match_colors returns."""
    tables = color_tables()
    # Void needs a block of 2x2 pixels: a mixture of two classes often hits one of its colours, and would put a dark ring round cars.
    padded = np.pad(found, 1)
    pairs = padded[1:] & padded[:-1]
    blocks = pairs[:, 1:] & pairs[:, :-1]  # (H + 1, W + 1): all four agree
    pairs = blocks[1:] | blocks[:-1]
    in_block = pairs[:, 1:] | pairs[:, :-1]  # (H, W)
    sure = found & (in_block | ~VOID_BITS)
    label = COLOR_TO_ID.take(tables.nearest.take(index))

    edges = np.flatnonzero(sure == 0)
    values, candidates = index.ravel().take(edges), spread(sure).ravel().take(edges)
    candidates = np.where(candidates == 0, spread(found).ravel().take(edges), candidates)  # if chance hits are all there is
    candidates |= tables.alone.take(values)
    candidates[candidates == 0] = np.bitwise_or.reduce(sure, axis=None) or ANY_COLOR
    label.ravel()[edges] = COLOR_TO_ID.take(np.frexp(candidates.astype(np.float64))[1] - 1)  # the highest bit, mostly the only one

    several = np.flatnonzero(candidates & (candidates - 1))
    for ranked in tables.ranking:
        color = ranked.take(values.take(several))
        chosen = (candidates.take(several) >> color) & 1 == 1
        label.ravel()[edges.take(several[chosen])] = COLOR_TO_ID.take(color[chosen])
        several = several[~chosen]
        if not len(several):
            break
    return label


def spread(bits: np.ndarray) -> np.ndarray:
    """The bits of int32 (H, W) that stand in the 5x5 pixels around each."""
    H, W = bits.shape
    padded = np.pad(bits, 2)
    rows = padded[:, :W] | padded[:, 4:]
    result = np.zeros_like(bits)
    for shift in (1, 2, 3):  # in place: new arrays of this size cost more than the operation
        rows |= padded[:, shift : shift + W]
    for shift in range(5):
        result |= rows[shift : shift + H]
    return result


# --- Reading composites -------------------------------------------------------------------------------------------------


def natural_key(path: Path) -> list:
    """Sort key that puts 2.jpg before 10.jpg; digits compare as numbers, everything else as text."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", str(path))]


def list_images(folder: str | Path, suffixes: tuple[str, ...] = COMPOSITE_SUFFIXES) -> list[Path]:
    """The images of a folder in natural order, hidden files left out."""
    paths = (path for path in Path(folder).iterdir() if path.suffix.lower() in suffixes and path.name[0] != ".")
    return sorted(paths, key=natural_key)


def read_image(path: str | Path) -> Image.Image:
    """A photo from disk: upright, 8-bit RGB, whatever its mode was.

    Raises:
        DatasetError: no such file, not an image, damaged, of one pixel, or too large to be a photo (a decompression bomb).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                photo = to_rgb(image)
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: no such file; check the path") from error
    except Exception as error:  # on damaged bytes Pillow's readers raise a dozen types, SyntaxError and struct.error among them
        reason = "is a folder" if Path(path).is_dir() else f"cannot be read as an image ({str(error) or type(error).__name__})"
        raise DatasetError(f"{path}: {reason}; replace or remove it") from error
    if min(photo.size) < 2:
        raise DatasetError(f"{path}: has {photo.width}x{photo.height} pixels, expected 2x2 or more; replace or remove it")
    return photo


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB, turned upright by its EXIF orientation.

    16-bit grey is scaled to 8 bits, where Pillow alone would clip it to white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # grey of 16 or 32 bits, or of floats
        levels = np.nan_to_num(np.asarray(image, dtype=np.float32)).clip(0)
        white = 65535 if image.mode.startswith("I") else max(levels.max(), 1e-9)
        image = Image.fromarray((levels * (255 / white)).clip(max=255).round().astype(np.uint8))
    return image.convert("RGB")


def read_composite(path: str | Path, image_size: int | None = 256) -> tuple[np.ndarray, np.ndarray]:
    """One composite, photo left and colour-coded label right.

    Returns:
        image uint8 (S, S, 3), resized with bilinear filtering, and label uint8 (S, S), ids 0..19, resized with nearest;
        S is image_size, or the composite's height for None.
    Raises:
        DatasetError: unreadable, not twice as wide as high, halves swapped, or a right half that is no label.
    """
    composite = read_image(path)
    width, height = composite.size
    if width != 2 * height or height < 2:
        raise DatasetError(f"{path}: {width}x{height} pixels; a composite is twice as wide as high (photo left, label right)")
    image, label_rgb = composite.crop((0, 0, height, height)), np.asarray(composite)[:, height:]
    index, found = match_colors(label_rgb)
    share = np.mean(found != 0)
    if share < MIN_PALETTE_SHARE:
        if palette_share(np.asarray(image)) >= MIN_PALETTE_SHARE:
            raise DatasetError(f"{path}: its halves are swapped (label left); put the photo left and the label right")
        raise DatasetError(
            f"{path}: its right half is no colour-coded label: {share:.0%} of its pixels lie near a Cityscapes colour, "
            f"expected {MIN_PALETTE_SHARE:.0%} or more; recolour or remove it"
        )
    label = settle_edges(index, found)
    if image_size not in (None, height):
        size = (image_size, image_size)
        image = image.resize(size, Image.Resampling.BILINEAR)
        label = np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
    return np.asarray(image), label


class Reader(Dataset):
    """Composites from disk, checked and packed, uint8 (H, W, 4); of a bad one the error message."""

    def __init__(self, paths: list[Path], image_size: int, n_classes: int) -> None:
        self.paths, self.image_size, self.n_classes = paths, image_size, n_classes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray | str:
        try:
            image, label = read_composite(self.paths[index], self.image_size)
        except DatasetError as error:
            return str(error)
        if label.max() >= self.n_classes:
            return (f"{self.paths[index]}: holds class id {label.max()} ({CLASSES[label.max()].name}), expected ids below "
                    f"--num_classes {self.n_classes}; pass --num_classes {label.max() + 1} or more")
        return pack(image, label)


class CompositeDataset(Dataset):
    """The composites of one folder, checked once and then served from memory or from disk.

    Every file is read and decoded at the start, so a bad one is named before any training. With `cache` the result is kept:
    4 bytes a pixel, 0.26 MB a composite at 256x256, 0.85 GB for the 3,225 of Cityscapes' train and (half its) val. Without,
    it is thrown away and decoded again by each access, in DataLoader workers.

    `class_pixels` counts the pixels of each class, int64 (n_classes,).

    Items are image uint8 (3, H, W) and label uint8 (H, W). A batch is one tensor, so that it is one gather and one transfer:
    uint8 (B, H, W, 4), red, green, blue and class id, to be taken apart by split_batch on the device.

    Raises:
        DatasetError: no such folder, no composites in it, a bad composite, or a label id of `n_classes` or more.
    """

    def __init__(self, folder: str | Path, image_size: int = 256, n_classes: int = len(CLASSES), *, cache: bool = True,
                 show_progress: bool = True) -> None:
        self.paths = list_composites(folder)
        self.image_size, self.n_classes, self.cache = image_size, n_classes, cache
        n_kept = len(self.paths) if cache else 0
        self.pixels = torch.empty((n_kept, image_size, image_size, 4), dtype=torch.uint8)
        self.class_pixels = np.zeros(n_classes, dtype=np.int64)
        # Processes, because two threads are hardly faster than one; few files are read sooner than processes start.
        workers = available_cpus() if len(self.paths) >= 256 else 0
        color_tables()  # built before the processes fork, so that each has it
        batches = DataLoader(Reader(self.paths, image_size, n_classes), batch_size=8, num_workers=workers, collate_fn=keep_batch)
        problems, index = [], 0
        with tqdm(desc=f"Reading {Path(folder).name}", total=len(self.paths), unit="image", leave=False,
                  disable=None if show_progress else True) as progress:
            for sample in itertools.chain.from_iterable(batches):
                if isinstance(sample, str):
                    problems.append(sample)
                else:
                    self.class_pixels += np.bincount(sample[..., 3].ravel(), minlength=n_classes)
                    if cache:
                        self.pixels.numpy()[index] = sample
                index += 1
                progress.update()
        if problems:
            others = f" (and {len(problems) - 1} other composites have problems)" if len(problems) > 1 else ""
            raise DatasetError(f"{problems[0]}{others}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = split_batch(self.__getitems__([index]))
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Tensor:
        if self.cache:
            return self.pixels[torch.as_tensor(indices)]
        return torch.from_numpy(np.stack([pack(*read_composite(self.paths[index], self.image_size)) for index in indices]))


def pack(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """uint8 image (H, W, 3) and label (H, W) to one array (H, W, 4)."""
    return np.stack([*image.transpose(2, 0, 1), label], axis=2)  # plane by plane: five times as fast as joining them


def split_batch(batch: Tensor) -> tuple[Tensor, Tensor]:
    """A batch of CompositeDataset, uint8 (B, H, W, 4), to its images (B, 3, H, W) and labels (B, H, W), without a copy."""
    return batch[..., :3].permute(0, 3, 1, 2), batch[..., 3]


def keep_batch(batch):
    """collate_fn that leaves a batch as it is: CompositeDataset.__getitems__ has gathered it already."""
    return batch


def list_composites(folder: str | Path) -> list[Path]:
    """The composites of `folder` in natural order; DatasetError with the expected layout where there are none."""
    folder = Path(folder)
    problem = "is missing" if not folder.exists() else "is not a folder" if not folder.is_dir() else ""
    if not problem:
        try:
            paths = list_images(folder)
        except OSError as error:
            raise DatasetError(f"{folder} cannot be listed ({error.strerror}); check its permissions") from error
        if paths:
            return paths
        problem = "holds no composites (.jpg, .jpeg or .png)"
    raise DatasetError(f"{folder} {problem}. {DATA_HELP}")


def available_cpus() -> int:
    """Cores this process may use: its share of those that the processes of torchrun have together."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken without swapping or exceeding a container's limit; None where the system does not tell (not Linux)."""
    try:
        memory = re.search(r"^MemAvailable: +(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    available = int(memory[1]) * 1024
    try:
        limit, used, details = ((root / "sys/fs/cgroup" / name).read_text() for name in ("memory.max", "memory.current", "memory.stat"))
    except OSError:  # no container, or an old one
        return available
    if limit.strip() == "max":
        return available
    file_cache = re.search(r"^inactive_file (\d+)", details, re.MULTILINE)  # counted as used, but given up when memory is short
    return min(available, int(limit) - int(used) + int(file_cache[1]))


# --- Whole batches on the device ----------------------------------------------------------------------------------------


def normalize(images: Tensor) -> Tensor:
    """uint8 images (B, 3, H, W) to float32, ImageNet-normalised."""
    mean, std = imagenet_statistics(images.device)
    return (images - 255 * mean).div_(255 * std)


@functools.cache  # a copy to the device makes the host wait; once a run is enough
def imagenet_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """MEAN and STD on the device, each (1, 3, 1, 1)."""
    mean, std = torch.tensor((MEAN, STD), device=device)
    return mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)


def augment(images: Tensor, labels: Tensor, generator: torch.Generator, min_crop: float = MIN_CROP) -> tuple[Tensor, Tensor]:
    """Flip, zoom, shift, brighten and stretch each image of a batch on its own, and each label along with its image.

    Half of the images are mirrored; a window of min_crop..1 of the side is cut at a random place and enlarged to the full
    size; contrast and brightness are scaled by 1 +- PHOTOMETRIC.

    Args:
        images: normalised float32 (B, 3, H, W).
        labels: uint8 (B, H, W).
        generator: on the images' device; the only source of randomness.
        min_crop: smallest side of the window, in sides of the image; 1 leaves the scale alone.
    Returns:
        images float32 (B, 3, H, W) in channels_last and labels uint8 (B, H, W).
    """
    B, _, H, W = images.shape
    draw = torch.rand((6, B, 1, 1), device=images.device, generator=generator)
    side = 1 - (1 - min_crop) * draw[0]
    shift_x, shift_y = (1 - side) * (2 * draw[1] - 1), (1 - side) * (2 * draw[2] - 1)  # the window stays inside the image
    mirror = torch.where(draw[3] < 0.5, -1.0, 1.0)
    x, y = ((2 * torch.arange(n, device=images.device) + 1) / n - 1 for n in (W, H))  # centres of the pixels, in -1..1
    grid = torch.stack(torch.broadcast_tensors(side * mirror * x + shift_x, side * y[:, None] + shift_y), dim=-1)  # (B, H, W, 2)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    labels = F.grid_sample(labels[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)

    contrast, brightness = (1 + PHOTOMETRIC * (2 * draw[4:, ..., None] - 1)).unbind()  # each (B, 1, 1, 1)
    mean, std = imagenet_statistics(images.device)
    black = -mean / std  # a black pixel, which brightness leaves as it is
    grey = images.mean(dim=(1, 2, 3), keepdim=True)
    offset = (grey * (1 - contrast) - black) * brightness + black  # (B, 3, 1, 1)
    images = torch.addcmul(offset, images, contrast * brightness)  # both at once: each pass over the batch costs as much
    return images.contiguous(memory_format=torch.channels_last), labels[:, 0].to(torch.uint8)


# --- Demo scenes --------------------------------------------------------------------------------------------------------

DEMO_SPLITS = {"train": 80, "val": 16}  # ten epochs of them take two minutes on two cores
EYE, FOCAL = 1.7, 0.9  # metres the camera stands high, widths of the picture that its focal length is long


class Scene:
    """A street drawn twice through one pinhole camera: as a photo and as its label. Points are metres right, up and ahead."""

    def __init__(self, seed: int, size: int) -> None:
        self.size, self.rng = size, np.random.default_rng(seed)
        self.vanishing_point = np.array([0.5, 0.45]) * size
        self.photo, self.label = Image.new("RGB", (size, size)), Image.new("L", (size, size), CLASS_NAMES.index("sky"))
        self.pens = ImageDraw.Draw(self.photo), ImageDraw.Draw(self.label)
        self.light = self.rng.uniform(0.7, 1.1)

    def tint(self, *rgb: int) -> np.ndarray:
        """A colour like this one."""
        return np.array(rgb) * self.rng.uniform(0.8, 1.2)

    def paint(self, shape: str, name: str, color, points, width: float = 0) -> None:
        """polygon, line or ellipse (box from its first to its second point) of `width` metres, on both pictures."""
        x, y, z = np.array(points, dtype=float).T
        scale = FOCAL * self.size / np.maximum(z, 1)
        dots = np.stack([self.vanishing_point[0] + x * scale, self.vanishing_point[1] - (y - EYE) * scale], axis=1)
        haze = np.exp(-z.min() / 150)  # far things fade
        color = (np.array(color) * self.light * haze + np.array((200, 212, 224)) * self.light * (1 - haze)).clip(0, 255)
        options = {"width": max(round(width * scale.mean()), self.size // 200)} if shape == "line" else {}
        for pen, fill in zip(self.pens, (tuple(color.astype(int).tolist()), CLASS_NAMES.index(name))):
            getattr(pen, shape)([tuple(dot) for dot in (np.sort(dots, axis=0) if shape == "ellipse" else dots).tolist()], fill=fill, **options)

    def rectangle(self, name: str, color, x, y, z: float, **options) -> None:
        """Upright, facing the camera, from (x[0], y[0]) to (x[1], y[1])."""
        self.paint("polygon", name, color, [(x[0], y[0], z), (x[1], y[0], z), (x[1], y[1], z), (x[0], y[1], z)], **options)

    def ellipse(self, name: str, color, x: float, y: float, z: float, radius_x: float, radius_y: float) -> None:
        self.paint("ellipse", name, color, [(x - radius_x, y - radius_y, z), (x + radius_x, y + radius_y, z)])

    def ground(self, name: str, color, left: float, right: float, near: float = 1, far: float = 400) -> None:
        self.paint("polygon", name, color, [(left, 0, near), (right, 0, near), (right, 0, far), (left, 0, far)])

    def building(self, side: int, x: float, near: float, far: float) -> None:
        color, height = self.tint(*self.rng.choice([(190, 170, 140), (170, 110, 90), (150, 150, 155)])), self.rng.uniform(8, 18)
        for x0, x1, z0, z1, shade in ((x, x + 12 * side, near, near, 0.8), (x, x, near, far, 1)):  # front, then side
            self.paint("polygon", "building", color * shade, [(x0, 0, z0), (x1, 0, z1), (x1, height, z1), (x0, height, z0)])
            for t in np.arange(0.1, 0.9, 0.2):
                for y in np.arange(1.5, height - 2, 3):
                    xs, zs = x0 + (x1 - x0) * np.array([t, t + 0.1]), z0 + (z1 - z0) * np.array([t, t + 0.1])
                    corners = [(xs[0], y, zs[0]), (xs[1], y, zs[1]), (xs[1], y + 1.6, zs[1]), (xs[0], y + 1.6, zs[0])]
                    self.paint("polygon", "building", (70, 85, 105), corners)

    def barrier(self, name: str, x: float, near: float, far: float) -> None:
        color = (150, 140, 135) if name == "wall" else (140, 100, 60)
        self.paint("polygon", name, color, [(x, 0, near), (x, 0, far), (x, 1.8, far), (x, 1.8, near)])
        for z in np.linspace(near, far, 24 if name == "fence" else 5):
            self.paint("line", name, np.array(color) * 0.7, [(x, 0, z), (x, 1.8, z)], width=0.06)

    def tree(self, x: float, z: float) -> None:
        self.paint("line", "vegetation", (95, 70, 50), [(x, 0, z), (x, 3, z)], width=0.35)
        for u, v, r, shade in self.rng.uniform((-1.3, 3, 0.7, 0.7), (1.3, 5.5, 1.4, 1.1), (14, 4)):
            self.ellipse("vegetation", np.array((75, 115, 50)) * shade, x + u, v, z, r, r)

    def vehicle(self, name: str, x: float, z: float) -> None:
        width, height = {"car": (1.8, 1.5), "truck": (2.5, 3.4), "bus": (2.6, 3.1), "train": (2.7, 3.6)}[name]
        color = {"truck": self.tint(190, 185, 170), "bus": self.tint(200, 160, 40), "train": self.tint(60, 130, 90)}.get(
            name, self.tint(*self.rng.choice([(170, 40, 40), (40, 70, 140), (200, 200, 205), (60, 60, 65)])))
        left, right = x - width / 2, x + width / 2
        for wheel in (left + 0.25, right - 0.25):
            self.ellipse(name, (25, 25, 28), wheel, 0.3, z, 0.2, 0.3)
        self.rectangle(name, color, (left, right), (0.25, height * (0.62 if name == "car" else 1)), z)
        if name == "car":
            roof = [(left + 0.05, 0.9, z), (right - 0.05, 0.9, z), (right - 0.3, height, z), (left + 0.3, height, z)]
            self.paint("polygon", name, color * 0.9, roof)
        glass = (0.95, 1.4) if name == "car" else (height * 0.5, height * 0.88)
        if name != "truck":  # a box van has no rear window
            self.rectangle(name, (50, 60, 75), (left + 0.3, right - 0.3), glass, z)
        for lamp in (left + 0.05, right - 0.35):
            self.rectangle(name, (215, 30, 30), (lamp, lamp + 0.3), (0.6, 0.8), z)
        self.rectangle(name, (235, 235, 220), (x - 0.3, x + 0.3), (0.4, 0.55), z)

    def person(self, name: str, x: float, z: float, y: float = 0) -> None:
        shirt, trousers = self.tint(*self.rng.integers(50, 200, 3)), self.tint(60, 60, 80)
        for step in (-0.15, 0.15):
            self.paint("line", name, trousers, [(x + step, y, z), (x, y + 0.9, z)], width=0.18)
            self.paint("line", name, shirt * 0.85, [(x + 1.5 * step, y + 1.35, z), (x + 2 * step, y + 0.85, z)], width=0.13)
        self.ellipse(name, shirt, x, y + 1.15, z, 0.26, 0.38)
        self.ellipse(name, (205, 160, 130), x, y + 1.65, z, 0.14, 0.18)

    def cycle(self, name: str, x: float, z: float, ridden: bool) -> None:
        motor, color = name == "motorcycle", self.tint(*self.rng.choice([(190, 40, 40), (40, 90, 170), (220, 150, 40)]))
        for hub in (x - 0.55, x + 0.55):
            self.ellipse(name, (30, 30, 32), hub, 0.35, z, 0.35, 0.35)
            self.ellipse(name, (120, 120, 122), hub, 0.35, z, 0.24, 0.24)
        for start, end in (((-0.55, 0.35), (-0.15, 0.9)), ((0.55, 0.35), (0.35, 1.05)), ((-0.15, 0.85), (0.4, 0.85)), ((-0.2, 0.4), (0.4, 0.8))):
            self.paint("line", name, color, [(x + start[0], start[1], z), (x + end[0], end[1], z)], width=0.32 if motor else 0.1)
        if ridden:
            self.person("rider", x - 0.05, z, y=0.45)

    def pole(self, x: float, z: float, top: str) -> None:
        self.paint("line", "pole", (120, 122, 125), [(x, 0, z), (x, 5.5 if top == "lamp" else 3, z)], width=0.13)
        if top == "lamp":
            self.paint("line", "pole", (120, 122, 125), [(x, 5.5, z), (x - np.sign(x) * 1.4, 5.6, z)], width=0.13)
        elif top == "traffic light":
            self.rectangle(top, (35, 38, 36), (x - 0.22, x + 0.22), (2.4, 3.6), z)
            lit = self.rng.integers(3)
            for i, color in enumerate(((60, 220, 90), (250, 180, 40), (235, 40, 40))):
                self.ellipse(top, np.array(color) * (1 if i == lit else 0.4), x, 2.6 + 0.4 * i, z, 0.14, 0.14)
        else:
            rim, face = ((205, 30, 40), (245, 245, 240)) if self.rng.random() < 0.5 else ((240, 240, 240), (30, 80, 180))
            self.ellipse(top, rim, x, 3, z, 0.5, 0.5)
            self.ellipse(top, face, x, 3, z, 0.36, 0.36)


def draw_scene(seed: int, size: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """A synthetic street scene, the same for the same arguments; any four seeds in a row hold all 20 classes.

    Returns:
        photo uint8 (size, size, 3) and label uint8 (size, size), class ids 0..19.
    """
    scene = Scene(seed, size)
    rng, horizon = scene.rng, int(scene.vanishing_point[1])
    sky = np.linspace((90, 140, 210), (215, 225, 235), horizon) * scene.light  # (rows, 3), from the zenith down
    scene.photo.paste(Image.fromarray(sky.clip(0, 255).astype(np.uint8)[:, None].repeat(size, axis=1)))
    left, right = -rng.uniform(4, 6), rng.uniform(3, 4.5)
    scene.ground("terrain", scene.tint(110, 140, 70), -300, 300)
    scene.ground("sidewalk", scene.tint(170, 160, 155), left - 3, right + 3)
    scene.ground("road", scene.tint(95, 95, 100), left, right)
    for z in np.arange(2, 90, 6):
        scene.ground("road", (225, 225, 215), -0.9, -0.75, z, z + 2.5)

    things = [(150.0, scene.building, (1, x, 150, 160)) for x in range(-90, 90, 13)]  # (distance, what, arguments)
    for side, edge in ((-1, left - 3), (1, right + 3)):
        z, barrier = rng.uniform(4, 8), ("wall", "fence")[(seed + (side > 0)) % 2]
        while z < 120:
            length = rng.uniform(8, 16)
            if 9 < z < 40 and barrier:
                things.append((z, scene.barrier, (barrier, edge + side, z, z + length)))
                things += [(z + length + 1, scene.tree, (edge + side * u, z + length)) for u in (3, 6, 9)]
                barrier = None
            else:
                things.append((z, scene.building, (side, edge + side * rng.uniform(1, 3), z, z + length * 0.9)))
            z += length
        curb = edge - side * 2.5
        things += [(z, scene.tree, (curb, z)) for z in rng.uniform(12, 60, 3)]
        things += [(z, scene.pole, (curb, z, top)) for top in ("lamp", "traffic light", "traffic sign") for z in rng.uniform(8, 30, 2)]
        things += [(z, scene.person, ("person", edge - side * rng.uniform(0.5, 2), z)) for z in rng.uniform(7, 25, 3)]
        things += [(z, scene.vehicle, ("car", (left + 1.2, right - 1.2)[side > 0], z)) for z in rng.uniform(9, 60, 4)]
    large = ("truck", "bus", "train", "car")[seed % 4]
    things += [(z, scene.vehicle, (large, -2.2, z)) for z in (rng.uniform(13, 20),)]
    ridden, parked = ("bicycle", "motorcycle")[:: 1 if seed % 2 else -1]
    things += [(z, scene.cycle, (ridden, rng.uniform(0.6, 1.4), z, True)) for z in (rng.uniform(6, 9),)]
    things += [(z, scene.cycle, (parked, right + 1.3, z, False)) for z in (rng.uniform(6, 9),)]
    for _, draw, arguments in sorted(things, key=lambda thing: -thing[0]):  # far things first
        draw(*arguments)
    for pen, fill in zip(scene.pens, ((40, 42, 48), CLASS_NAMES.index("background"))):  # the bonnet of the car that films
        pen.ellipse((-size * 0.2, size * 0.92, size * 1.2, size * 1.3), fill=fill)
    photo = np.asarray(scene.photo) + rng.integers(-9, 10, (size, size, 1), dtype=np.int16)  # the camera's noise
    return photo.clip(0, 255).astype(np.uint8), np.array(scene.label)


def write_demo(data_dir: str | Path, splits: dict[str, int] | None = None) -> None:
    """Composites of 256x512 in data_dir/train and data_dir/val, JPEG at quality 95; those already there are kept."""
    splits = splits or DEMO_SPLITS
    paths = [Path(data_dir, split, f"{number}.jpg") for split, count in splits.items() for number in range(1, count + 1)]

    def write_one(seed: int) -> None:
        if not paths[seed].exists():
            photo, label = draw_scene(seed)  # four times as large, so that shrinking smooths the photo as a lens does
            photo = Image.fromarray(photo).resize((256, 256), Image.Resampling.BOX)
            label = Image.fromarray(label).resize((256, 256), Image.Resampling.NEAREST)
            write_composite(paths[seed], np.asarray(photo), colorize(np.asarray(label)))

    with ThreadPoolExecutor(available_cpus()) as pool:
        list(tqdm(pool.map(write_one, range(len(paths))), "Drawing the demo", len(paths), unit="image", leave=False, disable=None))


# --- Making composites from the original download -----------------------------------------------------------------------


def make_composites(cityscapes_dir: Path, data_dir: Path, size: int = 256) -> int:
    """Composites as lossless PNG from leftImg8bit/SPLIT/CITY/*.png and gtFine/SPLIT/CITY/*_gtFine_color.png.

    The photo is shrunk with antialiasing, the label with nearest, so that every pixel keeps an official colour.

    Returns:
        How many were written to data_dir/train and data_dir/val; those already there are counted, not made again.
    Raises:
        DatasetError: no photos there, a photo without its label, or a picture that cannot be read.
    """
    photos = [(split, path) for split in ("train", "val")
              for path in sorted(cityscapes_dir.glob(f"leftImg8bit/{split}/*/*_leftImg8bit.png"))]
    if not photos:
        raise DatasetError(f"{cityscapes_dir} holds no leftImg8bit/train/*/*_leftImg8bit.png; unpack leftImg8bit_trainvaltest.zip and "
                           "gtFine_trainvaltest.zip of the Cityscapes download there")

    def make_one(entry: tuple[str, Path]) -> None:
        split, photo_path = entry
        frame = photo_path.name.removesuffix("_leftImg8bit.png")
        target = data_dir / split / f"{frame}.png"
        if target.exists():
            return
        photo = read_image(photo_path).resize((size, size), Image.Resampling.LANCZOS)
        label_path = cityscapes_dir / "gtFine" / split / photo_path.parent.name / f"{frame}_gtFine_color.png"
        label = read_image(label_path).resize((size, size), Image.Resampling.NEAREST)
        write_composite(target, np.asarray(photo), np.asarray(label))

    with ThreadPoolExecutor(available_cpus()) as pool:
        list(tqdm(pool.map(make_one, photos), "Making composites", len(photos), unit="image", disable=None))
    return len(photos)


def write_composite(path: Path, photo: np.ndarray, label_rgb: np.ndarray) -> None:
    """Photo and colour-coded label, each uint8 (S, S, 3), side by side in a file that is whole at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    image_format = "PNG" if path.suffix == ".png" else "JPEG"
    Image.fromarray(np.concatenate([photo, label_rgb], axis=1)).save(temporary, image_format, quality=95)
    os.replace(temporary, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make train/ and val/ composites from the original Cityscapes download.",
                                     allow_abbrev=False)
    parser.add_argument("cityscapes_dir", type=Path, help="holds leftImg8bit/ and gtFine/ (with the *_gtFine_color.png)")
    parser.add_argument("--output", type=Path, default=Path("data/cityscapes_data"), metavar="FOLDER",
                        help="gets train/ and val/, %(default)s if left out")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="side of each half, %(default)s if left out")
    args = parser.parse_args(argv)
    try:
        print(f"{make_composites(args.cityscapes_dir, args.output, args.size)} composites in {args.output}")
    except (DatasetError, OSError) as error:
        parser.exit(1, f"dataset.py: error: {error}\n")


if __name__ == "__main__":
    main()
