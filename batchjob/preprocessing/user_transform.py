"""The user's own transform: it gets each image as a tensor or as a PIL image, and its result is checked."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from batchjob.errors import DEBUG_VARIABLE, ImageError, InvalidJob
from batchjob.functions.function_target import FunctionTarget, pickle_by_value
from batchjob.text import with_article
from batchjob.user_code import catch_exit, describe_fault, enable_unpickling, load_target, name_fault

__all__ = ["TransformInput", "UserTransform", "find_input"]

TransformInput = Literal["pil", "tensor"]

# Steps of torchvision (v1, v2) and timm that take only one kind of image; their class names, with those of their base
# classes, decide. `ToImage` takes both, but behind a resize it makes sense for PIL images only.
_PIL_STEPS = frozenset({"ToTensor", "PILToTensor", "ToImage", "MaybeToTensor", "MaybePILToTensor", "ToNumpy"})
_TENSOR_STEPS = frozenset(
    {"ToPILImage", "ConvertImageDtype", "ConvertDtype", "ToDtype", "Normalize", "LinearTransformation", "RandomErasing"}
)
_STEP_PACKAGES = ("torchvision.", "timm.")

_INPUT_WORDS = {"tensor": "a uint8 tensor [3, height, width]", "pil": "a PIL image in mode RGB"}


class UserTransform:
    """Transform of the user, called with each image. Picklable: a loader process loads or unpickles it again.

    Args:
        target: `module:attribute` that names it, or that has made it.
        folder: Folder of the job file.
        image_kind: Kind of image that it gets; None finds that out from its steps, a tensor if they do not
            say.
        function: The transform, if the target has made it; None loads it from the target.

    Attributes:
        image_kind: Kind of image that it gets.
        is_certain: True if it was given or found out, False if the steps do not say.
        reason: Reason for the kind of image, in words, where the job leaves it open.

    Raises:
        InvalidJob: It cannot be loaded, called, or pickled.
    """

    def __init__(
        self,
        target: str,
        folder: Path,
        image_kind: TransformInput | None = None,
        function: Callable[[Any], Any] | None = None,
    ) -> None:
        self._target, self._folder = target, folder
        self._function = _load_transform(target, folder) if function is None else function
        self._pickled = None if function is None else _pickle_transform(function, target)
        found = image_kind or find_input(self._function)
        self.image_kind: TransformInput = found or "tensor"
        self.is_certain = found is not None
        if not self.is_certain:
            self.reason = "the steps of the transform do not say"
        else:
            self.reason = "a step takes only that" if image_kind is None else "the transform fails on a tensor"

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Transform one image.

        Args:
            image: uint8 `[3, h, w]`.

        Returns:
            uint8, or float32.

        Raises:
            ImageError: Stage `transform`: it fails, or returns no tensor of numbers for a model.
        """
        try:
            with catch_exit():
                result = self._function(image if self.image_kind == "tensor" else _to_pil(image))
        except MemoryError:
            raise ImageError("transform", "memory", "there was not enough memory to transform it") from None
        except Exception as error:  # noqa: BLE001 - the user's code failed on this image, which becomes an error row
            _print_traceback_once()
            raise ImageError("transform", name_fault(error), describe_fault(error, in_library=True)) from None
        return _check_result(result, self._target)

    def with_input(self, image_kind: TransformInput) -> UserTransform:
        """Return the transform for another kind of image."""
        return UserTransform(self._target, self._folder, image_kind, self._function if self._pickled else None)

    @property
    def input_words(self) -> str:
        """Kind of image that it gets, for messages."""
        return _INPUT_WORDS[self.image_kind]

    def __getstate__(self) -> tuple[str, Path, TransformInput, bytes | None]:
        return self._target, self._folder, self.image_kind, self._pickled

    def __setstate__(self, state: tuple[str, Path, TransformInput, bytes | None]) -> None:
        target, folder, image_kind, pickled = state
        if pickled is not None:
            enable_unpickling(folder)
        function = None if pickled is None else pickle.loads(pickled)  # noqa: S301 - pickled by this job's own worker
        self.__init__(target, folder, image_kind, function)  # type: ignore[misc]


def find_input(transform: Any) -> TransformInput | None:
    """Find out from a transform's steps if it takes PIL images or tensors; None if they do not say.

    The first step that takes only one kind decides. Steps of other packages, and functions, are passed over.

    Example: `Compose([Resize(256), ToTensor(), Normalize(…)])` takes PIL images, since `Resize` takes both and
    `ToTensor` does not; `Compose([ToPILImage(), Resize(256), ToTensor()])` takes tensors.
    """
    for step in _walk_steps(transform, set()):
        classes = [kind for kind in type(step).__mro__ if kind.__module__.startswith(_STEP_PACKAGES)]
        names = {kind.__name__ for kind in classes}
        if names & _PIL_STEPS:
            return "pil"
        if names & _TENSOR_STEPS:
            return "tensor"
    return None


def _walk_steps(transform: Any, seen: set[int]) -> Iterator[Any]:
    """Yield a transform and what it consists of, in order: steps of a Compose, or attributes of the user's class."""
    if id(transform) in seen:
        return
    seen.add(id(transform))
    yield transform
    steps = getattr(transform, "transforms", None)
    if isinstance(steps, list | tuple | torch.nn.ModuleList):
        parts: Iterator[Any] = iter(steps)
    elif isinstance(transform, torch.nn.Module):
        parts = transform.children()
    else:
        # An object with `__call__`, or a method of one, which holds its steps in attributes.
        owner = getattr(transform, "__self__", transform)
        values = vars(owner).values() if hasattr(owner, "__dict__") and not isinstance(owner, type) else ()
        parts = chain.from_iterable(
            value if isinstance(value, list | tuple) else (value,) for value in values if _may_be_transform(value)
        )
    for part in parts:
        yield from _walk_steps(part, seen)


def _may_be_transform(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(callable, value))
    return callable(value) and type(value).__module__.startswith(_STEP_PACKAGES)


def _load_transform(target: str, folder: Path) -> Callable[[Any], Any]:
    transform, attribute = load_target(target, folder), target.partition(":")[2]
    if isinstance(transform, type):
        raise InvalidJob(
            f"preprocess.transform: {target} is a class; name an object of it, like `steps = {transform.__name__}()`"
        )
    if type(transform).__module__.partition(".")[0] == "albumentations":
        raise InvalidJob(
            f"preprocess.transform: {target} is of albumentations, which takes image=… and gives a dict; name a "
            f"function beside it, `def prepare(image): return torch.from_numpy({attribute}(image=np.asarray(image))"
            "['image']).permute(2, 0, 1)`, with preprocess.transform_input: pil"
        )
    if not callable(transform):
        raise InvalidJob(
            f"preprocess.transform: {target} is {with_article(type(transform).__name__)}; name a function, or an "
            "object like a Compose, that takes an image and returns what the model gets"
        )
    return transform  # type: ignore[no-any-return]


def _pickle_transform(transform: Callable[[Any], Any], target: str) -> bytes:
    try:
        # What a script itself defines is found by its name in no other process.
        return pickle.dumps(transform) if not isinstance(target, FunctionTarget) else pickle_by_value(transform)
    except Exception as error:  # pickle raises what the objects in it raise
        raise InvalidJob(
            f"model.target: {target} returned a transform that cannot be sent to the loader's processes "
            f"({type(error).__name__}: {error}); assign it to a name of the module, outside the function"
        ) from error


def _to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))


def _check_result(result: Any, target: str) -> torch.Tensor:
    if not isinstance(result, torch.Tensor):
        raise ImageError("transform", "type", f"{target} returned {_describe(result)}, not a tensor{_advise(result)}")
    if result.dtype == torch.uint8:
        return result.detach()
    if not result.is_floating_point():
        raise ImageError("transform", "type", f"{target} returned {result.dtype}, neither uint8 nor float")
    return result.detach().float()


def _describe(result: Any) -> str:
    if result is None:
        return "None"
    if isinstance(result, tuple | list):
        return f"{with_article(type(result).__name__)} of {len(result)}"
    module = type(result).__module__.partition(".")[0]
    return with_article(type(result).__name__ if module == "builtins" else f"{module}.{type(result).__name__}")


def _advise(result: Any) -> str:
    """Return the end of a message on a result that is no tensor."""
    if result is None:
        return " (no return?)"
    if isinstance(result, Image.Image):
        return "; end it with ToTensor()"
    if isinstance(result, np.ndarray):
        return "; end it with torch.from_numpy(…), channels first"
    if isinstance(result, Mapping):
        return f"; return the value that the model gets, one of {', '.join(map(str, result))}, and no batch of one"
    if isinstance(result, tuple | list) and result and isinstance(result[0], torch.Tensor):
        return "; return its first item alone"
    return ""


_printed_traceback = False


def _print_traceback_once() -> None:
    """Print the traceback of the exception at hand with `--debug`, once in a process; its row keeps only a line."""
    global _printed_traceback  # noqa: PLW0603 - one flag a process
    if os.environ.get(DEBUG_VARIABLE) and not _printed_traceback:
        _printed_traceback = True
        traceback.print_exc()
