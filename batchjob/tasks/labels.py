"""Class names by id: from a list in the job, from a file of one of three plain forms, or the weights' own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow as pa
from pydantic import BeforeValidator

from batchjob.errors import InvalidJob, NotFound, StorageError
from batchjob.settings import Uri

if TYPE_CHECKING:
    import numpy as np

    from batchjob.storage.reader import Reader

__all__ = ["DEFAULT_LABEL_BYTES", "Labels", "look_up_labels", "max_label_bytes", "read_labels", "resolve_class_names"]

DEFAULT_LABEL_BYTES = 128
"""What a label takes at most where it is not known yet."""
_FORMS = "a label file has one label a line, or is a JSON list, or a JSON object of id: label"


def _numbers_as_text(value: Any) -> Any:
    """Digits are fair labels; `yes` and `no`, which YAML may take for truth values, must be quoted."""
    if not isinstance(value, list | tuple):
        return value
    return [str(label) if type(label) is int else label for label in value]


Labels = Annotated[tuple[str, ...] | Uri | None, BeforeValidator(_numbers_as_text)]
"""Names by id, or a file of them."""


def resolve_class_names(
    labels: Labels, classes: int | None, own: tuple[str, ...] | None, reader: Reader
) -> tuple[str, ...] | None:
    """The names of a model's classes: those of the job, else what the weights bring, else None.

    `classes` is None where the output does not show how many there are.

    Raises:
        InvalidJob: they are not as many as the classes, or their file cannot be used.
        Unavailable: the store of the file cannot be reached.
    """
    given, source = own, "the weights name"
    if isinstance(labels, str):
        given, source = read_labels(reader, labels), f"task.labels: {labels} has"
    elif labels is not None:
        given, source = labels, "task.labels has"
    if given is not None and classes is not None and len(given) != classes:
        raise InvalidJob(
            f"{source} {len(given)} labels, but the model gives {classes} classes; "
            "give one label for each class, in the order of their ids, under task.labels"
        )
    return given


def max_label_bytes(labels: Labels) -> int:
    """A bound on the bytes of one label."""
    listed = labels if isinstance(labels, tuple) else ()
    return max((len(name.encode()) for name in listed), default=DEFAULT_LABEL_BYTES)


def read_labels(reader: Reader, uri: str) -> tuple[str, ...]:
    """Labels by id, from a text file of one a line, a JSON list, or a JSON object `id: label` (or `label: id`).

    Raises:
        InvalidJob: not there, not UTF-8, none of these, or ids that are not 0 to n-1.
        Unavailable: the store cannot be reached.
    """
    where = f"task.labels: {uri}"
    try:
        text = reader.read(uri).data.decode("utf-8-sig")
    except NotFound as error:
        raise InvalidJob(f"{where} is not there; correct the path, or give the labels as a list") from error
    except StorageError as error:
        raise InvalidJob(f"{where} cannot be read: {error.message}") from error
    except UnicodeDecodeError as error:
        raise InvalidJob(f"{where} is not UTF-8 text; {_FORMS}") from error
    if not text.strip():
        raise InvalidJob(f"{where} is empty; {_FORMS}")
    content = _json(text, where, uri.endswith(".json"))
    if content is None:
        return tuple(line.strip() for line in text.rstrip().splitlines())
    if isinstance(content, list):
        return tuple(_text(label, where) for label in content)
    return _by_id(content, where)


def look_up_labels(labels: tuple[str, ...] | None, ids: np.ndarray[Any, Any]) -> pa.Array:
    """The labels of these ids, a string each; null where there is none."""
    if labels is None:
        return pa.nulls(len(ids), pa.string())
    unknown = (ids < 0) | (ids >= len(labels))
    return pa.array(labels, pa.string()).take(pa.array(ids, mask=unknown))


def _json(text: str, where: str, must: bool) -> Any:
    """The JSON list or object in a text, or None: a plain label may begin with a bracket too."""
    if not must and text.lstrip()[0] not in "[{":
        return None
    try:
        content = json.loads(text)
    except ValueError as error:
        if must:
            raise InvalidJob(f"{where} is not JSON ({error}); {_FORMS}") from error
        return None
    if not isinstance(content, list | dict):
        raise InvalidJob(f"{where} holds a {type(content).__name__}; {_FORMS}")
    return content


def _by_id(content: dict[str, Any], where: str) -> tuple[str, ...]:
    if all(key.isdecimal() for key in content):
        pairs = [(int(key), _text(label, where)) for key, label in content.items()]
    elif all(type(number) is int for number in content.values()):  # torchvision's class_to_idx
        pairs = [(number, label) for label, number in content.items()]
    else:
        raise InvalidJob(f"{where} has keys that are not ids; {_FORMS}")
    found = dict(pairs)
    absent = next((number for number in range(len(pairs)) if number not in found), None)
    if absent is not None:
        raise InvalidJob(f"{where} has {len(pairs)} labels but none for id {absent}; ids run from 0 without gaps")
    return tuple(found[number] for number in range(len(pairs)))


def _text(label: Any, where: str) -> str:
    if isinstance(label, list) and label:  # Keras writes [wordnet id, name]
        return _text(label[-1], where)
    if isinstance(label, str) or type(label) is int:
        return str(label)
    raise InvalidJob(f"{where} holds {json.dumps(label)[:80]} in place of a label; {_FORMS}")
