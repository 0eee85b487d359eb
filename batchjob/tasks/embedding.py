"""`type: embedding`: the features of the model, its output, or a layer's, as one float32 vector per row."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.settings import Decision
from batchjob.tasks.feature_layer import MODEL_OUTPUT, decide_layer, parse_left_out, remove_layers
from batchjob.tasks.list_columns import build_vector_column
from batchjob.tasks.model_output import check_row_shape, require_float_output
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess
from batchjob.tasks.settings import RunModel, TaskContext, TaskModel, TaskSettings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from batchjob.preprocessing.geometry import ImageGeometry

__all__ = ["EmbeddingTask"]

_TYPICAL_DIMENSIONS = 4096
_EXPECTED = "an embedding is one vector for each image, [n, d] (or [n, c, 1, 1])"
_ADVICE = "name another layer under task.layer, or wrap the model so that it returns [n, d] (model.type: python)"


class EmbeddingTask(TaskSettings):
    """A vector for each image.

    Attributes:
        layer: Layer whose output is taken, by its name in `named_modules()` (`avgpool`, `encoder.ln`). `auto` takes the
            features of a classifier, before the layer that turns them into class scores, where it is sure which one
            that is, else the model's output; `output` takes the model's output; `before:fc` leaves out the last layer,
            here `fc`.
        normalize: True scales each vector to length 1.
        allow_nan: True keeps vectors that hold NaN or infinity; else they are error rows.
    """

    type: Literal["embedding"] = "embedding"
    layer: str | None = Field(default="auto", min_length=1)
    normalize: bool = False
    allow_nan: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of a vector of 4096 numbers, a usual maximum: the model is not known yet."""
        return 4 * _TYPICAL_DIMENSIONS

    def decide(self, model: TaskModel, run_model: RunModel) -> dict[str, Decision]:
        """Choose the layer, if it is `auto` and no layer has that name. Raises InvalidJob if the model fails."""
        if self.layer != "auto" or "auto" in dict(model.module.named_modules()):
            return {}
        return {"layer": decide_layer(model, run_model)}

    def adapt(self, module: nn.Module) -> nn.Module:
        """Return a module whose output is that of `layer`.

        Raises:
            InvalidJob: If there is no such layer; the message has the nearest names.
        """
        layers = dict(module.named_modules())
        if self.layer is None:
            return module
        if self.layer in layers:
            return _wrap_layer_output(module, layers[self.layer], self.layer)
        if self.layer in {"auto", MODEL_OUTPUT}:
            return module
        left_out = parse_left_out(self.layer)
        for name in left_out or (self.layer,):
            if name not in layers:
                raise _missing_layer(name, module)
        return remove_layers(module, left_out)

    def build_postprocess(self, output: Any, context: TaskContext) -> Postprocess:  # noqa: ARG002
        """Build the postprocess; see `TaskSettings`. The output must be a vector for each image."""
        is_output = self.layer in {None, "auto", MODEL_OUTPUT}
        source = "the model" if is_output else f"task.layer {self.layer}"
        vectors = require_float_output(output, _EXPECTED, _ADVICE)
        shape = list(vectors.shape)
        if (vectors.ndim == 4 and shape[2:] == [1, 1]) or (vectors.ndim == 2 and shape[1] > 0):
            return _EmbeddingPostprocess(tuple(shape[1:]), self.normalize, self.allow_nan)
        hint = {
            3: "these look like tokens [n, t, d]: pool them or pick one; ",
            4: "this is a feature map [n, c, h, w]: take the pooling layer behind it; ",
        }.get(vectors.ndim, "")
        raise InvalidJob(f"{source} gives {shape} for {EXAMPLE_ROWS} images, but {_EXPECTED}; {hint}{_ADVICE}")


@dataclass(frozen=True)
class _EmbeddingPostprocess(Postprocess):
    row_shape: tuple[int, ...]
    normalize: bool
    allow_nan: bool

    @property
    def fields(self) -> list[pa.Field]:
        return [pa.field("embedding", pa.list_(pa.float32(), self.row_shape[0]))]

    def on_device(self, output: torch.Tensor) -> dict[str, torch.Tensor]:
        """Flatten the output to `embedding` float32 `[n, d]`, with `finite` bool `[n]`."""
        import torch

        check_row_shape(output, self.row_shape)
        vectors = output.flatten(1).float()
        finite = vectors.isfinite().all(dim=1)
        if self.normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=1)
        return {"embedding": vectors, "finite": finite}

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:  # noqa: ARG002
        return [build_vector_column(tensors["embedding"], self.null_rows(tensors))]


def _missing_layer(name: str, module: nn.Module) -> InvalidJob:
    names = [each for each, _ in module.named_modules() if each]
    matches = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    top = [each for each, _ in module.named_children()]
    hint = f"did you mean {' or '.join(matches)}?" if matches else f"at the top it has {', '.join(top[:20])}"
    return InvalidJob(f"task.layer: the model has no layer {name!r}; {hint}")


def _wrap_layer_output(module: nn.Module, layer: nn.Module, name: str) -> nn.Module:
    """Wrap a module so that it returns the output of one of its layers."""
    import torch

    class LayerOutput(torch.nn.Module):
        """Module that runs `module` and returns the output of a layer in it, of its last call if there are several."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module
            self.kept: Any = None
            layer.register_forward_hook(self._keep)

        def _keep(self, _layer: nn.Module, _inputs: Any, output: Any) -> None:
            # The next layer may write over the output (ReLU in place), so a copy is kept.
            self.kept = output.clone() if isinstance(output, torch.Tensor) else output

        def forward(self, *inputs: Any) -> Any:
            self.kept = None
            self.module(*inputs)
            output, self.kept = self.kept, None
            if output is None:
                raise InvalidJob(f"task.layer: {name} does not run when the model does; name one that it calls")
            return output

    return LayerOutput().eval()
