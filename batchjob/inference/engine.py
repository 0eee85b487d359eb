"""Engine: a loaded model on its device, with the image transform before it and the task's postprocess behind it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from batchjob.errors import InvalidJob
from batchjob.inference.cpu_parallelism import is_stateful
from batchjob.inference.devices import (
    DeviceCapabilities,
    check_precision,
    get_device_capabilities,
    pick_device,
    pick_model_device,
)
from batchjob.inference.example_images import (
    contrasting_images,
    load_images,
    make_example_image,
    repeat_image,
    trim_output,
)
from batchjob.inference.execution_config import ExecutionConfig, requested_config
from batchjob.inference.forward import ForwardOptions, ForwardPass
from batchjob.inference.optimize import optimize
from batchjob.inference.predictor import Predictor
from batchjob.job.acceleration import Acceleration
from batchjob.job.job import AnyTask, Job
from batchjob.models.loaded_model import LoadedModel
from batchjob.preprocessing.normalize import Normalizer
from batchjob.preprocessing.settings import Preprocess, merge_preprocess
from batchjob.preprocessing.transforms import ImageTransform, ResizeCrop
from batchjob.settings import Decision
from batchjob.storage.reader import Reader
from batchjob.system import import_torchvision
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess
from batchjob.user_code import source_digest

__all__ = ["Engine"]

_TASK = "task"  # section of a job, the first part of a decision's name


class Engine:
    """Composition of all that lies between an encoded image and the tensors from which its row is made.

    Args:
        job: Job with paths as they are on this machine.
        reader: Reader of weights, labels and images.
        sample_locations: Locations of images, from which the model's input size is learnt if no setting fixes it.

    Attributes:
        model: Model as its format loaded it.
        device: Device on which the model runs.
        capabilities: Numeric formats that the device supports, and its name.
        preprocess: Preprocessing settings of the job, completed with those of the weights.
        image_transform: Callable from the bytes of an image to the pixels that go into a batch.
        example_image: One prepared image `[c, h, w]`.

    Raises:
        InvalidJob: Model, labels, preprocessing, precision or device do not fit together.
    """

    def __init__(self, job: Job, reader: Reader, sample_locations: Sequence[str]) -> None:
        self._job, self._reader = job, reader
        # A device that is not there is reported before the weights are read.
        pick_device(job.runtime.device)
        # The first import of torchvision decides how long it takes, so it comes before models, transforms and tasks.
        import_torchvision()
        self.model: LoadedModel = job.model.load(reader, job.folder)
        self.device: torch.device = pick_model_device(job.runtime, self.model.devices)
        self.capabilities: DeviceCapabilities = get_device_capabilities(self.device)
        self.preprocess: Preprocess = merge_preprocess(job.preprocess, self.model.preprocess)
        self.image_transform: ImageTransform = _build_image_transform(job, self.preprocess)
        self._normalize = Normalizer(self.preprocess)
        self._example_run: tuple[nn.Module, Any] | None = None
        self.example_image: torch.Tensor = make_example_image(job, reader, self.image_transform, sample_locations)

    # -- settings left at auto ---------------------------------------------------------------------------------

    @cached_property
    def decisions(self) -> Mapping[str, Decision]:
        """Decisions on settings that the job leaves at `auto`, by dotted name; the first access runs the model.

        Raises:
            InvalidJob: The module fails, or it does not suit the task.
        """
        found = self._job.task.decide(self.model, self._run_model)
        return {f"{_TASK}.{name}": decision for name, decision in found.items()}

    @property
    def decided_values(self) -> dict[str, str]:
        """Values of the decisions by dotted name, as a plan keeps them."""
        return {name: decision.value for name, decision in self.decisions.items()}

    def adopt(self, values: Mapping[str, str]) -> None:
        """Use a plan's decisions in place of this engine's own; settings for which the plan has none keep theirs.

        Args:
            values: Values by dotted name.
        """
        adopted = {name: Decision(value, "the plan was begun so") for name, value in values.items()}
        differing = {name: adopted.get(name, own) for name, own in self.decisions.items()}
        if self.decided_values == {name: decision.value for name, decision in differing.items()}:
            return
        self.decisions = differing
        # These follow from the decisions and are built again when they are used next.
        for name in ("_task", "_module", "postprocess"):
            self.__dict__.pop(name, None)

    @cached_property
    def _task(self) -> AnyTask:
        """Task of the job, with the decisions in place of `auto`. Raises InvalidJob if a value is not known."""
        values = self.decided_values
        try:
            return self._job.task.with_values({name.removeprefix(f"{_TASK}."): values[name] for name in values})
        except ValidationError:
            chosen = ", ".join(f"{name}: {value}" for name, value in values.items())
            raise InvalidJob(
                f"the plan was begun with {chosen} by another version of batchjob, which this one does not know; use "
                "that version, or `batchjob discard` the output and run again"
            ) from None

    @cached_property
    def _module(self) -> nn.Module:
        return self._task.adapt(self.model.module)

    def _run_model(self, module: nn.Module) -> Iterator[Any]:
        """Yield a module's output for copies of the example image, then for copies of images that look otherwise."""
        example = self.example_image
        yield self._run_example(module)
        for image in contrasting_images(example.shape, example.dtype):
            yield self._run_on_copies(module, image)

    def _run_example(self, module: nn.Module) -> Any:
        """Return a module's output for `EXAMPLE_ROWS` copies of the example image; the last one is kept."""
        if self._example_run is None or self._example_run[0] is not module:
            self._example_run = module, self._run_on_copies(module, self.example_image)
        return self._example_run[1]

    def _run_on_copies(self, module: nn.Module, image: torch.Tensor) -> Any:
        rows = self.model.batch_size
        forward = ForwardPass(module, self._normalize, self.device, self._forward_options(ExecutionConfig()))
        output = forward.run_example(repeat_image(image, rows or EXAMPLE_ROWS))
        return output if rows is None else trim_output(output, rows, EXAMPLE_ROWS)

    # -- facts about the model ---------------------------------------------------------------------------------

    @property
    def digest(self) -> str:
        """sha256 of the weights and of all code that decides predictions, the user's transform and task included."""
        folder, transform = self._job.folder, self.preprocess.transform
        code = [self._job.task.digest(folder), source_digest(transform, folder) if transform else None]
        digests = [self.model.digest, *(digest for digest in code if digest)]
        return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()

    @property
    def variable_size(self) -> bool:
        """True if images of different sizes go to the model."""
        return self.model.input_kind == "list" or self.preprocess.sizes == "group"

    @property
    def argmax_is_class(self) -> bool:
        """True if the index of an image's largest output is its class."""
        return self._job.task.argmax_is_class

    @property
    def acceleration(self) -> Acceleration:
        """Job's settings on speed."""
        return self._job.runtime

    @property
    def requested_config(self) -> ExecutionConfig:
        """Execution config with only what the job names.

        Raises:
            InvalidJob: The device or the model cannot run it.
        """
        config = requested_config(self._job.runtime)
        check_precision(config.precision, self.device)
        if not self.model.eager and config != ExecutionConfig():
            raise InvalidJob(
                f"runtime: {config.description} cannot be had with model.type {self._job.model.type}, which runs as "
                "it was saved; leave precision, compile and their like at auto"
            )
        return config

    def is_stateful(self) -> bool:
        """Return True if the module, or the user's own task, may change itself while it computes.

        Such a module computes one batch at a time, in order.
        """
        if self._job.task.type == "python":
            return True
        example = self._example_batch()
        return is_stateful(self._module, lambda: self.build_forward(ExecutionConfig()).run_example(example))

    # -- parts of the data path --------------------------------------------------------------------------------

    def load_images(self, locations: Iterable[str]) -> Iterator[torch.Tensor]:
        """Yield the prepared images `[c, h, w]` of these locations, without those that cannot be read or decoded."""
        return load_images(self._job, self._reader, self.image_transform, locations)

    @cached_property
    def postprocess(self) -> Postprocess:
        """Task for the outputs of this model; the first access runs the module, eagerly in fp32, on the example batch.

        Raises:
            InvalidJob: The module fails, or its output does not fit the task.
        """
        output = self._run_example(self._module)
        return self._task.build_postprocess(output, self.model.labels, self._reader, self._job.folder)

    def check_task(self) -> None:
        """Raise InvalidJob if the module fails on the example batch, or if its output does not fit the task."""
        _ = self.postprocess

    def build_forward(self, config: ExecutionConfig, pixels: torch.Tensor | None = None) -> ForwardPass:
        """Build the forward pass of the module, on its device, with an execution config.

        Args:
            config: Precision, layout, compile mode and quantisation.
            pixels: Prepared images `[n, c, h, w]` to calibrate quantisation on; None uses the example image.

        Raises:
            InvalidJob: The module does not fit into the device's memory, or a package is missing.
            Exception: Any error of torch, where the module does not support the config.
        """
        forward = ForwardPass(self._module, self._normalize, self.device, self._forward_options(config))
        if config == ExecutionConfig() or not self.model.eager:
            return forward
        with forward.disable_gradients():
            inputs = forward.prepare_inputs(
                repeat_image(self.example_image, EXAMPLE_ROWS) if pixels is None else pixels
            )
        return forward.with_module(optimize(self._module, config, inputs))

    def build_predictor(self, forward: ForwardPass, batch_size: int | None = None) -> Predictor:
        """Build the predictor around a forward pass.

        Args:
            forward: Result of `build_forward`.
            batch_size: Images that each call should have, as a compiled module needs; None for any number.
        """
        return Predictor(forward, self.postprocess, self.model.batch_size, batch_size)

    def _forward_options(self, config: ExecutionConfig) -> ForwardOptions:
        return ForwardOptions(self._job.runtime.grad_mode, self.model.input_kind, config)

    def _example_batch(self) -> torch.Tensor:
        return repeat_image(self.example_image, self.model.batch_size or EXAMPLE_ROWS)


def _build_image_transform(job: Job, preprocess: Preprocess) -> ImageTransform:
    return ImageTransform(
        job.decode,
        ResizeCrop(preprocess, job.folder),
        gray=preprocess.channels == "gray",
        apply_exif=preprocess.exif == "apply",
    )
