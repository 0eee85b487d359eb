"""Embeddings: one vector per row, from the model or from a layer in it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import torchvision
from torch import nn

from batchjob.errors import InvalidJob
from batchjob.storage.reader import Reader
from batchjob.tasks.embedding import EmbeddingTask
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess
from batchjob.tasks.settings import TaskContext
from tests.support.task_rows import build_rows, find_error_types

READER, BASE = Reader(), Path()
NAN, INF = float("nan"), float("inf")


def make_postprocess(*shape: int, **settings: Any) -> Postprocess:
    return EmbeddingTask(**settings).build_postprocess(
        torch.zeros(EXAMPLE_ROWS, *shape), TaskContext(None, READER, BASE)
    )


def test_each_row_has_its_vector() -> None:
    output = torch.randn(5, 8)
    rows = build_rows(make_postprocess(8), output)
    assert [row["embedding"] for row in rows] == output.tolist()
    assert make_postprocess(8).fields == [pa.field("embedding", pa.list_(pa.float32(), 8))]
    rows = build_rows(make_postprocess(8, 1, 1), output.view(5, 8, 1, 1))
    assert [row["embedding"] for row in rows] == output.tolist()
    strided = torch.randn(8, 5).t()
    assert [row["embedding"] for row in build_rows(make_postprocess(8), strided)] == strided.tolist()


def test_empty_batch_has_no_rows() -> None:
    assert build_rows(make_postprocess(3), torch.zeros(0, 3)) == []


def test_normalized_vectors_have_length_one() -> None:
    output = torch.cat([torch.randn(4, 8) * 100, torch.zeros(1, 8)])
    rows = build_rows(make_postprocess(8, normalize=True), output)
    vectors = torch.tensor([row["embedding"] for row in rows])
    assert vectors.norm(dim=1).tolist() == pytest.approx([1, 1, 1, 1, 0])
    torch.testing.assert_close(vectors[:4], output[:4] / output[:4].norm(dim=1, keepdim=True))


@pytest.mark.parametrize("normalize", [False, True])
def test_vectors_that_are_not_finite_are_errors_unless_allowed(normalize: bool) -> None:
    output = torch.tensor([[1.0, 2.0], [NAN, 1.0], [INF, 1.0], [3.0, 4.0]])
    postprocess = make_postprocess(2, normalize=normalize)
    assert [row["embedding"] is None for row in build_rows(postprocess, output)] == [False, True, True, False]
    assert [error is None for error in find_error_types(postprocess, output)] == [True, False, False, True]
    lenient = make_postprocess(2, normalize=normalize, allow_nan=True)
    assert all(row["embedding"] for row in build_rows(lenient, output))
    assert find_error_types(lenient, output) == [None] * 4


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((5, 7), "tokens"),
        ((8, 4, 4), "pooling layer"),
        ((), "[2]"),
        ((0,), "[2, 0]"),
        ((1, 2, 3, 4), "[2, 1, 2, 3, 4]"),
    ],
)
def test_output_other_than_vectors_is_refused_with_its_shape(shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        make_postprocess(*shape)
    assert text in caught.value.message
    assert "task.layer" in caught.value.message
    with pytest.raises(InvalidJob, match="a tuple of 1"):
        EmbeddingTask().build_postprocess((torch.zeros(2, 3),), TaskContext(None, READER, BASE))


def test_row_bytes_allow_2048_dimensions() -> None:
    assert EmbeddingTask().row_bytes >= 4 * 2048


def make_resnet() -> nn.Module:
    torch.manual_seed(3)
    net: nn.Module = torchvision.models.resnet18()
    return net.eval().requires_grad_(False)


def test_named_layer_matches_the_truncated_model() -> None:
    x = torch.rand(2, 3, 64, 64)
    task = EmbeddingTask(layer="avgpool")
    net = make_resnet()
    expected = nn.Sequential(*list(make_resnet().children())[:-1])(x).flatten(1)
    adapted = task.adapt(net)
    assert not any(part.training for part in adapted.modules())
    with torch.inference_mode():
        postprocess = task.build_postprocess(adapted(x), TaskContext(None, READER, BASE))
        rows = build_rows(postprocess, adapted(x))
    torch.testing.assert_close(torch.tensor([row["embedding"] for row in rows]), expected)
    assert EmbeddingTask().adapt(net) is net


def test_reading_a_layer_does_not_change_the_model() -> None:
    x = torch.rand(2, 3, 64, 64)
    net = make_resnet()
    expected = net(x)
    EmbeddingTask(layer="layer4.1.bn2").adapt(net)(x)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)


def test_layer_output_is_copied_before_an_in_place_layer() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    net[0].load_state_dict({"weight": -torch.eye(2), "bias": torch.zeros(2)})
    net.requires_grad_(False)
    assert EmbeddingTask(layer="0").adapt(net)(torch.ones(1, 2)).tolist() == [[-1.0, -1.0]]


def test_layer_output_survives_compile_and_deepcopy() -> None:
    net = EmbeddingTask(layer="0").adapt(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).requires_grad_(False))
    x = torch.rand(3, 2)
    torch.testing.assert_close(copy.deepcopy(net)(x), net(x))
    torch.testing.assert_close(torch.compile(net, backend="eager")(x), net(x))


def test_missing_and_unused_layers_are_refused() -> None:
    with pytest.raises(InvalidJob, match=r"no layer 'avg_pool'; did you mean avgpool"):
        EmbeddingTask(layer="avg_pool").adapt(make_resnet())
    with pytest.raises(InvalidJob, match=r"no layer 'zzz'; at the top it has conv1, bn1"):
        EmbeddingTask(layer="zzz").adapt(make_resnet())

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(InvalidJob, match=r"task\.layer: unused does not run"):
        EmbeddingTask(layer="unused").adapt(Idle())(torch.ones(2, 2))
    with pytest.raises(InvalidJob):
        EmbeddingTask(layer="")
