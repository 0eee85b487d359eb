"""Class names by id: a list in the job, a label file in one of three forms, or the names that the weights bring."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BeforeValidator

from batchjob.errors import InvalidJob, NotFound, StorageError
from batchjob.settings import Uri
from batchjob.text import with_article

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader
    from batchjob.tasks.settings import TaskContext

__all__ = [
    "CLASS_FIELDS",
    "DEFAULT_LABEL_BYTES",
    "Labels",
    "look_up_labels",
    "max_label_bytes",
    "read_labels",
    "resolve_class_names",
]

CLASS_FIELDS = [pa.field("label_id", pa.int32()), pa.field("label", pa.string()), pa.field("score", pa.float32())]
"""Fields of a predicted class, in all tasks with classes."""
DEFAULT_LABEL_BYTES = 128
"""Assumed upper bound of a label's bytes while the labels are not known."""
_FORMS = "a label file has one label a line, or is a JSON list, or a JSON object of id: label"


def _integers_to_text(value: Any) -> Any:
    """Accept whole numbers as labels. Booleans stay an error: YAML reads an unquoted `yes` or `no` as one."""
    if not isinstance(value, list | tuple):
        return value
    return [str(label) if type(label) is int else label for label in value]


Labels = Annotated[tuple[str, ...] | Uri | None, BeforeValidator(_integers_to_text)]
"""Class names by id, or the URI of a file of them."""


def resolve_class_names(labels: Labels, class_count: int | None, context: TaskContext) -> tuple[str, ...] | None:
    """Return the class names by id: those of the job, else those of the weights, else None.

    Args:
        labels: `task.labels` of the job.
        class_count: Number of classes the model gives; None if its output does not show it.
        context: Model, whose weights may bring names, and reader for a label file.

    Raises:
        InvalidJob: If there are more or fewer names than classes, or their file cannot be used.
        Unavailable: If the store of the file cannot be reached.
    """
    names, source = context.model_labels, "the weights name"
    if isinstance(labels, str):
        names, source = read_labels(context.reader, labels), f"task.labels: {labels} has"
    elif labels is not None:
        names, source = labels, "task.labels has"
    if names is not None and class_count is not None and len(names) != class_count:
        raise InvalidJob(
            f"{source} {len(names)} labels, but the model gives {class_count} classes; "
            "give one label for each class, in the order of their ids, under task.labels"
        )
    return names


def max_label_bytes(labels: Labels) -> int:
    """Return an upper bound of the UTF-8 bytes of one label."""
    names = labels if isinstance(labels, tuple) else ()
    return max((len(name.encode()) for name in names), default=DEFAULT_LABEL_BYTES)


def read_labels(reader: Reader, uri: str) -> tuple[str, ...]:
    """Read labels by id from a label file.

    The file has one label per line, or is a JSON list, or a JSON object `id: label` (Keras: `id: [wordnet id, name]`)
    or `label: id` (torchvision's `class_to_idx`).

    Raises:
        InvalidJob: If the file is missing, not UTF-8, in none of these forms, or its ids are not 0 to n-1.
        Unavailable: If the store cannot be reached.
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
    content = _parse_json(text, where, required=uri.endswith(".json"))
    if content is None:
        return tuple(line.strip() for line in text.rstrip().splitlines())
    if isinstance(content, list):
        return tuple(_require_label(label, where) for label in content)
    return _order_by_id(content, where)


def look_up_labels(labels: tuple[str, ...] | None, ids: pa.Array) -> pa.Array:
    """Return the label of each id as a string array; null where the id is null or has no label."""
    if labels is None:
        return pa.nulls(len(ids), pa.string())
    has_label = pc.and_(pc.greater_equal(ids, 0), pc.less(ids, len(labels)))
    return pa.array(labels, pa.string()).take(pc.if_else(has_label, ids, pa.scalar(None, ids.type)))


def _parse_json(text: str, where: str, *, required: bool) -> Any:
    """Return the JSON list or object in the text, or None: the first label of a plain file may begin with a bracket."""
    if not required and text.lstrip()[0] not in "[{":
        return None
    try:
        content = json.loads(text)
    except ValueError as error:
        if required:
            raise InvalidJob(f"{where} is not JSON ({error}); {_FORMS}") from error
        return None
    if not isinstance(content, list | dict):
        raise InvalidJob(f"{where} holds {with_article(type(content).__name__)}; {_FORMS}")
    return content


def _order_by_id(content: dict[str, Any], where: str) -> tuple[str, ...]:
    if all(key.isdecimal() for key in content):
        pairs = [(int(key), _require_label(label, where)) for key, label in content.items()]
    elif all(type(number) is int for number in content.values()):
        pairs = [(number, label) for label, number in content.items()]
    else:
        raise InvalidJob(f"{where} has keys that are not ids; {_FORMS}")
    by_id = dict(pairs)
    missing = next((number for number in range(len(pairs)) if number not in by_id), None)
    if missing is not None:
        raise InvalidJob(f"{where} has {len(pairs)} labels but none for id {missing}; ids run from 0 without gaps")
    return tuple(by_id[number] for number in range(len(pairs)))


def _require_label(label: Any, where: str) -> str:
    if isinstance(label, list) and label:
        return _require_label(label[-1], where)
    if isinstance(label, str) or type(label) is int:
        return str(label)
    raise InvalidJob(f"{where} holds {json.dumps(label)[:80]} in place of a label; {_FORMS}")
