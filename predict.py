"""Segment photos with a trained checkpoint: palette PNGs of class ids, on request overlays or scores too.

From Python: `predictions = Segmenter("runs/demo/best.pth")(photo)`.
"""
import contextlib
import io
import math
import os
import time
from collections.abc import Iterable, Sequence
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
from utils import UserError, counted

DEFAULT_IMAGE_SIZE = 256  # train.py's default
SOFTWARE = "EfficientSegNet mask"  # Software field of masks and overlays; by it predict.py knows its own
NAMED_CLASSES, SCORES = 3, "dice {dice:.4f}, mean_iou {mean_iou:.4f}"  # in the line of a photo


class Segmenter:
    """A checkpoint, loaded once, that turns photos into class ids.

    The network sees a photo as in training, squeezed to a square of the checkpoint's image size; its logits
    are stretched to the photo's size before the best class is taken, so outlines are smooth.

    Args:
        checkpoint: path of a best.pth, last.pth or a bare state_dict of EfficientSegNet.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        image_size: for a state_dict that does not say, in pixels, a multiple of 32; 256 if left out.
        flip: average the logits with those of the mirrored photo, in twice the network's time.
    Raises:
        utils.UserError: checkpoint or device cannot be used, or the checkpoint says another image size.
    """

    def __init__(self, checkpoint: str | Path, device: str = "auto", *,
                 image_size: int | None = None, flip: bool = False) -> None:
        content = models.load_checkpoint(checkpoint)
        self.config, self.flip = content["config"], flip
        self.image_size = self.config.get("image_size", image_size or DEFAULT_IMAGE_SIZE)
        if image_size not in (None, self.image_size):
            raise UserError(f"--image_size {image_size}: {checkpoint} was trained at {self.image_size}; "
                            "leave the flag out")
        network = models.model_from_checkpoint(content, checkpoint)
        self.n_classes = network.out.out_channels
        known = dataset.CLASSES[: self.n_classes]
        self.class_names = self.config.get("class_names", [entry.name for entry in known])
        colors = self.config.get("class_colors", [entry.color for entry in known])
        self.palette = np.array(colors, dtype=np.uint8)  # (n_classes, 3)
        if not len(self.class_names) == len(self.palette) == self.n_classes:
            raise models.WeightsError(f"{checkpoint} has {self.n_classes} classes, {len(self.class_names)} "
                                      f"of them named; list {self.n_classes} in CLASSES of dataset.py")
        selected = utils.select_device(device)
        self.runtime = utils.Runtime(selected, *utils.select_amp("auto", selected))
        self.model = models.fold_batch_norms(network).to(selected, memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, photo: Image.Image | np.ndarray) -> np.ndarray:
        """A PIL image, or RGB as a uint8 array (H, W, 3), to the upright photo's class ids, uint8 (H, W)."""
        photo = dataset.to_rgb(photo if isinstance(photo, Image.Image) else Image.fromarray(photo))
        square = photo.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
        images = torch.from_numpy(np.array(square)[None]).to(self.runtime.device)
        inputs = dataset.normalize(images.permute(0, 3, 1, 2))  # (1, 3, S, S)
        with self.runtime.autocast():
            logits = self.model(inputs).float()
            if self.flip:
                logits = (logits + self.model(inputs.flip(3)).float().flip(3)) / 2
        return metrics.score_stretched(logits[0], photo.size[::-1])[0].cpu().numpy()

    def make_scores(self) -> metrics.SegmentationMetrics:
        """Figures, still 0, that count what the checkpoint's training counted."""
        settings = self.config.get("settings", {})
        return metrics.SegmentationMetrics(
            self.n_classes, score_background=settings.get("score_background", dataset.SCORE_BACKGROUND),
            ignore_background=settings.get("ignore_background", False))


# --- Command line -------------------------------------------------------------------------------------------

def get_args_parser() -> utils.ArgumentParser:
    parser = utils.ArgumentParser(description="Segment photos with a trained checkpoint.", epilog="""examples:
  python predict.py photo.jpg --output mask.png
  python predict.py holiday/ street.png --checkpoint runs/demo/best.pth --output masks/ --overlay
  python predict.py images/demo/val --composite""")
    add = parser.add_argument
    add("photos", nargs="+", type=utils.file_path, metavar="PHOTO_OR_FOLDER",
        help="any size and mode that Pillow reads in 8 bits; folders are read with their subfolders")
    add("--checkpoint", type=utils.file_path, metavar="FILE",
        help="best.pth or a bare state_dict; the newest runs/*/best.pth if left out")
    add("--output", type=utils.file_path, default="masks", metavar="FILE_OR_FOLDER",
        help="a .png for one photo, else a folder (%(default)s); only own files are replaced")
    add("--overlay", action="store_true", help="also save NAME_overlay.png, the mask over the photo")
    add("--composite", action="store_true", help="of composites: score the left half against the right one")
    add("--flip", action="store_true", help="average with the mirrored photo, in twice the time")
    add("--device", type=utils.device_name, default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--image_size", type=utils.number(int, 64, 8192, multiple=32), metavar="PIXELS",
        help=f"the network's input, for a checkpoint that does not say; {DEFAULT_IMAGE_SIZE} if left out")
    return parser


def newest_checkpoint() -> Path:
    """The newest runs/*/best.pth, named in a line; UserError if there is none."""
    newest = max(Path("runs").glob("*/best.pth"), key=os.path.getmtime, default=None)
    if not newest:
        raise UserError("there is no runs/*/best.pth; pass --checkpoint FILE, or run python train.py --demo")
    utils.say(f"Checkpoint  {newest}, the newest")
    return newest


def find_photos(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """The photos of the command line, each once, with their places below the output; a line names the rest.

    UserError if there are no photos, or one that is named is a mask; OSError if a folder cannot be listed.
    """
    photos, left_out = {}, []
    for path in paths:
        if path.is_dir():
            found, others = dataset.find_images(path)
            own = [photo for photo in found if is_own(photo)]
            left_out += own + others
            if len(found) == len(own):
                utils.say(f"Left out    {path}, which holds no photos")
            found = {photo: photo.relative_to(path) for photo in found if photo not in own}
        elif is_own(path):
            raise UserError(f"{path} is a mask or overlay of predict.py; pass photos")
        else:
            found = {path: Path(path.name)}
        for photo, place in found.items():
            photos.setdefault((os.path.realpath(photo), place.name), (photo, place))
    if left_out:
        utils.say(f"Left out    {counted(len(left_out), 'file')}, no photos or masks of earlier runs: "
                  f"{', '.join(map(str, left_out[:5]))}{', ...' if left_out[5:] else ''}")
    if not photos:
        raise UserError(f"{paths[0]} holds no photos; pass photos or a folder of them")
    return list(photos.values())


def is_own(path: Path) -> bool:
    """Whether a file is a mask or overlay that predict.py wrote."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return f"Software\0{SOFTWARE}".encode() in file.read(1024)  # it stands before palette and pixels
    return False


def plan_masks(photos: Sequence[tuple[Path, Path]], output: Path) -> list[Path]:
    """The file of each photo's mask: --output itself for one photo, if it is a file, or its place in it."""
    if output.is_dir() or output.suffix.lower() not in dataset.SUFFIXES:
        return [output / place.with_suffix(".png") for _, place in photos]
    if len(photos) > 1 or output.suffix.lower() != ".png":
        raise UserError(f"--output {output}: name a folder, or for one photo a .png, which alone keeps ids")
    return [output]


def check_outputs(outputs: Iterable[Path]) -> None:
    """UserError if two outputs are one file, or one would replace what predict.py did not write."""
    seen = {}
    for output in outputs:
        other = seen.setdefault(str(output).casefold(), output)
        if other is not output:
            raise UserError(f"two outputs would be one file, {other} and {output}; rename a photo")
        if output.exists() and not is_own(output):
            raise UserError(f"{output} is there, not written by predict.py; choose another --output")


def read_sample(path: Path, composite: bool, n_classes: int) -> tuple[Image.Image, np.ndarray | None] | str:
    """A photo and, of a composite, its label, uint8 (H, W); the error message for what cannot be used."""
    try:
        if not composite:
            photo = dataset.read_image(path)
            if dataset.is_composite(photo):
                return f"{path}: its right half is a colour-coded label; pass --composite"
            return photo, None
        image, label = dataset.read_composite(path, image_size=None)
    except dataset.DatasetError as error:
        return str(error)
    if label.max() >= n_classes:
        return f"{path}: holds class id {label.max()}, the checkpoint's end at {n_classes - 1}; leave it out"
    return Image.fromarray(image), label


def draw_overlay(photo: Image.Image, predictions: np.ndarray, names: Sequence[str],
                 palette: np.ndarray) -> Image.Image:
    """The colours of predictions, uint8 (H, W), over an RGB photo, and a legend of their classes below."""
    blended = Image.blend(photo, Image.fromarray(palette[predictions]), alpha=0.55)
    W, H = blended.size
    present, font = np.unique(predictions), ImageFont.load_default(size=max(11, min(W, 1600) // 45))
    line = round(font.size * 1.6)
    column = max(font.getlength(names[i]) for i in present) + 2 * line
    n_columns = max(1, int(W // column))
    n_lines = math.ceil(len(present) / n_columns) + 0.5
    canvas = Image.new("RGB", (max(W, round(column)), H + round(line * n_lines)), "white")
    canvas.paste(blended)
    draw = ImageDraw.Draw(canvas)
    for place, i in enumerate(present):
        x, y = place % n_columns * column + line // 4, H + line // 4 + place // n_columns * line
        draw.rectangle((x, y + line * 0.15, x + line * 0.8, y + line * 0.85), fill=tuple(palette[i].tolist()),
                       outline="gray")
        draw.text((x + line * 1.1, y + line * 0.5), names[i], fill="black", font=font, anchor="lm")
    return canvas


def write_own(path: Path, image: Image.Image) -> None:
    """A PNG that `is_own` knows."""
    mark, buffer = PngInfo(), io.BytesIO()
    mark.add_text("Software", SOFTWARE)
    image.save(buffer, "PNG", pnginfo=mark)
    utils.write_file(path, buffer.getbuffer())


def segment_all(segmenter: Segmenter, photos: Sequence[Path], masks: Sequence[Path],
                overlays: dict[Path, Path], composite: bool) -> None:
    """Write each photo's mask, and the overlay of that, with a line each; UserError for what was skipped."""
    total, names = segmenter.make_scores(), segmenter.class_names
    problems, started = [], time.monotonic()
    read = partial(read_sample, composite=composite, n_classes=segmenter.n_classes)
    n_cores = utils.available_cpus()
    samples = dataset.in_threads(read, photos, n_cores, n_ahead=n_cores)
    bar = segmenter.runtime.progress("Segmenting", len(photos), "photo")
    for path, mask_path, sample in zip(photos, masks, samples):
        bar.update()
        if isinstance(sample, str):
            problems.append(f"skipped {sample}")
            utils.say(problems[-1])
            continue
        (photo, label), sample = sample, None  # no longer than needed: photos can be large
        predictions = segmenter(photo)
        mask = Image.fromarray(predictions)
        mask.putpalette(segmenter.palette.tobytes())
        write_own(mask_path, mask)
        if mask_path in overlays:
            try:
                write_own(overlays[mask_path], draw_overlay(photo, predictions, names, segmenter.palette))
            except Exception as error:  # a picture ends no run
                problems.append(f"{path}: no overlay ({utils.first_line(error)})")
                utils.say(problems[-1])
        shares = np.bincount(predictions.flat, minlength=len(names)) / predictions.size
        largest = [i for i in np.argsort(-shares)[:NAMED_CLASSES] if shares[i] > 0]
        line = ", ".join(f"{names[i]} {shares[i]:.1%}" for i in largest) + " of the mask"
        if composite:
            scores = segmenter.make_scores()
            scores.update(torch.from_numpy(predictions), torch.from_numpy(label))
            total.confusion += scores.confusion
            line = SCORES.format(**scores.compute()) + f"; {line}"
        utils.say(f"{path} -> {mask_path}: {line}")
    bar.close()
    if composite and total.confusion.any():
        utils.say(f"All composites together: {SCORES.format(**total.compute())}")
    rate = len(photos) / (time.monotonic() - started)
    utils.say(f"{counted(len(photos), 'photo')}, {rate:.1f} a second, {counted(len(problems), 'problem')}")
    if problems:
        raise UserError(problems[0] + f" (and {len(problems) - 1} more, named above)" * (len(problems) > 1))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; SystemExit with status 1 and one line on stderr for what a user can put right."""
    with utils.one_line_errors("masks written so far are whole; the same command starts again"):
        args = get_args_parser().parse_args(argv)
        found = find_photos(args.photos)
        photos, masks = [photo for photo, _ in found], plan_masks(found, args.output)
        overlays = {mask: mask.with_name(f"{mask.stem}_overlay.png") for mask in masks if args.overlay}
        check_outputs([*masks, *overlays.values()])
        checkpoint = args.checkpoint or newest_checkpoint()
        segmenter = Segmenter(checkpoint, args.device, image_size=args.image_size, flip=args.flip)
        if args.composite:
            dataset.check_classes(segmenter.class_names, segmenter.palette.tolist(), checkpoint)
        if not segmenter.config:
            utils.say(f"Checkpoint  {checkpoint} holds weights alone: taking the classes of dataset.py and "
                      f"--image_size {segmenter.image_size}")
        segment_all(segmenter, photos, masks, overlays, args.composite)


if __name__ == "__main__":
    main()
