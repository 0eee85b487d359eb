"""Where an input lies: a file, a folder or a glob, found out once and then listed in key order."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchjob.errors import InvalidJob, NotFound, Refused, Unaddressable
from batchjob.records import Stat
from batchjob.settings import is_local, local_path
from batchjob.sources import globs

if TYPE_CHECKING:
    from batchjob.storage import Reader

__all__ = ["Place", "as_folder", "find", "folder_of", "forbidden", "locate", "plain_uri", "unmet", "walk"]


@dataclass(frozen=True)
class Place:
    """An input that is there.

    Attributes:
        uri: as the job names it.
        folder: what relative names below are relative to; ends with `/`.
        file: the only object, where `uri` names one.
        pattern: glob relative to `folder`, where `uri` is one.
    """

    uri: str
    folder: str
    file: Stat | None = None
    pattern: str | None = None


def find(reader: Reader, uri: str) -> Place | None:
    """Tell file, folder and glob apart; None where nothing is there. Raises InvalidJob for what no name can be."""
    uri = plain_uri(uri)
    if _is_glob(uri):
        folder, pattern = globs.split(uri)
        try:
            re.compile(globs.translate(pattern))
        except re.error as error:
            raise InvalidJob(f"input.uri {uri}: not a glob pattern ({error}); write '[[]' for a literal '['") from error
        place = Place(uri, folder, pattern=pattern)
    elif (file := _file(reader, uri)) is not None:
        return Place(uri, folder_of(uri), file=file)
    else:
        place = Place(uri, as_folder(uri))
    return place if _folder_there(reader, place.folder) else None


def locate(reader: Reader, uri: str) -> Place:
    """Like `find`. Raises InvalidJob where nothing is there."""
    place = find(reader, uri)
    if place is None:
        raise InvalidJob(f"input.uri {uri}: nothing there; check its spelling, or what should have written it")
    return place


def walk(reader: Reader, place: Place, after: str | None, recursive: bool, outside: str | None) -> Iterator[Stat]:
    """The place's objects in the order of a listing (UTF-8 bytes of keys), after `after`; nothing below `outside`.

    Folder markers (keys that end with `/`) are no objects. A glob says itself how deep it reaches.
    """
    hidden = forbidden(place, outside)
    if place.file is not None:
        if after is None:
            yield place.file
        return
    found = _matches(reader, place, after) if place.pattern else reader.list(place.folder, after, recursive)
    for stat in found:
        if not stat.uri.endswith("/") and not (hidden and stat.uri.startswith(hidden)):
            yield stat


def forbidden(place: Place, outside: str | None) -> str | None:
    """`outside` as a listing of the place spells it (ends with `/`); None where the two do not meet.

    Raises InvalidJob when the place itself lies there.
    """
    if outside is None or is_local(outside) != is_local(place.folder):
        return None
    home, out = as_folder(place.folder), as_folder(plain_uri(outside))
    if is_local(out):
        home, out = (as_folder(os.path.realpath(folder)) for folder in (home, out))
    if home.startswith(out):
        raise InvalidJob(
            f"input.uri {place.uri} lies in the output {outside}, which is never read as input; "
            f"give output.uri a folder of its own"
        )
    return place.folder + out.removeprefix(home) if out.startswith(home) else None


def unmet(reader: Reader, uri: str, marker: str | None) -> str | None:
    """Why the input is not there yet: nothing at all, or its marker, which lies in the input's folder."""
    place = find(reader, uri)
    if place is None:
        return f"input.uri {uri}: nothing there yet"
    if marker is not None:
        try:
            reader.stat(place.folder + marker)
        except NotFound:
            return f"input.require.marker: {place.folder}{marker} is not there yet"
    return None


def plain_uri(uri: str) -> str:
    """The URI as listings spell it: local ones as a path, with the last `/` kept."""
    return str(local_path(uri)) + ("/" if uri.endswith("/") and uri != "/" else "") if is_local(uri) else uri


def as_folder(uri: str) -> str:
    """The URI with exactly the `/` that names what lies below it."""
    return uri if uri.endswith("/") else uri + "/"


def folder_of(uri: str) -> str:
    """The folder an object lies in; ends with `/`."""
    return uri[: uri.rfind("/") + 1]


def _matches(reader: Reader, place: Place, after: str | None) -> Iterator[Stat]:
    """Only what can match is listed: from the pattern's literal beginning on, and none after the last one with it."""
    pattern = place.pattern or ""
    matches = re.compile(globs.translate(pattern) + ("(?s:.*)" if pattern.endswith("/") else "")).fullmatch
    literal = globs.literal_start(pattern)
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


def _file(reader: Reader, uri: str) -> Stat | None:
    if uri.endswith("/"):
        return None
    if is_local(uri):
        return reader.stat(uri) if Path(uri).is_file() else None
    try:
        stat = reader.stat(uri)
    except NotFound:
        return None
    except Unaddressable as error:
        raise InvalidJob(f"input.uri {uri}: no client can address this ({error.message}); correct it") from error
    except Refused as error:
        raise InvalidJob(f"input.uri {error.message}") from error
    # Stores with real folders answer for one as for an object of no bytes.
    return stat if stat.size or not _anything(reader, as_folder(uri)) else None


def _folder_there(reader: Reader, folder: str) -> bool:
    return Path(folder).is_dir() if is_local(folder) else _anything(reader, folder)


def _anything(reader: Reader, folder: str) -> bool:
    try:
        return any(True for _ in itertools.islice(reader.list(folder), 1))
    except NotFound:
        return False


def _is_glob(uri: str) -> bool:
    if is_local(uri):
        return globs.has_magic(uri) and not Path(uri).exists()
    return globs.has_magic(uri) and not uri.startswith(("http://", "https://"))
