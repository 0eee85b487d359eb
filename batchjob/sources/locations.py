"""Locations of inputs: a file, a folder or a glob, told apart once and then listed in key order."""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchjob.errors import AddressRefused, InvalidJob, NotFound, UnaddressableKey
from batchjob.sources.glob_patterns import glob_to_regex, has_magic, literal_prefix, split_glob
from batchjob.storage.backend import LIST_PAGE_SIZE
from batchjob.storage.objects import FolderFilter, ObjectInfo
from batchjob.uris import CLOUD_SCHEMES, is_below, is_local, local_path, split_chain, uri_scheme

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = [
    "InputLocation",
    "child_uri",
    "escape_magic",
    "explain_missing_input",
    "find_location",
    "list_location",
    "name_slice",
    "normalize_uri",
    "parent_folder",
    "require_location",
    "require_places",
    "with_trailing_slash",
]


# Character behind that of almost every name: a listing after `a/` with it begins behind the folder `a/`.
_LAST_CHARACTER = "\ufffd"
_ARCHIVES = {"zip", "tar"}  # schemes of names inside an archive
# Stores whose listings may begin after any key, and do so in the order of keys.
_ORDERED_STORES = {"s3", "gs"}


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
        inner, chain = split_chain(uri)
        folder, pattern = split_glob(inner)
        try:
            re.compile(glob_to_regex(pattern))
        except re.error as error:
            raise InvalidJob(f"input.uri {uri}: not a glob pattern ({error}); write '[[]' for a literal '['") from error
        location = InputLocation(uri, folder + chain, pattern=pattern)
    elif (file := _find_file(reader, uri)) is not None:
        return InputLocation(uri, parent_folder(uri), file=file)
    else:
        location = InputLocation(uri, with_trailing_slash(uri))
    return location if _folder_exists(reader, location.folder) else None


def require_location(reader: Reader, uri: str) -> InputLocation:
    """Return the location like `find_location`. Raises InvalidJob if there is nothing."""
    location = find_location(reader, uri)
    if location is None and uri_scheme(uri) in _ARCHIVES and not split_chain(uri)[1]:
        archive = uri.partition("://")[2]
        raise InvalidJob(
            f"input.uri {uri}: names no archive, which stands behind '::'; write {uri_scheme(uri)}://::{archive}"
        )
    if location is None:
        raise InvalidJob(f"input.uri {uri}: nothing there; check its spelling, or what should have written it")
    return location


def require_places(prefixes: Sequence[str]) -> None:
    """Check that the local folders of `input.within` exist: below a misspelt one no image lies. Raises InvalidJob."""
    if absent := [one for one in prefixes if is_local(one) and not local_path(one).exists()]:
        raise InvalidJob(f"input.within: {absent[0]} is not there, so every row would be refused; correct it")


def explain_missing_input(reader: Reader, uri: str, marker: str | None) -> str | None:
    """Return a sentence that says why the input is not there yet: nothing at all, or no marker in its folder."""
    location = find_location(reader, uri)
    if location is None:
        return f"input.uri {uri}: nothing there yet"
    if marker is not None:
        try:
            reader.stat(child_uri(location.folder, marker))
        except NotFound:
            return f"input.require.marker: {child_uri(location.folder, marker)} is not there yet"
    return None


def list_location(
    reader: Reader,
    location: InputLocation,
    after: str | None,
    recursive: bool,
    excluded_folder: str | None,
    folders: FolderFilter,
) -> Iterator[ObjectInfo]:
    """Yield the objects of a location in the order of a listing, which is that of the UTF-8 bytes of their keys.

    Folder markers (keys that end with `/`) are left out.

    Args:
        reader: Reader with the job's storage options.
        location: Location to list.
        after: URI of the last object that is left out; None starts at the first one.
        recursive: List the folders below too. A glob says itself how deep it reaches.
        excluded_folder: URI of a folder whose objects are left out.
        folders: Filter of the folders below the location's folder, relative to it.

    Raises:
        InvalidJob: The location lies in the excluded folder.
    """
    excluded_name = _excluded_name(location, excluded_folder)
    if location.file is not None:
        if after is None:
            yield location.file
        return
    listing = _FolderListing(reader, location.folder, _WalkFilter(excluded_name, folders))
    pattern = location.pattern
    listed = _list_matches(listing, pattern, after) if pattern else listing.list(after, recursive)
    for found in listed:
        name = found.uri[listing.names]
        if name and not name.endswith("/"):
            yield found


def normalize_uri(uri: str) -> str:
    """Return a URI as listings spell it: a local one as a path, with its last `/`."""
    return str(local_path(uri)) + ("/" if uri.endswith("/") and uri != "/" else "") if is_local(uri) else uri


def with_trailing_slash(uri: str) -> str:
    """Return the URI of a folder with its final `/`."""
    head, chain = split_chain(uri)
    return uri if head.endswith("/") else f"{head}/{chain}"


def parent_folder(uri: str) -> str:
    """Return the folder of an object; ends with `/`."""
    head, chain = split_chain(uri)
    return head[: head.rfind("/") + 1] + chain


def child_uri(folder: str, name: str) -> str:
    """Return the URI of a name in a folder."""
    head, chain = split_chain(folder)
    return head + name + chain


def name_slice(folder: str) -> slice:
    """Return the part of an object's URI that is its name relative to the folder that holds it.

    For example, of `zip://in/::s3://lake/a.zip` it is the part `a.jpg` of `zip://in/a.jpg::s3://lake/a.zip`.
    """
    head, chain = split_chain(folder)
    return slice(len(head), -len(chain) or None)


def escape_magic(name: str) -> str:
    """Return a name as a glob that matches this name only."""
    return re.sub(r"[*?[]", lambda magic: f"[{magic[0]}]", name)


def _excluded_name(location: InputLocation, excluded_folder: str | None) -> str | None:
    """Return the excluded folder relative to the location's folder, with a final `/`; None if they are apart.

    For example, with the folder `/data/link/` and `/data/real/out` excluded, where `link` points to `real`, it is
    `out/`. Raises InvalidJob if the location lies in the excluded folder.
    """
    if excluded_folder is None or is_local(excluded_folder) != is_local(location.folder):
        return None
    folder, excluded = with_trailing_slash(location.folder), with_trailing_slash(normalize_uri(excluded_folder))
    if is_local(excluded):
        folder, excluded = (with_trailing_slash(os.path.realpath(path)) for path in (folder, excluded))
    if is_below(folder, excluded):
        raise InvalidJob(
            f"input.uri {location.uri} lies in the output {excluded_folder}, which is never read as input; "
            f"give output.uri a folder of its own"
        )
    # Counted by its slashes, because `s3a://lake/` holds `s3://lake/out/` too.
    return "/".join(excluded.split("/")[folder.count("/") :]) if is_below(excluded, folder) else None


@dataclass(frozen=True)
class _WalkFilter:
    """Filter of the folders that a listing goes into, without the excluded one."""

    excluded_name: str | None
    folders: FolderFilter

    def enters(self, folder: str) -> bool:
        return folder != self.excluded_name and self.folders.enters(folder)

    def skip_unreadable(self, folder: str, reason: str) -> None:
        self.folders.skip_unreadable(folder, reason)


class _FolderListing:
    """Listing of a folder without the folders that a filter leaves out.

    On a local disk these are not entered. In a bucket their keys come with the others; after a page of such keys the
    listing begins again behind the folder.

    Args:
        reader: Reader with the job's storage options.
        folder: URI of the folder, with a final `/`.
        folders: Filter of the folders below it.

    Attributes:
        names: Part of an object's URI that is its name in the folder.
    """

    def __init__(self, reader: Reader, folder: str, folders: FolderFilter) -> None:
        self.folder, self.names = folder, name_slice(folder)
        self._reader, self._folders = reader, folders
        self._last_parent = ""
        self._last_refused: str | None = None
        self._is_ordered = CLOUD_SCHEMES.get(uri_scheme(folder)) in _ORDERED_STORES

    def list(self, after: str | None, recursive: bool) -> Iterator[ObjectInfo]:
        """Yield the objects after the URI `after`; not recursive: those directly in the folder."""
        if is_local(self.folder):
            yield from self._reader.list(self.folder, after, recursive, self._folders)
            return
        jumped: set[str] = set()
        while (refused := (yield from self._list_until(after, recursive, jumped))) is not None:
            jumped.add(refused)
            after = child_uri(self.folder, refused + _LAST_CHARACTER)

    def _list_until(
        self, after: str | None, recursive: bool, jumped: set[str]
    ) -> Generator[ObjectInfo, None, str | None]:
        """Yield objects; return a folder that is left out if a page of objects lies in it, None at the end."""
        last_refused, count = None, 0
        for found in self._reader.list(self.folder, after, recursive):
            refused = self._find_refused(found.uri[self.names])
            if refused is None:
                yield found
            count = count + 1 if refused is not None and refused == last_refused else 0
            last_refused = refused
            if refused is not None and self._is_ordered and count >= LIST_PAGE_SIZE and refused not in jumped:
                return refused
        return None

    def _find_refused(self, name: str) -> str | None:
        """Return the first folder above an object that is not entered; None if all are."""
        parent = name[: name.rfind("/") + 1]
        if parent != self._last_parent:
            ends = [match.end() for match in re.finditer("/", parent)]
            self._last_parent = parent
            self._last_refused = next((parent[:end] for end in ends if not self._folders.enters(parent[:end])), None)
        return self._last_refused


def _list_matches(listing: _FolderListing, pattern: str, after: str | None) -> Iterator[ObjectInfo]:
    """List a glob. The listing begins at the pattern's literal prefix, and ends after the last name with that prefix.

    For example, of `a-*` the listing begins after `a`, and ends at the first name after `a-` that has another prefix.
    """
    matches = re.compile(glob_to_regex(pattern) + ("(?s:.*)" if pattern.endswith("/") else "")).fullmatch
    prefix = literal_prefix(pattern)
    if after is None and len(prefix) > 1:
        after = child_uri(listing.folder, prefix[:-1])
    recursive = "/" in pattern or "**" in pattern
    for found in listing.list(after, recursive):
        name = found.uri[listing.names]
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
        return reader.stat(uri) if _is_local_kind(uri, stat.S_ISREG) else None
    try:
        found = reader.stat(uri)
    except NotFound:
        return None
    except UnaddressableKey as error:
        raise InvalidJob(f"input.uri {error.message}; correct it, or write it there again") from error
    except AddressRefused as error:
        raise InvalidJob(f"input.uri {error.message}") from error
    # A store with real folders answers for a folder like for an empty object.
    return found if found.size or not _has_objects(reader, with_trailing_slash(uri)) else None


def _folder_exists(reader: Reader, folder: str) -> bool:
    return _is_local_kind(folder, stat.S_ISDIR) if is_local(folder) else _has_objects(reader, folder)


def _is_local_kind(path: str, is_kind: Callable[[int], bool]) -> bool:
    try:
        return is_kind(Path(path).stat().st_mode)
    except PermissionError as error:
        raise InvalidJob(f"input.uri {path} cannot be read ({error.strerror}); give this user access to it") from error
    except (OSError, ValueError):  # Nothing can have this name.
        return False


def _has_objects(reader: Reader, folder: str) -> bool:
    try:
        return any(True for _ in itertools.islice(reader.list(folder), 1))
    except NotFound:
        return False


def _is_glob(uri: str) -> bool:
    if is_local(uri):
        return has_magic(uri) and not os.path.lexists(uri)
    return has_magic(split_chain(uri)[0]) and uri_scheme(uri) not in ("http", "https")
