"""Glob patterns over names separated by `/`: `*`, `?`, `[…]` within a segment, `**` across segments."""

from __future__ import annotations

import re
from collections.abc import Callable

__all__ = [
    "glob_to_regex",
    "has_magic",
    "is_hidden",
    "literal_prefix",
    "make_folder_filter",
    "make_hidden_folder_filter",
    "make_hidden_path_filter",
    "make_path_filter",
    "split_glob",
]

_MAGIC = re.compile(r"[*?[]")
# Beginning of a hidden name: a dot, as of `.Trash` and `._a.jpg`, or `__MACOSX`, the folder of such files in a zip.
_HIDDEN_NAME = r"(?:\.(?!\.?(?:/|$))|__MACOSX(?:/|$))"
_NOT_HIDDEN = f"(?!{_HIDDEN_NAME})"
_PATH_NOT_HIDDEN = f"{_NOT_HIDDEN}(?:(?!/{_HIDDEN_NAME}).)*"
_HAS_HIDDEN_NAME = re.compile(f"(?:^|/){_HIDDEN_NAME}")


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


def is_hidden(path: str) -> bool:
    """Return True if a segment of the path is hidden: it begins with a dot, or is the folder `__MACOSX`."""
    # The first test is for speed: it is true for few of ten million names.
    return ("." in path or "_" in path) and _HAS_HIDDEN_NAME.search(path) is not None


def glob_to_regex(pattern: str, hidden: bool = True) -> str:
    """Return a glob as a regular expression for `re.fullmatch`; a segment `**` stands for any number of segments.

    For example, `**/*.jpg` becomes `(?s:(?:[^/]+/)*[^/]*\\.jpg)`.

    Args:
        pattern: The glob.
        hidden: False if wildcards do not match hidden names, as in a shell: only a literal dot does.
    """
    start, any_path = ("", ".*") if hidden else (_NOT_HIDDEN, f"(?:(?!/{_HIDDEN_NAME}).)*")
    regex, at = "", 0
    while at < len(pattern):
        begins_segment = at == 0 or pattern[at - 1] == "/"
        if begins_segment and pattern[at] in "*?[" and not pattern.startswith("**/", at):
            regex += start
        if pattern.startswith("**/", at) and begins_segment:
            regex, at = f"{regex}(?:{start}[^/]+/)*", at + 3
        elif pattern.startswith("**", at):
            regex, at = regex + any_path, at + 2
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


def make_hidden_path_filter(include: tuple[str, ...], glob: str | None) -> Callable[[str], bool]:
    """Return a test of hidden paths: each of its hidden names is named by one of `include`, or by the input's own glob.

    For example, `.thumbs/` and `.thumbs/*.jpg` name `.thumbs/a.jpg`, but `*.jpg` does not.
    """
    regexes = [_filter_to_regex(pattern, hidden=False) for pattern in include]
    if glob is not None:
        below = f"(?s:{_PATH_NOT_HIDDEN})" if glob.endswith("/") else ""
        regexes.append(glob_to_regex(glob, hidden=False) + below)
    named = re.compile("|".join(regexes)) if regexes else None
    return lambda path: named is not None and named.fullmatch(path) is not None


def make_hidden_folder_filter(include: tuple[str, ...], glob: str | None) -> Callable[[str], bool]:
    """Return a test of a hidden folder's name: some segment of the patterns may name it."""
    segments = [segment for pattern in (*include, *filter(None, [glob])) for segment in pattern.split("/")]
    regexes = [glob_to_regex(segment) for segment in segments if _HAS_HIDDEN_NAME.match(segment)]
    named = re.compile("|".join(regexes)) if regexes else None
    return lambda name: named is not None and named.fullmatch(name) is not None


def make_folder_filter(glob: str) -> Callable[[str], bool]:
    """Return a test of folders, `a/b/`: a match of the glob may lie below.

    For example, `a*/x/*.jpg` may match below `ab/` and `ab/x/`, but not below `b/`, `ab/y/` or `ab/x/deep/`.
    """
    if re.search(r"\[[^\]]*/", glob):  # A `/` in brackets ends no segment.
        return lambda folder: True
    segments = glob.split("/")
    # Behind the first `**` everything may match; the last segment is the name of a file, or empty after a final `/`.
    fixed = next((index for index, segment in enumerate(segments) if "**" in segment), len(segments) - 1)
    is_open = fixed < len(segments) - 1 or "**" in segments[-1] or not segments[-1]
    matches = [re.compile(glob_to_regex(segment)).fullmatch for segment in segments[:fixed]]

    def may_hold(folder: str) -> bool:
        names = folder.rstrip("/").split("/")
        if len(names) > fixed and not is_open:
            return False
        return all(match(name) for match, name in zip(matches, names, strict=False))

    return may_hold


def _compile_any(patterns: tuple[str, ...]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(_filter_to_regex, patterns))) if patterns else None


def _filter_to_regex(pattern: str, hidden: bool = True) -> str:
    any_path = ".*" if hidden else _PATH_NOT_HIDDEN
    name = pattern.rstrip("/")
    below = f"/{any_path}" if pattern.endswith("/") else f"(?:/{any_path})?"
    above = "" if "/" in name else f"(?:{any_path}/)?"
    return f"(?s:{above}{glob_to_regex(name.removeprefix('/'), hidden)}{below})"


def _class_to_regex(inside: str) -> str:
    """Return the inside of `[…]` as a regular expression: `!a-c` becomes `(?!/)[^a-c]`."""
    letters, regex = inside.removeprefix("!"), ""
    while letters:
        if letters[1:2] == "-" and len(letters) > 2:
            regex, letters = f"{regex}{re.escape(letters[0])}-{re.escape(letters[2])}", letters[3:]
        else:
            regex, letters = regex + re.escape(letters[0]), letters[1:]
    return f"(?!/)[{'^' if inside.startswith('!') else ''}{regex}]"
