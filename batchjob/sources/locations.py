"""Locations of inputs: a file, a folder or a glob, told apart once and then listed in key order."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchjob.errors import AddressRefused, InvalidJob, NotFound, UnaddressableKey
from batchjob.settings import is_local, local_path
from batchjob.sources.glob_patterns import glob_to_regex, has_magic, literal_prefix, split_glob
from batchjob.storage.objects import ObjectInfo

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = [
    "InputLocation",
    "explain_missing_input",
    "find_location",
    "list_location",
    "normalize_uri",
    "parent_folder",
    "require_location",
    "with_trailing_slash",
]


@dataclass(frozen=True)
class InputLocation:
    """An input that exists.

    For example, the glob `s3://lake/in/*.jpg` has the folder `s3://lake/in/` and the pattern `*.jpg`.

    Attributes:
        uri: URI as the job names it.
        folder: URI of the folder that relative names refer to; ends with `/`.
        file: The only object, if `uri` names one.
        pattern: Glob relative to `folder`, if `uri` is one.
    """

    uri: str
    folder: str
    file: ObjectInfo | None = None
    pattern: str | None = None


def find_location(reader: Reader, uri: str) -> InputLocation | None:
    """Tell file, folder and glob apart; return None if there is nothing. Raises InvalidJob for an impossible name."""
    uri = normalize_uri(uri)
    if _is_glob(uri):
        folder, pattern = split_glob(uri)
        try:
            re.compile(glob_to_regex(pattern))
        except re.error as error:
            raise InvalidJob(f"input.uri {uri}: not a glob pattern ({error}); write '[[]' for a literal '['") from error
        location = InputLocation(uri, folder, pattern=pattern)
    elif (file := _find_file(reader, uri)) is not None:
        return InputLocation(uri, parent_folder(uri), file=file)
    else:
        location = InputLocation(uri, with_trailing_slash(uri))
    return location if _folder_exists(reader, location.folder) else None


def require_location(reader: Reader, uri: str) -> InputLocation:
    """Return the location like `find_location`. Raises InvalidJob if there is nothing."""
    location = find_location(reader, uri)
    if location is None:
        raise InvalidJob(f"input.uri {uri}: nothing there; check its spelling, or what should have written it")
    return location


def explain_missing_input(reader: Reader, uri: str, marker: str | None) -> str | None:
    """Return a sentence that says why the input is not there yet: nothing at all, or no marker in its folder."""
    location = find_location(reader, uri)
    if location is None:
        return f"input.uri {uri}: nothing there yet"
    if marker is not None:
        try:
            reader.stat(location.folder + marker)
        except NotFound:
            return f"input.require.marker: {location.folder}{marker} is not there yet"
    return None


def list_location(
    reader: Reader, location: InputLocation, after: str | None, recursive: bool, excluded_folder: str | None
) -> Iterator[ObjectInfo]:
    """Yield the objects of a location in the order of a listing, which is that of the UTF-8 bytes of their keys.

    Folder markers (keys that end with `/`) are left out.

    Args:
        reader: Reader with the job's storage options.
        location: Location to list.
        after: URI of the last object that is left out; None starts at the first one.
        recursive: List the folders below too. A glob says itself how deep it reaches.
        excluded_folder: URI of a folder whose objects are left out.

    Raises:
        InvalidJob: The location lies in the excluded folder.
    """
    excluded_prefix = _excluded_prefix(location, excluded_folder)
    if location.file is not None:
        if after is None:
            yield location.file
        return
    if location.pattern:
        listed = _list_matches(reader, location.folder, location.pattern, after)
    else:
        listed = reader.list(location.folder, after, recursive)
    for found in listed:
        if not found.uri.endswith("/") and not (excluded_prefix and found.uri.startswith(excluded_prefix)):
            yield found


def normalize_uri(uri: str) -> str:
    """Return a URI as listings spell it: a local one as a path, with its last `/`."""
    return str(local_path(uri)) + ("/" if uri.endswith("/") and uri != "/" else "") if is_local(uri) else uri


def with_trailing_slash(uri: str) -> str:
    """Return the URI of a folder with its final `/`."""
    return uri if uri.endswith("/") else uri + "/"


def parent_folder(uri: str) -> str:
    """Return the folder of an object; ends with `/`."""
    return uri[: uri.rfind("/") + 1]


def _excluded_prefix(location: InputLocation, excluded_folder: str | None) -> str | None:
    """Return the excluded folder as a listing of the location spells it, with a final `/`; None if they are apart.

    For example, with the folder `/data/link/` and `/data/real/out` excluded, where `link` points to `real`, it is
    `/data/link/out/`. Raises InvalidJob if the location lies in the excluded folder.
    """
    if excluded_folder is None or is_local(excluded_folder) != is_local(location.folder):
        return None
    folder, excluded = with_trailing_slash(location.folder), with_trailing_slash(normalize_uri(excluded_folder))
    if is_local(excluded):
        folder, excluded = (with_trailing_slash(os.path.realpath(path)) for path in (folder, excluded))
    if folder.startswith(excluded):
        raise InvalidJob(
            f"input.uri {location.uri} lies in the output {excluded_folder}, which is never read as input; "
            f"give output.uri a folder of its own"
        )
    return location.folder + excluded.removeprefix(folder) if excluded.startswith(folder) else None


def _list_matches(reader: Reader, folder: str, pattern: str, after: str | None) -> Iterator[ObjectInfo]:
    """List a glob. The listing begins at the pattern's literal prefix, and ends after the last name with that prefix.

    For example, of `a-*` the listing begins after `a`, and ends at the first name after `a-` that has another prefix.
    """
    matches = re.compile(glob_to_regex(pattern) + ("(?s:.*)" if pattern.endswith("/") else "")).fullmatch
    prefix = literal_prefix(pattern)
    if after is None and len(prefix) > 1:
        after = folder + prefix[:-1]
    recursive = "/" in pattern or "**" in pattern
    for found in reader.list(folder, after, recursive):
        name = found.uri.removeprefix(folder)
        if matches(name):
            yield found
            continue
        # Every server lists first segments in ascending order, even one that lists `a/x` before `a-b`.
        segment = name.partition("/")[0]
        if _encode_key(segment) > _encode_key(prefix) and not segment.startswith(prefix):
            return


def _encode_key(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _find_file(reader: Reader, uri: str) -> ObjectInfo | None:
    if uri.endswith("/"):
        return None
    if is_local(uri):
        return reader.stat(uri) if Path(uri).is_file() else None
    try:
        found = reader.stat(uri)
    except NotFound:
        return None
    except UnaddressableKey as error:
        raise InvalidJob(f"input.uri {uri}: no client can address this ({error.message}); correct it") from error
    except AddressRefused as error:
        raise InvalidJob(f"input.uri {error.message}") from error
    # A store with real folders answers for a folder like for an empty object.
    return found if found.size or not _has_objects(reader, with_trailing_slash(uri)) else None


def _folder_exists(reader: Reader, folder: str) -> bool:
    return Path(folder).is_dir() if is_local(folder) else _has_objects(reader, folder)


def _has_objects(reader: Reader, folder: str) -> bool:
    try:
        return any(True for _ in itertools.islice(reader.list(folder), 1))
    except NotFound:
        return False


def _is_glob(uri: str) -> bool:
    if is_local(uri):
        return has_magic(uri) and not Path(uri).exists()
    return has_magic(uri) and not uri.startswith(("http://", "https://"))
