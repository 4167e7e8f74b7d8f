"""Segment photos with a trained checkpoint: palette PNGs of class ids, on request overlays or scores too.

From Python: `predictions = Segmenter("runs/x/best.pth")(photo)`.
"""
import contextlib
import io
import math
import os
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

import dataset
import metrics
import model as models
import utils

DEFAULT_IMAGE_SIZE = 256  # train.py's default
BATCH = 8  # photos a forward pass; all are resized to one square, so sizes can mix
SOFTWARE = "EfficientSegNet mask"  # Software field of masks and overlays; by it predict.py knows its own
NAME_BYTES = 230  # most systems allow 255, and a file's name is longer while it is written


class Segmenter:
    """A checkpoint, loaded once, that turns photos into class ids.

    The network sees a photo as it saw those of the training: squeezed to a square of the checkpoint's image
    size. Its logits are stretched to the photo's size before the best class is taken, so outlines are smooth.

    Args:
        checkpoint: path of a best.pth, last.pth or a bare state_dict of EfficientSegNet.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        image_size: for a state_dict that does not say, in pixels, a multiple of 32; 256 if left out.
        flip: average the logits with those of the mirrored photo, in twice the network's time.
    Raises:
        model.WeightsError: the checkpoint cannot be used.
        utils.UserError: the device cannot be used, or the checkpoint says another image size.
    """

    def __init__(self, checkpoint: str | Path, device: str = "auto", *,
                 image_size: int | None = None, flip: bool = False) -> None:
        content = models.load_checkpoint(checkpoint)
        config = content["config"] if isinstance(content["config"], dict) else {}
        self.has_config, self.flip = "image_size" in config, flip
        self.image_size = config.get("image_size", image_size or DEFAULT_IMAGE_SIZE)
        if type(self.image_size) is not int or self.image_size < 32 or self.image_size % 32:
            raise models.WeightsError(f"{checkpoint} was trained at image size {self.image_size!r}, and only "
                                      "multiples of 32 can be; pass a checkpoint of train.py")
        if image_size not in (None, self.image_size):
            raise utils.UserError(f"--image_size {image_size}: {checkpoint} was trained at "
                                  f"{self.image_size}; leave the flag out")
        network = models.model_from_checkpoint(content, checkpoint)
        self.n_classes = network.out.out_channels
        self.class_names, self.palette = read_class_table(config, self.n_classes, checkpoint)
        selected = utils.select_device(device)
        self.runtime = utils.Runtime(selected, *utils.select_amp("auto", selected))
        self.model = models.fold_batch_norms(network).to(selected, memory_format=torch.channels_last)

    def __call__(self, photo: Image.Image | np.ndarray) -> np.ndarray:
        """A PIL image of any mode or uint8 array (H, W, 3) to the upright photo's class ids, uint8 (H, W)."""
        return self.segment([photo])[0]

    @torch.inference_mode()
    def segment(self, photos: Sequence[Image.Image | np.ndarray]) -> list[np.ndarray]:
        """Several photos of any sizes in one forward pass; class ids uint8 (H, W) for each."""
        photos = [as_image(photo) for photo in photos]
        square = (self.image_size, self.image_size)
        images = [np.asarray(photo.resize(square, Image.Resampling.BILINEAR)) for photo in photos]
        images = torch.from_numpy(np.stack(images)).to(self.runtime.device)
        inputs = dataset.normalize(images.permute(0, 3, 1, 2))  # (B, 3, S, S)
        with self.runtime.autocast():
            logits = self.model(inputs).float()
            if self.flip:
                logits = (logits + self.model(inputs.flip(3)).float().flip(3)) / 2
        return [metrics.score_stretched(one, photo.size[::-1])[0].cpu().numpy()
                for one, photo in zip(logits, photos)]


def read_class_table(config: dict, n_classes: int, checkpoint: str | Path) -> tuple[list[str], np.ndarray]:
    """Names and colours, uint8 (n_classes, 3), of a checkpoint's classes; dataset.py's where it has none.

    WeightsError if they are not one name and one colour for each class.
    """
    known = dataset.CLASSES[:n_classes]
    names = config.get("class_names", [entry.name for entry in known])
    colors = config.get("class_colors", [entry.color for entry in known])
    with contextlib.suppress(TypeError, ValueError, OverflowError):  # from entries of any other type
        palette = np.array(colors, dtype=np.uint8)
        is_named = len(names) == n_classes and all(isinstance(name, str) for name in names)
        if is_named and palette.shape == (n_classes, 3) and n_classes <= 256:
            return list(names), palette
    raise models.WeightsError(f"{checkpoint} has {n_classes} classes, not a name and colour for each; "
                              f"pass one of train.py, or list {n_classes} in CLASSES of dataset.py")


def as_image(photo: Image.Image | np.ndarray) -> Image.Image:
    """What Segmenter takes as 8-bit RGB; ValueError for arrays of other kinds."""
    if isinstance(photo, Image.Image):
        return dataset.to_rgb(photo)
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or not photo.size:
        raise ValueError(f"expected a uint8 array (H, W, 3), got {photo.dtype} {photo.shape}")
    return Image.fromarray(photo)


# --- Command line -------------------------------------------------------------------------------------------


def get_args_parser() -> utils.ArgumentParser:
    parser = utils.ArgumentParser(description=__doc__.split("\n")[0], epilog="""examples:
  python predict.py photo.jpg --checkpoint runs/x/best.pth --output mask.png
  python predict.py holiday/ street.png --checkpoint runs/x/best.pth --output masks/ --overlay
  python predict.py images/demo/val --composite --checkpoint runs/x/best.pth --output masks/""")
    add = parser.add_argument
    add("photos", nargs="+", type=Path, metavar="PHOTO_OR_FOLDER",
        help="any size and mode that Pillow reads; of a folder, its images in natural order")
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="best.pth or a bare state_dict")
    add("--output", type=Path, required=True, metavar="FILE_OR_FOLDER",
        help="a .png file for one photo, else a folder that gets NAME.png for each; only files that "
             "predict.py wrote are replaced")
    add("--overlay", action="store_true", help="also save NAME_overlay.png, the mask over the photo")
    add("--composite", action="store_true",
        help="the files are composites: segment the left half and score it against the right half")
    add("--flip", action="store_true", help="average with the mirrored photo, in twice the time")
    add("--device", type=utils.device_name, default="auto", metavar="auto|cpu|cuda|cuda:N|mps",
        help="auto (if left out) prefers a GPU")
    add("--image_size", type=utils.whole_number(32, 8192, multiple=32), metavar="PIXELS",
        help=f"the network's input, for a checkpoint that does not say; {DEFAULT_IMAGE_SIZE} if left out")
    return parser


def find_photos(paths: Sequence[Path]) -> list[Path]:
    """The photos of the command line, each once; of a folder without the masks and overlays of earlier runs.

    UserError if there are no photos, or one is a mask by name; DatasetError if a folder cannot be listed.
    """
    photos, n_own = {}, 0
    for path in paths:
        if is_own(path):
            raise utils.UserError(f"{path} is a mask or overlay of predict.py; pass photos")
        for photo in dataset.list_images(path) if os.path.isdir(path) else [path]:
            if is_own(photo):
                n_own += 1
            else:
                photos.setdefault((os.path.realpath(photo), photo.name), photo)
    if n_own:
        utils.say(f"Leaving out {n_own} masks and overlays of earlier runs")
    if not photos:
        found = "only masks of earlier runs" if n_own else "no images"
        raise utils.UserError(f"{paths[0]} holds {found}; pass photos or a folder of them")
    return list(photos.values())


def is_own(path: Path) -> bool:
    """Whether a file is a mask or overlay that predict.py wrote."""
    if os.path.isfile(path):  # reading from a pipe would empty it
        with contextlib.suppress(OSError), open(path, "rb") as file:
            return f"Software\0{SOFTWARE}".encode() in file.read(1024)  # it stands before palette and pixels
    return False


def plan_masks(photos: Sequence[Path], output: Path) -> list[Path]:
    """The file of each photo's mask: --output itself for one photo, or NAME.png in it.

    UserError if --output is a file for several photos, or no PNG.
    """
    if not dataset.is_image(output) or os.path.isdir(output):
        stems = Counter(name_key(photo.stem) for photo in photos)  # a.jpg and a.png: a.jpg.png and a.png.png
        names = [photo.stem if stems[name_key(photo.stem)] == 1 else photo.name for photo in photos]
        return [output / f"{name}.png" for name in names]
    if len(photos) > 1:
        raise utils.UserError(f"--output {output} is one file, and these photos need a folder; name one")
    if output.suffix.lower() != ".png":
        raise utils.UserError(f"--output {output}: a mask holds class ids, which only PNG keeps; "
                              f"name it {output.stem}.png")
    return [output]


def overlay_of(mask: Path) -> Path:
    """The file of the overlay that belongs to a mask."""
    return mask.with_name(f"{mask.stem}_overlay.png")


def name_key(name: str | Path) -> str:
    """The same for names that some file systems take for one: other case, or accents coded in another way."""
    return unicodedata.normalize("NFC", str(name)).casefold()


def check_outputs(outputs: Iterable[Path]) -> None:
    """UserError if two outputs are one file, or one would replace what predict.py did not write."""
    seen = {}
    for output in outputs:
        other = seen.setdefault(name_key(output), output)
        if other is not output:
            what = (f"two outputs would be one file, {output}" if other == output
                    else f"{other} and {output} would be one file where case does not count")
            raise utils.UserError(f"{what}; rename a photo, or segment them apart")
        if len(os.fsencode(output.name)) > NAME_BYTES:
            raise utils.UserError(f"{output}: its name has more than {NAME_BYTES} bytes; rename the photo")
        if os.path.exists(output) and not is_own(output):
            raise utils.UserError(f"{output} is there, not written by predict.py; choose another --output")


def read_sample(path: Path, composite: bool, n_classes: int) -> tuple[Image.Image, np.ndarray | None] | str:
    """A photo and, of a composite, its label, uint8 (H, W); the error message for what cannot be read."""
    try:
        if not composite:
            return dataset.read_image(path), None
        image, label = dataset.read_composite(path, image_size=None)
    except dataset.DatasetError as error:
        return str(error)
    if label.max() >= n_classes:
        return f"{path}: holds class id {label.max()}, the checkpoint's end at {n_classes - 1}; leave it out"
    return Image.fromarray(image), label


def segment_files(segmenter: Segmenter, paths: Sequence[Path], composite: bool) -> Iterator[tuple | str]:
    """(photo, label, predictions) or an error message for each path; reads while the network works."""
    read = partial(read_sample, composite=composite, n_classes=segmenter.n_classes)
    with ThreadPoolExecutor(utils.available_cpus()) as pool:
        pending = pool.map(read, paths[:BATCH])
        for start in range(BATCH, len(paths) + BATCH, BATCH):
            samples = list(pending)
            pending = pool.map(read, paths[start : start + BATCH])
            readable = [sample for sample in samples if not isinstance(sample, str)]
            predictions = iter(segmenter.segment([photo for photo, _ in readable]) if readable else [])
            for sample in samples:
                yield sample if isinstance(sample, str) else (*sample, next(predictions))


def draw_overlay(photo: Image.Image, predictions: np.ndarray, names: Sequence[str],
                 palette: np.ndarray) -> Image.Image:
    """The class colours blended over a photo, with a legend of the classes present below it.

    The photo is RGB, the predictions are uint8 (H, W), the palette is uint8 (n_classes, 3).
    """
    blended = Image.blend(photo, Image.fromarray(palette[predictions]), alpha=0.55)
    W, H = blended.size
    present = np.unique(predictions)
    font = ImageFont.load_default(size=max(11, min(W, 1600) // 45))
    line = round(font.size * 1.6)
    column = max(font.getlength(names[i]) for i in present) + 2 * line
    n_columns = max(1, int(W // column))
    n_lines = math.ceil(len(present) / n_columns) + 0.5
    canvas = Image.new("RGB", (max(W, round(column)), H + round(line * n_lines)), "white")
    canvas.paste(blended)
    draw = ImageDraw.Draw(canvas)
    for place, i in enumerate(present):
        x, y = place % n_columns * column + line // 4, H + line // 4 + place // n_columns * line
        fill = tuple(palette[i].tolist())
        draw.rectangle((x, y + line * 0.15, x + line * 0.8, y + line * 0.85), fill=fill, outline="gray")
        draw.text((x + line * 1.1, y + line * 0.5), names[i], fill="black", font=font, anchor="lm")
    return canvas


def write_own(path: Path, image: Image.Image) -> None:
    """A PNG that `is_own` knows."""
    mark, buffer = PngInfo(), io.BytesIO()
    mark.add_text("Software", SOFTWARE)
    image.save(buffer, "PNG", pnginfo=mark)
    utils.write_file(path, buffer.getbuffer())


def describe_scores(scores: metrics.SegmentationMetrics) -> str:
    figures = scores.compute()
    return f"dice {figures['dice']:.4f}, mean IoU {figures['mean_iou']:.4f}"


def describe_shares(predictions: np.ndarray, names: Sequence[str]) -> str:
    shares = np.bincount(predictions.flat, minlength=len(names)) / predictions.size
    return ", ".join(f"{names[i]} {shares[i]:.1%}" for i in np.argsort(-shares) if shares[i] > 0)


def main(argv: list[str] | None = None) -> None:
    """The command line; SystemExit with status 1 and one line on stderr for what a user can put right."""
    remedy = "masks written so far are whole; the same command starts again"
    with utils.user_errors(dataset.DatasetError, models.WeightsError), utils.stoppable(remedy):
        args = get_args_parser().parse_args(argv)
        photos = find_photos(args.photos)
        masks = plan_masks(photos, args.output)
        overlays = [overlay_of(mask) for mask in masks] if args.overlay else []
        check_outputs(masks + overlays)
        with utils.memory_errors(partial(memory_advice, args.device)):
            segmenter = Segmenter(args.checkpoint, args.device, image_size=args.image_size, flip=args.flip)
            if args.composite:
                dataset.check_classes(segmenter.class_names, segmenter.palette.tolist(), args.checkpoint)
            if not segmenter.has_config:
                utils.say(f"{args.checkpoint} holds weights alone: taking the first {segmenter.n_classes} "
                          f"classes of dataset.py and --image_size {segmenter.image_size}")
            utils.make_dir(masks[0].parent, "--output")
            segment_all(segmenter, photos, masks, args.overlay, args.composite)


def memory_advice(device: str) -> str:
    """Where memory ran out, and what to try."""
    elsewhere = "" if device == "cpu" else "--device cpu, or "
    return f"--device {device}; try {elsewhere}again without other programs there"


def segment_all(segmenter: Segmenter, photos: Sequence[Path], masks: Sequence[Path], overlay: bool,
                composite: bool) -> None:
    """Write each photo's mask, and its overlay if asked, with a line each; UserError for what was skipped."""
    total, skipped, started = metrics.SegmentationMetrics(segmenter.n_classes), [], time.monotonic()
    results = zip(photos, masks, segment_files(segmenter, photos, composite))
    for path, mask_path, result in utils.progress_bar(results, "Segmenting", len(photos), unit="photo"):
        if isinstance(result, str):
            skipped.append(result)
            continue
        photo, label, predictions = result
        mask = Image.fromarray(predictions)
        mask.putpalette(segmenter.palette.tobytes())
        write_own(mask_path, mask)
        if overlay:
            picture = draw_overlay(photo, predictions, segmenter.class_names, segmenter.palette)
            write_own(overlay_of(mask_path), picture)
        line = describe_shares(predictions, segmenter.class_names)
        if composite:
            scores = metrics.SegmentationMetrics(segmenter.n_classes)
            scores.update(torch.from_numpy(predictions), torch.from_numpy(label))
            total.confusion += scores.confusion
            line = f"{describe_scores(scores)}; {line}"
        utils.say(f"{path} -> {mask_path}: {line}")
    n_done, rate = len(photos) - len(skipped), len(photos) / (time.monotonic() - started)
    if composite and n_done:
        utils.say(f"All {n_done} composites together: {describe_scores(total)}")
    if len(photos) > 1:
        utils.say(f"{n_done} of {len(photos)} photos segmented, {rate:.1f} a second, "
                  f"masks in {masks[0].parent}")
    if skipped:
        raise utils.UserError(f"skipped {len(skipped)} of {len(photos)}: {'; '.join(skipped)}")


if __name__ == "__main__":
    main()
