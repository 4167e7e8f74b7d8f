"""metrics.py: each figure against hand-worked cases and a slow loop over pixels."""
import math

import pytest
import torch

from metrics import SegmentationMetrics, cross_entropy


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
    assert [perfect[name] for name in ("dice", "mean_dice", "mean_iou", "pixel_accuracy", "class_accuracy")] == [1] * 5
    nothing_to_score = compute([[[0, 0]]], [[[0, 0]]])
    assert nothing_to_score["dice"] == 1 and math.isnan(nothing_to_score["mean_iou"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_against_a_slow_loop(dtype):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(20, (3, 9, 11), generator=generator).to(dtype)
    predictions = torch.where(torch.rand(labels.shape, generator=generator) < 0.6, labels, (labels + 1) % 20).to(dtype)
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
    logits, labels = torch.randn(5, 4, 6, 6, generator=generator), torch.randint(4, (5, 6, 6), generator=generator)
    for sizes in ([5], [2, 3], [1, 1, 3]):
        totals = SegmentationMetrics(4)
        for part, truth in zip(logits.split(sizes), labels.split(sizes)):
            totals.update(part.argmax(1), truth, cross_entropy(part, truth))
        assert totals.compute()["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_cross_entropy_equals_torchs_on_four_dimensions(memory_format):
    logits = torch.randn(2, 20, 8, 8).contiguous(memory_format=memory_format)
    labels = torch.randint(20, (2, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(cross_entropy(logits, labels), torch.nn.functional.cross_entropy(logits, labels.long()))
    per_pixel = cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(per_pixel, torch.nn.functional.cross_entropy(logits, labels.long(), reduction="none"))
    assert cross_entropy(logits.bfloat16(), labels).dtype == torch.float32


@pytest.mark.parametrize("predictions", [torch.zeros(1, 20, 4, 4), torch.zeros(1, 4, 4), torch.zeros((1, 4, 5), dtype=torch.int64)])
def test_logits_or_shapes_that_do_not_fit_are_refused(predictions):
    with pytest.raises(ValueError, match="argmax"):
        SegmentationMetrics(20).update(predictions, torch.zeros((1, 4, 4), dtype=torch.int64))
