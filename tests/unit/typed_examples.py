"""Programs of users as mypy sees them; `test_typed_examples.py` checks this file as a project of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

import batchjob
from batchjob import (
    CheckpointModel,
    ClassificationTask,
    DecodeSettings,
    DetectionTask,
    EmbeddingTask,
    ErrorBudget,
    ExportedModel,
    HuggingfaceModel,
    InvalidJob,
    Job,
    LoaderSettings,
    ManifestSource,
    MultilabelTask,
    OnnxModel,
    Output,
    Param,
    PickleModel,
    PrefixSource,
    Preprocess,
    PythonModel,
    PythonTask,
    RawTask,
    RegressionTask,
    Require,
    RunResult,
    Runtime,
    SegmentationTask,
    StorageOptions,
    Temporary,
    TensorrtModel,
    TimmModel,
    TorchScriptModel,
    TorchvisionModel,
    Workers,
)


def build(width: int = 3) -> nn.Module:
    return nn.Linear(width, 2)


def prepare(image: torch.Tensor) -> torch.Tensor:
    return image.float()


class Columns:
    fields: ClassVar = {"top": "int64"}

    def columns(self, output: torch.Tensor) -> dict[str, Any]:
        return {"top": output.argmax(1)}


smallest = Job(
    input=PrefixSource(uri="photos"),
    model=TorchvisionModel(name="resnet50", weights="DEFAULT"),
    task=ClassificationTask(),
    output=Output(uri="out"),
)
largest = Job(
    name="nightly",
    params={"day": Param(type="str", default="today")},
    input=ManifestSource(
        uri="s3://bucket/images.parquet", uri_column="image", passthrough=("camera",), require=Require(min_images=10)
    ),
    model=PythonModel(target=build, arguments={"width": 3}),
    preprocess=Preprocess(transform=prepare, transform_input="tensor"),
    task=PythonTask(target=Columns),
    runtime=Runtime(pool="local", workers=Workers(max=4), batch_size=32, loader=LoaderSettings(processes=2)),
    errors=ErrorBudget(max_rate=0.001, attempts=2),
    output=Output(uri="s3://bucket/out"),
    storage={"s3://": StorageOptions(region="eu-west-1")},
    decode=DecodeSettings(max_pixels=10_000_000),
)
models = [
    CheckpointModel(architecture=build, weights="net.pt"),
    CheckpointModel(architecture="resnet18", weights="net.pt", num_classes=3),
    PickleModel(weights="net.pt", trust=True),
    TorchScriptModel(weights="net.pt", trust=True),
    ExportedModel(weights="net.pt2", trust=True),
    OnnxModel(weights="net.onnx"),
    TensorrtModel(weights="net.ts", trust=True),
    TimmModel(name="vit_tiny_patch16_224", pretrained=True),
    HuggingfaceModel(model="google/vit-base-patch16-224"),
    PythonModel(target="net:build"),
]
tasks = [
    MultilabelTask(threshold=0.4),
    RegressionTask(outputs=("age",)),
    EmbeddingTask(),
    DetectionTask(),
    SegmentationTask(),
    RawTask(),
]
steps = Preprocess(resize=256, crop=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def run_nightly() -> RunResult:
    try:
        print(*batchjob.validate(largest), sep="\n")
        return batchjob.run(largest, progress=True).raise_for_status()
    except Temporary:
        return batchjob.run(largest, address="auto")
    except InvalidJob as error:
        raise SystemExit(error.exit_code) from error


def read_output(result: RunResult) -> Iterator[dict[str, Any]]:
    print(result.predicted, batchjob.status(largest).failed, batchjob.make_plan(smallest).images)
    print(result.table().count_rows(), largest.model.type, len(largest.fingerprint()))
    yield from result.errors()
    yield from batchjob.read_errors("s3://bucket/out")
    batchjob.retry(largest, progress=False)
    batchjob.discard(largest)
