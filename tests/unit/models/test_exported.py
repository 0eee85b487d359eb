"""`type: exported`: programs of `torch.export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from batchjob.errors import InvalidJob
from batchjob.models.exported import ExportedModel
from batchjob.models.loaded_model import LoadedModel
from batchjob.storage.reader import Reader
from tests.support.saved_models import catch_load_error, make_net, make_pixels, repack_archive, with_trust

READER = Reader()
PIXELS = make_pixels(8)


def load(file: Path, **settings: Any) -> LoadedModel:
    return ExportedModel.model_validate(with_trust({"weights": str(file), **settings}, file)).load(READER, file.parent)


class MaskedPooling(nn.Module):
    """Module with two inputs and two outputs."""

    def forward(self, pixel_values: torch.Tensor, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        mean = pixel_values.mean((2, 3))
        return {"mean": mean if mask is None else mean * mask, "peak": pixel_values.amax((2, 3))}


class MeanPooling(nn.Module):
    """Module without weights, for pixels of any dtype."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3))


class DeviceConstant(nn.Module):
    """Module that creates a tensor on a device, which becomes a constant of the graph."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3)) + torch.arange(3, device=pixels.device)


def export_program(module: nn.Module, file: Path, *inputs: Any, shapes: Any = None, **keyword_inputs: Any) -> Path:
    torch.export.save(torch.export.export(module, inputs, keyword_inputs, dynamic_shapes=shapes), file)
    return file


def test_fixed_batch_size_is_reported(tmp_path: Path) -> None:
    fixed = load(export_program(make_net(tmp_path, 1), tmp_path / "net.pt2", make_pixels(6)))
    assert fixed.batch_size == 6
    free = load(
        export_program(MeanPooling(), tmp_path / "free.pt2", make_pixels(6), shapes=({0: torch.export.Dim.AUTO},))
    )
    assert free.batch_size is None


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    shapes = ({0: torch.export.Dim.AUTO},)
    module = load(export_program(make_net(tmp_path, 1), tmp_path / "net.pt2", PIXELS, shapes=shapes)).module
    with pytest.raises(InvalidJob, match=r"takes \[any, 3, 16, 16\] and got \[2, 3, 20, 16\]; correct preprocess"):
        module(torch.zeros(2, 3, 20, 16))


def test_keyword_input_and_named_output(tmp_path: Path) -> None:
    file = export_program(MaskedPooling(), tmp_path / "net.pt2", pixel_values=PIXELS)
    torch.testing.assert_close(load(file, output="peak").module(PIXELS), PIXELS.amax((2, 3)))
    with pytest.raises(InvalidJob, match="a dict with the keys 'mean', 'peak'"):
        load(file, output="logits").module(PIXELS)


@pytest.mark.parametrize(
    ("module", "inputs", "message"),
    [
        (MaskedPooling(), (PIXELS, torch.ones(8, 1)), "takes 2 inputs (pixel_values, mask), not one batch of images"),
        (MeanPooling(), (PIXELS.half(),), "takes torch.float16 pixels; export it with"),
        (nn.Linear(3, 2), (torch.ones(8, 3),), "takes [8, 3], not images [n, c, h, w]"),
        (nn.Sequential(nn.Dropout()).train(), (PIXELS,), "was exported in training mode (dropout is at work)"),
    ],
)
def test_program_that_does_not_take_images_is_refused(
    module: nn.Module, inputs: tuple[Any, ...], message: str, tmp_path: Path
) -> None:
    assert message in catch_load_error(load, export_program(module, tmp_path / "net.pt2", *inputs))


def test_broken_program_is_refused(tmp_path: Path) -> None:
    whole = export_program(MeanPooling(), tmp_path / "net.pt2", PIXELS)
    broken = repack_archive(whole, tmp_path / "broken.pt2", "models/model.json", lambda data: data[:50])
    assert "that this torch does not load" in catch_load_error(load, broken)


@pytest.mark.gpu
def test_program_moves_to_a_gpu_with_its_constants(tmp_path: Path) -> None:
    module = load(export_program(DeviceConstant(), tmp_path / "net.pt2", PIXELS)).module.to("cuda")
    torch.testing.assert_close(module(PIXELS.cuda()).cpu(), DeviceConstant()(PIXELS), rtol=0, atol=1e-6)
