"""`type: torchscript`: traced, scripted and frozen modules."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from batchjob.errors import describe_error
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.torchscript import TorchScriptModel
from batchjob.storage.reader import Reader
from tests.support.saved_models import (
    catch_load_error,
    make_net,
    make_pixels,
    repack_archive,
    run_in_batches,
    with_trust,
)

READER = Reader()
PIXELS = make_pixels(8)


def load(file: Path, **settings: Any) -> LoadedModel:
    return TorchScriptModel.model_validate(with_trust({"weights": str(file), **settings}, file)).load(
        READER, file.parent
    )


def save_torchscript(module: nn.Module, file: Path, *, freeze: bool = False) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
        script = (
            torch.jit.freeze(torch.jit.script(module)) if freeze else torch.jit.trace(module, PIXELS, check_trace=False)
        )
        torch.jit.save(script, file)
    return file


def test_loading_warns_that_torchscript_is_deprecated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load(save_torchscript(make_net(tmp_path, 1), tmp_path / "net.pt"))
    assert "torch.export replaces it" in caplog.text
    assert not loaded.eager


def test_frozen_archive_loads(tmp_path: Path) -> None:
    module = make_net(tmp_path, 1)
    loaded = load(save_torchscript(module, tmp_path / "net.pt", freeze=True)).module
    torch.testing.assert_close(run_in_batches(loaded, PIXELS), run_in_batches(module, PIXELS), rtol=0, atol=1e-6)


def test_trace_in_training_mode_is_refused(tmp_path: Path) -> None:
    file = save_torchscript(nn.Sequential(nn.Flatten(), nn.Dropout()).train(), tmp_path / "net.pt")
    assert "was traced in training mode (dropout is at work); call model.eval()" in catch_load_error(load, file)


def test_broken_archive_is_refused(tmp_path: Path) -> None:
    whole = save_torchscript(make_net(tmp_path, 1), tmp_path / "net.pt")
    broken = repack_archive(whole, tmp_path / "broken.pt", "/data.pkl", lambda data: data[:20])
    assert "that this torch does not load" in catch_load_error(load, broken)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is:FutureWarning")
def test_an_error_of_the_interpreter_is_told_by_its_cause(tmp_path: Path) -> None:
    model = load(save_torchscript(make_net(tmp_path, 1), tmp_path / "net.pt"))
    with pytest.raises(RuntimeError) as caught:
        model.module(torch.ones(2, 4, 8, 8))
    described = describe_error(caught.value)
    assert described.startswith("RuntimeError: ")
    assert "to have 3 channels, but got 4 channels instead" in described
    assert "interpreter" not in described


def test_an_error_of_the_interpreter_without_words_names_the_operation() -> None:
    lines = [
        "The following operation failed in the TorchScript interpreter.",
        "    input0 = torch._convolution(input, weight)",
        "             ~~~~~~~~~~~~~~~~~~ <--- HERE",
        "RuntimeError: ",
    ]
    described = describe_error(RuntimeError("\n".join(lines)))
    assert described.startswith("RuntimeError: it fails at input0 = torch._convolution(input, weight); ")
