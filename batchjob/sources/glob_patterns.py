"""Glob patterns over names separated by `/`: `*`, `?`, `[…]` within a segment, `**` across segments."""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = ["glob_to_regex", "has_magic", "literal_prefix", "make_path_filter", "split_glob"]

_MAGIC = re.compile(r"[*?[]")


def has_magic(text: str) -> bool:
    """Return True if a character of the text has a meaning in a pattern."""
    return _MAGIC.search(text) is not None


def split_glob(pattern: str) -> tuple[str, str]:
    """Split a glob before its first segment with magic: `s3://lake/in/*/a.jpg` is `s3://lake/in/` and `*/a.jpg`."""
    first = _MAGIC.search(pattern)
    cut = pattern.rfind("/", 0, first.start() if first else len(pattern)) + 1
    return pattern[:cut], pattern[cut:]


def literal_prefix(pattern: str) -> str:
    """Return the text with which every match begins: `a-` of `a-*/b`."""
    first = _MAGIC.search(pattern)
    return pattern[: first.start()] if first else pattern


def glob_to_regex(pattern: str) -> str:
    """Return a glob as a regular expression for `re.fullmatch`; a segment `**` stands for any number of segments.

    For example, `**/*.jpg` becomes `(?s:(?:[^/]+/)*[^/]*\\.jpg)`.
    """
    regex, at = "", 0
    while at < len(pattern):
        if pattern.startswith("**/", at) and (at == 0 or pattern[at - 1] == "/"):
            regex, at = regex + "(?:[^/]+/)*", at + 3
        elif pattern.startswith("**", at):
            regex, at = regex + ".*", at + 2
        elif pattern[at] == "*":
            regex, at = regex + "[^/]*", at + 1
        elif pattern[at] == "?":
            regex, at = regex + "[^/]", at + 1
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2 + (pattern[at + 1 : at + 2] == "!"))) > 0:
            regex, at = regex + _class_to_regex(pattern[at + 1 : end]), end + 1
        else:
            regex, at = regex + re.escape(pattern[at]), at + 1
    return f"(?s:{regex})"


def make_path_filter(include: tuple[str, ...], exclude: tuple[str, ...]) -> Callable[[str], bool]:
    """Return a test of paths relative to the input: one of `include`, if there are any, and none of `exclude` matches.

    Like in `.gitignore`: a pattern with a `/` before its end is matched from the input's folder on, any other pattern
    against each name of the path; a pattern that matches a folder matches everything below it. For example, `deep/`
    matches `a/deep/x.jpg`; `a/*` matches `a/x.jpg` and `a/b/y.jpg`.
    """
    included, excluded = _compile_any(include), _compile_any(exclude)

    def is_chosen(path: str) -> bool:
        return (included is None or included.fullmatch(path) is not None) and (
            excluded is None or excluded.fullmatch(path) is None
        )

    return is_chosen


def _compile_any(patterns: tuple[str, ...]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(_filter_to_regex, patterns))) if patterns else None


def _filter_to_regex(pattern: str) -> str:
    name = pattern.rstrip("/")
    below = "/.*" if pattern.endswith("/") else "(?:/.*)?"
    above = "" if "/" in name else "(?:.*/)?"
    return f"(?s:{above}{glob_to_regex(name.removeprefix('/'))}{below})"


def _class_to_regex(inside: str) -> str:
    """Return the inside of `[…]` as a regular expression: `!a-c` becomes `(?!/)[^a-c]`."""
    letters, regex = inside.removeprefix("!"), ""
    while letters:
        if letters[1:2] == "-" and len(letters) > 2:
            regex, letters = f"{regex}{re.escape(letters[0])}-{re.escape(letters[2])}", letters[3:]
        else:
            regex, letters = regex + re.escape(letters[0]), letters[1:]
    return f"(?!/)[{'^' if inside.startswith('!') else ''}{regex}]"
