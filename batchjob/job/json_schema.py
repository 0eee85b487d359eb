"""`Job`: everything a run needs to know, as one frozen model made of the settings of the rooms below.

Read from a job file with every fault named at its line, or built in Python. Its fingerprint decides whether an output
belongs to it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any, get_args

from batchjob.job.job import Job
from batchjob.settings import Settings

__all__ = ["job_json_schema"]


def job_json_schema() -> dict[str, Any]:
    """JSON schema of a job file, with descriptions, for editors."""
    schema = Job.model_json_schema()
    documented = {kind.__name__: kind for kind in _kinds_in(Job)}
    for name, definition in [("Job", schema), *schema.get("$defs", {}).items()]:
        if name in documented:
            _describe(definition, documented[name])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "batchjob job"}


def _kinds_in(annotation: Any) -> Iterator[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
        for field in annotation.model_fields.values():
            yield from _kinds_in(field.annotation)
    for part in get_args(annotation):
        yield from _kinds_in(part)


def _describe(definition: dict[str, Any], kind: type[Settings]) -> None:
    """Moves what the docstrings say of each attribute, also of inherited ones, to its property."""
    definition["description"] = (inspect.getdoc(kind) or "").partition("Attributes:")[0].strip()
    for ancestor in kind.__mro__:
        attributes = (inspect.getdoc(ancestor) or "").partition("Attributes:")[2]
        for name, words in re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", attributes, re.MULTILINE):
            if name in definition.get("properties", {}):
                definition["properties"][name].setdefault("description", re.sub(r"\s+", " ", words))
