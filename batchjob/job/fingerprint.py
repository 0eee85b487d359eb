"""`Job`: everything a run needs to know, as one frozen model made of the settings of the rooms below.

Read from a job file with every fault named at its line, or built in Python. Its fingerprint decides whether an output
belongs to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["diff_fingerprints"]


def diff_fingerprints(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, a line a key: `model.weights: V1 there, V2 here`."""
    a, b = dict(_leaves(there)), dict(_leaves(here))
    keys = dict.fromkeys([*a, *b])
    return [
        f"{key}: {_shown(a, key)} there, {_shown(b, key)} here"
        for key in keys
        if key not in a or key not in b or a[key] != b[key]
    ]


def _leaves(doc: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in doc.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    if key not in leaves:
        return "not set"
    value = leaves[key]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"
