"""Differences between two fingerprints, as a user reads them when an output belongs to another job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchjob.job.fingerprint import compute_fingerprint, diff_fingerprints, select_deciding_fields
from batchjob.job.job import Job

LONG = "s3://models/" + "a" * 80


@pytest.mark.parametrize(
    ("there", "here", "lines"),
    [
        ({"task": {"top_k": 5}}, {"task": {"top_k": 3}}, ["task.top_k: 5 there, 3 here"]),
        ({"task": {"top_k": 5}}, {}, ["task.top_k: 5 there, not set here"]),
        ({}, {"task": {"top_k": 5}}, ["task.top_k: not set there, 5 here"]),
        # Values other than text are written as in JSON and YAML.
        ({"a": None}, {"a": True}, ["a: null there, true here"]),
        ({"a": None}, {}, ["a: null there, not set here"]),
        ({"a": [256, 256]}, {"a": ["é", 0.5]}, ['a: [256, 256] there, ["é", 0.5] here']),
        # Lists are compared as a whole, mappings key by key.
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 1, "d": 3}}}, ["a.b.d: 2 there, 3 here"]),
        ({"a": {"b": 1}}, {"a": 1}, ["a.b: 1 there, not set here", "a: not set there, 1 here"]),
        # An empty mapping that is set is a value.
        ({"a": {}}, {}, ["a: {} there, not set here"]),
        ({"a": {}}, {"a": {"b": 1}}, ["a: {} there, not set here", "a.b: not set there, 1 here"]),
        # The order of keys makes no difference; the lines come in the order of the plan, then of the job.
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, []),
        (
            {"b": 1, "a": 1},
            {"c": 2, "a": 2, "b": 2},
            ["b: 1 there, 2 here", "a: 1 there, 2 here", "c: not set there, 2 here"],
        ),
    ],
)
def test_each_key_that_differs_is_one_line(there: dict[str, Any], here: dict[str, Any], lines: list[str]) -> None:
    assert diff_fingerprints(there, here) == lines


def test_long_values_are_cut_to_80_characters() -> None:
    (line,) = diff_fingerprints({"model": {"weights": LONG}}, {"model": {"weights": "V1"}})
    assert line == f"model.weights: {LONG[:79]}… there, V1 here"


def test_value_of_80_characters_is_not_cut() -> None:
    value = "x" * 80
    assert diff_fingerprints({"a": value}, {}) == [f"a: {value} there, not set here"]


@pytest.mark.parametrize(
    ("there", "here", "line"),
    [
        # 30 characters before the first difference are shown.
        (f"{LONG}/v1.pth", f"{LONG}/v2.pth", f"a: …{'a' * 28}/v1.pth there, …{'a' * 28}/v2.pth here"),
        (LONG, f"{LONG}.pth", f"a: …{'a' * 30} there, …{'a' * 30}.pth here"),
        (f"{LONG}1{LONG}", f"{LONG}2{LONG}", f"a: …{'a' * 30}1{LONG[:47]}… there, …{'a' * 30}2{LONG[:47]}… here"),
    ],
    ids=["end", "longer", "middle"],
)
def test_long_values_with_the_same_beginning_are_shown_where_they_differ(there: str, here: str, line: str) -> None:
    assert diff_fingerprints({"a": there}, {"a": here}) == [line]


@pytest.mark.parametrize(
    ("section", "fields", "deciding"),
    [
        ("runtime", {"precision": "bf16", "workers": 4, "batch_size": 8}, {"precision": "bf16"}),
        ("runtime", {"half_weights": True, "quantize": "int8"}, {"half_weights": True, "quantize": "int8"}),
        ("input", {"uri": "images/", "require": {"min_images": 3}}, {"uri": "images/"}),
        ("model", {"type": "pickle", "trust": True, "sha256": "0"}, {"type": "pickle"}),
        # Only the section that knows such a field ignores it.
        ("task", {"trust": True, "require": 1}, {"trust": True, "require": 1}),
    ],
)
def test_fields_that_do_not_decide_the_predictions_are_left_out(
    section: str, fields: dict[str, Any], deciding: dict[str, Any]
) -> None:
    assert select_deciding_fields(section, fields) == deciding


def test_sections_without_a_deciding_field_are_left_out() -> None:
    document = {"model": {"name": "x"}, "runtime": {"workers": 4}, "preprocess": None, "output": {"uri": "out"}}
    assert compute_fingerprint(document) == {"model": {"name": "x"}}


@pytest.mark.parametrize(
    "model",
    [
        {"type": "timm", "name": "resnet18", "pretrained": True},
        {"type": "timm", "name": "resnet18", "seed": 1},
        {"type": "timm", "name": "resnet18", "weights": "net.pth"},
        {"type": "torchvision", "name": "resnet18", "seed": 1},
        {"type": "torchvision", "name": "resnet18", "weights": "DEFAULT"},
        {"type": "checkpoint", "architecture": "resnet18", "weights": "net.pth"},
        {"type": "python", "target": "net:build"},
        {"type": "huggingface", "model": "owner/name"},
        {"type": "pickle", "weights": "net.pth"},
        {"type": "torchscript", "weights": "net.pt"},
        {"type": "exported", "weights": "net.pt2"},
        {"type": "onnx", "weights": "net.onnx"},
    ],
    ids=lambda model: "-".join(map(str, model.values())),
)
@pytest.mark.parametrize("task", ["classification", "detection", "embedding", "multilabel", "raw", "segmentation"])
@pytest.mark.parametrize("kind", ["prefix", "manifest"])
def test_plans_of_the_oldest_versions_fit_every_job(model: dict[str, Any], task: str, kind: str) -> None:
    source = {"type": kind, "uri": "in", **({"uri_column": "path"} if kind == "manifest" else {})}
    sections = {"input": source, "model": model, "task": {"type": task}, "output": {"uri": "out"}}
    job = Job.model_validate(sections | {"preprocess": {"resize": 8}}, context={"base": Path("/jobs")})
    assert job.with_defaults({}).fingerprint() == job.fingerprint()
