"""How near outputs are to the reference, and what is near enough for which recipe."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from batchjob.inference.execution_config import ExecutionConfig
from batchjob.inference.output_comparison import OutputComparison, compare_outputs

FP32, BF16, INT8 = ExecutionConfig(), ExecutionConfig(precision="bf16"), ExecutionConfig(quantize="int8-static")


def logits(rows: int = 64, classes: int = 10, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(3)) * scale


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_the_same_is_the_same_at_any_scale(scale: float) -> None:
    found = compare_outputs(logits(scale=scale), logits(scale=scale))
    assert found.deviation == 0
    assert found.cosine == pytest.approx(1, abs=1e-5)
    assert found.agreement == 1
    assert found.rejection(FP32) is None


def test_rounding_passes_for_fp32_and_half_precision_does_not() -> None:
    reference = logits()
    assert compare_outputs(reference, reference * (1 + 1e-6)).rejection(FP32) is None
    half = compare_outputs(reference, reference.to(torch.bfloat16))
    assert "deviates" in str(half.rejection(FP32))
    assert half.rejection(BF16) is None
    assert half.rejection(INT8) is None


def test_another_class_is_a_fault_unless_the_two_likeliest_are_level() -> None:
    reference = torch.tensor([[1.0, 0.5], [0.5, 1.0], [0.7, 0.7001]])
    level = reference.clone()
    level[2] = torch.tensor([0.7001, 0.7])
    assert compare_outputs(reference, level).agreement == 1
    wrong = reference.clone()
    wrong[0] = torch.tensor([0.75, 0.76])
    found = compare_outputs(reference, wrong)
    assert found.agreement == 0.5
    assert "agrees on 50.0%" in str(replace(found, deviation=0.0, cosine=1.0).rejection(BF16))


def test_what_is_not_a_number_is_far_away() -> None:
    reference = logits()
    broken = reference.clone()
    broken[0, 0] = torch.nan
    assert compare_outputs(reference, broken).rejection(BF16) is not None
    endless = reference.clone()
    endless[0, 0] = -torch.inf
    assert compare_outputs(endless, endless).rejection(FP32) is None, "a class ruled out, in both"


def test_dicts_and_tuples_are_compared_leaf_by_leaf() -> None:
    a, b = logits(), logits(classes=3)
    assert (
        compare_outputs(
            {"a": a, "n": torch.ones(2, dtype=torch.int64)}, {"a": a, "n": torch.zeros(2)[:2].long()}
        ).cosine
        > 0.99
    )
    assert compare_outputs((a, [b]), (a, [b + 1])).deviation > 0.1
    with pytest.raises(ValueError, match=r"gives \[\[64, 3\]\] for \[\[64, 10\]\]"):
        compare_outputs(a, b)


def boxes(*rows: tuple[float, float, float, float], score: float = 0.9) -> dict[str, torch.Tensor]:
    count = len(rows)
    return {
        "boxes": torch.tensor(rows).reshape(count, 4),
        "labels": torch.ones(count, dtype=torch.int64),
        "scores": torch.full((count,), score),
    }


def test_boxes_are_found_again_by_overlap_and_class() -> None:
    one, two = (0.0, 0.0, 10.0, 10.0), (20.0, 20.0, 40.0, 40.0)
    assert compare_outputs([boxes(one, two)], [boxes(two, one)]) == OutputComparison(0.0, 1.0, 1.0)
    assert compare_outputs([boxes(one, two)], [boxes(one)]).agreement == pytest.approx(2 / 3)
    assert compare_outputs([boxes(one)], [boxes()]).agreement == 0
    assert compare_outputs([boxes(one)], [boxes(one, two)]).agreement == pytest.approx(2 / 3), "one too many"
    assert compare_outputs([boxes(one, score=0.1)], [boxes()]).agreement == 0, "the likeliest count where none is sure"
    other = boxes(one)
    other["labels"] += 1
    assert compare_outputs([boxes(one)], [other]).agreement == 0


def test_classes_and_masks_are_compared_by_how_many_are_the_same() -> None:
    classes = torch.arange(10)
    assert compare_outputs(classes, classes.clone()).agreement == 1
    other = classes.clone()
    other[:3] = 99
    found = compare_outputs((logits(), classes), (logits(), other))
    assert found.agreement == pytest.approx(0.7)
    assert found.rejection(BF16) is not None
    with pytest.raises(ValueError, match="no tensor"):
        compare_outputs(["a"], ["a"])


def test_a_nan_in_any_place_counts() -> None:
    broken = logits()
    broken[0, 0] = torch.nan
    for reference, output in (((logits(), logits()), (logits(), broken)), ((logits(), logits()), (broken, logits()))):
        assert compare_outputs(reference, output).rejection(BF16) is not None
    assert compare_outputs(torch.tensor(1.0), torch.tensor(1.0)).deviation == 0


def test_numbers_that_are_no_classes_need_not_be_largest_at_the_same_place() -> None:
    reference, output = torch.tensor([[1.0, 0.97, -1.0]]), torch.tensor([[0.97, 1.0, -1.0]])
    assert compare_outputs(reference, output).agreement == 0
    assert compare_outputs(reference, output, argmax_is_class=False).agreement == 1
