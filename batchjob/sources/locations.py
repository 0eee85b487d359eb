"""Where an input lies: a file, a folder or a glob, found out once and then listed in key order."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchjob.errors import AddressRefused, InvalidJob, NotFound, UnaddressableKey
from batchjob.settings import is_local, local_path
from batchjob.storage.objects import ObjectInfo

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = [
    "InputLocation",
    "excluded_prefix",
    "explain_missing_input",
    "find_location",
    "glob_to_regex",
    "has_magic",
    "list_location",
    "literal_prefix",
    "make_path_filter",
    "normalize_uri",
    "parent_folder",
    "require_location",
    "split_glob",
    "with_trailing_slash",
]


@dataclass(frozen=True)
class InputLocation:
    """An input that is there.

    Attributes:
        uri: as the job names it.
        folder: what relative names below are relative to; ends with `/`.
        file: the only object, where `uri` names one.
        pattern: glob relative to `folder`, where `uri` is one.
    """

    uri: str
    folder: str
    file: ObjectInfo | None = None
    pattern: str | None = None


def find_location(reader: Reader, uri: str) -> InputLocation | None:
    """Tell file, folder and glob apart; None where nothing is there. Raises InvalidJob for what no name can be."""
    uri = normalize_uri(uri)
    if _is_glob(uri):
        folder, pattern = split_glob(uri)
        try:
            re.compile(glob_to_regex(pattern))
        except re.error as error:
            raise InvalidJob(f"input.uri {uri}: not a glob pattern ({error}); write '[[]' for a literal '['") from error
        place = InputLocation(uri, folder, pattern=pattern)
    elif (file := _file(reader, uri)) is not None:
        return InputLocation(uri, parent_folder(uri), file=file)
    else:
        place = InputLocation(uri, with_trailing_slash(uri))
    return place if _folder_there(reader, place.folder) else None


def require_location(reader: Reader, uri: str) -> InputLocation:
    """Like `find`. Raises InvalidJob where nothing is there."""
    place = find_location(reader, uri)
    if place is None:
        raise InvalidJob(f"input.uri {uri}: nothing there; check its spelling, or what should have written it")
    return place


def list_location(
    reader: Reader, location: InputLocation, after: str | None, recursive: bool, excluded_folder: str | None
) -> Iterator[ObjectInfo]:
    """The place's objects in the order of a listing (UTF-8 bytes of keys), after `after`; nothing below `outside`.

    Folder markers (keys that end with `/`) are no objects. A glob says itself how deep it reaches.
    """
    hidden = excluded_prefix(location, excluded_folder)
    if location.file is not None:
        if after is None:
            yield location.file
        return
    found = _matches(reader, location, after) if location.pattern else reader.list(location.folder, after, recursive)
    for stat in found:
        if not stat.uri.endswith("/") and not (hidden and stat.uri.startswith(hidden)):
            yield stat


def excluded_prefix(location: InputLocation, excluded_folder: str | None) -> str | None:
    """`outside` as a listing of the place spells it (ends with `/`); None where the two do not meet.

    Raises InvalidJob when the place itself lies there.
    """
    if excluded_folder is None or is_local(excluded_folder) != is_local(location.folder):
        return None
    home, out = with_trailing_slash(location.folder), with_trailing_slash(normalize_uri(excluded_folder))
    if is_local(out):
        home, out = (with_trailing_slash(os.path.realpath(folder)) for folder in (home, out))
    if home.startswith(out):
        raise InvalidJob(
            f"input.uri {location.uri} lies in the output {excluded_folder}, which is never read as input; "
            f"give output.uri a folder of its own"
        )
    return location.folder + out.removeprefix(home) if out.startswith(home) else None


def explain_missing_input(reader: Reader, uri: str, marker: str | None) -> str | None:
    """Why the input is not there yet: nothing at all, or its marker, which lies in the input's folder."""
    place = find_location(reader, uri)
    if place is None:
        return f"input.uri {uri}: nothing there yet"
    if marker is not None:
        try:
            reader.stat(place.folder + marker)
        except NotFound:
            return f"input.require.marker: {place.folder}{marker} is not there yet"
    return None


def normalize_uri(uri: str) -> str:
    """The URI as listings spell it: local ones as a path, with the last `/` kept."""
    return str(local_path(uri)) + ("/" if uri.endswith("/") and uri != "/" else "") if is_local(uri) else uri


def with_trailing_slash(uri: str) -> str:
    """The URI with exactly the `/` that names what lies below it."""
    return uri if uri.endswith("/") else uri + "/"


def parent_folder(uri: str) -> str:
    """The folder an object lies in; ends with `/`."""
    return uri[: uri.rfind("/") + 1]


def _matches(reader: Reader, place: InputLocation, after: str | None) -> Iterator[ObjectInfo]:
    """Only what can match is listed: from the pattern's literal beginning on, and none after the last one with it."""
    pattern = place.pattern or ""
    matches = re.compile(glob_to_regex(pattern) + ("(?s:.*)" if pattern.endswith("/") else "")).fullmatch
    literal = literal_prefix(pattern)
    if after is None and len(literal) > 1:
        after = place.folder + literal[:-1]
    deep = "/" in pattern or "**" in pattern
    for stat in reader.list(place.folder, after, deep):
        name = stat.uri.removeprefix(place.folder)
        if matches(name):
            yield stat
        # First segments rise in every order that is met, also where a server lists `a/x` before `a-b`.
        elif _key(first := name.partition("/")[0]) > _key(literal) and not first.startswith(literal):
            return


def _key(uri: str) -> bytes:
    return uri.encode("utf-8", "surrogateescape")


def _file(reader: Reader, uri: str) -> ObjectInfo | None:
    if uri.endswith("/"):
        return None
    if is_local(uri):
        return reader.stat(uri) if Path(uri).is_file() else None
    try:
        stat = reader.stat(uri)
    except NotFound:
        return None
    except UnaddressableKey as error:
        raise InvalidJob(f"input.uri {uri}: no client can address this ({error.message}); correct it") from error
    except AddressRefused as error:
        raise InvalidJob(f"input.uri {error.message}") from error
    # Stores with real folders answer for one as for an object of no bytes.
    return stat if stat.size or not _anything(reader, with_trailing_slash(uri)) else None


def _folder_there(reader: Reader, folder: str) -> bool:
    return Path(folder).is_dir() if is_local(folder) else _anything(reader, folder)


def _anything(reader: Reader, folder: str) -> bool:
    try:
        return any(True for _ in itertools.islice(reader.list(folder), 1))
    except NotFound:
        return False


def _is_glob(uri: str) -> bool:
    if is_local(uri):
        return has_magic(uri) and not Path(uri).exists()
    return has_magic(uri) and not uri.startswith(("http://", "https://"))


_MAGIC = re.compile(r"[*?[]")


def has_magic(text: str) -> bool:
    """True where a character of `text` has a meaning in a pattern."""
    return _MAGIC.search(text) is not None


def split_glob(pattern: str) -> tuple[str, str]:
    """The folder before the first segment with magic (ends with `/`), and the pattern below it."""
    first = _MAGIC.search(pattern)
    cut = pattern.rfind("/", 0, first.start() if first else len(pattern)) + 1
    return pattern[:cut], pattern[cut:]


def literal_prefix(pattern: str) -> str:
    """What every match begins with."""
    first = _MAGIC.search(pattern)
    return pattern[: first.start()] if first else pattern


def glob_to_regex(pattern: str) -> str:
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


def make_path_filter(include: tuple[str, ...], exclude: tuple[str, ...]) -> Callable[[str], bool]:
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
    return f"(?s:{above}{glob_to_regex(name.removeprefix('/'))}{below})"


def _class(inside: str) -> str:
    letters, out = inside.removeprefix("!"), ""
    while letters:
        if letters[1:2] == "-" and len(letters) > 2:
            out, letters = f"{out}{re.escape(letters[0])}-{re.escape(letters[2])}", letters[3:]
        else:
            out, letters = out + re.escape(letters[0]), letters[1:]
    return f"(?!/)[{'^' if inside.startswith('!') else ''}{out}]"
