"""Settings as JSON holds them, with `./` before paths inside the job's folder; what was set apart from what was not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, BeforeValidator

from batchjob.settings import Settings, is_local

__all__ = ["fill_unset_fields", "serialize_all_fields", "serialize_set_fields"]


def serialize_set_fields(settings: BaseModel, folder: Path) -> dict[str, Any]:
    """Fields that were given (and every `type`), in the order the class declares them; `base` is the job's folder."""
    given = settings.model_fields_set | {"type"}
    return {name: value for name, value in serialize_all_fields(settings, folder).items() if name in given}


def serialize_all_fields(settings: BaseModel, folder: Path) -> dict[str, Any]:
    """All fields, those that were not given too, as JSON holds them."""
    return {
        name: _plain(getattr(settings, name), folder, _holds_path(field.annotation) or _is_path(field.metadata))
        for name, field in type(settings).model_fields.items()
    }


def fill_unset_fields(settings: Settings, defaults: Mapping[str, Any], folder: Path) -> Settings:
    """The same settings with these values in fields that are not set, and go on not being set."""
    kind = type(settings)
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    filled = kind.model_validate(given | dict(defaults), context={"base": folder})
    values = {name: getattr(filled, name) for name in kind.model_fields}
    return kind.model_construct(_fields_set=set(settings.model_fields_set), **values)


def _plain(value: Any, base: Path, path: bool) -> Any:
    match value:
        case BaseModel():
            return serialize_set_fields(value, base)
        case Mapping():
            return {str(key): _plain(item, base, path) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, base, path) for item in value]
        case str() if path and is_local(value):
            return _beside(value, base)
        case str():
            return str(value)
    return value


def _beside(value: str, base: Path) -> str:
    if value.rstrip("/") == str(base):
        return "./"
    return f"./{value[len(str(base)) + 1 :]}" if value.startswith(f"{str(base).rstrip('/')}/") else value


def _is_path(metadata: Sequence[Any]) -> bool:
    # Uri and its kin are the only types that look at a value before it is validated.
    return any(isinstance(part, BeforeValidator) for part in metadata)


def _holds_path(annotation: Any) -> bool:
    return _is_path(getattr(annotation, "__metadata__", ())) or any(map(_holds_path, get_args(annotation)))
