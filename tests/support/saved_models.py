"""One small model with seeded weights, saved in every format, with its job settings and its reference output.

A new format is one entry in `FORMATS`; test_model_format_contract.py runs its whole suite over all entries.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from batchjob.errors import InvalidJob
from batchjob.models.huggingface_hub import silence_hub_libraries
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.torchvision_weights import find_weights_by_name

__all__ = [
    "FORMATS",
    "NET_SOURCE",
    "FormatCase",
    "SavedModel",
    "catch_load_error",
    "make_net",
    "make_pixels",
    "repack_archive",
    "run_in_batches",
    "with_trust",
]

SIDE = 16
NET_SOURCE = '''
"""The user's own module beside the job file."""

import torch
from torch import nn


class Net(nn.Module):
    """Network whose batch norm and dropout show if it is in eval mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, pixels):
        features = torch.relu(self.norm(self.conv(pixels)))
        return self.head(self.drop(features.mean(dim=(2, 3))))


def net():
    return Net()


def seeded_net(seed):
    torch.manual_seed(seed)
    module = Net()
    nn.init.normal_(module.norm.running_mean)
    nn.init.uniform_(module.norm.running_var, 0.5, 2.0)
    return module.eval()


def net_with_preprocessing(seed):
    return seeded_net(seed), {"resize": 18, "crop": 16, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
'''


@dataclass(frozen=True)
class SavedModel:
    """Model saved in one format.

    Attributes:
        settings: Section `model` of a job, with `weights` as a local path.
        folder: Folder of the job file.
        reference: Function that computes the expected output for pixels `[n, 3, h, w]`, in plain PyTorch.
        file: File of weights; None if there is none.
        transform: Expected preprocessing, from an RGB image to `[3, h, w]`; None if the format brings none.
        side: Height and width of the pixels it takes.
        tolerance: Largest allowed difference of its output from the reference.
        transform_tolerance: Largest allowed difference of its input from that of `transform`.
    """

    settings: dict[str, Any]
    folder: Path
    reference: Callable[[torch.Tensor], torch.Tensor]
    file: Path | None = None
    transform: Callable[[Image.Image], torch.Tensor] | None = None
    side: int = SIDE
    tolerance: float = 1e-5
    transform_tolerance: float = 1e-5


@dataclass(frozen=True)
class FormatCase:
    """One format of the contract suite.

    Attributes:
        save: Function of a folder and a seed that saves a model there.
        is_code: True if the file is code, which needs `trust` and `sha256`.
        missing_requirement: Function that names a program this machine lacks to save it; empty if it lacks none.
        seeds: Number of different models that may be saved; 1 for a format that takes long.
    """

    save: Callable[[Path, int], SavedModel]
    is_code: bool = False
    missing_requirement: Callable[[], str] = field(default=lambda: "")
    seeds: int = 2


def with_trust(settings: dict[str, Any], file: Path) -> dict[str, Any]:
    """Add the trust that a file of code needs to its settings."""
    return {**settings, "trust": True, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def make_pixels(count: int, side: int = SIDE) -> torch.Tensor:
    """Make normalised pixels `[count, 3, side, side]`, the same on every call."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(7))


def run_in_batches(module: nn.Module, pixels: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
    """Run a module on pixels; with a fixed batch size in batches, of which the last is padded."""
    count = len(pixels)
    with torch.inference_mode():
        if batch_size is None:
            return torch.as_tensor(module(pixels))
        padded = pixels.new_zeros(-(-count // batch_size) * batch_size, *pixels.shape[1:])
        padded[:count] = pixels
        return torch.cat([module(batch) for batch in padded.split(batch_size)])[:count]


def make_net(folder: Path, seed: int) -> nn.Module:
    """Write `net.py` into a folder and make its model, whose class is `net.Net`."""
    with _imported_net(folder) as net:
        module: nn.Module = net.seeded_net(seed)
    return module


def catch_load_error(load: Callable[..., LoadedModel], file: Path, **settings: Any) -> str:
    """Load a file that is refused, and return the message, which names the file or the job key."""
    with pytest.raises(InvalidJob) as caught:
        load(file, **settings)
    assert str(file) in caught.value.message or caught.value.message.startswith("model.")
    return caught.value.message


def repack_archive(source: Path, file: Path, suffix: str, change: Callable[[bytes], bytes]) -> Path:
    """Copy a zip archive, and change the members whose names end with a suffix."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith(suffix) else data)
    return file


@contextmanager
def _imported_net(folder: Path) -> Iterator[ModuleType]:
    """Context in which `import net` finds `net.py` of the folder, as for a training script there."""
    path = folder / "net.py"
    path.write_text(NET_SOURCE)
    spec = spec_from_file_location("net", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["net"] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["net"]


def _save_torchvision(folder: Path, seed: int) -> SavedModel:
    torch.manual_seed(seed)
    module = torchvision.models.squeezenet1_1().eval()
    file = folder / find_weights_by_name("squeezenet1_1", "DEFAULT").file_name
    torch.save(module.state_dict(), file)
    preset = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.transforms()
    settings = {"type": "torchvision", "name": "squeezenet1_1", "weights": str(file)}
    return SavedModel(settings, folder, module, file, lambda image: preset(pil_to_tensor(image)), side=64)


def _save_checkpoint(folder: Path, seed: int) -> SavedModel:
    module, file = make_net(folder, seed), folder / "net.pth"
    torch.save({"state_dict": module.state_dict(), "epoch": 3}, file)
    return SavedModel({"type": "checkpoint", "architecture": "net:net", "weights": str(file)}, folder, module, file)


def _save_safetensors(folder: Path, seed: int) -> SavedModel:
    from safetensors.torch import save_file

    module, file = make_net(folder, seed), folder / "net.safetensors"
    save_file(module.state_dict(), file)
    return SavedModel({"type": "checkpoint", "architecture": "net:net", "weights": str(file)}, folder, module, file)


def _save_python(folder: Path, seed: int) -> SavedModel:
    steps = torchvision.transforms
    transform = steps.Compose(
        [
            steps.PILToTensor(),
            steps.Resize(18, antialias=True),
            steps.CenterCrop(16),
            steps.ConvertImageDtype(torch.float32),
            steps.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.25]),
        ]
    )
    settings = {"type": "python", "target": "net:net_with_preprocessing", "arguments": {"seed": seed}}
    return SavedModel(settings, folder, make_net(folder, seed), transform=transform)


def _save_pickle(folder: Path, seed: int) -> SavedModel:
    file = folder / "net.pt"
    with _imported_net(folder) as net:
        module = net.seeded_net(seed)
        torch.save(module, file)
    return SavedModel(with_trust({"type": "pickle", "weights": str(file)}, file), folder, module, file)


def _save_traced_torchscript(folder: Path, seed: int) -> SavedModel:
    return _save_torchscript(folder, seed, lambda module: torch.jit.trace(module, make_pixels(2)))


def _save_scripted_torchscript(folder: Path, seed: int) -> SavedModel:
    return _save_torchscript(folder, seed, torch.jit.script)


def _save_torchscript(folder: Path, seed: int, convert: Callable[[nn.Module], Any]) -> SavedModel:
    file = folder / "net.pt"
    with _imported_net(folder) as net, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
        module = net.seeded_net(seed)
        torch.jit.save(convert(module), file)
    return SavedModel(with_trust({"type": "torchscript", "weights": str(file)}, file), folder, module, file)


def _save_exported(folder: Path, seed: int) -> SavedModel:
    module, file = make_net(folder, seed), folder / "net.pt2"
    torch.export.save(_export_program(module, dynamic=True), file)
    return SavedModel(with_trust({"type": "exported", "weights": str(file)}, file), folder, module, file)


def _save_exported_with_fixed_batch(folder: Path, seed: int) -> SavedModel:
    module, file = make_net(folder, seed), folder / "net.pt2"
    torch.export.save(_export_program(module, dynamic=False), file)
    return SavedModel(with_trust({"type": "exported", "weights": str(file)}, file), folder, module, file)


def _save_aoti_package(folder: Path, seed: int) -> SavedModel:
    module, file = make_net(folder, seed), folder / "net.pt2"
    torch._inductor.aoti_compile_and_package(_export_program(module, dynamic=True), package_path=str(file))
    return SavedModel(with_trust({"type": "exported", "weights": str(file)}, file), folder, module, file)


def _export_program(module: nn.Module, *, dynamic: bool) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},) if dynamic else None
    return torch.export.export(module, (make_pixels(4),), dynamic_shapes=shapes)


def _save_timm(folder: Path, seed: int) -> SavedModel:
    import timm
    from safetensors.torch import save_file
    from timm.data import config
    from timm.data.transforms_factory import create_transform

    torch.manual_seed(seed)
    module, file = timm.create_model("test_resnet.r160_in1k").eval(), folder / "model.safetensors"
    save_file(module.state_dict(), file)
    data: Any = config
    transform = create_transform(**data.resolve_model_data_config(module), is_training=False)
    settings = {"type": "timm", "name": "test_resnet.r160_in1k", "weights": str(file)}
    # timm resizes with Pillow, which may differ by one grey level: 1/255 divided by a deviation of 0.5.
    return SavedModel(settings, folder, module, file, transform, side=64, transform_tolerance=0.0079)


def _save_huggingface(folder: Path, seed: int) -> SavedModel:
    with silence_hub_libraries():
        import transformers

        torch.manual_seed(seed)
        sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}
        module: Any = transformers.ResNetForImageClassification(transformers.ResNetConfig(layer_type="basic", **sizes))
        module.eval()
        processor = transformers.ViTImageProcessor(size={"height": 24, "width": 20})
        module.save_pretrained(folder)
        processor.save_pretrained(folder)
    return SavedModel(
        {"type": "huggingface", "model": str(folder)},
        folder,
        lambda pixels: module(pixel_values=pixels).logits,
        transform=lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0],
        side=32,
        transform_tolerance=0.0079,  # one grey level, because it resizes plane by plane
    )


def _save_onnx(folder: Path, seed: int) -> SavedModel:
    return _save_onnx_file(folder, seed, ({0: torch.export.Dim("batch")},))


def _save_onnx_with_fixed_batch(folder: Path, seed: int) -> SavedModel:
    return _save_onnx_file(folder, seed, None)


def _save_onnx_file(folder: Path, seed: int, shapes: Any) -> SavedModel:
    module, file = make_net(folder, seed), folder / "net.onnx"
    program = torch.onnx.export(module, (make_pixels(4),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.save(str(file), external_data=False)
    return SavedModel({"type": "onnx", "weights": str(file)}, folder, module, file)


def _find_missing_compiler() -> str:
    return "" if shutil.which("g++") else "AOTInductor needs g++"


FORMATS: dict[str, FormatCase] = {
    "torchvision": FormatCase(_save_torchvision),
    "checkpoint-pth": FormatCase(_save_checkpoint),
    "checkpoint-safetensors": FormatCase(_save_safetensors),
    "python": FormatCase(_save_python),
    "pickle": FormatCase(_save_pickle, is_code=True),
    "torchscript-traced": FormatCase(_save_traced_torchscript, is_code=True),
    "torchscript-scripted": FormatCase(_save_scripted_torchscript, is_code=True),
    "exported": FormatCase(_save_exported, is_code=True),
    "exported-fixed-batch": FormatCase(_save_exported_with_fixed_batch, is_code=True),
    "timm": FormatCase(_save_timm),
    "huggingface": FormatCase(_save_huggingface),
    "onnx": FormatCase(_save_onnx),
    "onnx-fixed-batch": FormatCase(_save_onnx_with_fixed_batch),
    "exported-aoti": FormatCase(_save_aoti_package, is_code=True, missing_requirement=_find_missing_compiler, seeds=1),
}
