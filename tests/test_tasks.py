"""Tasks: model output to Arrow columns; and a sentence for output, labels and layers that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from pydantic import ValidationError
from torch import nn

from batchjob.errors import InvalidJob
from batchjob.storage.reader import Reader
from batchjob.tasks.classification import ClassificationTask
from batchjob.tasks.embedding import EmbeddingTask
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess
from batchjob.types import ErrorRecord

READER, BASE = Reader(), Path()
NAN, INF = float("nan"), float("inf")


def classification(classes: int = 3, own: tuple[str, ...] | None = None, **settings: Any) -> Postprocess:
    return ClassificationTask(**settings).build_postprocess(torch.zeros(EXAMPLE_ROWS, classes), own, READER, BASE)


def embedding(*shape: int, **settings: Any) -> Postprocess:
    return EmbeddingTask(**settings).build_postprocess(torch.zeros(EXAMPLE_ROWS, *shape), None, READER, BASE)


def rows(post: Postprocess, output: torch.Tensor, tmp_path: Path) -> list[dict[str, Any]]:
    """The rows as a reader sees them: through Parquet, in the declared schema."""
    tensors = {name: tensor.cpu() for name, tensor in post.on_device(output).items()}
    assert tensors["finite"].dtype is torch.bool
    assert {len(tensor) for tensor in tensors.values()} == {len(output)}
    arrays = post.columns(tensors, [])
    for array, field in zip(arrays, post.fields, strict=True):
        array.validate(full=True)
        assert (array.type, len(array), field.nullable) == (field.type, len(output), True)
    table = pa.Table.from_arrays(arrays, schema=pa.schema(post.fields))
    pq.write_table(table, tmp_path / "rows.parquet")
    read = pq.read_table(tmp_path / "rows.parquet")
    assert read.schema.equals(table.schema)
    found: list[dict[str, Any]] = read.to_pylist()
    return found


def faults(post: Postprocess, output: torch.Tensor) -> list[ErrorRecord | None]:
    return post.find_errors(post.on_device(output))


# --------------------------------------------------------------------------------------------------- classification


def test_the_k_likeliest_classes_are_those_of_plain_torch(tmp_path: Path) -> None:
    output = torch.randn(50, 7)
    labels = tuple("abcdefg")
    found = rows(classification(7, labels, top_k=3), output, tmp_path)
    scores, ids = output.softmax(1).topk(3)
    for row, want_ids, want_scores in zip(found, ids.tolist(), scores.tolist(), strict=True):
        assert [one["label_id"] for one in row["top_k"]] == want_ids
        assert [one["label"] for one in row["top_k"]] == [labels[number] for number in want_ids]
        assert [one["score"] for one in row["top_k"]] == pytest.approx(want_scores)
        assert (row["label_id"], row["label"], row["score"]) == tuple(row["top_k"][0].values())


def test_columns_are_the_same_whatever_is_known() -> None:
    one = pa.struct([pa.field("label_id", pa.int32()), pa.field("label", pa.string()), pa.field("score", pa.float32())])
    want = pa.schema({"label_id": pa.int32(), "label": pa.string(), "score": pa.float32(), "top_k": pa.list_(one)})
    assert pa.schema(classification().fields) == want
    assert pa.schema(classification(9, tuple("abcdefghi"), top_k=9, allow_nan=True).fields) == want


def test_without_any_labels_the_label_is_null(tmp_path: Path) -> None:
    (row,) = rows(classification(), torch.tensor([[0.0, 9.0, 0.0]]), tmp_path)
    assert (row["label_id"], row["label"]) == (1, None)
    assert row["top_k"][0]["label"] is None


def test_no_rows_are_fine(tmp_path: Path) -> None:
    assert rows(classification(), torch.zeros(0, 3), tmp_path) == []
    assert rows(embedding(3), torch.zeros(0, 3), tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_softmax_is_computed_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    output = torch.tensor([[1.0, 2.0, 3.0]], dtype=dtype)
    (row,) = rows(classification(), output, tmp_path)
    assert row["score"] == pytest.approx(float(output.float().softmax(1)[0, 2]), abs=1e-7)


def test_rows_that_are_not_finite_are_faults_and_null(tmp_path: Path) -> None:
    output = torch.tensor([[1.0, 2.0, 3.0], [NAN, 0.0, 0.0], [INF, 0.0, 0.0], [-INF, 5.0, 0.0]])
    post = classification(3, ("a", "b", "c"), top_k=2)
    found = rows(post, output, tmp_path)
    nulls = {"label_id": None, "label": None, "score": None, "top_k": None}
    assert [found[0]["label"], found[1], found[2], found[3]["label"]] == ["c", nulls, nulls, "b"]
    said = faults(post, output)
    assert [fault is None for fault in said] == [True, False, False, True]
    assert said[1] is not None
    assert (said[1].stage, said[1].type) == ("predict", "not_finite")
    assert "allow_nan" in said[1].message


def test_allowed_nan_is_a_score_and_no_class(tmp_path: Path) -> None:
    post = classification(3, allow_nan=True)
    output = torch.tensor([[NAN, 0.0, 0.0], [0.0, 0.0, 9.0]])
    first, second = rows(post, output, tmp_path)
    assert first["score"] != first["score"]
    assert (first["label_id"], first["top_k"], second["label_id"]) == (None, None, 2)
    assert faults(post, output) == [None, None]


LABEL_FILES = {
    "lines.txt": "tench\ngoldfish\nwhite shark\n",
    "windows.txt": "\ufefftench\r\ngoldfish\r\nwhite shark\r\n\r\n",
    "list.json": '["tench", "goldfish", "white shark"]',
    "ids.json": '{"1": "goldfish", "0": "tench", "2": "white shark"}',
    "keras.json": '{"0": ["n01", "tench"], "1": ["n02", "goldfish"], "2": ["n03", "white shark"]}',
    "class_to_idx.json": '{"goldfish": 1, "tench": 0, "white shark": 2}',
    "list without suffix": '  ["tench", "goldfish", "white shark"]',
}


@pytest.mark.parametrize("file", LABEL_FILES)
def test_labels_from_a_file(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(LABEL_FILES[file].encode())
    task = ClassificationTask(labels=str(tmp_path / file))
    task.check(READER, BASE)
    post = task.build_postprocess(torch.zeros(EXAMPLE_ROWS, 3), ("x", "y"), READER, BASE)
    found = rows(post, torch.eye(3), tmp_path)
    assert [row["label"] for row in found] == ["tench", "goldfish", "white shark"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[1, 2", "is not JSON"),
        (b"7", "holds a int"),
        (b'{"0": "a", "2": "c"}', "none for id 1"),
        (b'{"a": "x"}', "keys that are not ids"),
        (b'["a", {}]', "in place of a label"),
    ],
)
def test_label_files_that_are_none(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_bytes(content)
    with pytest.raises(InvalidJob) as caught:
        ClassificationTask(labels=str(tmp_path / "labels.json")).check(READER, BASE)
    assert said in caught.value.message
    assert str(tmp_path / "labels.json") in caught.value.message


def test_a_label_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"task\.labels: .*absent\.txt is not there"):
        ClassificationTask(labels=str(tmp_path / "absent.txt")).check(READER, BASE)


def test_labels_of_the_wrong_number_are_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"task\.labels has 2 labels, but the model gives 3 classes"):
        classification(3, labels=["a", "b"])
    with pytest.raises(InvalidJob, match="the weights name 4 labels, but the model gives 3 classes"):
        classification(3, tuple("abcd"))
    (tmp_path / "labels.json").write_text(json.dumps(["a"]))
    with pytest.raises(InvalidJob, match=r"labels\.json has 1 labels, but the model gives 3 classes"):
        classification(3, labels=str(tmp_path / "labels.json"))


def test_labels_are_text_and_digits_are_too() -> None:
    assert ClassificationTask(labels=[0, 1, "two"]).labels == ("0", "1", "two")
    with pytest.raises(ValidationError, match="valid string"):
        ClassificationTask(labels=[True, False])


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (torch.zeros(2, 3, 4, 4), "[2, 3, 4, 4]"),
        (torch.zeros(2), "[2]"),
        (torch.zeros(1, 3), "float32 [1, 3]"),
        (torch.zeros(()), "float32 []"),
        (torch.zeros(2, 3, dtype=torch.int64), "int64 [2, 3]"),
        (torch.zeros(2, 1), "says nothing"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), "a tuple of 2 (float32 [2, 3], float32 [2, 3])"),
        ({"out": torch.zeros(2, 3), "aux": None}, "a dict with the keys out, aux"),
        (None, "the model gives None"),
    ],
)
def test_output_that_is_no_row_of_logits_is_refused_with_its_shape(output: Any, said: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        ClassificationTask().build_postprocess(output, None, READER, BASE)
    assert said in caught.value.message
    assert "model.type: python" in caught.value.message


def test_more_classes_than_there_are_cannot_be_listed() -> None:
    with pytest.raises(InvalidJob, match=r"task\.top_k is 5, but the model knows 3 classes"):
        classification(3, top_k=5)
    with pytest.raises(ValidationError):
        ClassificationTask(top_k=0)


def test_rows_have_a_bound_before_the_model_is_known(tmp_path: Path) -> None:
    labels = [f"label number {n}" for n in range(10)]
    task = ClassificationTask(top_k=5, labels=labels)
    post = task.build_postprocess(torch.zeros(EXAMPLE_ROWS, 10), None, READER, BASE)
    columns = post.columns(post.on_device(torch.randn(1000, 10)), [])
    assert sum(column.nbytes for column in columns) / 1000 <= task.row_bytes < ClassificationTask(top_k=5).row_bytes
    assert EmbeddingTask().row_bytes >= 4 * 2048


# -------------------------------------------------------------------------------------------------------- embedding


def test_a_vector_a_row(tmp_path: Path) -> None:
    output = torch.randn(5, 8)
    found = rows(embedding(8), output, tmp_path)
    assert [row["embedding"] for row in found] == output.tolist()
    assert embedding(8).fields == [pa.field("embedding", pa.list_(pa.float32(), 8))]
    assert [row["embedding"] for row in rows(embedding(8, 1, 1), output.view(5, 8, 1, 1), tmp_path)] == output.tolist()
    strided = torch.randn(8, 5).t()
    assert [row["embedding"] for row in rows(embedding(8), strided, tmp_path)] == strided.tolist()


def test_normalized_vectors_have_length_one(tmp_path: Path) -> None:
    output = torch.cat([torch.randn(4, 8) * 100, torch.zeros(1, 8)])
    found = rows(embedding(8, normalize=True), output, tmp_path)
    vectors = torch.tensor([row["embedding"] for row in found])
    assert vectors.norm(dim=1).tolist() == pytest.approx([1, 1, 1, 1, 0])
    torch.testing.assert_close(vectors[:4], output[:4] / output[:4].norm(dim=1, keepdim=True))


@pytest.mark.parametrize("normalize", [False, True])
def test_vectors_that_are_not_finite(normalize: bool, tmp_path: Path) -> None:
    output = torch.tensor([[1.0, 2.0], [NAN, 1.0], [INF, 1.0], [3.0, 4.0]])
    post = embedding(2, normalize=normalize)
    assert [row["embedding"] is None for row in rows(post, output, tmp_path)] == [False, True, True, False]
    assert [fault is None for fault in faults(post, output)] == [True, False, False, True]
    lenient = embedding(2, normalize=normalize, allow_nan=True)
    assert all(row["embedding"] for row in rows(lenient, output, tmp_path))
    assert faults(lenient, output) == [None] * 4


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((5, 7), "tokens"),
        ((8, 4, 4), "pooling layer"),
        ((), "[2]"),
        ((0,), "[2, 0]"),
        ((1, 2, 3, 4), "[2, 1, 2, 3, 4]"),
    ],
)
def test_output_that_is_no_vector_is_refused_with_its_shape(shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        embedding(*shape)
    assert said in caught.value.message
    assert "task.layer" in caught.value.message
    with pytest.raises(InvalidJob, match="a tuple of 1"):
        EmbeddingTask().build_postprocess((torch.zeros(2, 3),), None, READER, BASE)


def resnet() -> nn.Module:
    torch.manual_seed(3)
    net: nn.Module = torchvision.models.resnet18()
    return net.eval().requires_grad_(False)


def test_a_named_layer_gives_what_the_truncated_model_gives(tmp_path: Path) -> None:
    x = torch.rand(2, 3, 64, 64)
    task = EmbeddingTask(layer="avgpool")
    net = resnet()
    want = nn.Sequential(*list(resnet().children())[:-1])(x).flatten(1)
    adapted = task.adapt(net)
    assert not any(part.training for part in adapted.modules())
    with torch.inference_mode():
        post = task.build_postprocess(adapted(x), None, READER, BASE)
        found = rows(post, adapted(x), tmp_path)
    torch.testing.assert_close(torch.tensor([row["embedding"] for row in found]), want)
    assert EmbeddingTask().adapt(net) is net


def test_the_model_itself_is_not_changed_by_looking_into_it() -> None:
    x = torch.rand(2, 3, 64, 64)
    net = resnet()
    want = net(x)
    EmbeddingTask(layer="layer4.1.bn2").adapt(net)(x)
    torch.testing.assert_close(net(x), want, rtol=0, atol=0)


def test_a_layer_is_seen_before_what_follows_writes_over_it() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    net[0].load_state_dict({"weight": -torch.eye(2), "bias": torch.zeros(2)})
    net.requires_grad_(False)
    assert EmbeddingTask(layer="0").adapt(net)(torch.ones(1, 2)).tolist() == [[-1.0, -1.0]]


def test_a_layer_is_seen_through_compile_and_copies() -> None:
    import copy

    net = EmbeddingTask(layer="0").adapt(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).requires_grad_(False))
    x = torch.rand(3, 2)
    torch.testing.assert_close(copy.deepcopy(net)(x), net(x))
    torch.testing.assert_close(torch.compile(net, backend="eager")(x), net(x))


def test_layers_that_are_not_there_or_never_run() -> None:
    with pytest.raises(InvalidJob, match=r"no layer 'avg_pool'; did you mean avgpool"):
        EmbeddingTask(layer="avg_pool").adapt(resnet())
    with pytest.raises(InvalidJob, match=r"no layer 'zzz'; at the top it has conv1, bn1"):
        EmbeddingTask(layer="zzz").adapt(resnet())

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(InvalidJob, match=r"task\.layer: unused does not run"):
        EmbeddingTask(layer="unused").adapt(Idle())(torch.ones(2, 2))
    with pytest.raises(ValidationError):
        EmbeddingTask(layer="")
