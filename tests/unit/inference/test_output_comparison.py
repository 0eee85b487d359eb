"""Comparison of outputs with a reference, and its limits for each execution config."""

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
def test_equal_outputs_agree_at_any_scale(scale: float) -> None:
    comparison = compare_outputs(logits(scale=scale), logits(scale=scale))
    assert comparison.deviation == 0
    assert comparison.cosine == pytest.approx(1, abs=1e-5)
    assert comparison.agreement == 1
    assert comparison.rejection(FP32) is None


def test_rounding_is_accepted_for_fp32_and_bf16_is_not() -> None:
    reference = logits()
    assert compare_outputs(reference, reference * (1 + 1e-6)).rejection(FP32) is None
    half = compare_outputs(reference, reference.to(torch.bfloat16))
    assert "deviates" in str(half.rejection(FP32))
    assert half.rejection(BF16) is None
    assert half.rejection(INT8) is None


def test_other_class_is_rejected_unless_two_classes_are_level() -> None:
    reference = torch.tensor([[1.0, 0.5], [0.5, 1.0], [0.7, 0.7001]])
    level = reference.clone()
    level[2] = torch.tensor([0.7001, 0.7])
    assert compare_outputs(reference, level).agreement == 1
    wrong = reference.clone()
    wrong[0] = torch.tensor([0.75, 0.76])
    comparison = compare_outputs(reference, wrong)
    assert comparison.agreement == 0.5
    assert "agrees on 50.0%" in str(replace(comparison, deviation=0.0, cosine=1.0).rejection(BF16))


def test_nan_is_rejected() -> None:
    reference = logits()
    broken = reference.clone()
    broken[0, 0] = torch.nan
    assert compare_outputs(reference, broken).rejection(BF16) is not None
    with_infinity = reference.clone()
    with_infinity[0, 0] = -torch.inf
    assert compare_outputs(with_infinity, with_infinity).rejection(FP32) is None, "a class excluded in both"


def test_nested_outputs_are_compared_tensor_by_tensor() -> None:
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


def test_boxes_are_matched_by_overlap_and_label() -> None:
    one, two = (0.0, 0.0, 10.0, 10.0), (20.0, 20.0, 40.0, 40.0)
    assert compare_outputs([boxes(one, two)], [boxes(two, one)]) == OutputComparison(0.0, 1.0, 1.0)
    assert compare_outputs([boxes(one, two)], [boxes(one)]).agreement == pytest.approx(2 / 3)
    assert compare_outputs([boxes(one)], [boxes()]).agreement == 0
    assert compare_outputs([boxes(one)], [boxes(one, two)]).agreement == pytest.approx(2 / 3), "one too many"
    assert compare_outputs([boxes(one, score=0.1)], [boxes()]).agreement == 0, (
        "the best boxes count even with low scores"
    )
    other = boxes(one)
    other["labels"] += 1
    assert compare_outputs([boxes(one)], [other]).agreement == 0


def test_integers_are_compared_by_share_of_equal_values() -> None:
    classes = torch.arange(10)
    assert compare_outputs(classes, classes.clone()).agreement == 1
    other = classes.clone()
    other[:3] = 99
    comparison = compare_outputs((logits(), classes), (logits(), other))
    assert comparison.agreement == pytest.approx(0.7)
    assert comparison.rejection(BF16) is not None
    with pytest.raises(ValueError, match="no tensor"):
        compare_outputs(["a"], ["a"])


def test_nan_in_any_tensor_is_rejected() -> None:
    broken = logits()
    broken[0, 0] = torch.nan
    for reference, output in (((logits(), logits()), (logits(), broken)), ((logits(), logits()), (broken, logits()))):
        assert compare_outputs(reference, output).rejection(BF16) is not None
    assert compare_outputs(torch.tensor(1.0), torch.tensor(1.0)).deviation == 0


def test_argmax_is_ignored_if_it_is_no_class() -> None:
    reference, output = torch.tensor([[1.0, 0.97, -1.0]]), torch.tensor([[0.97, 1.0, -1.0]])
    assert compare_outputs(reference, output).agreement == 0
    assert compare_outputs(reference, output, argmax_is_class=False).agreement == 1
