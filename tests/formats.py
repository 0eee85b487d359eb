"""One small model with seeded weights, saved in every format: what a job says of it, and what a plain loop gives.

A new format is one builder in `FORMATS`; tests/test_format_contract.py then runs its whole suite over it.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from batchjob.models.huggingface_hub import silence_hub_libraries
from batchjob.models.torchvision_weights import find_weights_by_name

__all__ = ["FORMATS", "Built", "Format", "example", "net", "outputs", "trusted"]

SIDE = 16
NET = '''
"""The user's own module beside the job file."""

import torch
from torch import nn


class Net(nn.Module):
    """Batch norm and dropout show whether it is in eval mode."""

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


def seeded(seed):
    torch.manual_seed(seed)
    module = Net()
    nn.init.normal_(module.norm.running_mean)
    nn.init.uniform_(module.norm.running_var, 0.5, 2.0)
    return module.eval()


def ready(seed):
    return seeded(seed), {"resize": 18, "crop": 16, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
'''

Loop = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Built:
    """A model that was saved in some format.

    Attributes:
        settings: the `model` of a job, `weights` as a local path.
        base: the job's folder.
        loop: what plain PyTorch gives for pixels `[n, 3, h, w]`.
        file: the file of weights, where there is one.
        transform: what the format brings as preprocessing, from an RGB image to `[3, h, w]`; None where it brings none.
        side: height and width of the pixels it takes.
        tolerance: how far its output may be from the loop's.
        transform_tolerance: how far its input may be from what `transform` makes.
    """

    settings: dict[str, Any]
    base: Path
    loop: Loop
    file: Path | None = None
    transform: Callable[[Image.Image], torch.Tensor] | None = None
    side: int = SIDE
    tolerance: float = 1e-5
    transform_tolerance: float = 1e-5


@dataclass(frozen=True)
class Format:
    """How a model is saved in one format.

    Attributes:
        build: `(folder, seed)` to what was saved there.
        code: the file is code, which needs `trust` and `sha256`.
        missing: what this machine lacks to build it; empty where nothing is.
        seeds: how many different models it may be asked for; 1 where one takes long.
    """

    build: Callable[[Path, int], Built]
    code: bool = False
    missing: Callable[[], str] = field(default=lambda: "")
    seeds: int = 2


def trusted(settings: dict[str, Any], file: Path) -> dict[str, Any]:
    """The settings, with the trust that a file of code needs."""
    return {**settings, "trust": True, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def example(count: int, side: int = SIDE) -> torch.Tensor:
    """The same normalised pixels every time: `[count, 3, side, side]`."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(7))


def outputs(module: nn.Module, pixels: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
    """What a module gives for pixels, as the forward loop calls it: short batches of a fixed size are padded."""
    count = len(pixels)
    with torch.inference_mode():
        if batch_size is None:
            return torch.as_tensor(module(pixels))
        filled = pixels.new_zeros(-(-count // batch_size) * batch_size, *pixels.shape[1:])
        filled[:count] = pixels
        return torch.cat([module(part) for part in filled.split(batch_size)])[:count]


def net(folder: Path, seed: int) -> nn.Module:
    """The model of `net.py`, which is written into the folder; its class is `net.Net`."""
    with _beside(folder) as module:
        made: nn.Module = module.seeded(seed)
    return made


@contextmanager
def _beside(folder: Path) -> Iterator[ModuleType]:
    """`net`, as a training script in the folder would import it."""
    path = folder / "net.py"
    path.write_text(NET)
    spec = spec_from_file_location("net", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["net"] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["net"]


def _torchvision(folder: Path, seed: int) -> Built:
    torch.manual_seed(seed)
    module = torchvision.models.squeezenet1_1().eval()
    file = folder / find_weights_by_name("squeezenet1_1", "DEFAULT").file_name
    torch.save(module.state_dict(), file)
    preset = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.transforms()
    settings = {"type": "torchvision", "name": "squeezenet1_1", "weights": str(file)}
    return Built(settings, folder, module, file, lambda image: preset(pil_to_tensor(image)), side=64)


def _checkpoint(folder: Path, seed: int) -> Built:
    module, file = net(folder, seed), folder / "net.pth"
    torch.save({"state_dict": module.state_dict(), "epoch": 3}, file)
    return Built({"type": "checkpoint", "architecture": "net:net", "weights": str(file)}, folder, module, file)


def _safetensors(folder: Path, seed: int) -> Built:
    from safetensors.torch import save_file

    module, file = net(folder, seed), folder / "net.safetensors"
    save_file(module.state_dict(), file)
    return Built({"type": "checkpoint", "architecture": "net:net", "weights": str(file)}, folder, module, file)


def _python(folder: Path, seed: int) -> Built:
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
    settings = {"type": "python", "target": "net:ready", "arguments": {"seed": seed}}
    return Built(settings, folder, net(folder, seed), transform=transform)


def _pickle(folder: Path, seed: int) -> Built:
    file = folder / "net.pt"
    with _beside(folder) as beside:
        module = beside.seeded(seed)
        torch.save(module, file)
    return Built(trusted({"type": "pickle", "weights": str(file)}, file), folder, module, file)


def _traced(folder: Path, seed: int) -> Built:
    return _torchscript(folder, seed, lambda module: torch.jit.trace(module, example(2)))


def _scripted(folder: Path, seed: int) -> Built:
    return _torchscript(folder, seed, torch.jit.script)


def _torchscript(folder: Path, seed: int, convert: Callable[[nn.Module], Any]) -> Built:
    file = folder / "net.pt"
    with _beside(folder) as beside, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
        module = beside.seeded(seed)
        torch.jit.save(convert(module), file)
    return Built(trusted({"type": "torchscript", "weights": str(file)}, file), folder, module, file)


def _exported(folder: Path, seed: int) -> Built:
    module, file = net(folder, seed), folder / "net.pt2"
    torch.export.save(_program(module, dynamic=True), file)
    return Built(trusted({"type": "exported", "weights": str(file)}, file), folder, module, file)


def _exported_fixed(folder: Path, seed: int) -> Built:
    module, file = net(folder, seed), folder / "net.pt2"
    torch.export.save(_program(module, dynamic=False), file)
    return Built(trusted({"type": "exported", "weights": str(file)}, file), folder, module, file)


def _compiled(folder: Path, seed: int) -> Built:
    module, file = net(folder, seed), folder / "net.pt2"
    torch._inductor.aoti_compile_and_package(_program(module, dynamic=True), package_path=str(file))
    return Built(trusted({"type": "exported", "weights": str(file)}, file), folder, module, file)


def _program(module: nn.Module, *, dynamic: bool) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},) if dynamic else None
    return torch.export.export(module, (example(4),), dynamic_shapes=shapes)


def _timm(folder: Path, seed: int) -> Built:
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
    # timm resizes with Pillow: one grey level, of a deviation of 0.5.
    return Built(settings, folder, module, file, transform, side=64, transform_tolerance=0.0079)


def _huggingface(folder: Path, seed: int) -> Built:
    with silence_hub_libraries():
        import transformers

        torch.manual_seed(seed)
        sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}
        module: Any = transformers.ResNetForImageClassification(transformers.ResNetConfig(layer_type="basic", **sizes))
        module.eval()
        processor = transformers.ViTImageProcessor(size={"height": 24, "width": 20})
        module.save_pretrained(folder)
        processor.save_pretrained(folder)
    return Built(
        {"type": "huggingface", "model": str(folder)},
        folder,
        lambda pixels: module(pixel_values=pixels).logits,
        transform=lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0],
        side=32,
        transform_tolerance=0.0079,  # one grey level: it resizes plane by plane
    )


def _onnx(folder: Path, seed: int) -> Built:
    return _onnx_file(folder, seed, ({0: torch.export.Dim("batch")},))


def _onnx_fixed(folder: Path, seed: int) -> Built:
    return _onnx_file(folder, seed, None)


def _onnx_file(folder: Path, seed: int, shapes: Any) -> Built:
    module, file = net(folder, seed), folder / "net.onnx"
    program = torch.onnx.export(module, (example(4),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.save(str(file), external_data=False)
    return Built({"type": "onnx", "weights": str(file)}, folder, module, file)


def _compiler() -> str:
    return "" if shutil.which("g++") else "AOTInductor needs g++"


FORMATS: dict[str, Format] = {
    "torchvision": Format(_torchvision),
    "checkpoint-pth": Format(_checkpoint),
    "checkpoint-safetensors": Format(_safetensors),
    "python": Format(_python),
    "pickle": Format(_pickle, code=True),
    "torchscript-traced": Format(_traced, code=True),
    "torchscript-scripted": Format(_scripted, code=True),
    "exported": Format(_exported, code=True),
    "exported-fixed-batch": Format(_exported_fixed, code=True),
    "timm": Format(_timm),
    "huggingface": Format(_huggingface),
    "onnx": Format(_onnx),
    "onnx-fixed-batch": Format(_onnx_fixed),
    "exported-aoti": Format(_compiled, code=True, missing=_compiler, seeds=1),
}
