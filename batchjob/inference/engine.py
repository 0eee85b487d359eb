"""Engine: a loaded model on its device, with the image transform before it and the task's postprocess behind it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from batchjob.errors import InvalidJob, describe_error
from batchjob.inference.autotune.cache import use_compile_cache
from batchjob.inference.cpu_parallelism import is_stateful
from batchjob.inference.device_errors import classify_device_error
from batchjob.inference.devices import (
    DeviceCapabilities,
    check_precision,
    check_reserved_gpus,
    get_device_capabilities,
    pick_device,
    pick_model_device,
)
from batchjob.inference.doubts import doubt_model, doubt_transform
from batchjob.inference.example_images import (
    TransformFailed,
    check_images,
    contrasting_images,
    load_images,
    make_example_image,
    repeat_image,
    trim_output,
)
from batchjob.inference.example_run import ExampleRun, run_example_images
from batchjob.inference.execution_config import ExecutionConfig, config_of_weights, requested_config
from batchjob.inference.forward import ForwardOptions, ForwardPass
from batchjob.inference.optimize import find_weight_dtype, optimize
from batchjob.inference.predictor import Predictor
from batchjob.job.acceleration import Acceleration
from batchjob.job.job import AnyTask, Job
from batchjob.models.loaded_model import LoadedModel
from batchjob.preprocessing.normalize import Normalizer
from batchjob.preprocessing.settings import Preprocess, merge_preprocess
from batchjob.preprocessing.transforms import ImageTransform, ResizeCrop
from batchjob.settings import Decision
from batchjob.storage.reader import Reader
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess
from batchjob.tasks.settings import TaskContext
from batchjob.user_code import source_digest

__all__ = ["Engine"]

_TASK = "task"  # section of a job, the first part of a decision's name
_TRANSFORM_INPUT = "preprocess.transform_input"


class Engine:
    """Composition of all that lies between an encoded image and the tensors from which its row is made.

    Args:
        job: Job with paths as they are on this machine.
        reader: Reader of weights, labels and images.
        sample_locations: Locations of images, from which the model's input size is learnt if no setting fixes it.
        reserved_gpus: GPUs that the pool has reserved for this process; torch must see them.

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

    def __init__(self, job: Job, reader: Reader, sample_locations: Sequence[str], reserved_gpus: float = 0.0) -> None:
        self._job, self._reader = job, reader
        check_reserved_gpus(job.runtime, reserved_gpus)
        # A device that is not there is reported before the weights are read.
        pick_device(job.runtime.device)
        self.model: LoadedModel = job.model.load(reader, job.folder)
        self.device: torch.device = pick_model_device(job.runtime, self.model.devices, reserved_gpus)
        self.capabilities: DeviceCapabilities = get_device_capabilities(self.device)
        self.preprocess: Preprocess = merge_preprocess(job.preprocess, self.model.preprocess)
        self._sample_locations = sample_locations
        self._normalize = Normalizer(self.preprocess)
        self.image_transform, self.example_image = self._find_example(
            _build_image_transform(job, self.preprocess, self.model)
        )
        self.model = self._materialize_model()
        self._example_run: tuple[nn.Module, ExampleRun] | None = None

    # -- settings left at auto ---------------------------------------------------------------------------------

    @cached_property
    def decisions(self) -> Mapping[str, Decision]:
        """Decisions on settings that the job leaves at `auto`, by dotted name; the first access runs the model.

        Raises:
            InvalidJob: The module fails, or it does not suit the task.
        """
        found = self._job.task.decide(self.model, self._run_model)
        decisions = {f"{_TASK}.{name}": decision for name, decision in found.items()}
        user_transform = self.image_transform.resize_crop.user_transform
        if user_transform is not None and self.preprocess.transform_input == "auto":
            decisions[_TRANSFORM_INPUT] = Decision(user_transform.image_kind, user_transform.reason)
        return decisions

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
        own_input, self.decisions = self.decisions.get(_TRANSFORM_INPUT), differing
        if own_input is not None and (image_kind := differing[_TRANSFORM_INPUT].value) != own_input.value:
            transform = self.image_transform.with_transform_input("pil" if image_kind == "pil" else "tensor")
            self.image_transform, self.example_image = self._find_example(transform)
            self._example_run = None
        # These follow from the decisions and are built again when they are used next.
        for name in ("_task", "_module", "postprocess"):
            self.__dict__.pop(name, None)

    @cached_property
    def _task(self) -> AnyTask:
        """Task of the job, with the decisions in place of `auto`. Raises InvalidJob if a value is not known."""
        prefix = f"{_TASK}."
        values = {name: value for name, value in self.decided_values.items() if name.startswith(prefix)}
        try:
            return self._job.task.with_values({name.removeprefix(prefix): values[name] for name in values})
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
        yield self._run_example(module).output
        for image in contrasting_images(example.shape, example.dtype):
            yield self._run_on_copies(module, image)

    def _run_example(self, module: nn.Module) -> ExampleRun:
        """Try a module on the example image; the last trial is kept."""
        if self._example_run is None or self._example_run[0] is not module:
            forward = self._build_loaded_forward(module, self.loaded_config)
            run = run_example_images(forward, self.example_image, self.model.batch_size, self._is_one_by_one)
            self._example_run = module, run
        return self._example_run[1]

    def _run_on_copies(self, module: nn.Module, image: torch.Tensor) -> Any:
        """Return a module's output for `EXAMPLE_ROWS` copies of an image."""
        rows = max(self._example_rows, self._run_example(module).min_rows)
        output = self._build_loaded_forward(module, self.loaded_config).run_example(repeat_image(image, rows))
        return output if rows == EXAMPLE_ROWS else trim_output(output, rows, EXAMPLE_ROWS)

    # -- facts about the model ---------------------------------------------------------------------------------

    @property
    def digest(self) -> str:
        """sha256 of the weights and of all code that decides predictions, the user's transform and task included."""
        folder, transform = self._job.folder, self.preprocess.transform
        code = [self._job.task.digest(folder), source_digest(transform, folder) if transform else None]
        digests = [self.model.digest, *(digest for digest in code if digest)]
        return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the log, `validate` and the report: how the model was loaded, and what can hardly be meant."""
        doubts = list[str]()
        if self.model.eager and self.model.input_kind == "batch":
            doubts += doubt_model(self.model.module, self._run_example(self._module).output)
        if self.image_transform.resize_crop.user_transform is not None:
            doubts += doubt_transform([*self.load_images([*self._sample_locations[:1], *self._sample_locations[:1]])])
        return (*self.model.notes, *doubts)

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

    @cached_property
    def loaded_config(self) -> ExecutionConfig:
        """Execution config of the module as it was loaded: eager, in the precision of its weights."""
        return config_of_weights(find_weight_dtype(self.model.module)) if self.model.eager else ExecutionConfig()

    @property
    def requested_config(self) -> ExecutionConfig:
        """Execution config with only what the job names.

        Raises:
            InvalidJob: The device or the model cannot run it.
        """
        config = requested_config(self._job.runtime, self.loaded_config)
        check_precision(config.precision, self.device)
        if not self.model.eager and config != self.loaded_config:
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
        return is_stateful(self._module, lambda: self.build_forward(self.loaded_config).run_example(example))

    @property
    def task_module(self) -> nn.Module:
        """Module whose output the task reads: the model, or a form of it without layers that the task leaves out."""
        return self._module

    # -- parts of the data path --------------------------------------------------------------------------------

    def load_images(self, locations: Iterable[str]) -> Iterator[torch.Tensor]:
        """Yield the prepared images `[c, h, w]` of these locations, without those that cannot be read or decoded."""
        return load_images(self._job, self._reader, self.image_transform, locations)

    @cached_property
    def postprocess(self) -> Postprocess:
        """Task for the outputs of this model; the first access runs the module, as it was loaded, on example images.

        Raises:
            InvalidJob: The module fails, or its output does not fit the task.
        """
        output = self._run_example(self._module).output
        context = TaskContext(self.model.labels, self._reader, self._job.folder)
        return self._task.build_postprocess(output, context)

    def check_task(self) -> None:
        """Raise InvalidJob if the module fails on the example batch, or if its output does not fit the task."""
        _ = self.postprocess

    def check_requested_config(self, batch_size: int) -> None:
        """Try the execution config that the job names, where it is not that of the loaded module.

        Args:
            batch_size: Images in a batch, for which a compiled module is built.

        Raises:
            InvalidJob: It fails.
        """
        config = self.requested_config
        if config == self.loaded_config:
            return
        use_compile_cache()
        pixels = repeat_image(self.example_image, batch_size) if config.fixed_batch else self._example_batch()
        try:
            self.build_forward(config).call_example(pixels)
        except InvalidJob:
            raise
        except Exception as error:  # torch and torchao raise all kinds
            if classify_device_error(error, self.device) is not None:
                raise
            raise InvalidJob(
                f"runtime: {config.description} fails with this model on {self.device}: {describe_error(error)}; "
                "leave it at auto, or name another"
            ) from error

    def check_images(self, locations: Sequence[str]) -> list[str]:
        """Try the preprocessing on the first of these images; return lines about those that fail.

        Raises:
            InvalidJob: More of them fail than the error budget allows.
        """
        if self.image_transform.resize_crop.size is not None:
            return []
        return check_images(self._job, self._reader, self.image_transform, locations, self.variable_size)

    def build_forward(self, config: ExecutionConfig, pixels: torch.Tensor | None = None) -> ForwardPass:
        """Build the forward pass of the module, on its device, with an execution config.

        Args:
            config: Precision, layout, compile mode and quantisation.
            pixels: Prepared images `[n, c, h, w]` to calibrate quantisation on; None uses the example image.

        Raises:
            InvalidJob: The module does not fit into the device's memory, or a package is missing.
            Exception: Any error of torch, where the module does not support the config.
        """
        forward = self._build_loaded_forward(self._module, config)
        if config == self.loaded_config or not self.model.eager:
            return forward
        with forward.disable_gradients():
            inputs = forward.prepare_inputs(self._example_batch() if pixels is None else pixels)
        return forward.with_module(optimize(self._module, config, inputs))

    def build_predictor(self, forward: ForwardPass, batch_size: int | None = None) -> Predictor:
        """Build the predictor around a forward pass.

        Args:
            forward: Result of `build_forward`.
            batch_size: Images that each call should have, as a compiled module needs; None for any number.
        """
        return Predictor(
            forward, self.postprocess, self.model.batch_size, batch_size, self._run_example(self._module).min_rows
        )

    @property
    def _example_rows(self) -> int:
        return self.model.batch_size or (1 if self._is_one_by_one else EXAMPLE_ROWS)

    @property
    def _is_one_by_one(self) -> bool:
        return self._job.runtime.batch_size == 1

    def _build_loaded_forward(self, module: nn.Module, config: ExecutionConfig) -> ForwardPass:
        options = ForwardOptions(self._job.runtime.grad_mode, self.model.input_kind, config)
        return ForwardPass(module, self._normalize, self.device, options)

    def _example_batch(self) -> torch.Tensor:
        rows = max(self._example_rows, self._run_example(self._module).min_rows)
        return repeat_image(self.example_image, rows)

    def _find_example(self, transform: ImageTransform) -> tuple[ImageTransform, torch.Tensor]:
        """Prepare the example image; a transform that does not say what it takes is tried with a PIL image too."""
        user_transform, locations = transform.resize_crop.user_transform, self._sample_locations
        try:
            return transform, make_example_image(self._job, self._reader, transform, locations)
        except TransformFailed as failure:
            if user_transform is None or user_transform.is_certain:
                raise
            transform = transform.with_transform_input("pil")
            try:
                return transform, make_example_image(self._job, self._reader, transform, locations)
            except TransformFailed:
                raise failure from None

    def _materialize_model(self) -> LoadedModel:
        """Give lazy layers their weights, by a run on the example batch as the model's own code would do it."""
        options, cpu = ForwardOptions("no_grad", self.model.input_kind), torch.device("cpu")
        pixels = repeat_image(self.example_image, self.model.batch_size or EXAMPLE_ROWS)
        return self.model.materialize(
            lambda module: ForwardPass(module, self._normalize, cpu, options).run_example(pixels)
        )


def _build_image_transform(job: Job, preprocess: Preprocess, model: LoadedModel) -> ImageTransform:
    own = model.preprocess
    function = model.transform if own is not None and preprocess.transform == own.transform else None
    return ImageTransform(
        job.decode,
        ResizeCrop(preprocess, job.folder, function),
        gray=preprocess.channels == "gray",
        apply_exif=preprocess.exif == "apply",
    )
