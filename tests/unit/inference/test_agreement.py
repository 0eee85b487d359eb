"""Agreement of two outputs: classes over all images, near ties apart, boxes and integers."""

from __future__ import annotations

import torch

from batchjob.inference.output_comparison import measure_agreement


def test_classes_are_counted_over_all_images_and_near_ties_apart() -> None:
    # All four rows have margins below 1 % of the largest output, which is what rounding may move.
    reference = torch.tensor([[1000.0, 1002.0, 998.0], [1000.0, 999.0, 990.0], [1000.0, 1000.0, 3.0], [5.0, 0.0, 1.0]])
    output = torch.tensor([[1002.0, 1000.0, 998.0], [1000.0, 999.0, 990.0], [1.0, 5.0, 3.0], [5.0, 0.0, 1.0]])
    agreement = measure_agreement(reference, output, argmax_is_class=True)
    assert agreement is not None
    assert (agreement.same, agreement.compared, agreement.undecided) == (2, 3, 1)
    assert agreement.describe() == "2 of 3 images keep their class (66.7%), 1 undecided (two classes nearly equal)"


def test_only_ties_give_no_share() -> None:
    agreement = measure_agreement(torch.ones(3, 4), torch.ones(3, 4), argmax_is_class=True)
    assert agreement is not None
    assert (agreement.share, agreement.undecided) == (None, 3)


def test_outputs_without_classes_have_no_agreement() -> None:
    assert measure_agreement(torch.rand(3, 4), torch.rand(3, 4), argmax_is_class=False) is None
    assert measure_agreement(torch.rand(3, 1), torch.rand(3, 1), argmax_is_class=True) is None
    assert measure_agreement(torch.rand(3, 4, 5, 5), torch.rand(3, 4, 5, 5), argmax_is_class=True) is None


def test_integers_and_boxes_are_counted() -> None:
    values = measure_agreement(
        {"mask": torch.tensor([[1, 2], [3, 4]])}, {"mask": torch.tensor([[1, 2], [3, 0]])}, argmax_is_class=True
    )
    assert values is not None
    assert (values.things, values.same, values.compared) == ("value", 3, 4)
    image = {"boxes": torch.tensor([[0.0, 0, 9, 9]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    boxes = measure_agreement([image, image], [image, none], argmax_is_class=True)
    assert boxes is not None
    assert boxes.describe() == "2 of 3 boxes are the same (66.7%)"
