"""Settings as JSON documents: all fields or the explicitly set ones, with `./` before paths in the job's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, BeforeValidator

from batchjob.functions.function_target import FunctionTarget
from batchjob.settings import Settings
from batchjob.uris import is_local

__all__ = ["fill_unset_fields", "make_relative", "serialize_all_fields", "serialize_set_fields"]


def serialize_set_fields(settings: BaseModel, folder: Path) -> dict[str, Any]:
    """Serialize the fields that were explicitly set, and every `type`.

    Args:
        settings: The settings.
        folder: The job's folder. A path in it is written as `./path`.

    Returns:
        Values as JSON holds them, in the order in which the class declares its fields.
    """
    names = settings.model_fields_set | {"type"}
    return {name: value for name, value in serialize_all_fields(settings, folder).items() if name in names}


def serialize_all_fields(settings: BaseModel, folder: Path) -> dict[str, Any]:
    """Serialize all fields, with the defaults of those that were not set; see `serialize_set_fields`."""
    return {
        name: _serialize(getattr(settings, name), folder, _is_path_type(field.annotation) or _is_path(field.metadata))
        for name, field in type(settings).model_fields.items()
    }


def fill_unset_fields(settings: Settings, defaults: Mapping[str, Any], folder: Path) -> Settings:
    """Return the settings with other values in fields that were not set. These fields still count as not set.

    Args:
        settings: The settings.
        defaults: Values by field, as JSON holds them.
        folder: The job's folder, against which relative paths resolve.

    Raises:
        ValidationError: A value does not fit its field.
    """
    settings_class = type(settings)
    set_values = {name: getattr(settings, name) for name in settings.model_fields_set}
    filled = settings_class.model_validate(set_values | dict(defaults), context={"base": folder})
    values = {name: getattr(filled, name) for name in settings_class.model_fields}
    return settings_class.model_construct(_fields_set=set(settings.model_fields_set), **values)


def _serialize(value: Any, folder: Path, is_path: bool) -> Any:
    match value:
        case BaseModel():
            return serialize_set_fields(value, folder)
        case Mapping():
            return {str(key): _serialize(item, folder, is_path) for key, item in value.items()}
        case list() | tuple():
            return [_serialize(item, folder, is_path) for item in value]
        case FunctionTarget():
            return value.to_document()
        case str() if is_path and is_local(value):
            return make_relative(value, folder)
        case str():
            return str(value)
    return value


def make_relative(path: str, folder: Path) -> str:
    """Return a path in a folder as `./path`; any other path unchanged."""
    if path.rstrip("/") == str(folder):
        return "./"
    return f"./{path[len(str(folder)) + 1 :]}" if path.startswith(f"{str(folder).rstrip('/')}/") else path


def _is_path(metadata: Sequence[Any]) -> bool:
    # `Uri` and the types made of it are the only ones with a validator that runs before pydantic's own.
    return any(isinstance(part, BeforeValidator) for part in metadata)


def _is_path_type(annotation: Any) -> bool:
    return _is_path(getattr(annotation, "__metadata__", ())) or any(map(_is_path_type, get_args(annotation)))
