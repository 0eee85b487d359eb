"""Model under trial: the job's engine with one batch of the job's own images, already on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch

from batchjob.inference.autotune.trials import TrialModel
from batchjob.inference.engine import Engine
from batchjob.inference.example_images import random_pixels
from batchjob.inference.execution_config import ExecutionConfig
from batchjob.inference.forward import ForwardPass

__all__ = ["EngineTrialModel"]

# Different images in a batch; a larger batch repeats them.
_MAX_DISTINCT_IMAGES = 64


class EngineTrialModel(TrialModel):
    """Model of an engine, with a batch of the job's images.

    Args:
        engine: Engine with its model loaded.
        sample_locations: Locations of images; if none can be decoded, random pixels take their place.
        batch_size: Images in a call of the model; fewer images are repeated.
    """

    def __init__(self, engine: Engine, sample_locations: Sequence[str], batch_size: int) -> None:
        self._engine = engine
        self.batch_size, self.argmax_is_class = engine.model.batch_size or batch_size, engine.argmax_is_class
        self._images = self._load_batch(sample_locations)
        # With the job's own transform there is no normalisation, so the module gets these tensors themselves and may
        # write into them.
        self._copies_inputs = engine.preprocess.transform is not None

    def build(self, config: ExecutionConfig) -> Callable[[], Any]:
        """Prepare the model for a config, and the inputs too, so that only the forward pass is timed."""
        forward, _ = self.build_forward(config), self._inputs
        return partial(self.run, forward)

    def build_forward(self, config: ExecutionConfig) -> ForwardPass:
        """Build the forward pass of a config; quantisation is calibrated on these images."""
        is_batch = self._engine.model.input_kind == "batch"
        return self._engine.build_forward(config, torch.stack(self._images) if is_batch else None)

    def run(self, forward: ForwardPass) -> Any:
        """Return the output for the batch once it is complete."""
        with forward.disable_gradients():
            inputs = self._inputs
            if self._copies_inputs:
                inputs = [image.clone() for image in inputs] if isinstance(inputs, list) else inputs.clone()
            output = forward(inputs)
            if forward.device.type == "cuda":
                torch.cuda.synchronize(forward.device)
        return output

    @cached_property
    def _inputs(self) -> torch.Tensor | list[torch.Tensor]:
        """The batch on the device, as one tensor or as the list that the module takes."""
        engine = self._engine
        # Like real batches these are inference tensors.
        with engine.build_forward(engine.loaded_config).disable_gradients():
            if engine.model.input_kind == "batch":
                return torch.stack(self._images).to(engine.device)
            return [image.to(engine.device, copy=True) for image in self._images]

    def _load_batch(self, sample_locations: Sequence[str]) -> list[torch.Tensor]:
        engine, example, count = self._engine, self._engine.example_image, min(self.batch_size, _MAX_DISTINCT_IMAGES)
        images = (
            image
            for image in engine.load_images(sample_locations)
            if engine.model.input_kind == "list" or image.shape == example.shape
        )
        distinct = list(islice(images, count)) or list(random_pixels(example.shape, count, example.dtype))
        return [distinct[index % len(distinct)] for index in range(self.batch_size)]
