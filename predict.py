"""Segment photos with a trained checkpoint: a palette PNG of class ids for each, and on request an overlay or scores.

From Python: `label = Segmenter("runs/x/best.pth")(photo)`.
"""
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

import dataset
import metrics
import model as models
import utils

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
BATCH = 8  # photos a forward pass; all are resized to one square, so sizes can mix


class Segmenter:
    """A checkpoint, loaded once, that turns photos into label maps.

    The network sees a photo as it saw the training photos: squeezed to a square of the checkpoint's image size. Its logits are
    stretched back to the photo's size before the best class is taken, so outlines are smooth.

    Args:
        checkpoint: path of a best.pth, last.pth or a bare state_dict of EfficientSegNet.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        image_size: for a state_dict that does not say, in pixels, a multiple of 32.
    Raises:
        model.WeightsError: the checkpoint cannot be used.
        utils.UserError: the device cannot be used.
    """

    def __init__(self, checkpoint: str | Path, device: str = "auto", *, image_size: int = 256) -> None:
        content = models.load_checkpoint(checkpoint)
        config = content["config"]
        self.has_config = "image_size" in config
        chosen = utils.select_device(device)
        self.runtime = utils.Runtime(chosen, *utils.select_amp("auto", chosen))
        self.model = models.model_from_checkpoint(content, checkpoint).eval()
        self.model.to(self.runtime.device, memory_format=torch.channels_last).fold_encoder()
        self.n_classes = self.model.out.out_channels
        self.image_size = config.get("image_size", image_size)
        known = dataset.CLASSES[: self.n_classes]
        self.class_names = config.get("class_names", [entry.name for entry in known])
        self.palette = np.array(config.get("class_colors", [entry.color for entry in known]), dtype=np.uint8)  # (n_classes, 3)
        if not len(self.class_names) == len(self.palette) == self.n_classes:
            raise models.WeightsError(f"{checkpoint}: has {self.n_classes} classes and {len(self.class_names)} class names; pass a "
                                      "checkpoint of train.py, or add classes to CLASSES in dataset.py")

    def __call__(self, photo: Image.Image | np.ndarray) -> np.ndarray:
        """A PIL image of any mode or uint8 array (H, W, 3) to class ids, uint8 (H, W)."""
        return self.segment([photo])[0]

    @torch.inference_mode()
    def segment(self, photos: Sequence[Image.Image | np.ndarray]) -> list[np.ndarray]:
        """Several photos of any sizes in one forward pass; a label map uint8 (H, W) for each."""
        pictures = [self._as_image(photo) for photo in photos]
        square = (self.image_size, self.image_size)
        inputs = np.stack([np.asarray(picture.resize(square, Image.Resampling.BILINEAR)) for picture in pictures])
        images = torch.from_numpy(inputs).to(self.runtime.device).permute(0, 3, 1, 2)  # (B, 3, S, S), channels_last
        with self.runtime.autocast():
            logits = self.model(dataset.normalize(images)).float()
        return [best_classes(one, picture.size[::-1]).cpu().numpy() for one, picture in zip(logits, pictures)]

    @staticmethod
    def _as_image(photo: Image.Image | np.ndarray) -> Image.Image:
        if isinstance(photo, Image.Image):
            return dataset.to_rgb(photo)
        if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
            raise ValueError(f"expected a uint8 array (H, W, 3), got {photo.dtype} {photo.shape}")
        return Image.fromarray(photo)


def best_classes(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (C, h, w), stretched bilinearly to `size` (H, W), to the best class of each pixel, uint8 (H, W).

    Class by class: all logits of a 12-megapixel photo at once would take a gigabyte.
    """
    best, classes = None, torch.zeros(size, dtype=torch.uint8, device=logits.device)
    for index, logit in enumerate(logits):
        stretched = F.interpolate(logit[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        if best is None:
            best = stretched
        else:
            classes[stretched > best] = index
            best = torch.maximum(best, stretched)
    return classes


def get_args_parser() -> utils.ArgumentParser:
    parser = utils.ArgumentParser(description=__doc__.split("\n")[0], epilog="""examples:
  python predict.py photo.jpg --checkpoint runs/x/best.pth --output mask.png
  python predict.py holiday/ street.png --checkpoint runs/x/best.pth --output masks/ --overlay
  python predict.py data/demo/val --composite --checkpoint runs/x/best.pth --output masks/""")
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO_OR_FOLDER",
                        help="any size and mode that Pillow reads; of a folder, its images in natural order")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="best.pth of a run, or a bare state_dict")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE_OR_FOLDER",
                        help="a .png file for one photo, else a folder that gets NAME.png for each")
    look = parser.add_argument_group("what else to do")
    look.add_argument("--overlay", action="store_true", help="also save NAME_overlay.png, the mask over the photo with a legend")
    look.add_argument("--composite", action="store_true",
                      help="the files are composites: segment the left half and score it against the right half")
    run = parser.add_argument_group("run")
    run.add_argument("--device", default="auto", metavar="auto|cpu|cuda|cuda:N|mps", help="auto (if left out) prefers a GPU")
    run.add_argument("--image_size", type=int, default=256, metavar="PIXELS",
                     help="of the network's input, only for a checkpoint that does not say; %(default)s if left out")
    return parser


def plan_outputs(args: Namespace) -> list[tuple[Path, Path]]:
    """Each photo with the file of its mask.

    Raises:
        utils.UserError: no photos, an output that cannot be, or one that would overwrite a photo.
    """
    photos = []
    for path in args.photos:
        photos += dataset.list_images(path, PHOTO_SUFFIXES) if path.is_dir() else [path]
    if not photos:
        raise utils.UserError(f"{args.photos[0]} holds no images ({', '.join(PHOTO_SUFFIXES)}); pass photos or a folder of them")
    one_file = len(photos) == 1 and not args.photos[0].is_dir() and not args.output.is_dir() and args.output.suffix
    if one_file and args.output.suffix.lower() != ".png":
        raise utils.UserError(f"--output {args.output}: a mask holds class ids, which only PNG keeps; name it {args.output.stem}.png")
    if not one_file and args.output.is_file():
        raise utils.UserError(f"--output {args.output} is a file, and {len(photos)} masks need a folder; name a folder")
    stems = Counter(path.stem for path in photos)
    outputs = [args.output] if one_file else [
        # a.jpg and a.png become a.jpg.png and a.png.png
        args.output / (f"{path.stem}.png" if stems[path.stem] == 1 else f"{path.name}.png") for path in photos]
    times, originals = Counter(outputs), {path.resolve() for path in photos}
    for output in outputs:
        if times[output] > 1 or output.resolve() in originals:
            raise utils.UserError(f"{output} would be written twice or over a photo; choose another --output or fewer folders at once")
    return list(zip(photos, outputs))


def read_sample(path: Path, composite: bool, n_classes: int) -> tuple[Image.Image, np.ndarray | None] | str:
    """A photo and, of a composite, its truth, uint8 (H, W); the error message for what cannot be read."""
    try:
        if not composite:
            return dataset.read_image(path), None
        image, label = dataset.read_composite(path, image_size=None)
        if label.max() >= n_classes:
            return f"{path}: holds class id {label.max()}, and the checkpoint's {n_classes} classes end at {n_classes - 1}"
        return Image.fromarray(image), label
    except dataset.DatasetError as error:
        return str(error)


def segment_files(segmenter: Segmenter, paths: Sequence[Path], composite: bool) -> Iterator[tuple]:
    """(photo, truth, label map) or an error message for each path, in order; files are read while the network works."""
    with ThreadPoolExecutor(dataset.available_cpus()) as pool:
        batches = [paths[start : start + BATCH] for start in range(0, len(paths), BATCH)]
        pending = [pool.submit(read_sample, path, composite, segmenter.n_classes) for path in batches[0]]
        for following in [*batches[1:], []]:
            samples = [future.result() for future in pending]
            pending = [pool.submit(read_sample, path, composite, segmenter.n_classes) for path in following]
            readable = [sample for sample in samples if not isinstance(sample, str)]
            labels = iter(segmenter.segment([photo for photo, _ in readable]) if readable else [])
            for sample in samples:
                yield sample if isinstance(sample, str) else (*sample, next(labels))


def save_mask(label: np.ndarray, palette: np.ndarray, path: Path) -> None:
    """A palette PNG of uint8 (H, W): pixel values are class ids, and viewers show the official colours."""
    mask = Image.fromarray(label)
    mask.putpalette(palette.flatten().tolist())
    utils.write_image(path, mask)


def score(label: np.ndarray, truth: np.ndarray, n_classes: int) -> metrics.SegmentationMetrics:
    """The metrics of one label map against its truth, both uint8 (H, W)."""
    totals = metrics.SegmentationMetrics(n_classes)
    totals.update(torch.from_numpy(label)[None], torch.from_numpy(truth)[None])
    return totals


def describe(totals: metrics.SegmentationMetrics) -> str:
    figures = totals.compute()
    return f"dice {figures['dice']:.4f}, mean IoU {figures['mean_iou']:.4f}"


def main(argv: list[str] | None = None) -> None:
    """The command line; SystemExit with status 1 and one line on stderr for what a user can put right."""
    with utils.user_errors(dataset.DatasetError, models.WeightsError):
        args = get_args_parser().parse_args(argv)
        plan = plan_outputs(args)
        segmenter = Segmenter(args.checkpoint, args.device, image_size=args.image_size)
        if not segmenter.has_config:
            print(f"{args.checkpoint} holds weights alone: taking the first {segmenter.n_classes} Cityscapes classes and --image_size "
                  f"{args.image_size}")
        utils.make_dir(plan[0][1].parent, "--output")
        totals, skipped = metrics.SegmentationMetrics(segmenter.n_classes), []
        results = segment_files(segmenter, [path for path, _ in plan], args.composite)
        progress = tqdm(zip(plan, results), "Segmenting", len(plan), unit="photo", leave=False, disable=None)
        started = time.monotonic()
        for (path, output), result in progress:
            if isinstance(result, str):
                skipped.append(result)
                continue
            photo, truth, label = result
            save_mask(label, segmenter.palette, output)
            if args.overlay:
                overlay = utils.draw_overlay(photo, label, segmenter.class_names, segmenter.palette)
                utils.write_image(output.with_name(f"{output.stem}_overlay.png"), overlay)
            shares = np.bincount(label.flat, minlength=segmenter.n_classes) / label.size
            line = ", ".join(f"{segmenter.class_names[i]} {shares[i]:.1%}" for i in np.argsort(-shares) if shares[i] > 0)
            if args.composite:
                scored = score(label, truth, segmenter.n_classes)
                totals.confusion += scored.confusion
                line = f"{describe(scored)}; {line}"
            tqdm.write(f"{path} -> {output}: {line}")
        n_done = len(plan) - len(skipped)
        if args.composite and n_done:
            print(f"All {n_done} composites together: {describe(totals)}")
        if len(plan) > 1:
            rate = len(plan) / (time.monotonic() - started)
            print(f"{n_done} of {len(plan)} photos segmented, {rate:.1f} a second, masks in {plan[0][1].parent}")
        if skipped:
            raise utils.UserError(f"skipped {len(skipped)} of {len(plan)}: {'; '.join(skipped)}")


if __name__ == "__main__":
    main()
