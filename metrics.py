"""Segmentation figures, all derived from one confusion matrix over a whole split.

The matrix is summed on the device and read once at the end, so there is no average of batch averages, and any division of a
split into batches or ranks gives the same figures.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

BACKGROUND = 0  # the one class that the official Cityscapes scoring leaves out


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy in float32 of logits (B, C, H, W) and integer labels (B, H, W): the mean per pixel, or "none" for (B, H, W).

    Logits in channels_last are viewed as (B*H*W, C) without a copy; on (B, C, H, W) log_softmax would copy them twice.
    """
    losses = F.cross_entropy(logits.permute(0, 2, 3, 1).flatten(0, 2).float(), labels.flatten().long(), reduction=reduction)
    return losses.view_as(labels) if reduction == "none" else losses


class SegmentationMetrics:
    """Confusion matrix of a split, rows truth and columns prediction, and the figures that follow from it.

    Args:
        n_classes: ids run from 0 to n_classes - 1; id 0 is background.
        device: where update() gets its tensors.
    """

    def __init__(self, n_classes: int, device: torch.device | str = "cpu") -> None:
        self.n_classes = n_classes
        self.confusion = torch.zeros((n_classes, n_classes), dtype=torch.int64, device=device)
        # float64, so that the sum does not depend on how the split was divided; MPS has no float64
        sum_dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self.loss_sums = torch.zeros(2, dtype=sum_dtype, device=device)  # sum of the loss over pixels, pixels

    def update(self, predictions: Tensor, labels: Tensor, loss: Tensor | None = None) -> None:
        """Count one batch, without waiting for the device.

        Args:
            predictions: integer (B, H, W), ids below n_classes.
            labels: integer (B, H, W), ids below n_classes.
            loss: mean loss per pixel of this batch; if it is never given, compute() says NaN.
        Raises:
            ValueError: the shapes differ or a tensor is not of integers (logits where predictions were meant).
        """
        if predictions.shape != labels.shape or predictions.is_floating_point() or labels.is_floating_point():
            raise ValueError(
                f"expected integer predictions and labels of one shape, got {predictions.dtype} {tuple(predictions.shape)} and "
                f"{labels.dtype} {tuple(labels.shape)}; pass logits.argmax(1)"
            )
        cells = (labels.long() * self.n_classes + predictions).flatten()
        # index_add_ and not bincount, which makes the host wait for the device to learn its size
        self.confusion.view(-1).index_add_(0, cells, torch.ones_like(cells))
        if loss is not None:
            self.loss_sums[0] += loss.detach() * labels.numel()
            self.loss_sums[1] += labels.numel()

    def all_reduce(self) -> None:
        """Sum over all ranks of torch.distributed, where it runs."""
        if dist.is_initialized():
            dist.all_reduce(self.confusion)
            dist.all_reduce(self.loss_sums)

    def per_class(self) -> dict[str, Tensor]:
        """Figures per class, each float64 (n_classes,) on the CPU; NaN where the class has no pixel to judge by.

        dice and accuracy count every pixel; iou leaves pixels whose truth is background out, and background has none.
        """
        confusion = self.confusion.cpu().double()
        hits, truth, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
        scored = predicted - confusion[BACKGROUND]  # predictions on pixels whose truth is background do not count
        iou = hits / (truth + scored - hits)
        iou[BACKGROUND] = torch.nan
        return {"dice": 2 * hits / (truth + predicted), "iou": iou, "accuracy": hits / truth, "pixels": truth}

    def compute(self) -> dict[str, float]:
        """The figures over the split; NaN where it holds no pixel to judge by.

        dice: micro-averaged over all classes, background included; with one label a pixel it equals pixel accuracy.
        mean_dice: Dice per class, averaged over the classes present in truth or prediction.
        mean_iou: IoU per class over the pixels whose truth is not background, averaged over the classes present there,
            as in the official Cityscapes scoring.
        pixel_accuracy, class_accuracy: over the same pixels; class_accuracy averages the classes present in the truth.
        loss: mean cross entropy per pixel, as update() was given it.
        """
        confusion, per_class = self.confusion.cpu().double(), self.per_class()
        hits, pixels = confusion.diag(), confusion.sum()
        figures = {
            "dice": 2 * hits.sum() / (2 * pixels),  # each pixel stands once in the truth and once in the prediction
            "mean_dice": per_class["dice"].nanmean(),
            "mean_iou": per_class["iou"].nanmean(),
            "pixel_accuracy": hits[1:].sum() / confusion[1:].sum(),
            "class_accuracy": per_class["accuracy"][1:].nanmean(),
            "loss": self.loss_sums[0] / self.loss_sums[1],
        }
        return {name: float(value) for name, value in figures.items()}
