"""metrics.py: each figure against hand-worked cases and a slow loop over pixels, the loss against torch's."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import plain_loss
from metrics import SegmentationMetrics, score_stretched, segmentation_loss


def compute(predictions, labels, n_classes=20):
    totals = SegmentationMetrics(n_classes)
    totals.update(torch.tensor(predictions), torch.tensor(labels))
    return totals.compute()


def test_hand_worked_case():
    # truth      0 1 1 1 2 2      class 0: 1 hit of 1, predicted twice   class 1: 2 of 3, predicted twice
    # prediction 0 0 1 1 2 1      class 2: 1 of 2, predicted once        (class 1 is predicted 3 times in all)
    figures = compute([[[0, 0, 1], [1, 2, 1]]], [[[0, 1, 1], [1, 2, 2]]], n_classes=3)
    assert figures["dice"] == pytest.approx(4 / 6)
    assert figures["mean_dice"] == pytest.approx((2 / 3 + 4 / 6 + 2 / 3) / 3)
    assert figures["mean_iou"] == pytest.approx((2 / 4 + 1 / 2) / 2)  # the pixel with truth 0 is left out
    assert figures["pixel_accuracy"] == pytest.approx(3 / 5)
    assert figures["class_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_predictions_on_background_truth_do_not_count_against_iou():
    figures = compute([[[5, 5, 5, 5]]], [[[0, 0, 5, 5]]])
    assert figures["mean_iou"] == 1 and figures["pixel_accuracy"] == 1 and figures["class_accuracy"] == 1
    assert figures["dice"] == 0.5


def test_predicting_background_on_a_class_is_an_error():
    figures = compute([[[0, 0, 5, 5]]], [[[5, 5, 5, 5]]])
    assert figures["mean_iou"] == 0.5 and figures["pixel_accuracy"] == 0.5


def test_absent_classes_are_left_out_of_the_averages():
    perfect = compute([[[1, 2]]], [[[1, 2]]])
    names = ("dice", "mean_dice", "mean_iou", "pixel_accuracy", "class_accuracy")
    assert [perfect[name] for name in names] == [1] * 5
    nothing_to_score = compute([[[0, 0]]], [[[0, 0]]])
    assert nothing_to_score["dice"] == 1 and math.isnan(nothing_to_score["mean_iou"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_against_a_slow_loop(dtype):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(20, (3, 9, 11), generator=generator).to(dtype)
    right = torch.rand(labels.shape, generator=generator) < 0.6
    predictions = torch.where(right, labels, (labels + 1) % 20).to(dtype)
    totals = SegmentationMetrics(20)
    for i in range(3):  # batch by batch
        totals.update(predictions[i : i + 1], labels[i : i + 1])
    figures = totals.compute()

    pairs = list(zip(labels.flatten().tolist(), predictions.flatten().tolist()))
    scored = [(truth, guess) for truth, guess in pairs if truth != 0]
    dices, ious, accuracies = [], [], []
    for c in range(20):
        hits = sum(truth == guess == c for truth, guess in pairs)
        dices.append(2 * hits / (sum(t == c for t, _ in pairs) + sum(g == c for _, g in pairs)))
        if c > 0:
            hits = sum(truth == guess == c for truth, guess in scored)
            ious.append(hits / sum(c in pair for pair in scored))
            accuracies.append(hits / sum(truth == c for truth, _ in scored))
    assert figures["dice"] == pytest.approx(sum(t == g for t, g in pairs) / len(pairs))
    assert figures["mean_dice"] == pytest.approx(sum(dices) / 20)
    assert figures["mean_iou"] == pytest.approx(sum(ious) / 19)
    assert figures["class_accuracy"] == pytest.approx(sum(accuracies) / 19)
    assert figures["pixel_accuracy"] == pytest.approx(sum(t == g for t, g in scored) / len(scored))


def test_loss_is_per_pixel_however_the_split_is_divided():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 4, 6, 6, generator=generator)
    labels = torch.randint(4, (5, 6, 6), generator=generator)
    for sizes in ([5], [2, 3], [1, 1, 3]):
        totals = SegmentationMetrics(4)
        for part, truth in zip(logits.split(sizes), labels.split(sizes)):
            totals.update(part.argmax(1), truth, F.cross_entropy(part, truth))
        assert totals.compute()["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-6)


def test_counts_are_exact_above_what_float32_holds_and_under_autocast():
    totals = SegmentationMetrics(2)
    labels = torch.zeros((1, 2**12, 2**12 + 1), dtype=torch.uint8)  # 2**24 + 2**12 pixels
    with torch.autocast("cpu", torch.bfloat16):
        totals.update(labels, labels)
        totals.update(labels, labels)
    assert totals.confusion.tolist() == [[2**25 + 2**13, 0], [0, 0]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts on a GPU in another way than on a CPU")
def test_counts_on_a_gpu_are_exact_and_do_not_make_the_host_wait():
    labels, predictions = torch.randint(60, (2, 3, 2048, 2048), dtype=torch.uint8, device="cuda")
    on_gpu, on_cpu = SegmentationMetrics(60, "cuda"), SegmentationMetrics(60)
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_gpu.update(predictions, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu.update(predictions.cpu(), labels.cpu())
    assert torch.equal(on_gpu.confusion.cpu(), on_cpu.confusion)


def test_reset_counts_from_zero_in_the_same_tensors():
    totals = SegmentationMetrics(3)
    confusion, label = totals.confusion, torch.ones((1, 2, 2), dtype=torch.uint8)
    totals.update(label, label, torch.tensor(2.0))
    totals.reset()
    totals.update(label, label, torch.tensor(1.0))
    assert totals.confusion is confusion and confusion.sum() == 4 and totals.compute()["loss"] == 1


def test_the_table_has_a_line_a_class_and_one_for_all():
    totals = SegmentationMetrics(3)
    totals.update(torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 1, 0]]]))
    lines = totals.table(["void", "a road", "never seen"]).splitlines()
    assert lines[0].split() == ["class", "dice", "iou", "accuracy", "share", "of", "pixels"]
    assert lines[2].split() == ["a", "road", "0.6667", "1.0000", "1.0000", "33.33%"]
    assert lines[3].split() == ["never", "seen", "-", "-", "-", "0.00%"]
    assert lines[-1].startswith("dice 0.6667  mean_dice")


def test_the_picture_of_the_confusion_matrix_leaves_absent_classes_blank(tmp_path):
    totals = SegmentationMetrics(3)
    totals.update(torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 1, 0]]]))
    figure = totals.plot(["a", "$b", "c$_$"])  # no formula
    figure.savefig(tmp_path / "confusion_matrix.png")
    axes = figure.axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["100", "50", "50"]
    assert np.isnan(np.asarray(axes.images[0].get_array().filled(np.nan))[2]).all()


# --- The loss -----------------------------------------------------------------------------------------------


def make_logits(dtype=torch.float32, memory_format=torch.channels_last):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 20, 8, 8, generator=generator)
    logits = logits.to(dtype).contiguous(memory_format=memory_format)
    labels = torch.randint(20, (2, 8, 8), generator=generator, dtype=torch.uint8)
    return logits.requires_grad_(), labels


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_is_cross_entropy_and_soft_dice_with_their_gradient(dtype, memory_format):
    logits, labels = make_logits(dtype, memory_format)
    loss, cross_entropy, predictions = segmentation_loss(logits, labels)
    again = logits.detach().float().requires_grad_()
    expected = plain_loss(again, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(cross_entropy, F.cross_entropy(again, labels.long()))
    assert torch.equal(predictions, logits.argmax(1)) and predictions.dtype == torch.uint8
    loss.backward()
    expected.backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad, again.grad.to(dtype))


def test_classes_that_a_batch_has_not_leave_its_dice_alone():
    logits, labels = make_logits()
    labels = labels % 3
    with torch.no_grad():
        logits[:, 7] = -300  # no pixel has any probability of it
    again = logits.detach().requires_grad_()
    loss, expected = segmentation_loss(logits, labels)[0], plain_loss(again, labels)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, again.grad)


def test_the_loss_scale_of_fp16_is_applied_before_the_gradient_is_rounded():
    """A pixel's gradient of 1e-9 is zero in float16; times 2**16 it is not."""
    logits, labels = make_logits(torch.float16)
    loss, _, _ = segmentation_loss(logits, labels)
    (loss * 1e-6 * 2**16).backward()
    again = logits.detach().float().requires_grad_()
    (plain_loss(again, labels) * 1e-6 * 2**16).backward()
    torch.testing.assert_close(logits.grad.float(), again.grad, rtol=2e-3, atol=1e-7)
    assert (logits.grad != 0).float().mean() > 0.8


def test_tied_logits_count_as_argmax_counts_them():
    logits = torch.randint(3, (2, 20, 16, 16)).bfloat16()  # every pixel has ties
    _, _, predictions = segmentation_loss(logits, torch.zeros((2, 16, 16), dtype=torch.uint8))
    assert torch.equal(predictions, logits.argmax(1))


def test_logits_that_are_no_numbers_give_a_loss_that_is_none_and_predictions_that_count():
    logits, labels = make_logits()
    with torch.no_grad():
        logits[0, 3, 2, 2] = torch.nan
    _, cross_entropy, predictions = segmentation_loss(logits, labels)
    assert cross_entropy.isnan() and predictions.max() < 20


@pytest.mark.parametrize("size", [(8, 8), (37, 21)])
def test_stretched_logits_are_scored_as_interpolation_argmax_and_cross_entropy_do(size):
    logits, labels = torch.randn(20, 8, 8), torch.randint(20, size, dtype=torch.uint8)
    predictions, loss = score_stretched(logits, size, labels)
    stretched = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)
    assert torch.equal(predictions.long(), stretched[0].argmax(0))
    torch.testing.assert_close(loss, F.cross_entropy(stretched, labels.long()[None]))
    assert torch.equal(score_stretched(logits, size)[0], predictions)


@pytest.mark.parametrize("predictions", [
    torch.zeros(1, 20, 4, 4), torch.zeros(1, 4, 4), torch.zeros((1, 4, 5), dtype=torch.int64),
])
def test_logits_or_shapes_that_do_not_fit_are_refused(predictions):
    with pytest.raises(ValueError, match="argmax"):
        SegmentationMetrics(20).update(predictions, torch.zeros((1, 4, 4), dtype=torch.int64))
