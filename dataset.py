"""Composites, photo left and colour-coded label right, to batches on the device; as a program, makes them."""
import argparse
import contextlib
import functools
import itertools
import os
import re
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import BatchSampler
from tqdm.auto import tqdm
from tqdm.contrib.concurrent import thread_map

from utils import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in 0..1
PHOTOMETRIC = 0.2  # largest relative change of brightness and of contrast
ENCODE_BATCH = 16  # photos that a frozen encoder takes at once


class DatasetError(UserError):
    """A file or folder of the data set that cannot be used. The message names it and the remedy."""


# --- Labels -------------------------------------------------------------------------------------------------

class SegmentationClass(NamedTuple):
    name: str
    color: tuple[int, int, int]
    further: dict[str, tuple] = MappingProxyType({})  # what counts as this class too, with its colours
    thin: bool = False  # mostly too thin to hold a pixel of its pure colour


# The index is the class id; id 0 is the background, whatever its name. Names and colours are those of the
# official Cityscapes scripts (Cordts et al., 2016, arXiv:1604.01685). Edit them for other labels, 2 to 60;
# further colours may move to another class (caravan to car, say); without them void would become bicycles.
CLASSES = tuple(SegmentationClass(*entry) for entry in (
    ("background", (0, 0, 0), {
        "dynamic": (111, 74, 0), "ground": (81, 0, 81), "parking": (250, 170, 160),
        "rail track": (230, 150, 140), "guard rail": (180, 165, 180), "bridge": (150, 100, 100),
        "tunnel": (150, 120, 90), "caravan": (0, 0, 90), "trailer": (0, 0, 110)}),
    ("road", (128, 64, 128)), ("sidewalk", (244, 35, 232)), ("building", (70, 70, 70)),
    ("wall", (102, 102, 156)), ("fence", (190, 153, 153)), ("pole", (153, 153, 153), {}, True),
    ("traffic light", (250, 170, 30)), ("traffic sign", (220, 220, 0)), ("vegetation", (107, 142, 35)),
    ("terrain", (152, 251, 152)), ("sky", (70, 130, 180)), ("person", (220, 20, 60)), ("rider", (255, 0, 0)),
    ("car", (0, 0, 142)), ("truck", (0, 0, 70)), ("bus", (0, 60, 100)), ("train", (0, 80, 100)),
    ("motorcycle", (0, 0, 230)), ("bicycle", (119, 11, 32)),
))
SCORE_BACKGROUND = False  # True where id 0 is a class like any other ("not road"): it counts in every figure

SURE_DISTANCE = 12  # in RGB: flat areas stay within 6 of their colour at JPEG quality 95
LUMA_WEIGHT = 4  # 4:2:0 blurs chroma alone, so luma tells better on which side of an edge a pixel lies
STANDALONE_DISTANCE = 15  # in to_features: lower, and persons appear where two other classes meet
THIN_DISTANCE = 16  # in to_features: mixtures are as grey as poles, but seldom as bright
MIN_PALETTE_SHARE = 0.45  # sure pixels, background aside: real labels have 0.60 and more, photos up to 0.32
STRANGE_DISTANCE = 14  # in RGB: JPEG can move the colour of a narrow flat area by 13
MAX_STRANGE = 15  # flat places in a strange colour: real labels have 0 to 7
FLAT = (5, 8)  # 5x5 pixels that differ by 8 at most: hardly any edge stays even over so many
LOSSLESS_FLAT = (3, 0)  # where no JPEG has blurred: 3x3 of one colour


class LabelDecoder:
    """Reads colour-coded labels that shrinking and JPEG have blurred; DatasetError for an unsound table."""

    def __init__(self, classes: Sequence[SegmentationClass]) -> None:
        table = [(entry.name, entry.color, i, entry.thin) for i, entry in enumerate(classes)]
        table += [(*item, i, False) for i, entry in enumerate(classes) for item in entry.further.items()]
        if not 2 <= len(classes) <= 60 or len(table) > 255:
            raise DatasetError(f"dataset.py: {len(classes)} CLASSES with {len(table)} colours; give 2 to 60 "
                               "classes and 255 colours at most")
        seen = {}
        for name, color, *_ in table:
            if len(color) != 3 or any(level not in range(256) for level in color):
                raise DatasetError(f"dataset.py: {name!r} has the colour {color}; give three of 0 to 255")
            if tuple(color) in seen:
                raise DatasetError(f"dataset.py: {seen[tuple(color)]!r} and {name!r} have the same colour")
            seen[tuple(color)] = name
        _, colors, ids, thin = zip(*table)
        self.n_classes = len(classes)
        self.colors = np.array(colors, dtype=np.uint8)  # (K, 3), further ones last
        self.ids, self.thin = np.array(ids, dtype=np.uint8), np.array(thin, dtype=bool)  # (K,)
        self.features = to_features(self.colors)
        self.standalone = (self.ids > 0) & (distance_to_mixtures(self.features) > STANDALONE_DISTANCE)
        self.no_color = len(table)  # stands for "no colour" where an index into colors is expected
        self.table = np.full((256, 256, 256), self.no_color, dtype=np.uint8)  # a sure colour for each RGB
        nearest = np.full(self.table.shape, SURE_DISTANCE**2, dtype=np.uint8)  # its squared distance
        for index, color in enumerate(self.colors.astype(int)):
            cube = np.ix_(*(abs(np.arange(256) - level) <= SURE_DISTANCE for level in color))
            squared = sum((levels - level) ** 2 for levels, level in zip(cube, color))
            closer = squared < nearest[cube]
            self.table[cube] = np.where(closer, index, self.table[cube])
            nearest[cube] = np.where(closer, squared, nearest[cube])

    def match(self, rgb: np.ndarray) -> np.ndarray:
        """Index of the colour that each pixel of uint8 (H, W, 3) surely has, or no_color; uint8 (H, W)."""
        r, g, b = np.moveaxis(rgb, -1, 0).astype(np.int32)
        return self.table.ravel().take(r << 16 | g << 8 | b)

    def decode(self, rgb: np.ndarray) -> np.ndarray:
        """Colour-coded label uint8 (H, W, 3) to class ids uint8 (H, W).

        A pixel near a colour of the table has its class. A mixed colour may resemble a third class, so other
        pixels get the nearest among the colours that surely stand within two pixels (the reach of 4:2:0
        chroma) or, where none does, beside any unsure pixel. A colour that no mixture resembles is allowed
        wherever it is the nearest of all, a thin class wherever it is near.
        """
        color = self.match(rgb)
        chance = self.chance_hits(color, rgb)
        sure = np.where(chance, self.no_color, color)
        unsure = np.flatnonzero(sure == self.no_color)
        allowed = self.colors_around(sure, unsure)  # (K, N)
        anywhere = allowed.any(axis=1, keepdims=True)
        lonely = ~allowed.any(axis=0)
        # Chance hits count where they are all there is.
        allowed[:, lonely] = self.colors_around(np.where(chance, color, self.no_color), unsure[lonely])
        allowed[:, ~allowed.any(axis=0)] = anywhere | ~anywhere.any()

        pixels, colors = to_features(rgb.reshape(-1, 3)[unsure]), self.features
        # Squared, (K, N). No matrix product: BLAS has its own threads, too many beside those that read.
        distance = sum((colors[:, c, None] - pixels[:, c]) ** 2 for c in range(3))
        allowed[self.standalone] |= distance[self.standalone] == distance.min(axis=0)
        allowed[self.thin] |= distance[self.thin] < THIN_DISTANCE**2
        np.copyto(distance, np.inf, where=~allowed)
        sure.ravel()[unsure] = distance.argmin(axis=0)
        return self.ids[sure]

    def colors_around(self, color: np.ndarray, where: np.ndarray) -> np.ndarray:
        """Which colours stand in the 5x5 pixels round each of `where`, N flat indices; bool (K, N)."""
        padded = np.pad(color, 2, constant_values=self.no_color)
        found = np.zeros((self.no_color, len(where)), dtype=bool)
        for index in np.flatnonzero(np.bincount(color.ravel())[: self.no_color]):
            mask = padded == index
            for _ in range(2):  # rows, then columns
                mask = (mask[:-4] | mask[1:-3] | mask[2:-2] | mask[3:-1] | mask[4:]).T
            found[index] = mask.ravel()[where]
        return found

    def chance_hits(self, color: np.ndarray, rgb: np.ndarray) -> np.ndarray:
        """Pixels of further colours that stand in no 2x2 block and are not exact; bool (H, W).

        A mixture of two classes often hits one of these, and void ones would put a dark ring round cars.
        """
        padded = np.pad(color, 1, constant_values=self.no_color)
        same = padded[1:] == padded[:-1]
        block = same[:, 1:] & same[:, :-1] & (padded[1:, 1:] == padded[1:, :-1])  # (H + 1, W + 1), four alike
        block = block[1:] | block[:-1]
        hits = (color >= self.n_classes) & (color != self.no_color) & ~(block[:, 1:] | block[:, :-1])
        hits[hits] = (rgb[hits] != self.colors[color[hits]]).any(axis=1)
        return hits

    def palette_share(self, rgb: np.ndarray) -> float:
        """Share of sure pixels among those not surely background, as other tables have black too; or 0."""
        color = self.match(rgb)
        return float((color[color != 0] != self.no_color).mean()) if color.any() else 0.0

    def problem(self, rgb: np.ndarray, step: int | None = None, flat: tuple[int, int] = FLAT) -> str | None:
        """Why uint8 (H, W, 3) is no label in this table's colours, as the end of a message, or None.

        Of pixels `step` apart; if left out 256 in a column, as an enlarged label has wide edges. Foreign
        colours are found in `flat` places, of this size and spread.
        """
        step = step or max(1, len(rgb) // 256)
        rgb = rgb[::step, ::step]
        color = self.match(rgb)
        foreground, unsure = np.mean(color != 0), np.mean(color == self.no_color)  # shares
        strange = self.strange_places(rgb, color, *flat)  # (N, 3)
        if len(strange) > MAX_STRANGE and unsure - len(strange) / color.size < 1 - MIN_PALETTE_SHARE:
            colors, counts = np.unique(strange, axis=0, return_counts=True)
            named = colors[counts.argmax()]
            share = np.mean((color == self.no_color) & (abs(rgb - named) <= SURE_DISTANCE).all(axis=2))
            return (f"{share:.1%} of its label are rgb{tuple(named.tolist())}, which CLASSES in dataset.py "
                    "lacks; add it, as a class or to the further colours of one")
        if unsure > max((1 - MIN_PALETTE_SHARE) * foreground, 0.05):
            return ("its label is not in the colours of the class table, which show in "
                    f"{1 - unsure / foreground:.0%} of it, background aside; recolour it or leave it out")
        return None

    def strange_places(self, rgb: np.ndarray, color: np.ndarray, size: int, spread: int) -> np.ndarray:
        """The colours, int (N, 3), of flat places that are far from every colour of the table."""
        far = color == self.no_color
        for _ in range(size - 1):  # shrink to the corners of the places that are far throughout
            far = far[1:, 1:] & far[:-1, 1:] & far[1:, :-1] & far[:-1, :-1]
        places = sliding_window_view(rgb, (size, size), (0, 1))[far]  # (N, 3, size, size)
        flat = np.ptp(places, axis=(2, 3)).max(axis=1) <= spread
        middle = places[flat, :, size // 2, size // 2].astype(int)
        squared = ((middle[:, None] - self.colors) ** 2).sum(axis=2)  # (N, K)
        return middle[(squared > STRANGE_DISTANCE**2).all(axis=1)]


def to_features(rgb: np.ndarray) -> np.ndarray:
    """RGB (N, 3) to JPEG's luma, weighted, and its two chroma channels, float32 (N, 3)."""
    r, g, b = rgb.T.astype(np.float32)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return np.stack([LUMA_WEIGHT * y, 0.564 * (b - y), 0.713 * (r - y)], axis=1)


def distance_to_mixtures(points: np.ndarray) -> np.ndarray:
    """How far each of (K, 3) lies from the nearest segment between two others, (K,)."""
    distances = []
    for index, point in enumerate(points):
        others = np.delete(points, index, axis=0) - point
        directions = others[:, None] - others  # (K - 1, K - 1, 3), each from the one of the second axis
        length = np.maximum((directions**2).sum(axis=2), 1e-9)
        along = (-(others * directions).sum(axis=2) / length).clip(0, 1)
        nearest = others + along[..., None] * directions
        distances.append(np.linalg.norm(nearest, axis=2).min())
    return np.array(distances)


@functools.lru_cache(maxsize=1)
def build_decoder(table: str) -> LabelDecoder:
    return LabelDecoder(CLASSES)


def project_decoder() -> LabelDecoder:
    """The decoder of this file's table as it is now. DatasetError as in LabelDecoder."""
    return build_decoder(repr(CLASSES))  # anew when what it holds has changed


def decode_label(rgb: np.ndarray) -> np.ndarray:
    """Colour-coded label uint8 (H, W, 3) to class ids uint8 (H, W), with this file's table."""
    return project_decoder().decode(rgb)


def check_classes(names: Sequence[str], colors: Sequence, owner: str | Path) -> None:
    """DatasetError if the class ids of a checkpoint, its `owner`, mean something else than here."""
    here = [f"{entry.name} {tuple(entry.color)}" for entry in CLASSES] + ["missing"] * len(names)
    there = [f"{name} {tuple(color)}" for name, color in zip(names, colors)]
    for index, (one, other) in enumerate(zip(there, here)):
        if one != other:
            raise DatasetError(f"{owner}: its class {index} is {one}, in dataset.py it is {other}; restore "
                               "CLASSES as it was in training, or train anew")


def colorize(label: np.ndarray) -> np.ndarray:
    """Class ids uint8 (H, W) to their colours, uint8 (H, W, 3)."""
    return project_decoder().colors[label]


# --- Photos -------------------------------------------------------------------------------------------------

KINDS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")  # Pillow's own
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in KINDS}
FORMATS = [name for name in KINDS if name in Image.OPEN]  # MPO opens as JPEG; a build may lack AVIF
GREY = (128, 128, 128)  # what shows where a photo is transparent
warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged metadata, which do not matter here


def find_images(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """The images in a folder and its subfolders, by their names, and its other files, in natural order.

    What is hidden is left out. OSError if a folder cannot be listed.
    """
    def fail(error: OSError) -> None:
        raise error  # os.walk would go on without the folder

    paths = []
    for name, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        if os.path.realpath(name) in map(os.path.realpath, Path(name).parents):  # a link back
            folders[:], files = [], []
        folders[:] = [one for one in folders if one[0] != "."]
        paths += [Path(name, file) for file in files if file[0] != "."]
    paths.sort(key=lambda path: (re.sub(r"\d+", lambda number: number[0].zfill(20), str(path)), path))
    images = [path for path in paths if path.suffix.lower() in SUFFIXES]
    return images, [path for path in paths if path.suffix.lower() not in SUFFIXES]


@contextlib.contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Pillow's image of a file, of FORMATS. Whatever goes wrong with it is a DatasetError that names it."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except MemoryError:  # no fault of the file
        raise
    except Exception as error:  # Pillow raises a dozen types on damaged bytes, SyntaxError among them
        reason, remedy = str(error) or type(error).__name__, "; save it anew or leave it out"
        if isinstance(error, DatasetError) or getattr(error, "errno", None):  # the file may be fine
            reason, remedy = getattr(error, "strerror", reason), ""
        raise DatasetError(f"{path}: {reason}{remedy}") from error


def read_image(path: str | Path) -> Image.Image:
    """A photo from disk as `to_rgb` gives it; DatasetError if there is none or it cannot be read."""
    with open_image(path) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB without metadata: upright as EXIF says, over grey where it is transparent.

    DatasetError for more than 8 bits a channel, which no rule tells how to shrink.
    """
    if image.mode[0] in "IF" or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        raise DatasetError("it has more than 8 bits a channel; save it with 8")  # Pillow would drop some
    rgb = image.convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        rgb.paste(GREY, (0, 0, *rgb.size))
        rgb.paste(rgba, mask=rgba)
    with contextlib.suppress(Exception):  # damaged EXIF, of which Pillow makes many an error
        ImageOps.exif_transpose(rgb, in_place=True)
    rgb.info = {}
    return rgb


def in_threads(function: Callable, items: Iterable, n_threads: int, n_ahead: int) -> Iterator:
    """function(item) of each item in order, computed by threads so many items ahead of the one taken."""
    pending, pool = deque(), ThreadPoolExecutor(max(n_threads, 1))
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > n_ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# --- Composites ---------------------------------------------------------------------------------------------

def read_composite(path: str | Path, image_size: int | None = 256, *,
                   resize_label: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """One composite, photo left and colour-coded label right, h pixels high.

    Returns image uint8 (S, S, 3), resized bilinearly, and label uint8 (S, S), ids in CLASSES, resized with
    nearest, or (h, h) as it is; S is image_size, or h for None. DatasetError: unreadable, not twice as wide
    as high, halves swapped, or a right half that is no label.
    """
    composite = read_image(path)
    width, height = composite.size
    if width != 2 * height:
        raise DatasetError(f"{path}: {width}x{height} pixels; a composite is twice as wide as high")
    image, label_rgb = composite.crop((0, 0, height, height)), np.asarray(composite)[:, height:]
    decoder = project_decoder()
    if problem := decoder.problem(label_rgb):
        if decoder.palette_share(np.asarray(image)) >= MIN_PALETTE_SHARE:
            problem = "its halves are swapped (label left); put the photo left and the label right"
        raise DatasetError(f"{path}: {problem}")
    label = decoder.decode(label_rgb)
    if image_size not in (None, height):
        size = (image_size, image_size)
        image = image.resize(size, Image.Resampling.BILINEAR)
        if resize_label:
            label = np.array(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
    return np.asarray(image), label


def is_composite(photo: Image.Image) -> bool:
    """Whether a picture's right half is a colour-coded label of this file's table."""
    width, height = photo.size
    if width != 2 * height:
        return False
    right, decoder = np.asarray(photo)[:, height:], project_decoder()
    return decoder.palette_share(right) >= MIN_PALETTE_SHARE and decoder.problem(right) is None


def list_composites(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """find_images() of a split's folder; DatasetError with the expected layout if it holds no images."""
    folder = Path(folder)
    images, others = find_images(folder) if folder.is_dir() else ([], [])
    if images:
        return images, others
    remedy = ("Expected: a folder with train/ and val/, each full of 256x512 composites (photo left, "
              "colour-coded label right), such as pix2pix's 'cityscapes' archive, on Kaggle "
              "'cityscapes-image-pairs'. Pass it with --data_dir, or --demo for drawn scenes; python "
              "dataset.py --help makes composites of your own photos and labels")
    if nested := next(folder.parent.glob(f"*/{folder.name}/"), None):
        remedy = f"It lies one folder deeper: pass --data_dir {nested.parent}"
    raise DatasetError(f"{folder} {'holds no composites' if folder.is_dir() else 'is missing'}. {remedy}")


class Split:
    """A process's share of train/ or val/: composites on disk, and what is kept of them.

    Photos are resized to squares of image_size S, and labels with them if asked, to train on; else they keep
    their size, to score on. Ids in them are below n_classes.

    Attributes:
        inputs: a list of the encoder's five feature maps, each (N, C, h, w), or of the images, uint8
            (N, 3, S, S), in channels_last; None where nothing is kept.
        labels: N of uint8 (h, w), beside inputs.
        has_foreground: whether any label read so far holds more than background.
    """

    def __init__(self, paths: Sequence[Path], image_size: int, n_classes: int, resize_labels: bool,
                 n_threads: int) -> None:
        self.paths, self.image_size, self.n_classes = paths, image_size, n_classes
        self.resize_labels, self.n_threads = resize_labels, n_threads
        self.inputs: list[Tensor] | None = None
        self.labels: list[Tensor] = []
        self.has_foreground = False

    def __len__(self) -> int:
        return len(self.paths)

    def label_bytes(self) -> int:
        """What all labels take in memory, those of their own size by the files' headers."""
        if self.resize_labels:
            return len(self) * self.image_size**2
        n_bytes = 0
        for path in self.paths:
            with open_image(path) as image:
                n_bytes += min(image.size) ** 2  # whichever way up it is stored
        return n_bytes

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A composite as read_composite gives it; DatasetError also for a class id that is too high."""
        path = self.paths[index]
        image, label = read_composite(path, self.image_size, resize_label=self.resize_labels)
        highest = int(label.max())
        if highest >= self.n_classes:
            raise DatasetError(f"{path}: holds class id {highest} ({CLASSES[highest].name}), not below "
                               f"--num_classes {self.n_classes}; leave the flag out, in a new run")
        if highest > 0:  # threads set it, and none takes it back
            self.has_foreground = True
        return image, label

    def load(self, order: Iterable[Sequence[int]]) -> Iterator[tuple[list[Tensor], Tensor | list[Tensor]]]:
        """[images], uint8 (B, 3, S, S) in channels_last, and labels of each batch of indices, from disk."""
        order = list(order)
        n_ahead = self.n_threads + max(map(len, order), default=0)  # a batch, while the network works
        samples = in_threads(self.read, itertools.chain(*order), self.n_threads, n_ahead)
        for indices in order:
            images, labels = zip(*itertools.islice(samples, len(indices)))
            images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
            yield [images], stack([*map(torch.from_numpy, labels)])

    def keep(self, encode: Callable[[Tensor], list[Tensor]], device: torch.device | None, bar: tqdm) -> None:
        """Read and check all composites; keep what `encode` makes of them on the device, None for nowhere."""
        order = list(BatchSampler(range(len(self)), ENCODE_BATCH, drop_last=False))
        for indices, ((images,), labels) in zip(order, self.load(order)):
            bar.update(len(indices))
            if device:
                self.labels += move(labels, device)
                encoded = encode(images)
                self.inputs = self.inputs or [
                    torch.empty((len(self), *one.shape[1:]), dtype=one.dtype, device=device,
                                memory_format=torch.channels_last) for one in encoded]
                for one, part in zip(self.inputs, encoded):
                    one[indices[0] : indices[-1] + 1] = part

    def batches(self, order: Iterable[Sequence[int]], device: torch.device) -> Iterator[tuple]:
        """inputs, a list of tensors, and labels of each batch of indices, on the device.

        The labels are uint8 (B, h, w), or a list of (h, w) where their sizes differ.
        """
        for inputs, labels in map(self.take, order) if self.inputs else self.load(order):
            yield move(inputs, device), move(labels, device)

    def take(self, indices: Sequence[int]) -> tuple[list[Tensor], Tensor | list[Tensor]]:
        """inputs and labels of a batch, of those that are kept."""
        index = move(torch.as_tensor(indices), self.inputs[0].device)  # with it channels_last stays
        return [one[index] for one in self.inputs], stack([self.labels[i] for i in indices])


def stack(labels: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Labels (h, w) as one tensor (B, h, w), or as they are where their sizes differ."""
    return torch.stack(labels) if len({label.shape for label in labels}) == 1 else labels


def move(tensors: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    """Tensors to a device, to a GPU through pinned memory, so that the host need not wait."""
    if isinstance(tensors, list):
        return [move(one, device) for one in tensors]
    if device.type != "cuda":
        return tensors.to(device)
    return (tensors if tensors.is_cuda else tensors.pin_memory()).to(device, non_blocking=True)


# --- Whole batches on the device ----------------------------------------------------------------------------

def augment(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror half of the images with their labels, and change brightness and contrast by 1 +- PHOTOMETRIC.

    Images uint8 (B, 3, H, W) become float32, a black pixel still 0; labels are uint8 (B, H, W). The
    generator, on the images' device, is the only source of randomness.
    """
    draw = torch.rand((3, len(images), 1, 1, 1), device=images.device, generator=generator)
    mirrored = draw[0] < 0.5
    images = torch.where(mirrored, images.flip(3), images).float()
    labels = torch.where(mirrored[..., 0], labels.flip(2), labels)
    contrast, brightness = 1 + PHOTOMETRIC * (2 * draw[1:] - 1)
    grey = images.mean(dim=(1, 2, 3), keepdim=True)
    return torch.addcmul(grey * (1 - contrast) * brightness, images, contrast * brightness), labels


def normalize(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) of 0..255, uint8 or float32, to float32 in channels_last, ImageNet-normalised."""
    mean, std = imagenet_statistics(images.device)
    return (images - mean).div_(std).contiguous(memory_format=torch.channels_last)


@functools.cache  # a copy to the device makes the host wait; once a run is enough
def imagenet_statistics(device: torch.device) -> Tensor:
    """MEAN and STD of 0..255 on the device, (2, 1, 3, 1, 1)."""
    return 255 * torch.tensor((MEAN, STD), device=device).view(2, 1, 3, 1, 1)


# --- Making composites --------------------------------------------------------------------------------------

def pair_cityscapes(folder: Path) -> list[tuple[Path, Path, Path]]:
    """(photo, label, path of the composite below the output) of the original download, in its own splits."""
    triples = []
    for photo in sorted(folder.glob("leftImg8bit/*/*/[!.]*_leftImg8bit.png")):
        *_, split, city, name = photo.parts
        label = folder / "gtFine" / split / city / name.replace("leftImg8bit", "gtFine_color")
        if split in ("train", "val"):
            triples.append((photo, label, Path(split, city, name.replace("_leftImg8bit", ""))))
    if not triples:
        raise DatasetError(f"{folder} holds no leftImg8bit/train/*/*_leftImg8bit.png; unpack Cityscapes' "
                           "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip there")
    return triples


def pair_folders(photo_dir: Path, label_dir: Path, val: float, seed: int) -> list[tuple[Path, Path, Path]]:
    """As pair_cityscapes, of photos in one folder and labels in another; prints what belongs to nothing.

    A label's stem may go on after its photo's (a.jpg, a_mask.png). A share `val` of the pairs, at least one,
    drawn by the seed, goes to val/. DatasetError for a photo without a label of its own.
    """
    photos, labels, left_out, pairs = {}, {}, [], {}  # by their paths in their folder, without suffix
    for folder, found in ((photo_dir, photos), (label_dir, labels)):
        images, others = find_images(folder)
        left_out += others
        for path in images:
            other = found.setdefault(path.relative_to(folder).with_suffix(""), path)
            if other != path:
                raise DatasetError(f"{other} and {path} have one name; rename one")
    for stem, label in labels.items():
        # The longest that ends where a word does: img1_mask is of img1, not of img.
        ends = [end for end in range(len(stem.name), 0, -1) if not stem.name[end : end + 1].isalnum()]
        owner = next((own for end in ends if (own := stem.with_name(stem.name[:end])) in photos), None)
        if owner is None:
            left_out.append(label)
        elif (other := pairs.setdefault(owner, label)) != label:
            raise DatasetError(f"{photos[owner]} has two labels, {other} and {label}; leave one out")
    if missing := [path for stem, path in photos.items() if stem not in pairs]:
        raise DatasetError(f"{missing[0]} has no label in {label_dir}, named a.png or a_mask.png for a.jpg; "
                           f"{len(missing)} of {len(photos)} photos have none")
    if len(photos) < 2:
        raise DatasetError(f"{photo_dir} holds too few photos; train/ and val/ need one each")
    if left_out:
        print("Left out   ", *left_out[:5], "..." if left_out[5:] else "", "(no photo, or of none)")
    n_val = min(max(round(val * len(photos)), 1), len(photos) - 1)
    chosen = np.random.default_rng(seed).permutation(len(photos))[:n_val]
    return [(photo, pairs[stem], Path("val" if index in chosen else "train", f"{stem}.png"))
            for index, (stem, photo) in enumerate(photos.items())]


def read_label(path: Path) -> np.ndarray:
    """A label in the colours of CLASSES, uint8 (H, W, 3), from one in colours or ids, of which 255 is id 0.

    DatasetError for colours and ids beyond the table, and for ids in a JPEG, which changes them.
    """
    with open_image(path) as image:
        is_jpeg = image.format in ("JPEG", "MPO")
        if len(image.getbands()) > 1:
            label_rgb, decoder = np.asarray(to_rgb(image)), project_decoder()
            flat = FLAT if is_jpeg else LOSSLESS_FLAT
            if problem := decoder.problem(label_rgb) or decoder.problem(label_rgb, 1, flat):
                raise DatasetError(problem)
            return label_rgb
        if is_jpeg:
            raise DatasetError("it holds class ids in a JPEG, which changes them; save them as PNG")
        ids = np.array(image).astype(np.int64)
        ids[ids == 255] = 0
        beyond = ids[~np.isin(ids, range(len(CLASSES)))]
        if beyond.size:
            raise DatasetError(f"it holds class id {beyond[0]}, expected 255 for background or ids below "
                               f"{len(CLASSES)}; change it, or add to CLASSES in dataset.py")
        return colorize(ids)


def make_composites(triples: Sequence[tuple[Path, Path, Path]], output: Path, size: int) -> None:
    """Lossless PNG composites, each half `size` pixels, in a new folder, which is there when all are made.

    The photo is shrunk with antialiasing, the label with nearest: every pixel keeps its colour. DatasetError
    if one cannot be read, or its label has another shape.
    """
    def make_one(triple: tuple[Path, Path, Path]) -> None:
        photo_path, label_path, target = triple
        photo, label = read_image(photo_path), Image.fromarray(read_label(label_path))
        if photo.size != label.size:
            raise DatasetError(f"{label_path} has {label.width}x{label.height} pixels, and its photo "
                               f"{photo_path} {photo.width}x{photo.height}; make them alike")
        composite = Image.new("RGB", (2 * size, size))
        composite.paste(photo.resize((size, size), Image.Resampling.LANCZOS))
        composite.paste(label.resize((size, size), Image.Resampling.NEAREST), (size, 0))
        path = Path(folder, "made", target)
        path.parent.mkdir(parents=True, exist_ok=True)
        composite.save(path)

    if output.exists():
        raise DatasetError(f"--output {output} is there already; name a new folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        thread_map(make_one, triples, max_workers=os.cpu_count(), desc="Making composites", disable=None)
        os.rename(Path(folder, "made"), output)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; SystemExit with status 1 and one line on stderr for what a user can put right."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Make train/ and val/ composites of the original Cityscapes data, "
        "or of photos and labels in two folders, labels in the colours of CLASSES or one channel of ids.")
    add, folder = parser.add_argument, lambda text: Path(text).expanduser()
    add("cityscapes_dir", type=folder, nargs="?", help="holds leftImg8bit/ and gtFine/ (*_gtFine_color.png)")
    add("--photos", type=folder, help="a folder, read with its subfolders")
    add("--labels", type=folder, help="a folder of their labels: a.png or a_mask.png for a.jpg")
    add("--val", type=float, help="share of the photos that goes to val/ (0.1 if left out)")
    add("--seed", type=int, help="by which these are drawn (0 if left out)")
    add("--output", type=folder, default="data/cityscapes_data", help="a new folder (%(default)s)")
    add("--size", type=int, default=256, help="side of each half in pixels (%(default)s)")
    args = parser.parse_args(argv and [str(word) for word in argv])
    own, drawn = [args.photos, args.labels], [args.val, args.seed]
    city, val, seed = args.cityscapes_dir, 0.1 if args.val is None else args.val, args.seed or 0
    if (own + drawn != [None] * 4) if city else None in own:
        parser.exit(2, "dataset.py: error: name the Cityscapes folder alone, as it has its own val/, or both "
                       "--photos and --labels\n")
    if not (32 <= args.size <= 8192 and 0 < val < 1 and seed >= 0):
        parser.exit(2, "dataset.py: error: expected --size 32 to 8192, --val in 0 to 1, --seed 0 or more\n")
    try:
        triples = pair_cityscapes(city) if city else pair_folders(*own, val, seed)
        make_composites(triples, args.output, args.size)
    except (DatasetError, OSError) as error:
        parser.exit(1, f"dataset.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; nothing was written\n")
    n_val = sum(target.parts[0] == "val" for *_, target in triples)
    print(f"Composites  {len(triples) - n_val} in {args.output / 'train'}, {n_val} in {args.output / 'val'}")


if __name__ == "__main__":
    main()
