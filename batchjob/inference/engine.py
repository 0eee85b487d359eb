"""A loaded model on its device, with the preprocessing before it and the task behind it: images in, tensors out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from batchjob.errors import InvalidJob
from batchjob.inference.cpu_parallelism import is_stateful
from batchjob.inference.devices import DeviceCapabilities, check_precision, get_device_capabilities, pick_device
from batchjob.inference.execution_config import ExecutionConfig, requested_config
from batchjob.inference.forward import ForwardOptions, ForwardPass
from batchjob.inference.gpu_decode import check_gpu_decode_supported
from batchjob.inference.optimize import optimize
from batchjob.inference.predictor import Predictor
from batchjob.job.acceleration import Acceleration
from batchjob.job.job import Job
from batchjob.loader.sample import load_samples
from batchjob.loader.settings import resolve_loader_settings
from batchjob.models.loaded_model import LoadedModel
from batchjob.preprocessing.normalize import Normalizer
from batchjob.preprocessing.settings import merge_preprocess
from batchjob.preprocessing.transforms import ImageTransform, ResizeCrop
from batchjob.storage.reader import Reader
from batchjob.system import available_memory, import_torchvision
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess
from batchjob.user_code import source_digest

if TYPE_CHECKING:
    import torch

__all__ = ["Engine"]

_SIDE_UNKNOWN = 224  # of the example when there is no image to ask


class Engine:
    """Everything between a prepared image and the tensors that become its row.

    Args:
        job: with its paths as they are on this machine.
        reader: of weights, labels and images.
        sample: locations of images, to learn the input's size where no setting fixes it.

    Attributes:
        model: as its format gave it.
        device: where it runs.
        traits: what that device can do.
        preprocess: the job's, merged with the weights' own.
        prepare: an encoded image to what goes into a batch.
        example: one prepared image `[c, h, w]`.
        post: the task, once `try_out` has shown it an output.

    Raises:
        InvalidJob: model, labels, preprocessing, precision or device do not fit.
    """

    postprocess: Postprocess

    def __init__(self, job: Job, reader: Reader, sample_locations: Sequence[str]) -> None:
        self._job, self._reader = job, reader
        runtime = job.runtime
        pick_device(runtime.device)  # before the weights are read
        import_torchvision()  # before a model, a transform or a task does it otherwise
        self.model: LoadedModel = job.model.load(reader, job.folder)
        self.device = pick_device(runtime.device, self.model.devices)
        if self.device.type == "cpu" and runtime.device == "auto" and runtime.gpus_per_worker not in {"auto", 0}:
            raise InvalidJob(
                f"runtime.gpus_per_worker is {runtime.gpus_per_worker}, but no GPU is visible here; leave it out to "
                "compute on the CPU"
            )
        self.capabilities: DeviceCapabilities = get_device_capabilities(self.device)
        self.preprocess = preprocess = merge_preprocess(job.preprocess, self.model.preprocess)
        self.image_transform = ImageTransform(
            job.decode,
            ResizeCrop(preprocess, job.folder),
            gray=preprocess.channels == "gray",
            apply_exif=preprocess.exif == "apply",
        )
        if job.decode.device == "cuda":
            check_gpu_decode_supported(preprocess, self.image_transform.resize_crop, self.model.input_kind)
        self._module = job.task.adapt(self.model.module)
        self._normalize = Normalizer(preprocess)
        self.example_image = self._example(sample_locations)

    @property
    def digest(self) -> str:
        """Of weights and code that decide the predictions: the user's own transform and task are among them."""
        base, transform = self._job.folder, self.preprocess.transform
        code = [self._job.task.digest(base), source_digest(transform, base) if transform else None]
        parts = [self.model.digest, *(part for part in code if part)]
        return parts[0] if len(parts) == 1 else hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @property
    def variable_size(self) -> bool:
        """Whether images of different sizes go to the model."""
        return self.model.input_kind == "list" or self.preprocess.sizes == "group"

    def is_stateful(self) -> bool:
        """Whether the module writes to itself as it computes, or the user's own task may: then batches go in turn."""
        if self._job.task.type == "python":
            return True
        example = self._repeated(self.model.batch_size or EXAMPLE_ROWS)
        return is_stateful(self._module, lambda: self.build_forward(ExecutionConfig()).run_example(example))

    @property
    def argmax_is_class(self) -> bool:
        """Whether the largest number of an image's output names its class."""
        return self._job.task.argmax_is_class

    @property
    def acceleration(self) -> Acceleration:
        """What the job says of speed."""
        return self._job.runtime

    @property
    def requested_config(self) -> ExecutionConfig:
        """What the job names, and nothing else. Raises InvalidJob where the device or the model cannot do it."""
        asked = requested_config(self._job.runtime)
        check_precision(asked.precision, self.device)
        if not self.model.eager and asked != ExecutionConfig():
            raise InvalidJob(
                f"runtime: {asked.description} cannot be had with model.type "
                f"{self._job.model.type}, which runs as it was "
                "saved; leave precision, compile and their like at auto"
            )
        return asked

    def build_postprocess(self) -> None:
        """Run the module for the first time, eagerly in fp32, and show its output to the task. Raises InvalidJob."""
        output = self.build_forward(ExecutionConfig()).run_example(
            self._repeated(self.model.batch_size or EXAMPLE_ROWS)
        )
        if self.model.batch_size is not None:
            output = _example_rows(output, self.model.batch_size)
        self.postprocess = self._job.task.build_postprocess(output, self.model.labels, self._reader, self._job.folder)

    def build_forward(self, config: ExecutionConfig, pixels: torch.Tensor | None = None) -> ForwardPass:
        """The module on its device as a recipe wants it.

        Args:
            recipe: that of `tuning.py`.
            pixels: prepared images `[n, c, h, w]` to calibrate on; the example where not given.

        Raises:
            InvalidJob: it does not fit into the device's memory; or a package is missing.
            Exception: whatever torch raises where a recipe is none for this module.
        """
        modes = ForwardOptions(self._job.runtime.grad_mode, self.model.input_kind, config, self.model.batch_size)
        plain = ForwardPass(self._module, self._normalize, self.device, modes)
        if config == ExecutionConfig() or not self.model.eager:
            return plain
        with plain.disable_gradients():
            inputs = plain.prepare_inputs(self._repeated(EXAMPLE_ROWS) if pixels is None else pixels)
        return plain.with_module(optimize(self._module, config, inputs))

    def build_predictor(self, forward: ForwardPass, batch_size: int | None = None) -> Predictor:
        """A predictor around one of `forward`; `batch_size` where every call had better have so many images."""
        return Predictor(forward, self.postprocess, self.model.batch_size, batch_size)

    def _repeated(self, rows: int) -> torch.Tensor:
        return self.example_image.expand(rows, *self.example_image.shape).contiguous()

    def load_images(self, locations: Iterable[str]) -> Iterator[torch.Tensor]:
        """The images there that can be read and decoded, prepared: elsewhere, for one that is deadly ends no worker."""
        job = self._job
        plan = resolve_loader_settings(
            job.runtime.loader, cores=1, memory_bytes=available_memory(), max_pixels=job.decode.max_pixels
        )
        return load_samples(self._reader, self.image_transform, locations, plan)

    def _example(self, sample: Sequence[str]) -> torch.Tensor:
        """Random where settings fix the size, else the first sample that decodes.

        Raises:
            InvalidJob: none of the samples decodes, so that the model's input size is not known.
        """
        import torch

        channels, size = 1 if self.image_transform.gray else 3, self.image_transform.resize_crop.size
        if size is None and sample:
            return self._first_decodable(sample)
        height, width = size or (_SIDE_UNKNOWN, _SIDE_UNKNOWN)
        own = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=own)

    def _first_decodable(self, sample: Sequence[str]) -> torch.Tensor:
        for pixels in self.load_images(sample):
            return pixels
        raise InvalidJob(
            f"none of the first {len(sample)} images can be decoded, so the model's input size is not "
            "known; give preprocess.resize or crop, or look at the input"
        )


def _example_rows(output: Any, rows: int) -> Any:
    """The output for `rows` images, all the same one, as one for `EXAMPLE_ROWS`."""
    import torch
    from torch.utils._pytree import tree_map

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0 or len(leaf) != rows:
            return leaf
        return leaf[:1].expand(EXAMPLE_ROWS, *leaf.shape[1:])

    return tree_map(cut, output)
