"""`LoadedModel`, the result of every format's `load`, and the steps that formats share on the way to it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from batchjob.errors import InvalidJob
from batchjob.models.weights import hash_state_dict
from batchjob.preprocessing.settings import Preprocess

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "LoadedModel",
    "describe_random_weights",
    "detect_input_kind",
    "has_lazy_weights",
    "isolated_torch_state",
    "prepare_for_inference",
]


@dataclass(frozen=True)
class LoadedModel:
    """Model in memory, ready for inference, with the facts that its file or its format states.

    A format is one file with one frozen settings class, listed in the union `AnyModel` of job/job.py. Its fields are
    what the job file may say under `model`. Besides them it has three members; `reader` reads any URI, and `folder`
    is that of the job file. Example:

        class LinearModel(Settings):
            type: Literal["linear"] = "linear"

            @property
            def title(self) -> str:  # name in the column `model_id`, before the digest
                return "linear"

            def check(self, reader: Reader, folder: Path) -> None:  # before the run: cheap, and without torch
                pass

            def load(self, reader: Reader, folder: Path) -> LoadedModel:  # in each worker
                from torch import nn

                with isolated_torch_state():
                    module = prepare_for_inference(nn.Linear(3, 2), "model")
                return LoadedModel(module, preprocess=None, labels=None, digest=hash_state_dict(module))

    Attributes:
        module: Module in eval mode, on the CPU, without gradients.
        preprocess: Preprocessing that the weights were trained with; None if the job must state all of it.
        labels: Class names by class id; None if the weights bring none.
        digest: Hexadecimal SHA-256 of the weights, and of the user's source files if there are some.
        input_kind: Argument of the module: `batch`, one tensor `[n, c, h, w]`, or `list`, `n` images `[c, h, w]` that
            may differ in size.
        eager: True for an ordinary module, which may be moved, run under autocast, compiled and quantised. False for a
            graph or a session of another runtime, which runs exactly as it was saved.
        devices: Device types it runs on (`cpu`, `cuda`); None for all.
        batch_size: Only batch size it accepts, in images; shorter batches are padded to it. None for any.
        output_operation: Operation that makes the output, such as `Softmax`, if the model's file says it.
        class_layers: Names, within `module`, of the layers that turn features into class scores; empty if the format
            does not know them.
        gives_features: Reason why the output is features and no class scores ("ViTModel has no classification head");
            None if it may be class scores.
        transform: Function from an image to the module's input, where the model brings it as an object; it is then
            used in place of the one that `preprocess.transform` names. None for all others.
        notes: Sentences about how it was loaded, for the log of the run, `validate` and the report.
    """

    module: nn.Module
    preprocess: Preprocess | None
    labels: tuple[str, ...] | None
    digest: str
    input_kind: Literal["batch", "list"] = "batch"
    eager: bool = True
    devices: tuple[str, ...] | None = None
    batch_size: int | None = None
    output_operation: str | None = None
    class_layers: tuple[str, ...] = ()
    gives_features: str | None = None
    transform: Callable[[Any], Any] | None = None
    notes: tuple[str, ...] = ()

    def materialize(self, run: Callable[[nn.Module], object]) -> LoadedModel:
        """Return the model with weights in its lazy layers, the same ones in every process.

        Args:
            run: Runs the module on example images, from which the layers learn their sizes.
        """
        if not has_lazy_weights(self.module):
            return self
        with isolated_torch_state():
            run(self.module)
        self.module.requires_grad_(False)
        digest = hashlib.sha256(f"{self.digest} {hash_state_dict(self.module)}".encode()).hexdigest()
        return replace(self, digest=digest)


def has_lazy_weights(module: nn.Module) -> bool:
    """Return True if weights of the module get their shape from its first input (`nn.LazyLinear`)."""
    from torch.nn.parameter import is_lazy

    return any(is_lazy(weight) for weight in chain(module.parameters(), module.buffers()))


@contextmanager
def isolated_torch_state(seed: int = 0) -> Iterator[None]:
    """Context in which a model is built alike in every process: fixed seed, float32, on the CPU, no inference mode.

    Afterwards torch's global state is restored, whatever the user's code has set inside.

    Args:
        seed: Seed of the CPU generator, so that random layers come out alike in every worker.
    """
    import torch

    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed, which also reseeds every accelerator.
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(grad)


def describe_random_weights(seed: int | None) -> tuple[str, ...]:
    """Return the note on a model with random weights; none if the job gives no seed."""
    return () if seed is None else (f"weights: random (model.seed: {seed}); its predictions mean nothing",)


def prepare_for_inference(module: nn.Module, where: str) -> nn.Module:
    """Move a module to the CPU, in eval mode, without gradients.

    Args:
        module: Module with its weights.
        where: Job key, the start of the error message.

    Raises:
        InvalidJob: Its parameters hold no data (device "meta").
    """
    try:
        module = module.to("cpu").eval()
        # Lazy weights refuse it until `materialize` has given them their values.
        return module if has_lazy_weights(module) else module.requires_grad_(False)
    except (NotImplementedError, RuntimeError) as error:
        raise InvalidJob(f"{where}: the module cannot be brought to the CPU ({error}); return one with data") from error


def detect_input_kind(module: nn.Module) -> Literal["batch", "list"]:
    """Detect the argument of a module: torchvision's detectors take a list of images of any size, others a batch."""
    from torchvision.models import detection

    detectors = (detection.FasterRCNN, detection.FCOS, detection.RetinaNet, detection.ssd.SSD)
    return "list" if isinstance(module, detectors) else "batch"
