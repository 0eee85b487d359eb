"""`type: embedding`: the output of the model, or of a layer in it, as one vector of float32 a row."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.preprocessing.geometry import ImageGeometry
from batchjob.tasks.postprocess import (
    EXAMPLE_ROWS,
    Postprocess,
    check_row_shape,
    finite_mask,
    nonfinite_errors,
    require_float_output,
)
from batchjob.tasks.settings import TaskSettings
from batchjob.types import ErrorRecord

if TYPE_CHECKING:
    import torch
    from torch import nn

    from batchjob.storage.reader import Reader

__all__ = ["EmbeddingTask"]

_USUAL_DIMENSIONS = 4096
_WANTED = "an embedding is one vector for each image, [n, d] (or [n, c, 1, 1])"
_ADVICE = "name another layer under task.layer, or wrap the model so that it returns [n, d] (model.type: python)"


class EmbeddingTask(TaskSettings):
    """A vector for each image.

    Attributes:
        layer: whose output, as `named_modules()` calls it (`avgpool`, `encoder.ln`); the model's own where not given.
        normalize: True scales each vector to length 1.
        allow_nan: True keeps vectors with NaN or infinity in them; else they are error rows.
    """

    type: Literal["embedding"] = "embedding"
    layer: str | None = Field(default=None, min_length=1)
    normalize: bool = False
    allow_nan: bool = False

    @property
    def row_bytes(self) -> int:
        """What a vector of the usual 4096 numbers at most takes; the model is not known yet."""
        return 4 * _USUAL_DIMENSIONS

    def adapt(self, module: nn.Module) -> nn.Module:
        """The module, giving out what its `layer` gives. Raises InvalidJob (no such layer: the nearest names)."""
        if self.layer is None:
            return module
        layers = dict(module.named_modules())
        if self.layer not in layers:
            names = [name for name in layers if name]
            near = difflib.get_close_matches(self.layer, names, n=4, cutoff=0.5)
            top = [name for name, _ in module.named_children()]
            hint = f"did you mean {' or '.join(near)}?" if near else f"at the top it has {', '.join(top[:20])}"
            raise InvalidJob(f"task.layer: the model has no layer {self.layer!r}; {hint}")
        return _layer_output(module, layers[self.layer], self.layer)

    def build_postprocess(self, output: Any, labels: tuple[str, ...] | None, reader: Reader, base: Path) -> Postprocess:  # noqa: ARG002
        """Looks at one output of the adapted model before work starts.

        Args:
            output: what it gave for `EXAMPLE_ROWS` images.
            labels: of no use here.
            reader: likewise.
            base: likewise.

        Raises:
            InvalidJob: the output is not a vector for each image.
        """
        source = f"task.layer {self.layer}" if self.layer else "the model"
        vectors = require_float_output(output, _WANTED, _ADVICE)
        shape = list(vectors.shape)
        if vectors.ndim == 4 and shape[2:] == [1, 1]:
            return _EmbeddingPostprocess(tuple(shape[1:]), self.normalize, self.allow_nan)
        if vectors.ndim == 2 and shape[1] > 0:
            return _EmbeddingPostprocess(tuple(shape[1:]), self.normalize, self.allow_nan)
        hint = {
            3: "these look like tokens [n, t, d]: pool them or pick one; ",
            4: "this is a feature map [n, c, h, w]: take the pooling layer behind it; ",
        }.get(vectors.ndim, "")
        raise InvalidJob(f"{source} gives {shape} for {EXAMPLE_ROWS} images, but {_WANTED}; {hint}{_ADVICE}")


def _layer_output(module: nn.Module, layer: nn.Module, name: str) -> nn.Module:
    import torch

    class LayerOutput(torch.nn.Module):
        """Runs the whole of `module` and returns what one layer in it gave, the last time if it ran more than once."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module
            self.kept: Any = None
            layer.register_forward_hook(self._keep)

        def _keep(self, _layer: nn.Module, _inputs: Any, output: Any) -> None:
            # A copy: what follows may well write over it (ReLU in place).
            self.kept = output.clone() if isinstance(output, torch.Tensor) else output

        def forward(self, *inputs: Any) -> Any:
            self.kept = None
            self.module(*inputs)
            output, self.kept = self.kept, None
            if output is None:
                raise InvalidJob(f"task.layer: {name} does not run when the model does; name one that it calls")
            return output

    return LayerOutput().eval()


@dataclass(frozen=True)
class _EmbeddingPostprocess:
    shape: tuple[int, ...]
    normalize: bool
    allow_nan: bool
    truth_columns: tuple[str, ...] = ()

    @property
    def dimensions(self) -> int:
        return self.shape[0]

    @property
    def fields(self) -> list[pa.Field]:
        return [pa.field("embedding", pa.list_(pa.float32(), self.dimensions))]

    def on_device(self, output: torch.Tensor) -> dict[str, torch.Tensor]:
        """`embedding` float32 `[n, d]` and `finite` bool `[n]`."""
        import torch

        check_row_shape(output, self.shape)
        vectors = output.flatten(1).float()
        finite = vectors.isfinite().all(dim=1)
        if self.normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=1)
        return {"embedding": vectors, "finite": finite}

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:  # noqa: ARG002
        flat = pa.array(tensors["embedding"].contiguous().view(-1).numpy())
        absent = None if self.allow_nan else pa.array(~finite_mask(tensors))
        return [pa.FixedSizeListArray.from_arrays(flat, self.dimensions, mask=absent)]

    def find_errors(self, tensors: dict[str, torch.Tensor]) -> list[ErrorRecord | None]:
        return nonfinite_errors(tensors, self.allow_nan)

    def sum_metrics(self, rows: pa.RecordBatch) -> dict[str, float]:  # noqa: ARG002
        return {}
