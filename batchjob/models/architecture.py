"""Names to fresh modules: torchvision's architectures, and functions beside the job file."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.error import HTTPError, URLError

from batchjob.errors import BatchjobError, InvalidJob, Unavailable
from batchjob.user_code import load_target

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "build_torchvision",
    "call_target",
    "check_torchvision_name",
    "detect_input_kind",
    "isolated_torch_state",
    "prepare_for_inference",
]


@contextmanager
def isolated_torch_state(seed: int = 0) -> Iterator[None]:
    """Builds models alike in every process, whatever the caller set; torch's global state is afterwards as before."""
    import torch

    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # Not torch.manual_seed: that reseeds every accelerator too.
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(grad)


def prepare_for_inference(module: nn.Module, where: str) -> nn.Module:
    """The module on the CPU, in eval mode, wanting no gradients. Raises InvalidJob where it holds no data (meta)."""
    try:
        return module.to("cpu").eval().requires_grad_(False)
    except (NotImplementedError, RuntimeError) as error:
        raise InvalidJob(f"{where}: the module cannot be brought to the CPU ({error}); return one with data") from error


def build_torchvision(name: str, key: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised model of torchvision, for classification, detection or segmentation.

    Raises:
        InvalidJob: no such model (nearest names), one for another task, or arguments it does not take.
    """
    from torchvision import models

    check_torchvision_name(name, key)
    given = dict(arguments)
    if name in {"googlenet", "inception_v3"}:
        given.setdefault("init_weights", False)  # left out, torchvision warns
    if name not in models.list_models(module=models):
        given.setdefault("weights_backbone", None)  # left out, torchvision downloads them
    try:
        module: nn.Module = models.get_model(name, weights=None, **given)
    except (TypeError, ValueError) as error:
        raise InvalidJob(f"{key}: torchvision's {name} cannot be built with {given}: {error}") from error
    return module


def check_torchvision_name(name: str, key: str) -> None:
    """Raises InvalidJob where torchvision has no model of that name for classification, detection or segmentation."""
    from torchvision import models

    known = [name for room in (models, models.detection, models.segmentation) for name in models.list_models(room)]
    if name in known:
        return
    if name in models.list_models():
        raise InvalidJob(
            f"{key}: torchvision's {name} is no float model for classification, detection or segmentation, which is "
            "what this version builds by name; wrap it in a function beside the job file and use model.type: python"
        )
    raise InvalidJob(f"{key}: {_unknown(name, known)} (or write 'module:function' with type checkpoint or python)")


def detect_input_kind(module: nn.Module) -> Literal["batch", "list"]:
    """What a module is called with: torchvision's detectors take a list of images of any size."""
    from torchvision.models import detection

    detectors = (detection.FasterRCNN, detection.FCOS, detection.RetinaNet, detection.ssd.SSD)
    return "list" if isinstance(module, detectors) else "batch"


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=4, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known[:5])} and {len(known) - 5} more"
    return f"torchvision has no model named {name!r}; {hint}"


def call_target(target: str, base: Path, key: str, arguments: Mapping[str, Any], num_classes: int | None = None) -> Any:
    """What the user's function beside the job file returns; a module that stands there ready is taken as it is.

    `num_classes` is passed where the function takes it.

    Raises:
        InvalidJob: no such module or function, arguments it does not take, or whatever it raises.
        Unavailable: it raised a network fault.
    """
    import torch

    found = load_target(target, base)
    where = f"{key}: {target} in {base}"
    if isinstance(found, torch.nn.Module):
        if arguments:
            raise InvalidJob(f"{where} is a module and takes no model.arguments; name a function that builds it")
        return found
    if not callable(found):
        raise InvalidJob(f"{where} is a {type(found).__name__}; name a function that returns a torch.nn.Module")
    given = dict(arguments)
    if num_classes is not None and _takes(found, "num_classes"):
        if "num_classes" in given:
            raise InvalidJob(f"{where}: num_classes stands both in the model and in model.arguments; keep one")
        given["num_classes"] = num_classes
    _check_arguments(found, given, where)
    return _call(found, given, where)


def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = _parameters(function)
    by_name = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    return any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD or (parameter.name == name and parameter.kind in by_name)
        for parameter in parameters
    )


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # written in C
        return []


def _check_arguments(function: Callable[..., Any], given: Mapping[str, Any], where: str) -> None:
    parameters = _parameters(function)
    if not parameters and not given:
        return
    try:
        inspect.signature(function).bind(**given)
    except (TypeError, ValueError) as error:
        takes = ", ".join(str(parameter) for parameter in parameters) or "nothing"
        raise InvalidJob(f"{where} cannot be called: {error}; it takes ({takes}); correct model.arguments") from error


def _call(function: Callable[..., Any], given: Mapping[str, Any], where: str) -> Any:
    try:
        return function(**given)
    except (BatchjobError, MemoryError):
        raise
    except Exception as error:  # the user's code: anything may come
        text = f"{where} raised {type(error).__name__}: {error}"
        if _is_network(error):
            raise Unavailable(text) from error
        raise InvalidJob(f"{text}; correct it, or model.arguments") from error


def _is_network(error: Exception) -> bool:
    if isinstance(error, HTTPError):
        return error.code == 429 or error.code >= 500
    return isinstance(error, URLError | ConnectionError | TimeoutError)
