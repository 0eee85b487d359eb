"""Glob patterns over `/`-separated names: `*`, `?`, `[…]` within a segment, `**` across segments."""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["filter_by", "has_magic", "literal_start", "split", "translate"]

_MAGIC = re.compile(r"[*?[]")


def has_magic(text: str) -> bool:
    """True where a character of `text` has a meaning in a pattern."""
    return _MAGIC.search(text) is not None


def split(pattern: str) -> tuple[str, str]:
    """The folder before the first segment with magic (ends with `/`), and the pattern below it."""
    first = _MAGIC.search(pattern)
    cut = pattern.rfind("/", 0, first.start() if first else len(pattern)) + 1
    return pattern[:cut], pattern[cut:]


def literal_start(pattern: str) -> str:
    """What every match begins with."""
    first = _MAGIC.search(pattern)
    return pattern[: first.start()] if first else pattern


def translate(pattern: str) -> str:
    """The pattern as a regular expression for `fullmatch`. A segment `**` stands for any number of segments."""
    out, at = "", 0
    while at < len(pattern):
        if pattern.startswith("**/", at) and (at == 0 or pattern[at - 1] == "/"):
            out, at = out + "(?:[^/]+/)*", at + 3
        elif pattern.startswith("**", at):
            out, at = out + ".*", at + 2
        elif pattern[at] == "*":
            out, at = out + "[^/]*", at + 1
        elif pattern[at] == "?":
            out, at = out + "[^/]", at + 1
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2 + (pattern[at + 1 : at + 2] == "!"))) > 0:
            out, at = out + _class(pattern[at + 1 : end]), end + 1
        else:
            out, at = out + re.escape(pattern[at]), at + 1
    return f"(?s:{out})"


def filter_by(include: tuple[str, ...], exclude: tuple[str, ...]) -> Callable[[str], bool]:
    """A test of paths relative to the input: matched by one of `include` (where given) and by none of `exclude`.

    As in `.gitignore`: a pattern with a `/` before its end is matched from the input's folder on, any other one
    against each name of the path; what matches a folder matches all below it.
    """
    wanted, unwanted = _any_of(include), _any_of(exclude)

    def passes(path: str) -> bool:
        return (wanted is None or wanted.fullmatch(path) is not None) and (
            unwanted is None or unwanted.fullmatch(path) is None
        )

    return passes


def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(_anchored, patterns))) if patterns else None


def _anchored(pattern: str) -> str:
    name = pattern.rstrip("/")
    below = "/.*" if pattern.endswith("/") else "(?:/.*)?"
    above = "" if "/" in name else "(?:.*/)?"
    return f"(?s:{above}{translate(name.removeprefix('/'))}{below})"


def _class(inside: str) -> str:
    letters, out = inside.removeprefix("!"), ""
    while letters:
        if letters[1:2] == "-" and len(letters) > 2:
            out, letters = f"{out}{re.escape(letters[0])}-{re.escape(letters[2])}", letters[3:]
        else:
            out, letters = out + re.escape(letters[0]), letters[1:]
    return f"(?!/)[{'^' if inside.startswith('!') else ''}{out}]"
