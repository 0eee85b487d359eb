"""Files by training scripts: types beside the tensors that only hold data are let through, code never runs."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import io
import os
import pathlib
import random
import sys
import types
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batchjob.errors import InvalidJob
from batchjob.models.checkpoint_reader import read_checkpoint

TENSORS = {"weight": torch.arange(4.0)}


def save(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


HARMLESS: dict[str, Any] = {
    "Namespace": argparse.Namespace(lr=0.1, nested=argparse.Namespace(path=Path("x"))),
    "SimpleNamespace": types.SimpleNamespace(a=1),
    "NumPy scalars": [np.float64(0.9), np.int64(3), np.bool_(True), np.float32(1), np.str_("x")],
    "NumPy arrays": {"mean": np.ones(3), "names": np.array(["a", "b"]), "rng": np.random.RandomState(1).get_state()},
    "NumPy types": [np.float32, np.dtype("float64")],
    "paths": [Path("/x"), pathlib.PurePosixPath("y"), pathlib.PureWindowsPath("z")],
    "dates": [datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), datetime.date(2024, 1, 1), datetime.timedelta(1)],
    "containers": [
        collections.defaultdict(list, a=[1]),
        collections.OrderedDict(b=2),
        collections.Counter("abc"),
        collections.deque([1, 2], maxlen=3),
        frozenset([1]),
        {1, 2},
        range(3),
        slice(1),
    ],
    "torch": [torch.Size([1, 2]), torch.float16, torch.device("cpu"), torch.__version__],
    "numbers": [decimal.Decimal("1.5"), 1j, 2**80, uuid.UUID(int=5)],
    "random state": {"python": random.getstate(), "torch": torch.get_rng_state()},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", HARMLESS)
def test_types_that_only_hold_data_are_let_through(name: str, legacy: bool) -> None:
    data = save({"model": TENSORS, "more": HARMLESS[name]}, _use_new_zipfile_serialization=not legacy)
    content = read_checkpoint(data, "model.weights: w.pth")
    assert torch.equal(content["model"]["weight"], TENSORS["weight"])


class _Config(dict[str, Any]):
    """Stand-in for a config that is a dict."""


class _Node:
    """Stand-in for a config that is an object with its content in `__dict__`."""


def test_classes_of_packages_that_are_not_installed_are_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, base in (
        ("omegaconf.dictconfig", "DictConfig", _Node),
        ("omegaconf.base", "ContainerMetadata", _Node),
        ("lightning.fabric.utilities.data", "AttributeDict", _Config),
        ("easydict", "EasyDict", _Config),
        ("mmengine.logging.history_buffer", "HistoryBuffer", _Node),
    ):
        made = types.ModuleType(module)
        config_class = type(name, (base,), {"__module__": module})
        setattr(made, name, config_class)
        parts = module.split(".")
        with monkeypatch.context() as patch:
            for depth in range(1, len(parts)):
                patch.setitem(sys.modules, ".".join(parts[:depth]), types.ModuleType("package"))
            patch.setitem(sys.modules, module, made)
            config = config_class()
            config.__dict__.update(_content={"lr": 0.1}, _metadata=None)
            if isinstance(config, dict):
                config["state_dict"] = TENSORS
            data = save({"model": TENSORS, "cfg": config})
        content = read_checkpoint(data, "model.weights: w.pth")
        assert torch.equal(content["model"]["weight"], TENSORS["weight"])
        if base is _Config:  # Weights in such a dict are found.
            assert torch.equal(content["cfg"]["state_dict"]["weight"], TENSORS["weight"])


def test_nothing_of_a_harmless_type_is_made() -> None:
    content = read_checkpoint(save({"model": TENSORS, "args": argparse.Namespace(lr=1)}), "w")
    assert not isinstance(content["args"], argparse.Namespace)
    assert not vars(type(content["args"])).get("__dict__")


class _Harmful:
    """Object that calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class _HarmfulState:
    """Object whose state is set by a function of the file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return argparse.Namespace, (), {"a": _Harmful(os.system, "touch marker")}


@pytest.mark.parametrize(
    ("harmful", "named"),
    [
        (_Harmful(os.system, "touch marker"), "posix.system"),
        (_Harmful(exec, "open('marker', 'w')"), "exec"),
        (_Harmful(eval, "open('marker', 'w')"), "eval"),
        (_Harmful(open, "marker", "w"), "io.open"),
        (_Harmful(Path.write_text, Path("marker"), "x"), "getattr"),
        (_Harmful(__import__, "antigravity"), "__import__"),
        (_HarmfulState(), "posix.system"),
        (argparse.Namespace(hook=_Harmful(os.system, "touch marker")), "posix.system"),
        (collections.defaultdict(os.getcwd), "posix.getcwd"),
        ({"np": np.ones(2), "more": [_Harmful(np.fromfile, "x")]}, "numpy.fromfile"),
        (_Harmful(np.load, "x.npy", None, True), "numpy.load"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_is_refused_beside_harmless_types(
    harmful: Any, named: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = save({"model": TENSORS, "args": argparse.Namespace(lr=1), "hook": harmful}, pickle_protocol=protocol)
    with pytest.raises(InvalidJob) as caught:
        read_checkpoint(data, "model.weights: w.pth")
    assert not (tmp_path / "marker").exists()
    assert "no code is loaded" in caught.value.message
    if protocol == 2:
        assert named in caught.value.message


class TrainConfig:
    """Class of the user's own script."""


def test_a_class_of_the_user_is_named_with_the_lines_that_rewrite_the_file() -> None:
    with pytest.raises(InvalidJob) as caught:
        read_checkpoint(save({"model": TENSORS, "config": TrainConfig(), "args": argparse.Namespace()}), "w.pth")
    assert f"{__name__}.TrainConfig) beside tensors: no code is loaded." in caught.value.message
    assert "file = torch.load(FILE, map_location='cpu', weights_only=False); torch.save(" in caught.value.message
    assert "Namespace" not in caught.value.message


def test_other_loads_of_this_process_stay_as_strict_as_before() -> None:
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(save({"model": TENSORS, "args": argparse.Namespace()}), "w.pth")
    assert set(torch.serialization.get_safe_globals()) == before
