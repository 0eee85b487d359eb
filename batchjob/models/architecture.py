"""Build modules from an architecture: the name of a torchvision model, or a function beside the job file."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError

from batchjob.errors import BatchjobError, InvalidJob, Unavailable
from batchjob.text import with_article
from batchjob.user_code import catch_exit, describe_fault, load_target

if TYPE_CHECKING:
    from torch import nn

__all__ = ["build_torchvision", "call_target", "check_torchvision_name", "has_parameter"]


def build_torchvision(name: str, key: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a freshly initialised torchvision model for classification, detection or segmentation.

    Args:
        name: Name in `torchvision.models.list_models()`.
        key: Job key that holds the name, for error messages.
        arguments: Keyword arguments of torchvision's function.

    Raises:
        InvalidJob: There is no such model (the message suggests similar names), it is for another task, or it does not
            take these arguments.
    """
    from torchvision import models

    check_torchvision_name(name, key)
    keywords = dict(arguments)
    if name in {"googlenet", "inception_v3"}:
        keywords.setdefault("init_weights", False)  # Without it torchvision warns.
    if name not in models.list_models(module=models):
        keywords.setdefault("weights_backbone", None)  # Without it torchvision downloads weights of the backbone.
    try:
        module: nn.Module = models.get_model(name, weights=None, **keywords)
    except (TypeError, ValueError) as error:
        raise InvalidJob(f"{key}: torchvision's {name} cannot be built with {keywords}: {error}") from error
    return module


def check_torchvision_name(name: str, key: str) -> None:
    """Check that torchvision has a model of this name for classification, detection or segmentation.

    Raises:
        InvalidJob: It has none. The message suggests similar names.
    """
    from torchvision import models

    supported = [name for room in (models, models.detection, models.segmentation) for name in models.list_models(room)]
    if name in supported:
        return
    if name in models.list_models():
        raise InvalidJob(
            f"{key}: torchvision's {name} is no float model for classification, detection or segmentation, which is "
            "what this version builds by name; wrap it in a function beside the job file and use model.type: python"
        )
    similar = difflib.get_close_matches(name.lower(), supported, n=4, cutoff=0.5)
    examples = f"it has {', '.join(supported[:5])} and {len(supported) - 5} more"
    hint = f"did you mean {' or '.join(similar)}?" if similar else examples
    raise InvalidJob(
        f"{key}: torchvision has no model named {name!r}; {hint} "
        "(or write 'module:attribute' with type checkpoint or python)"
    )


def call_target(
    target: str, folder: Path, key: str, arguments: Mapping[str, Any], num_classes: int | None = None
) -> Any:
    """Call the user's function beside the job file. A target that is a module already is returned unchanged.

    Args:
        target: `module:attribute`.
        folder: Folder of the job file.
        key: Job key that holds the target, for error messages.
        arguments: Keyword arguments of the function.
        num_classes: Passed on as a keyword argument; None if the job does not state it.

    Raises:
        InvalidJob: There is no such module or function, it does not take these arguments, or it raised an exception.
        Unavailable: It raised a network error.
    """
    import torch

    function = load_target(target, folder)
    where = f"{key}: {target} in {folder}"
    if isinstance(function, torch.nn.Module):
        if num_classes is not None:
            raise InvalidJob(f"{where} is a module and takes no model.num_classes; leave it out, or name a function")
        if arguments:
            raise InvalidJob(f"{where} is a module and takes no model.arguments; name a function that builds it")
        return function
    if not callable(function):
        raise InvalidJob(
            f"{where} is {with_article(type(function).__name__)}; name a function that returns a torch.nn.Module"
        )
    keywords = dict(arguments)
    if num_classes is not None:
        if "num_classes" in keywords:
            raise InvalidJob(f"{where}: num_classes stands both in the model and in model.arguments; keep one")
        if not has_parameter(function, "num_classes"):
            raise InvalidJob(
                f"{where} takes no num_classes; it takes ({_describe_signature(function)}); leave model.num_classes "
                "out, or write what it takes in model.arguments"
            )
        keywords["num_classes"] = num_classes
    _check_arguments(function, keywords, where)
    try:
        with catch_exit():
            return function(**keywords)
    except (BatchjobError, MemoryError):
        raise
    except Exception as error:  # the user's code may raise anything
        text = f"{where} raised {describe_fault(error)}"
        if _is_network_error(error):
            raise Unavailable(text) from error
        raise InvalidJob(f"{text}; correct it, or model.arguments") from error


def has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Return True if a function takes a keyword argument of this name."""
    keyword_kinds = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    return any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD or (parameter.name == name and parameter.kind in keyword_kinds)
        for parameter in _list_parameters(function)
    )


def _list_parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # A function written in C may have no signature.
        return []


def _check_arguments(function: Callable[..., Any], keywords: Mapping[str, Any], where: str) -> None:
    parameters = _list_parameters(function)
    if not parameters and not keywords:
        return
    unknown = next((name for name in keywords if not has_parameter(function, name)), None)
    if parameters and unknown is not None:
        match = difflib.get_close_matches(unknown, [parameter.name for parameter in parameters], 1)
        hint = f"did you mean {match[0]!r}?" if match else "leave it out of model.arguments"
        raise InvalidJob(f"{where} takes no {unknown!r}; it takes ({_describe_signature(function)}); {hint}")
    try:
        inspect.signature(function).bind(**keywords)
    except (TypeError, ValueError) as error:
        raise InvalidJob(
            f"{where} cannot be called: {error}; it takes ({_describe_signature(function)}); correct model.arguments"
        ) from error


def _describe_signature(function: Callable[..., Any]) -> str:
    return ", ".join(str(parameter) for parameter in _list_parameters(function)) or "nothing"


def _is_network_error(error: Exception) -> bool:
    if isinstance(error, HTTPError):
        return error.code == 429 or error.code >= 500
    return isinstance(error, URLError | ConnectionError | TimeoutError)
