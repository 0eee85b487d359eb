"""Page of the job file: each field of each section and kind, from the JSON schema of a job."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from batchjob.job.json_schema import job_json_schema
from docs.generate.markdown import UndocumentedError, join_lines, notice, table

__all__ = ["check_descriptions", "page"]

Schema = Mapping[str, Any]

_INTRODUCTION = """\
Every field that a job file may hold, with its type, its default and its meaning. The guide to [the job
file](../guides/job-file.md) explains how they work together; `batchjob schema` prints the same as a JSON schema, for
editors.

A field with the default **required** must be given. Unknown fields are errors. In a type, "text" is a string, "mapping"
is a YAML mapping, and values in `code` are written as they stand."""
_REFERENCE = "#/$defs/"
_TYPES = {"string": "text", "integer": "integer", "number": "number", "boolean": "`true` or `false`", "null": "`null`"}
_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
# Bounds of this size come from the computer, such as 2**63, and tell a reader nothing.
_UNINTERESTING_BOUND = 2**53


def page() -> str:
    """Return the text of the page.

    Raises:
        UndocumentedError: A field or a section has no description.
    """
    schema = job_json_schema()
    check_descriptions(schema)
    parts = ["# Job file", notice("the settings classes"), _INTRODUCTION, "## All sections"]
    parts.append(table(["section", "default", "meaning"], _section_rows(schema)))
    for name, field in schema["properties"].items():
        if next(_references(field), None):
            parts += [f"## `{name}`", *_section(name, field, schema["$defs"])]
    return "\n\n".join(parts) + "\n"


def check_descriptions(schema: Schema) -> None:
    """Raise an exception if a field or a settings class has no description.

    Raises:
        UndocumentedError: It names all of them.
    """
    missing = []
    for name, definition in {"Job": schema, **schema["$defs"]}.items():
        missing += [] if definition.get("description") else [name]
        fields = definition.get("properties", {})
        missing += [f"{name}.{key}" for key, field in _described_fields(fields) if not field.get("description")]
    if missing:
        raise UndocumentedError(f"describe under Attributes in the class's docstring: {', '.join(missing)}")


def _section_rows(schema: Schema) -> Iterator[list[str]]:
    for name, field in schema["properties"].items():
        is_section = next(_references(field), None) is not None
        shown = f"[`{name}`](#{name})" if is_section else f"`{name}`"
        yield [shown, _describe_default(name, field, schema), field["description"]]


def _section(path: str, field: Schema, definitions: Schema) -> list[str]:
    """Write one section: a table, or one for each of its kinds; then the sections nested in it."""
    kinds = field.get("discriminator", {}).get("mapping", {})
    type_of = {reference.removeprefix(_REFERENCE): kind for kind, reference in kinds.items()}
    is_mapping = "additionalProperties" in field
    parts: list[str] = [field["description"]] if kinds or is_mapping else []
    nested: dict[str, tuple[str, Schema]] = {}
    if is_mapping:
        parts.append("Fields of each entry:")
    for name in _references(field):
        definition = definitions[name]
        if kinds:
            parts.append(f"### {path}, `type: {type_of[name]}`")
        if not is_mapping:
            parts.append(join_lines(definition["description"]))
        parts.append(table(["field", "type", "default", "meaning"], _field_rows(path, definition)))
        for key, inner in definition["properties"].items():
            nested |= dict.fromkeys(_references(inner), (f"{path}.{key}", inner))
    for inner_path, inner in nested.values():
        parts += [f"### `{inner_path}`", *_section(inner_path, inner, definitions)]
    return parts


def _field_rows(path: str, definition: Schema) -> Iterator[list[str]]:
    for name, field in _described_fields(definition["properties"]):
        default = _describe_default(name, field, definition)
        yield [f"`{name}`", describe_type(field, f"{path}.{name}"), default, field["description"]]


def _described_fields(fields: Schema) -> Iterator[tuple[str, Schema]]:
    """Yield the fields except `type: kind`, whose only value stands in the title of the kind."""
    yield from ((name, field) for name, field in fields.items() if not (name == "type" and "const" in field))


def _references(field: Schema) -> Iterator[str]:
    """Yield the names of the settings classes that a field is made of."""
    if "$ref" in field:
        yield field["$ref"].removeprefix(_REFERENCE)
    for part in (*field.get("anyOf", ()), *field.get("oneOf", ())):
        yield from _references(part)
    if isinstance(field.get("additionalProperties"), Mapping):
        yield from _references(field["additionalProperties"])


def describe_type(field: Schema, path: str) -> str:
    """Describe the type of a field in words.

    Example: `{"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]}` becomes "integer ≥ 1, or `auto`".

    Args:
        field: JSON schema of the field.
        path: Path of the field in the job file, for a link to its own section.
    """
    if "anyOf" in field:
        return ", or ".join(dict.fromkeys(describe_type(part, path) for part in field["anyOf"]))
    if "$ref" in field:
        return f"[section](#{path.replace('.', '').lower()})"
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array":
        items = [field["items"]] if "items" in field else field["prefixItems"]
        return f"list of {', '.join(describe_type(item, path) for item in items)}"
    if field.get("type") == "object":
        values = field.get("additionalProperties")
        if not isinstance(values, Mapping):
            return "mapping"
        described = describe_type(values, path)
        return f"mapping to ({described})" if "anyOf" in values else f"mapping to {described}"
    bounds = [f"{sign} {field[key]:g}" for key, sign in _LIMITS.items() if _is_interesting(field.get(key))]
    return " ".join([_TYPES[field["type"]], " and ".join(bounds)]).strip()


def _is_interesting(bound: float | None) -> bool:
    return bound is not None and bound < _UNINTERESTING_BOUND


def _describe_default(name: str, field: Schema, definition: Schema) -> str:
    if name in definition.get("required", ()):
        return "**required**"
    if next(_references(field), None) and field.get("default"):
        return "see below"
    default = field.get("default", {})
    return f"`{default}`" if isinstance(default, str) else f"`{json.dumps(default, ensure_ascii=False)}`"
