"""JSON schema of a job file, with a description of each field from the docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any, get_args

from batchjob.job.job import Job
from batchjob.settings import Settings

__all__ = ["job_json_schema"]


def job_json_schema() -> dict[str, Any]:
    """Return the JSON schema of a job file, for editors that complete and check it."""
    schema = Job.model_json_schema()
    classes = {settings_class.__name__: settings_class for settings_class in _walk_settings_classes(Job)}
    for name, definition in [("Job", schema), *schema.get("$defs", {}).items()]:
        if name in classes:
            _add_descriptions(definition, classes[name])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "batchjob job"}


def _walk_settings_classes(annotation: Any) -> Iterator[type[Settings]]:
    """Yield the settings classes that a type is made of, and those of their fields."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
        for field in annotation.model_fields.values():
            yield from _walk_settings_classes(field.annotation)
    for argument in get_args(annotation):
        yield from _walk_settings_classes(argument)


def _add_descriptions(definition: dict[str, Any], settings_class: type[Settings]) -> None:
    """Copy the docstring, and the description of each attribute, also of inherited ones, into a schema definition."""
    definition["description"] = (inspect.getdoc(settings_class) or "").partition("Attributes:")[0].strip()
    for ancestor in settings_class.__mro__:
        attributes = (inspect.getdoc(ancestor) or "").partition("Attributes:")[2]
        for name, text in re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", attributes, re.MULTILINE):
            if name in definition.get("properties", {}):
                definition["properties"][name].setdefault("description", re.sub(r"\s+", " ", text))
