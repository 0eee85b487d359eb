"""Page of the command line: each command with its arguments and options, from the functions that implement them."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from typer.models import ArgumentInfo, OptionInfo

from batchjob.cli.main import app
from docs.generate.markdown import UndocumentedError, join_lines, notice, table

__all__ = ["list_parameters", "page"]

_INTRODUCTION = """\
Every command with its arguments, options and defaults. `batchjob COMMAND --help` prints the same. Options may stand
before or after the arguments. [Exit codes](exit-codes.md) are the same for all commands."""


@dataclass(frozen=True)
class Parameter:
    """Argument or option of a command.

    Attributes:
        names: Names as they are typed, such as `--param, -p`; of an argument its placeholder.
        is_option: True for an option.
        value: Kind of value in words; empty for a flag.
        default: Default value in words.
        help: Sentence that explains it.
    """

    names: str
    is_option: bool
    value: str
    default: str
    help: str


def page() -> str:
    """Return the text of the page.

    Raises:
        UndocumentedError: A command, an argument or an option has no help.
    """
    functions = [command.callback for command in app.registered_commands if command.callback is not None]
    parts = ["# Command line", notice("the commands"), _INTRODUCTION]
    parts.append(table(["command", "purpose"], [_command_row(function) for function in functions]))
    if app.registered_callback is not None and app.registered_callback.callback is not None:
        options = list_parameters(app.registered_callback.callback)
        parts += ["## Options of `batchjob` itself", _parameter_table("option", options)]
    for function in functions:
        parts += _describe_command(function)
    return "\n\n".join(parts) + "\n"


def list_parameters(function: Callable[..., Any]) -> list[Parameter]:
    """List the arguments and options of the function of a command.

    Raises:
        UndocumentedError: One of them has no help.
    """
    return list(_walk_parameters(function))


def _walk_parameters(function: Callable[..., Any]) -> Iterator[Parameter]:
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        annotation, *metadata = typing.get_args(hints[name])
        info = next(item for item in metadata if isinstance(item, ArgumentInfo | OptionInfo))
        if not info.help:
            raise UndocumentedError(f"batchjob {_name(function)}: {name} has no help")
        default = "" if parameter.default in {None, False, inspect.Parameter.empty} else f"`{parameter.default}`"
        if isinstance(info, ArgumentInfo):
            required = parameter.default is inspect.Parameter.empty
            yield Parameter(info.metavar or name.upper(), False, "", "**required**" if required else default, info.help)
        else:
            # typer keeps the first name of an option in `default`, where it stands in `Annotated`.
            names = [text for text in (info.default, *(info.param_decls or ())) if isinstance(text, str)]
            if not names:
                dashed = name.replace("_", "-")
                names = [f"--{dashed}", *([f"--no-{dashed}"] if annotation is bool else [])]
            value = "" if annotation is bool else info.metavar or _describe_value(annotation)
            yield Parameter(", ".join(f"`{name}`" for name in names), True, value, default, info.help)


def _describe_value(annotation: Any) -> str:
    types = [part for part in (annotation, *typing.get_args(annotation)) if isinstance(part, type)]
    for part in types:
        if issubclass(part, Enum):
            return ", ".join(f"`{member.value}`" for member in part)
    words = {str: "text", int: "integer", float: "number"}
    return next((words[part] for part in types if part in words), "text")


def _name(function: Callable[..., Any]) -> str:
    return function.__name__.replace("_", "-")


def _help(function: Callable[..., Any]) -> str:
    if not (text := inspect.getdoc(function)):
        raise UndocumentedError(f"batchjob {_name(function)} has no docstring, which is its help")
    return text


def _command_row(function: Callable[..., Any]) -> list[str]:
    name = _name(function)
    return [f"[`batchjob {name}`](#batchjob-{name})", _help(function).partition("\n\n")[0]]


def _describe_command(function: Callable[..., Any]) -> Iterator[str]:
    parameters = list_parameters(function)
    arguments = [parameter for parameter in parameters if not parameter.is_option]
    options = [parameter for parameter in parameters if parameter.is_option]
    usage = [
        argument.names if argument.default == "**required**" else f"[{argument.names} …]" for argument in arguments
    ]
    yield f"## `batchjob {_name(function)}`"
    yield "```text\n" + " ".join(["batchjob", _name(function), *usage, *(["[options]"] if options else [])]) + "\n```"
    yield join_lines(_help(function))
    if arguments:
        yield table(["argument", "meaning"], [[f"`{argument.names}`", argument.help] for argument in arguments])
    if options:
        yield _parameter_table("option", options)


def _parameter_table(title: str, parameters: list[Parameter]) -> str:
    rows = [[item.names, item.value, item.default, item.help] for item in parameters]
    return table([title, "value", "default", "meaning"], rows)
