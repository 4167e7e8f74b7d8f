"""Composites on disk to batches on the device: class table, label decoder, reading, data sets, augmentation.

A composite is one picture twice as wide as high, the photo on its left, the colour-coded label on its right.
Run as a program, this file makes composites from the original Cityscapes download: python dataset.py --help
"""
import argparse
import contextlib
import functools
import io
import math
import mimetypes
import multiprocessing
import os
import re
import signal
import stat
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from numpy.lib.stride_tricks import sliding_window_view
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset
from tqdm.auto import tqdm

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in 0..1
PHOTOMETRIC = 0.2  # largest relative change of brightness and of contrast
READ_BATCH = 8  # composites that a worker hands over at once
ENCODE_BATCH = 16  # photos that a frozen encoder takes at once
MANY_FILES = 256  # fewer are read sooner than worker processes start


class DatasetError(Exception):
    """A file or folder of the data set that cannot be used. The message names it and the remedy."""


# --- Labels -------------------------------------------------------------------------------------------------


class SegmentationClass(NamedTuple):
    name: str
    color: tuple[int, int, int]
    thin: bool = False  # mostly too thin to hold a pixel of its pure colour


# The index is the class id; id 0 is the background, whatever its name. Names and colours are those of the
# official Cityscapes scripts (Cordts et al., 2016, arXiv:1604.01685). Edit them for other labels, 2 to 60.
CLASSES = tuple(SegmentationClass(*entry) for entry in (
    ("background", (0, 0, 0)), ("road", (128, 64, 128)), ("sidewalk", (244, 35, 232)),
    ("building", (70, 70, 70)), ("wall", (102, 102, 156)), ("fence", (190, 153, 153)),
    ("pole", (153, 153, 153), True),
    ("traffic light", (250, 170, 30)), ("traffic sign", (220, 220, 0)), ("vegetation", (107, 142, 35)),
    ("terrain", (152, 251, 152)), ("sky", (70, 130, 180)), ("person", (220, 20, 60)), ("rider", (255, 0, 0)),
    ("car", (0, 0, 142)), ("truck", (0, 0, 70)), ("bus", (0, 60, 100)), ("train", (0, 80, 100)),
    ("motorcycle", (0, 0, 230)), ("bicycle", (119, 11, 32)),
))
# Colours of what is not scored; they count as background. Without them the decoder would see bicycles there.
VOID_COLORS = {
    "dynamic": (111, 74, 0), "ground": (81, 0, 81), "parking": (250, 170, 160), "rail track": (230, 150, 140),
    "guard rail": (180, 165, 180), "bridge": (150, 100, 100), "tunnel": (150, 120, 90), "caravan": (0, 0, 90),
    "trailer": (0, 0, 110),
}

SURE_DISTANCE = 12  # in RGB: flat areas stay within 6 of their colour at JPEG quality 95
LUMA_WEIGHT = 4  # 4:2:0 blurs chroma alone, so luma tells better on which side of an edge a pixel lies
STANDALONE_DISTANCE = 15  # in to_features: lower, and persons appear where two other classes meet
THIN_DISTANCE = 16  # in to_features: mixtures are as grey as poles, but seldom as bright
MIN_PALETTE_SHARE = 0.45  # sure pixels, background aside: real labels have 0.60 and more, photos up to 0.32
STRANGE_DISTANCE = 14  # in RGB: JPEG can move the colour of a narrow flat area by 13
MAX_STRANGE = 15  # flat places in a strange colour: real labels have 0 to 7
FLAT_SIZE, FLAT_SPREAD = 5, 8  # 5x5 pixels that differ by 8 at most: hardly any edge stays even over so many


class LabelDecoder:
    """Reads colour-coded labels that shrinking and JPEG have blurred, and finds colours of other tables.

    DatasetError unless there are 2 to 60 classes, each colour an RGB triple of 0..255, none there twice.
    """

    def __init__(self, classes: Sequence[SegmentationClass], void_colors: dict[str, tuple]) -> None:
        table = [*classes, *(SegmentationClass(*item) for item in void_colors.items())]
        check_table(table, len(classes))
        self.n_classes = len(classes)
        self.colors = np.array([entry.color for entry in table], dtype=np.uint8)  # (K, 3), void last
        self.ids = np.arange(len(table), dtype=np.uint8)  # (K,)
        self.ids[self.n_classes :] = 0
        self.thin = np.array([bool(entry.thin) for entry in table])  # (K,)
        self.features = to_features(self.colors)
        self.standalone = (self.ids > 0) & (distance_to_mixtures(self.features) > STANDALONE_DISTANCE)
        self.no_color = len(table)  # stands for "no colour" where an index into colors is expected
        self.table = self.sure_table()

    def sure_table(self) -> np.ndarray:
        """For each RGB value the colour within SURE_DISTANCE, or no_color; uint8 (256, 256, 256)."""
        table = np.full((256, 256, 256), self.no_color, dtype=np.uint8)
        nearest = np.full(table.shape, SURE_DISTANCE**2, dtype=np.uint8)  # squared distance
        for index, color in enumerate(self.colors.astype(int)):
            cube = np.ix_(*(abs(np.arange(256) - level) <= SURE_DISTANCE for level in color))
            squared = sum((levels - level) ** 2 for levels, level in zip(cube, color))
            closer = squared < nearest[cube]
            table[cube] = np.where(closer, index, table[cube])
            nearest[cube] = np.where(closer, squared, nearest[cube])
        return table

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
        # Squared, (K, N). No matrix product: BLAS has its own threads, too many where several workers read.
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
        """Void pixels that stand in no 2x2 block and are not exact; bool (H, W).

        A mixture of two classes often hits a void colour, and would put a dark ring round cars.
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

    def problem(self, rgb: np.ndarray) -> str | None:
        """Why uint8 (H, W, 3) is no label in this table's colours, as the end of a message, or None."""
        step = max(1, len(rgb) // 256)  # an enlarged label has wider edges
        rgb = rgb[::step, ::step]
        color = self.match(rgb)
        foreground, unsure = np.mean(color != 0), np.mean(color == self.no_color)  # shares
        strange = self.strange_places(rgb, color)  # (N, 3)
        if len(strange) > MAX_STRANGE and unsure - len(strange) / color.size < 1 - MIN_PALETTE_SHARE:
            colors, counts = np.unique(strange, axis=0, return_counts=True)
            named = colors[counts.argmax()]
            share = np.mean((color == self.no_color) & (abs(rgb - named) <= SURE_DISTANCE).all(axis=2))
            return (f"{share:.1%} of its label are rgb{tuple(named.tolist())}, no colour of the class table; "
                    "add it to CLASSES in dataset.py, or to VOID_COLORS if it is to count as background")
        if unsure > max((1 - MIN_PALETTE_SHARE) * foreground, 0.05):
            return (f"its right half is no colour-coded label: {1 - unsure / foreground:.0%} of its pixels, "
                    "background aside, lie near a colour of the class table, expected "
                    f"{MIN_PALETTE_SHARE:.0%} or more; recolour or remove it")
        return None

    def strange_places(self, rgb: np.ndarray, color: np.ndarray) -> np.ndarray:
        """The colours, int (N, 3), of flat places that are far from every colour of the table."""
        far = color == self.no_color
        if min(far.shape) < FLAT_SIZE:
            return np.empty((0, 3), dtype=int)
        for _ in range(FLAT_SIZE - 1):  # shrink to the corners of the 5x5 places that are far throughout
            far = far[1:, 1:] & far[:-1, 1:] & far[1:, :-1] & far[:-1, :-1]
        places = sliding_window_view(rgb, (FLAT_SIZE, FLAT_SIZE), (0, 1))[far]  # (N, 3, 5, 5)
        flat = np.ptp(places, axis=(2, 3)).max(axis=1) <= FLAT_SPREAD
        middle = places[flat, :, FLAT_SIZE // 2, FLAT_SIZE // 2].astype(int)
        squared = ((middle[:, None] - self.colors) ** 2).sum(axis=2)  # (N, K)
        return middle[(squared > STRANGE_DISTANCE**2).all(axis=1)]


def check_table(table: Sequence[SegmentationClass], n_classes: int) -> None:
    """Raise DatasetError if a decoder cannot be built from the classes and the void colours behind them."""
    if not 2 <= n_classes <= 60 or len(table) > 255:
        raise DatasetError(f"dataset.py: {n_classes} CLASSES and {len(table) - n_classes} VOID_COLORS; "
                           "give 2 to 60 classes and at most 255 colours in all")
    seen = {}
    for name, color, _ in table:
        if not isinstance(name, str):
            raise DatasetError(f"dataset.py: the class name {name!r} is no text; put it in quotes")
        is_triple = isinstance(color, (tuple, list)) and len(color) == 3
        if not is_triple or any(level not in range(256) for level in color):
            raise DatasetError(f"dataset.py: {name!r} has the colour {color}; "
                               "give three whole numbers from 0 to 255")
        if tuple(color) in seen:
            raise DatasetError(f"dataset.py: {seen[tuple(color)]!r} and {name!r} have the same colour "
                               f"{color}; change one")
        seen[tuple(color)] = name


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


@functools.cache
def project_decoder() -> LabelDecoder:
    """The decoder of this file's table, built at the first call so that a faulty table ends in one line."""
    return LabelDecoder(CLASSES, VOID_COLORS)


def decode_label(rgb: np.ndarray) -> np.ndarray:
    """Colour-coded label uint8 (H, W, 3) to class ids uint8 (H, W), with this file's table."""
    return project_decoder().decode(rgb)


def check_classes(names: Sequence[str], colors: Sequence, owner: str | Path) -> None:
    """DatasetError if the class ids of a checkpoint, its `owner`, mean something else than here."""
    here = [f"{entry.name} {tuple(map(int, entry.color))}" for entry in CLASSES]
    for index, (name, color) in enumerate(zip(names, colors)):
        there, known = f"{name} {tuple(color)}", here[index] if index < len(here) else "missing"
        if there != known:
            raise DatasetError(f"{owner}: its class {index} is {there}, in CLASSES of dataset.py it is "
                               f"{known}; restore CLASSES as it was in training, or train anew")


def colorize(label: np.ndarray) -> np.ndarray:
    """Class ids uint8 (H, W) to their colours, uint8 (H, W, 3)."""
    return project_decoder().colors[label]


# --- Photos -------------------------------------------------------------------------------------------------

# What Pillow decodes by itself: EPS would start Ghostscript; WMF, GRIB and their like are only recognised.
Image.init()
PHOTO_FORMATS = ("AVIF BLP BMP DCX DDS DIB FITS FTEX GIF ICNS ICO IM JPEG JPEG2000 MPO MSP PCD PCX PIXAR PNG "
                 "PPM PSD QOI SGI SPIDER SUN TGA TIFF WEBP XBM XPM").split()
PHOTO_FORMATS = [name for name in PHOTO_FORMATS if name in Image.OPEN]  # by some builds of Pillow
PHOTO_SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in PHOTO_FORMATS}
# Images that Pillow may not read, or only a thumbnail of; others are known by the system's MIME types.
OTHER_SUFFIXES = set(".3fr .arw .avif .cr2 .cr3 .crw .dcr .dng .erf .heic .heif .iiq .jp2 .jxl .kdc .mef "
                     ".mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .rwl .sr2 .srf .srw .svg .webp "
                     ".x3f".split())
BIT_DEPTHS = (8, 10, 12, 14, 16, 24, 32)  # 10 to 14 are those of camera sensors, stored in 16
GREY = 128  # what shows where a photo is transparent
# Segments of a JPEG; E0 and EE are none of them, as they say what the channels mean.
JPEG_METADATA = {bytes((0xFF, code)) for code in (*range(0xE1, 0xEE), 0xEF, 0xFE)}
# Pillow warns of damaged metadata, which do not matter here, and of size, which is checked below.
warnings.filterwarnings("ignore", module=r"PIL\.")


def is_image(path: Path) -> bool:
    """Whether the name of a file says that it is an image, be it one that Pillow reads or not."""
    suffix = path.suffix.lower()
    kind = mimetypes.guess_type(f"name{suffix}")[0] or ""
    return suffix in PHOTO_SUFFIXES or suffix in OTHER_SUFFIXES or kind.startswith("image/")


def natural_key(path: Path) -> tuple[list, str]:
    """Sort key that puts 2.jpg before 10.jpg; digits compare as numbers, everything else as text."""
    parts = re.split(r"(\d+)", str(path))  # text and numbers by turns
    parts[1::2] = map(int, parts[1::2])
    return parts, str(path)  # the text settles 01.jpg and 1.jpg


def list_images(folder: str | Path) -> list[Path]:
    """What is named like an image in a folder, in natural order, but no hidden files.

    What cannot be read is among it, so that `read_image` tells. DatasetError if the folder cannot be listed.
    """
    try:
        paths = [path for path in Path(folder).iterdir() if path.name[0] != "." and is_image(path)]
    except OSError as error:
        raise DatasetError(f"{folder} cannot be listed ({error.strerror}); check its permissions") from error
    return sorted(paths, key=natural_key)


def read_image(path: str | Path) -> Image.Image:
    """A photo from disk: upright, 8-bit RGB and without metadata.

    DatasetError if there is no such file, or it is no image, damaged, less than 2 pixels wide or high, larger
    than Image.MAX_IMAGE_PIXELS, or of values that `to_rgb` refuses.
    """
    path = Path(path)
    try:
        return decode_image(path)
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error
    except FileNotFoundError as error:
        raise DatasetError(f"{path}: no such file; check the path") from error
    except Exception as error:  # Pillow raises a dozen types on damaged bytes, SyntaxError among them
        reason = f"cannot be read as an image ({str(error) or type(error).__name__})"
        reason = "is a folder" if os.path.isdir(path) else reason
        raise DatasetError(f"{path}: {reason}; replace or remove it") from error


def decode_image(path: Path) -> Image.Image:
    """The pixels of a file as `to_rgb` gives them, if need be without its metadata."""
    if is_image(path) and path.suffix.lower() not in PHOTO_SUFFIXES:  # of a .dng a thumbnail would be read
        raise DatasetError(f"Pillow {PIL.__version__} does not read {path.suffix}; convert it to JPEG or PNG")
    limit = Image.MAX_IMAGE_PIXELS or math.inf  # it is None where a program has lifted it
    failure = None
    for source in readings(path):
        try:
            with Image.open(source, formats=PHOTO_FORMATS) as image:
                n_pixels = image.width * image.height
                if min(image.size) < 2:
                    raise DatasetError(f"has {image.width}x{image.height} pixels, expected 2x2 or more; "
                                       "replace or remove it")
                if n_pixels <= limit:
                    return to_rgb(image)
        except DatasetError:
            raise
        except Image.DecompressionBombError as error:  # above twice the limit
            n_pixels = int(re.search(r"\d+", str(error))[0])
        except Exception as error:
            failure = failure or error  # what is wrong with the file as it is
            continue
        raise DatasetError(f"has {n_pixels / 1e6:.1f} megapixels, the limit is {limit / 1e6:.1f}; shrink it")
    raise failure


def readings(path: Path) -> Iterator[Path | io.BytesIO]:
    """A file as it is; then, of a PNG or JPEG, what is left without metadata but EXIF; then without any."""
    yield path
    data = path.read_bytes()
    png, jpeg = data.startswith(b"\x89PNG\r\n\x1a\n"), data.startswith(b"\xff\xd8")
    if not png and not jpeg:
        return
    start = place = 8 if png else 2
    parts = []  # name, whether it is metadata, bytes
    while place < len(data) and data[place : place + 2] != b"\xff\xda":  # up to the scan of a JPEG
        if png:  # size of the content, name, content, checksum
            name, size = data[place + 4 : place + 8], 12 + int.from_bytes(data[place : place + 4], "big")
            is_metadata = name[:1].islower()
        else:  # marker, then the size of what follows, its own two bytes included
            name, size = data[place : place + 2], 2 + int.from_bytes(data[place + 2 : place + 4], "big")
            is_metadata = name in JPEG_METADATA
        parts.append((name, is_metadata, data[place : place + size]))
        place += size
    for kept in ((b"tRNS", b"eXIf", b"\xff\xe1"), (b"tRNS",)):
        left = [part for name, is_metadata, part in parts if name in kept or not is_metadata]
        yield io.BytesIO(b"".join([data[:start], *left, data[place:]]))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB without metadata: upright as EXIF says, over grey where it is transparent.

    8 bits are taken as they are, more bits scaled as `to_8_bits` says; DatasetError if they cannot be.
    """
    layout = str(image.tile[0][3]) if getattr(image, "tile", None) else ""  # the file's; load() forgets it
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF says nothing
        orientation = None
    if image.mode == "F" or image.mode.startswith("I"):
        rgb = Image.fromarray(to_8_bits(image)).convert("RGB")
    elif ";16" in layout and max(high for _, high in image.getextrema()[:3]) < 64:  # upper 8 of 16 bits
        raise DatasetError("has colours of 16 bits that fill at most 14, and Pillow drops 8; save 8 bits")
    elif image.has_transparency_data:
        rgb, color = Image.new("RGB", image.size, (GREY, GREY, GREY)), image.info.get("transparency")
        if layout in ("L;2", "L;4"):  # a PNG's transparent colour has the file's bits, Pillow's pixels have 8
            image.info["transparency"] = color * (85 if layout == "L;2" else 17)
        elif layout == "RGB;16B":
            image.info["transparency"] = tuple(value >> 8 for value in color)
        rgba = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        rgb.paste(rgba, mask=rgba)
    else:
        rgb = image.convert("RGB")
    rgb.info = {}
    if orientation is None:
        return rgb
    rgb.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(rgb)


def to_8_bits(image: Image.Image) -> np.ndarray:
    """Grey of integers or floats to uint8 (H, W).

    White is 2**n - 1 for integers, n the smallest of BIT_DEPTHS that holds the largest value; for floats 1 if
    none is larger, 255 if more than 1% of them are larger than 1. DatasetError for floats of other ranges and
    for negative, infinite or NaN values.
    """
    values = np.asarray(image)  # (H, W)
    if image.mode == "I" and image.format == "TIFF":
        if image.tag_v2.get(ExifTags.Base.SampleFormat, 1) in (1, (1,)):
            values = values.view(np.uint32)  # unsigned in the file, and Pillow reads it as signed
    low, high = np.fmin.reduce(values, axis=None), np.fmax.reduce(values, axis=None)  # NaN left out
    share, n_nan = np.mean(values > 1), np.isnan(values).sum()
    if image.mode == "F":
        white = 1 if high <= 1 else 255 if high <= 255 and share > 0.01 else None
    else:
        white = next(2**bits - 1 for bits in BIT_DEPTHS if high < 2**bits)
    if white is None or low < 0 or n_nan:
        raise DatasetError(f"has values of {low:g} to {high:g}, {share:.2%} above 1, {n_nan} NaN; expected "
                           "integers from 0, floats of 0..1 or of 0..255, over 1% above 1; save 8 bits")
    grey = np.multiply(values, 255 / white, dtype=np.float32).round().astype(np.uint8)
    grey[values == image.info.get("transparency", -1)] = GREY
    return grey


# --- Composites ---------------------------------------------------------------------------------------------


def read_composite(path: str | Path, image_size: int | None = 256, *,
                   resize_label: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """One composite, photo left and colour-coded label right, h pixels high.

    Returns:
        image uint8 (S, S, 3), resized with bilinear filtering; label uint8 (S, S), ids in CLASSES, resized
        with nearest, or (h, h) as it is. S is image_size, or h for None.
    Raises:
        DatasetError: unreadable, not twice as wide as high, halves swapped, or a right half that is no label.
    """
    composite = read_image(path)
    width, height = composite.size
    if width != 2 * height:
        raise DatasetError(f"{path}: {width}x{height} pixels; a composite is twice as wide as high "
                           "(photo left, label right)")
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


def composite_height(path: str | Path) -> int:
    """By the header alone; 0 where it cannot be read, so that `read_composite` tells."""
    try:
        with Image.open(path, formats=PHOTO_FORMATS) as image:
            return min(image.size)  # whichever way up it is stored
    except Exception:  # as in read_image
        return 0


def list_composites(folder: str | Path) -> list[Path]:
    """The composites of a folder in natural order; DatasetError with the expected layout if it has none."""
    folder, problem = Path(folder), "holds no composites"
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            problem = "is not a folder"
        elif paths := list_images(folder):
            return paths
    except (FileNotFoundError, NotADirectoryError):
        problem = "is missing"
    except OSError as error:
        problem = f"cannot be reached ({error.strerror})"
    raise DatasetError(
        f"{folder} {problem}. Expected: a folder with train/ and val/, each full of 256x512 composites "
        "(photo left, colour-coded label right). The data set is published as pix2pix's 'cityscapes' archive "
        "and on Kaggle as 'cityscapes-image-pairs'. Pass its folder with --data_dir, or pass --demo to train "
        "on synthetic scenes")


# --- Data sets ----------------------------------------------------------------------------------------------


@dataclass
class CompositeDataset(Dataset):
    """Composites on disk, decoded and checked at every access; an item is a batch.

    Its arrays are of numpy: worker processes send tensors through /dev/shm, which containers keep small.
    """

    paths: Sequence[Path]
    image_size: int  # side S of the square that photos are resized to
    n_classes: int  # ids in the labels are below this
    resize_labels: bool = field(kw_only=True)  # along with photos, to train on; else keep them, to score on

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray], list[str]]:
        """images uint8 (B, S, S, 3), their B labels uint8 (h, w), and the faults of the others."""
        images, labels, problems = [], [], []
        for path in (self.paths[index] for index in indices):
            try:
                image, label = read_composite(path, self.image_size, resize_label=self.resize_labels)
                highest = int(label.max())
                if highest >= self.n_classes:
                    raise DatasetError(
                        f"{path}: holds class id {highest} ({CLASSES[highest].name}), expected ids below "
                        f"--num_classes {self.n_classes}; pass --num_classes {highest + 1} to a new run, or "
                        "leave it out")
            except DatasetError as error:
                problems.append(str(error))
            else:
                images.append(image)
                labels.append(label)
        images = np.array(images, dtype=np.uint8).reshape(-1, self.image_size, self.image_size, 3)
        return images, labels, problems

    def kept_bytes(self) -> int:
        """What images and labels take in memory, labels of their own size by the files' headers."""
        if self.resize_labels:
            return len(self) * 4 * self.image_size**2
        return sum(3 * self.image_size**2 + composite_height(path) ** 2 for path in self.paths)

    def load(self, order: Iterable[Sequence[int]], workers: int) -> Iterator[tuple]:
        """images uint8 (B, 3, S, S) in channels_last, labels as from `stack`, and faults, a batch each.

        DatasetError if the processes that read cannot be started, or one was killed.
        """
        project_decoder()  # built before the workers fork, so that each has it
        # Without collate_fn it would make tensors of the arrays, in the workers.
        loader = DataLoader(self, batch_size=None, sampler=order, num_workers=workers, collate_fn=tuple,
                            worker_init_fn=end_quietly_at_sigterm)
        try:
            if workers:
                multiprocessing.Lock()  # where there can be none, a DataLoader leaves a traceback too
            with signals_held():
                batches = iter(loader)  # starts the workers
            for images, labels, problems in batches:
                images = torch.from_numpy(images).permute(0, 3, 1, 2)
                yield images, stack([torch.from_numpy(label) for label in labels]), problems
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
                raise
            raise DatasetError(f"{workers} processes could not read the composites ({error}); pass "
                               "--num_workers 0") from error


def end_quietly_at_sigterm(worker: int) -> None:
    """In a worker: a batch system ends it along with the main process, which would print a traceback."""
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait: what a handler raises while a process is forked, Python drops."""
    held, previous = [], {}
    if threading.current_thread() is threading.main_thread():  # signals reach no other
        previous = {number: signal.signal(number, lambda number, frame: held.append(number))
                    for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
        for number in held:
            signal.raise_signal(number)


def stack(labels: list[Tensor]) -> Tensor | list[Tensor]:
    """Labels (h, w) as one tensor (B, h, w), or as they are where their sizes differ."""
    return torch.stack(labels) if len({label.shape for label in labels}) == 1 else labels


@dataclass
class Split:
    """A process's share of train/ or val/, and what is kept of it in memory."""

    composites: CompositeDataset
    workers: int  # processes that read
    images: Tensor | None = None  # uint8 (N, 3, S, S) in channels_last
    features: list[Tensor] | None = None  # the encoder's five maps, each (N, C, h, w) in channels_last
    labels: Tensor | list[Tensor] | None = None  # of either, uint8 (N, h, w), or N of (h, w) if sizes differ
    has_foreground: bool = False  # once read, whether any pixel is more than background

    def __len__(self) -> int:
        return len(self.composites)

    def read(self, keep: bool, bar: tqdm) -> list[str]:
        """Read and check every composite, keep it if asked; the faults, a line a file."""
        N, S = len(self), self.composites.image_size
        kept = torch.empty((N * keep, 3, S, S), dtype=torch.uint8, memory_format=torch.channels_last)
        kept_labels, all_problems = [], []
        batches = BatchSampler(range(N), READ_BATCH, drop_last=False)
        workers = self.workers if N >= MANY_FILES else 0
        for images, labels, problems in self.composites.load(batches, workers):
            for image, label in zip(images, labels):
                self.has_foreground |= bool(label.any())
                if keep:
                    kept[len(kept_labels)] = image
                    kept_labels.append(label)
            all_problems += problems
            bar.update(len(images) + len(problems))
        if keep:
            self.images, self.labels = kept, stack(kept_labels)
        return all_problems

    def keep_features(self, encode: Callable, like: Sequence[Tensor], bar: tqdm) -> None:
        """Put the encoder's features in the place of the images; DatasetError if the dtype cannot hold them.

        `encode` makes feature maps of images, `like` are some of the dtype and on the device to keep them in.
        """
        images, finite = self.images, True
        self.features = [torch.empty((len(self), *one.shape[1:]), dtype=one.dtype, device=one.device,
                                     memory_format=torch.channels_last) for one in like]
        for start in range(0, len(self), ENCODE_BATCH):
            chosen = slice(start, start + ENCODE_BATCH)
            for kept, encoded in zip(self.features, encode(images[chosen])):
                kept[chosen] = encoded
                finite &= kept[chosen].isfinite().all()
            bar.update(len(images[chosen]))
        if not finite:
            raise DatasetError(f"the encoder's features exceed {like[0].dtype}; pass --no_cache")
        self.images = None
        if isinstance(self.labels, Tensor):
            self.labels = self.labels.to(like[0].device)

    def batches(self, order: Iterable[Sequence[int]], device: torch.device) -> Iterator[tuple]:
        """inputs (images, or the five feature maps) and labels of each batch of indices, on the device.

        DatasetError if a composite that is not kept can no longer be read.
        """
        if self.labels is None:  # nothing is kept
            for images, labels, problems in self.composites.load(order, self.workers):
                if problems:
                    raise DatasetError(problems[0])
                yield move(images, device), move(labels, device)
            return
        for indices in order:
            inputs = ([take(one, indices) for one in self.features] if self.features
                      else take(self.images, indices))
            yield move(inputs, device), move(take(self.labels, indices), device)


def take(tensors: Tensor | list[Tensor], indices: Sequence[int]) -> Tensor | list[Tensor]:
    """A batch; indexing with a tensor keeps channels_last, index_select does not."""
    if isinstance(tensors, list):
        return [tensors[index] for index in indices]
    return tensors[move(torch.as_tensor(indices), tensors.device)]


def move(tensors: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    """Tensors to a device, to a GPU through pinned memory, so that the host need not wait."""
    if isinstance(tensors, list):
        return [move(one, device) for one in tensors]
    if device.type == "cuda" and tensors.device.type == "cpu":
        tensors = tensors.pin_memory()
    return tensors.to(device, non_blocking=device.type == "cuda")  # mps would read what is freed by then


def storage_options(n_bytes: float, dtype: torch.dtype, free: dict[str, float]) -> list[list[str]]:
    """Where features that take so many bytes in their dtype fit, as [device, dtype], the best place first.

    `free` are the bytes that may be taken on each device, the faster device first. What is float32 may also
    be kept as float16, in half of the bytes.
    """
    needed = {str(dtype).removeprefix("torch."): n_bytes}
    if dtype == torch.float32:
        needed["float16"] = n_bytes / 2
    return [[device, name] for device, room in free.items() for name, size in needed.items() if size <= room]


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


# --- Making composites from the original download -----------------------------------------------------------


def make_composites(cityscapes_dir: Path, data_dir: Path, size: int) -> int:
    """Composites as lossless PNG from leftImg8bit/SPLIT/CITY/*.png and gtFine/SPLIT/CITY/*_gtFine_color.png.

    The photo is shrunk with antialiasing, the label with nearest: every pixel keeps an official colour.

    Returns:
        How many there are in data_dir/train and data_dir/val; those there before are counted, not made again.
    Raises:
        DatasetError: no photos, a picture missing or unreadable, or composites of another size in data_dir.
    """
    photos = [path for split in ("train", "val")
              for path in sorted(cityscapes_dir.glob(f"leftImg8bit/{split}/*/[!.]*_leftImg8bit.png"))]
    if not photos:
        raise DatasetError(f"{cityscapes_dir} holds no leftImg8bit/train/*/*_leftImg8bit.png; unpack "
                           "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of Cityscapes there")
    for path in sorted(data_dir.glob("*/[!.]*.png")):
        width, height = read_image(path).size
        if (width, height) != (2 * size, size):
            raise DatasetError(f"{path} has {width}x{height} pixels, and --size {size} makes "
                               f"{2 * size}x{size}; choose another --output, or remove what is there")

    def make_one(photo_path: Path) -> None:
        *_, split, city, name = photo_path.parts
        target = data_dir / split / name.replace("_leftImg8bit", "")
        if target.exists():
            return
        label_path = cityscapes_dir / "gtFine" / split / city / name.replace("leftImg8bit", "gtFine_color")
        photo = read_image(photo_path).resize((size, size), Image.Resampling.LANCZOS)
        label = read_image(label_path).resize((size, size), Image.Resampling.NEAREST)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        Image.fromarray(np.concatenate([photo, label], axis=1)).save(temporary, "PNG")
        os.replace(temporary, target)

    with ThreadPoolExecutor() as pool:
        list(tqdm(pool.map(make_one, photos), "Making composites", len(photos), unit="image", disable=None))
    return len(photos)


def main(argv: list[str] | None = None) -> None:
    """The command line: `make_composites`."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Make train/ and val/ composites from "
                                     "the original Cityscapes download.")
    parser.add_argument("cityscapes_dir", type=Path,
                        help="holds leftImg8bit/ and gtFine/ (with *_gtFine_color.png)")
    parser.add_argument("--output", type=Path, default=Path("data/cityscapes_data"), metavar="FOLDER",
                        help="gets train/ and val/, %(default)s if left out")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS",
                        help="side of each half, %(default)s if left out")
    args = parser.parse_args(argv)
    if not 2 <= args.size <= 8192:
        parser.exit(2, f"dataset.py: error: --size {args.size}: expected 2 to 8192 pixels, such as 256\n")
    try:
        print(f"{make_composites(args.cityscapes_dir, args.output, args.size)} composites in {args.output}")
    except (DatasetError, OSError) as error:
        parser.exit(1, f"dataset.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped by SIGINT; composites made so far are whole, the same command goes on\n")


if __name__ == "__main__":
    main()
