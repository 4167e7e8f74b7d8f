"""The loss, and segmentation figures that all derive from one confusion matrix over a whole split."""
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

BACKGROUND = 0  # the class that the official Cityscapes scoring leaves out
MAX_COUNT = 2**24  # float32 counts exactly up to here


class SegmentationLoss(torch.autograd.Function):
    """Cross entropy + soft Dice loss with one float32 array of the logits' size, their softmax.

    torch's own cross entropy keeps a float32 copy of the logits, their logarithmic softmax and its gradient.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, ignore_background: bool) -> tuple[Tensor, ...]:
        C = logits.shape[1]
        # One plane a class: sums and maxima over classes run along whole planes.
        planes = logits.to(torch.float32, memory_format=torch.contiguous_format, copy=True)  # (B, C, H, W)
        index = labels.long()[:, None]  # (B, 1, H, W)
        true_logits, top = planes.gather(1, index), planes.amax(1, keepdim=True)
        # As argmax, which takes a CPU longer: of equal ones the first, so here the highest of C, C - 1, ...
        ranks = torch.arange(C, 0, -1, dtype=torch.uint8, device=planes.device).view(1, C, 1, 1)
        predictions = C - ((planes == top) * ranks).amax(1).clamp_(min=1)  # NaN is no maximum
        sums = planes.sub_(top).exp_().sum(1, keepdim=True)
        softmax, losses = planes.div_(sums), sums.log() + top - true_logits  # (B, 1, H, W)
        in_training = ctx.needs_input_grad[0]
        n_ranks = dist.get_world_size() if in_training and dist.is_initialized() else 1
        confidence, counted = losses.neg().exp(), torch.ones_like(losses)
        if ignore_background:
            counted = (index != BACKGROUND).float()
            softmax.mul_(counted)
            confidence.mul_(counted)
        dice_loss, truth, *saved = soft_dice_loss(softmax, confidence, counted, index, n_ranks)
        n_counted = (truth.sum() / n_ranks).clamp(min=1) if ignore_background else index.numel()
        ctx.save_for_backward(softmax, index, counted / n_counted, *saved)
        ctx.dtype, cross_entropy = logits.dtype, mean_loss(losses, index, ignore_background)
        ctx.mark_non_differentiable(cross_entropy, predictions)
        return cross_entropy + dice_loss, cross_entropy, predictions

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        softmax, index, weights, slopes, true_slopes = ctx.saved_tensors
        per_pixel = grad * weights  # all in float32, fp16's loss scale included
        slopes, true_slopes = grad * slopes, grad * true_slopes
        mean_slopes = (slopes @ softmax.flatten(2)).view_as(true_slopes) + true_slopes  # over classes
        softmax.mul_(slopes.view(1, -1, 1, 1) + (per_pixel - mean_slopes))
        softmax.scatter_add_(1, index, true_slopes - per_pixel)
        return softmax.to(ctx.dtype).contiguous(memory_format=torch.channels_last), None, None


def soft_dice_loss(softmax: Tensor, confidence: Tensor, counted: Tensor, index: Tensor,
                   n_ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1 - mean Dice of the classes present, probabilities counting in the place of predictions.

    softmax is float32 (B, C, H, W), confidence what it holds for the true classes, (B, 1, H, W), which the
    index names, int64; counted is 1, or 0 where a pixel does not count and the others are 0 too. Ranks count
    together. Returns the loss; the pixels of each class, (C,); the loss's derivatives by a probability of
    each class, (C,); and what those of the true classes have beside that, times the probability.
    """
    B, C, H, W = softmax.shape

    def sum_by_class(values: Tensor) -> Tensor:  # row by row: a GPU's threads would queue at C cells
        rows = values.new_zeros(B * H, C)
        return rows.scatter_add_(1, index.reshape(B * H, W), values.reshape(B * H, W)).sum(0)

    counts = torch.stack([sum_by_class(confidence), sum_by_class(counted), softmax.sum((0, 2, 3))])
    if n_ranks > 1:
        dist.all_reduce(counts)
    hits, truth, predicted = counts  # each (C,)
    sizes, n_present = (truth + predicted).clamp(min=1), (truth > 0).sum().clamp(min=1)
    dice = 2 * hits / sizes
    factor = n_ranks / n_present  # as the gradient will be the mean over ranks
    return 1 - dice.sum() / n_present, truth, factor * dice / sizes, confidence * (-2 * factor / sizes)[index]


def mean_loss(losses: Tensor, labels: Tensor, ignore_background: bool) -> Tensor:
    """The mean of losses per pixel, where the background does not count over the other pixels alone."""
    if not ignore_background:
        return losses.mean()
    counted = labels != BACKGROUND
    return (losses * counted).sum() / counted.sum().clamp(min=1)


def segmentation_loss(logits: Tensor, labels: Tensor,
                      ignore_background: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of logits (B, C, H, W) of any float dtype and integer labels (B, H, W), in float32.

    Cross entropy hardly sees a rare class; the Dice of each class in the batch counts as much for a small one
    (after Milletari et al., 2016, arXiv:1606.04797, and for the sum Isensee et al., 2018, arXiv:1809.10486).

    Returns mean cross entropy per pixel + 1 - mean soft Dice of the classes present, to be differentiated
    once; the mean cross entropy alone; and predictions uint8 (B, H, W), equal to logits.argmax(1).
    """
    return SegmentationLoss.apply(logits, labels, ignore_background)


@torch.no_grad()
def score_stretched(logits: Tensor, size: tuple[int, int], labels: Tensor | None = None,
                    ignore_background: bool = False) -> tuple[Tensor, Tensor | None]:
    """Stretch one image's logits (C, h, w) bilinearly to `size`, (H, W), and take each pixel's best class.

    Class by class: all logits of 12 megapixels would take a gigabyte. Returns predictions uint8 (H, W), and
    the mean cross entropy per pixel of `labels`, uint8 (H, W), or None.
    """
    best = torch.full(size, -math.inf, device=logits.device)
    predictions = torch.zeros(size, dtype=torch.uint8, device=logits.device)
    if labels is not None:
        total, true_logits = best.clone(), best.clone()  # log of the sum of exp(logits); the true class's
    for c, plane in enumerate(logits.float()):
        if plane.shape != size:
            plane = F.interpolate(plane[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
        predictions.masked_fill_(plane > best, c)
        torch.maximum(best, plane, out=best)
        if labels is not None:
            torch.logaddexp(total, plane, out=total)
            true_logits = torch.where(labels == c, plane, true_logits)
    loss = None if labels is None else mean_loss(total - true_logits, labels, ignore_background)
    return predictions, loss


class SegmentationMetrics:
    """Confusion matrix of a split, rows truth and columns prediction, and the figures that follow from it.

    Ids are below n_classes; update() gets its tensors on the device. Unless score_background says that id 0
    is a class like any other, pixels of it count in dice and mean_dice alone, or nowhere if they are ignored.
    """

    def __init__(self, n_classes: int, device: torch.device | str = "cpu", score_background: bool = False,
                 ignore_background: bool = False) -> None:
        self.n_classes = n_classes
        self.score_background, self.ignore_background = score_background, ignore_background
        self.confusion = torch.zeros((n_classes, n_classes), dtype=torch.int64, device=device)
        # float64, so that the sum does not depend on how the split was divided; MPS has no float64
        sum_dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self.loss_sums = torch.zeros(2, dtype=sum_dtype, device=device)  # sum of the loss over pixels, pixels

    def reset(self) -> None:
        """Count from zero, in the same tensors."""
        self.confusion.zero_()
        self.loss_sums.zero_()

    def update(self, predictions: Tensor, labels: Tensor, loss: Tensor | None = None) -> None:
        """Count a batch of integers of one shape, ids below n_classes, without waiting for the device.

        Its `loss` is the mean per pixel. ValueError if the shapes differ or a tensor holds no integers.
        """
        if predictions.shape != labels.shape or predictions.is_floating_point() or labels.is_floating_point():
            raise ValueError(f"expected integers of one shape, as of argmax(1), got {predictions.dtype} "
                             f"{[*predictions.shape]} and {labels.dtype} {[*labels.shape]}")
        n_cells = self.n_classes**2
        for cells in (labels.int() * self.n_classes + predictions).flatten().split(MAX_COUNT):
            if cells.is_cuda:  # bincount would make the host wait, index_add_ queue at a few cells
                counts = torch.histc(cells.float(), n_cells, -0.5, n_cells - 0.5).long()
            else:
                counts = torch.bincount(cells, minlength=n_cells)
            self.confusion += counts.view_as(self.confusion)
        if loss is not None:
            n_pixels = (labels != BACKGROUND).sum() if self.ignore_background else labels.numel()
            self.loss_sums[0] += loss.detach() * n_pixels
            self.loss_sums[1] += n_pixels

    def all_reduce(self) -> None:
        """Sum over all ranks of torch.distributed, where it runs."""
        if dist.is_initialized():
            dist.all_reduce(self.confusion)
            dist.all_reduce(self.loss_sums)

    def counted(self) -> Tensor:
        """The confusion matrix of what counts, float64 on the CPU."""
        confusion = self.confusion.cpu().double()
        if self.ignore_background:
            confusion[BACKGROUND] = 0
        return confusion

    def per_class(self) -> dict[str, Tensor]:
        """Figures per class, each float64 (n_classes,) on the CPU; NaN where it has no pixel to judge by.

        dice and accuracy count every pixel; iou leaves out those of background, unless that is scored.
        """
        confusion = self.counted()
        hits, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
        dice, iou = 2 * hits / (truth + predicted), hits / (truth + predicted - hits)
        if not self.score_background:
            iou = hits / (truth + predicted - confusion[BACKGROUND] - hits)
            iou[BACKGROUND] = torch.nan
        if self.ignore_background:
            dice[BACKGROUND] = torch.nan
        return {"dice": dice, "iou": iou, "accuracy": hits / truth, "pixels": truth}

    def compute(self) -> dict[str, float]:
        """The figures over the split; NaN where it holds no pixel to judge by.

        dice: micro-averaged over all classes, which with one label a pixel is the share of right pixels.
        mean_dice: Dice per class, averaged over the classes present in truth or prediction.
        mean_iou: as in Cityscapes' own scoring, over the pixels and classes whose truth is not background.
        pixel_accuracy, class_accuracy: over the same pixels; the latter averages the classes in the truth.
        loss: mean cross entropy per pixel, as update() was given it.
        """
        confusion, per_class = self.counted(), self.per_class()
        hits, first = confusion.diag(), 0 if self.score_background else 1
        figures = {"dice": hits.sum() / confusion.sum(),
                   "mean_dice": per_class["dice"].nanmean(),
                   "mean_iou": per_class["iou"].nanmean(),
                   "pixel_accuracy": hits[first:].sum() / confusion[first:].sum(),
                   "class_accuracy": per_class["accuracy"][first:].nanmean(),
                   "loss": self.loss_sums[0] / self.loss_sums[1]}
        return {name: float(value) for name, value in figures.items()}

    def rows(self, names: Sequence[str]) -> list[dict]:
        """per_class() as a row a class, with the names of the classes."""
        per_class = self.per_class()
        return [{"class": name} | {figure: values[i].item() for figure, values in per_class.items()}
                for i, name in enumerate(names)]

    def table(self, names: Sequence[str]) -> str:
        """The figures as text, a line a class and a line for all."""
        n_pixels, width = self.counted().sum().item(), max(len("class"), *map(len, names))
        lines = [f"{'class':<{width}}    dice     iou  accuracy  share of pixels"]
        for row in self.rows(names):
            cells = f"  {row['dice']:>6.4f}  {row['iou']:>6.4f}  {row['accuracy']:>8.4f}"
            cells = cells.replace("   nan", "     -")  # there is no pixel to judge by
            lines.append(f"{row['class']:<{width}}{cells}  {row['pixels'] / n_pixels:>15.2%}")
        figures = "  ".join(f"{name} {value:.4f}" for name, value in self.compute().items())
        return "\n".join([*lines, "", figures])

    def draw(self, figure: Any, names: Sequence[str]) -> None:
        """The confusion matrix on a matplotlib Figure, rows in percent, blank where a class is absent."""
        confusion = self.counted()
        shares = (100 * confusion / confusion.sum(1, keepdim=True)).numpy()  # 0 / 0 is NaN
        side = 2.2 + 0.36 * len(names)
        figure.set_size_inches(side + 0.6, side)
        axes = figure.subplots()
        picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.5:  # a cell of 0% says more as a blank
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7.5,
                          color="white" if share > 55 else "black")
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="prediction", ylabel="truth", title="Where each class's pixels went, % of the row")
        figure.colorbar(picture, ax=axes, shrink=0.6, label="% of the true class's pixels")
