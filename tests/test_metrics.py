"""metrics.py: figures against hand-worked cases and a slow loop over pixels, the loss against float64."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from conftest import plain_loss
from metrics import SegmentationMetrics, score_stretched, segmentation_loss


def count(predictions, labels, n_classes=20, **settings):
    totals = SegmentationMetrics(n_classes, **settings)
    totals.update(torch.tensor(predictions), torch.tensor(labels))
    return totals


def compute(*args, **settings):
    return count(*args, **settings).compute()


def test_hand_worked_case():
    # truth      0 1 1 1 2 2      class 0: 1 hit of 1, predicted twice   class 1: 2 of 3, predicted 3 times
    # prediction 0 0 1 1 2 1      class 2: 1 of 2, predicted once
    figures = compute([[[0, 0, 1], [1, 2, 1]]], [[[0, 1, 1], [1, 2, 2]]], n_classes=3)
    assert figures["dice"] == pytest.approx(4 / 6)
    assert figures["mean_dice"] == pytest.approx((2 / 3 + 4 / 6 + 2 / 3) / 3)
    assert figures["mean_iou"] == pytest.approx((2 / 4 + 1 / 2) / 2)  # the pixel with truth 0 is left out
    assert figures["pixel_accuracy"] == pytest.approx(3 / 5)
    assert figures["class_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_iou_leaves_out_background_truth_but_not_background_predictions():
    figures = compute([[[5, 5, 5, 5]]], [[[0, 0, 5, 5]]])
    assert figures["dice"] == 0.5
    assert figures["mean_iou"] == figures["pixel_accuracy"] == figures["class_accuracy"] == 1
    figures = compute([[[0, 0, 5, 5]]], [[[5, 5, 5, 5]]])
    assert figures["mean_iou"] == figures["pixel_accuracy"] == 0.5


def test_absent_classes_are_left_out_of_the_averages():
    perfect = compute([[[1, 2]]], [[[1, 2]]])
    assert all(value == 1 for name, value in perfect.items() if name != "loss")
    nothing_to_score = compute([[[0, 0]]], [[[0, 0]]])
    assert nothing_to_score["dice"] == 1 and math.isnan(nothing_to_score["mean_iou"])


def test_a_background_that_is_a_class_counts_in_every_figure():
    """A table of "not road" and road, and a network that says road everywhere."""
    everywhere, truth = [[[1, 1, 1, 1]]], [[[0, 1, 1, 1]]]
    assert compute(everywhere, truth, n_classes=2)["mean_iou"] == 1  # where id 0 is void
    figures = compute(everywhere, truth, n_classes=2, score_background=True)
    assert figures["dice"] == figures["pixel_accuracy"] == 3 / 4
    assert figures["mean_dice"] == pytest.approx((0 + 6 / 7) / 2)
    assert figures["mean_iou"] == pytest.approx((0 + 3 / 4) / 2)
    assert figures["class_accuracy"] == pytest.approx((0 + 1) / 2)


def test_an_ignored_background_counts_in_no_figure():
    # truth      0 0 1 1 2 2      of the last four, class 1: 1 hit of 2, predicted twice
    # prediction 1 0 1 0 2 1                        class 2: 1 hit of 2, predicted once
    figures = compute([[[1, 0, 1, 0, 2, 1]]], [[[0, 0, 1, 1, 2, 2]]], n_classes=3, ignore_background=True)
    assert figures["dice"] == figures["pixel_accuracy"] == figures["class_accuracy"] == 1 / 2
    assert figures["mean_dice"] == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert figures["mean_iou"] == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_against_a_slow_loop():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(20, (3, 9, 11), generator=generator, dtype=torch.uint8)
    right = torch.rand(labels.shape, generator=generator) < 0.6
    predictions = torch.where(right, labels, (labels + 1) % 20)
    totals = SegmentationMetrics(20)
    for batch in zip(predictions.split(1), labels.split(1)):
        totals.update(*batch)
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


@pytest.mark.parametrize("ignored", [False, True])
def test_loss_is_per_pixel_that_counts_however_the_split_is_divided(ignored):
    logits, labels = torch.randn(5, 4, 6, 6), torch.randint(4, (5, 6, 6))
    labels[0] = 0  # a batch of one image in which nothing counts
    expected = F.cross_entropy(logits.double(), labels, ignore_index=0 if ignored else -100).item()
    for sizes in ([5], [2, 3], [1, 1, 3]):
        totals = SegmentationMetrics(4, ignore_background=ignored)
        for part, truth in zip(logits.split(sizes), labels.split(sizes)):
            _, cross_entropy, predictions = segmentation_loss(part, truth, ignored)
            totals.update(predictions, truth, cross_entropy)
        assert totals.compute()["loss"] == pytest.approx(expected, abs=1e-6)


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
    kept = totals.confusion.fill_(2), totals.loss_sums.fill_(2)
    totals.reset()
    assert totals.confusion is kept[0] and totals.loss_sums is kept[1] and not any(one.any() for one in kept)


def test_the_table_has_a_line_a_class_and_one_for_all():
    totals = count([[[0, 1, 1]]], [[[0, 1, 0]]], n_classes=3)
    lines = totals.table(["void", "a road", "never seen"]).splitlines()
    assert lines[0].split() == ["class", "dice", "iou", "accuracy", "share", "of", "pixels"]
    assert lines[2].split() == ["a", "road", "0.6667", "1.0000", "1.0000", "33.33%"]
    assert lines[3].split() == ["never", "seen", "-", "-", "-", "0.00%"]
    assert lines[-1].startswith("dice 0.6667  mean_dice")


def test_the_picture_of_the_confusion_matrix_leaves_absent_classes_blank(tmp_path):
    figure = Figure()
    count([[[0, 1, 1]]], [[[0, 1, 0]]], n_classes=3).draw(figure, ["a", "b", "c"])
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


def plain_loss_of_the_rest(logits, labels):
    """The plain loss of the pixels that are not background, as if there were no others."""
    rest = labels > 0
    return plain_loss(logits.movedim(1, -1)[rest].T[None, :, :, None], labels[rest][None, :, None])


def check(logits, labels, ignored=False, scale=1.0):
    """Loss, gradient and predictions against plain formulas in float64, but for the gradient's rounding."""
    exact = logits.detach().double().requires_grad_()
    expected = plain_loss_of_the_rest(exact, labels) if ignored else plain_loss(exact, labels)
    (expected * scale).backward()
    loss, cross_entropy, predictions = segmentation_loss(logits, labels, ignored)
    (loss * scale).backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == logits.dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    expected = F.cross_entropy(exact, labels.long(), ignore_index=0 if ignored else -100)
    torch.testing.assert_close(cross_entropy.double(), expected, rtol=1e-6, atol=0)
    rounding = max(torch.finfo(logits.dtype).eps, 1e-5)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=rounding, atol=1e-7)
    assert torch.equal(predictions, logits.argmax(1)) and predictions.dtype == torch.uint8


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_is_cross_entropy_and_soft_dice_with_their_gradient(dtype, memory_format):
    check(*make_logits(dtype, memory_format))


def test_ignored_background_teaches_nothing_and_the_rest_as_if_it_were_alone():
    check(*make_logits(), ignored=True)
    logits, labels = make_logits()
    loss, cross_entropy, _ = segmentation_loss(logits, labels * 0, ignore_background=True)  # no rest
    loss.backward()
    assert loss.isfinite() and cross_entropy == 0 and not logits.grad.any()


def test_classes_that_a_batch_has_not_leave_its_dice_alone():
    logits, labels = make_logits()
    with torch.no_grad():
        logits[:, 7] = -300  # no pixel has any probability of it
    check(logits, labels % 3)


def test_the_loss_scale_of_fp16_is_applied_before_the_gradient_is_rounded():
    """A pixel's gradient of 1e-9 is zero in float16; times 2**16 it is not."""
    logits, labels = make_logits(torch.float16)
    check(logits, labels, scale=1e-6 * 2**16)
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


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (37, 21)])
def test_stretched_logits_are_scored_as_interpolation_argmax_and_cross_entropy_do(size, ignored):
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 8, 8), torch.randint(20, size, dtype=torch.uint8)
    predictions, loss = score_stretched(logits, size, labels, ignored)
    stretched = F.interpolate(logits.double()[None], size=size, mode="bilinear", align_corners=False)
    assert torch.equal(predictions.long(), stretched[0].argmax(0))
    expected = F.cross_entropy(stretched, labels.long()[None], ignore_index=0 if ignored else -100)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert torch.equal(score_stretched(logits, size)[0], predictions)


@pytest.mark.parametrize("predictions", [
    torch.zeros(1, 20, 4, 4), torch.zeros(1, 4, 4), torch.zeros((1, 4, 5), dtype=torch.int64),
])
def test_logits_or_shapes_that_do_not_fit_are_refused(predictions):
    with pytest.raises(ValueError, match="argmax"):
        SegmentationMetrics(20).update(predictions, torch.zeros((1, 4, 4), dtype=torch.int64))
