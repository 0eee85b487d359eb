"""Every protocol of fsspec that no other backend reads, such as `memory://`, `hf://` and `zip://…::s3://…`."""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, BinaryIO, TypeVar

from batchjob.errors import InvalidJob, NotFound
from batchjob.storage.archives import archive_arguments, check_archive_is_whole, find_member
from batchjob.storage.backend import unquote_etag
from batchjob.storage.client_errors import check_etag, check_size, translate_errors
from batchjob.storage.objects import ObjectData, ObjectInfo
from batchjob.storage.retry_policy import RetryPolicy
from batchjob.uris import split_chain, suggest_scheme, uri_scheme

__all__ = ["FsspecBackend", "suggest_protocol"]

T = TypeVar("T")


class FsspecBackend:
    """Any protocol of fsspec.

    Args:
        base: Prefix of all URIs; base + key is the URI of an object. Empty if keys are whole URIs.
        arguments: Keyword arguments of the fsspec file system.
        policy: Retries and timeouts.
    """

    def __init__(self, base: str, arguments: Mapping[str, Any], policy: RetryPolicy) -> None:
        self._base, self._arguments, self._policy = base, arguments, policy

    def get(self, key: str, etag: str | None = None, limit: int | None = None) -> ObjectData:
        """Return an object. See `Backend.get`."""
        filesystem, path = self._resolve(key)
        # fsspec returns neither tag nor size with the bytes: ask for them first, if they are to be checked.
        if etag is not None or limit is not None:
            info = self._send(key, lambda: filesystem.info(path))
            check_etag(etag, _object_info(key, info, 0).etag, self._base + key)
            check_size(limit, info.get("size") or 0, self._base + key)
            if limit is not None and not info.get("size"):
                return ObjectData(self._send(key, lambda: self._read_at_most(filesystem, path, limit)), etag)
        return ObjectData(self._send(key, lambda: bytes(filesystem.cat_file(path))), etag)

    def _read_at_most(self, filesystem: Any, path: str, limit: int) -> bytes:
        """Read an object whose size nobody tells. Raises ObjectTooLarge."""
        with filesystem.open(path, "rb") as file:
            data = bytes(file.read(limit + 1))
        check_size(limit, len(data), path)
        return data

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`."""
        filesystem, path = self._resolve(key)
        return self._send(key, lambda: bytes(filesystem.cat_file(path, start=start, end=end)))

    def head(self, key: str) -> ObjectInfo:
        """Return size and tag of an object; an object without a known size is read."""
        filesystem, path = self._resolve(key)
        info = self._send(key, lambda: filesystem.info(path))
        if info.get("type") == "directory":
            raise NotFound(f"{self._base}{key}: a folder, not a file; name a file")
        size = info.get("size")
        return _object_info(key, info, size if size is not None else len(self.get(key).data))

    def list(self, prefix: str, after: str | None, recursive: bool) -> Iterator[ObjectInfo]:
        """Yield the objects below a prefix, in the byte order of their keys; all of them are held in memory."""
        filesystem, root = self._resolve(prefix)
        check_archive_is_whole(filesystem, self._base + prefix)
        depth = None if recursive else 1
        with suppress(NotFound):
            found: dict[str, Any] = self._send(prefix, lambda: filesystem.find(root, maxdepth=depth, detail=True))
            yield from _sort_listing(found, prefix, root, after)

    def open(self, key: str) -> BinaryIO:
        """Return an object as a seekable file; one that fsspec cannot seek in is read whole."""
        filesystem, path = self._resolve(key)
        file: BinaryIO = self._send(key, lambda: filesystem.open(path, "rb"))
        if not file.seekable():
            return io.BytesIO(self.get(key).data)
        # A file system of an archive closes the archive when it is collected; it lives as long as the file does.
        weakref.finalize(file, lambda kept: None, filesystem).atexit = False
        return file

    def _resolve(self, key: str) -> tuple[Any, str]:
        """Return the fsspec file system of a key, and the key's path in it. Raises InvalidJob without a reader."""
        from fsspec.core import url_to_fs

        uri = self._base + key
        try:
            with translate_errors(uri, reraise=ValueError):
                filesystem, path = url_to_fs(uri, **{**archive_arguments(uri), **self._arguments})
        except (ImportError, ValueError) as error:  # The protocol is unknown, or its package is missing.
            scheme = uri_scheme(uri)
            raise InvalidJob(f"{uri}: no reader for {scheme}:// ({error}){suggest_protocol(scheme)}") from error
        filesystem.invalidate_cache()
        return filesystem, find_member(filesystem, path)

    def _send(self, key: str, request: Callable[[], T]) -> T:
        return self._policy.send(self._base + key, request, unaddressable_on_400=True)


def suggest_protocol(scheme: str) -> str:
    """Return `; did you mean s3://?` for a scheme that neither batchjob nor fsspec knows; else an empty text."""
    from fsspec import available_protocols

    return suggest_scheme(scheme, available_protocols())


def _sort_listing(found: Mapping[str, Any], prefix: str, root: str, after: str | None) -> Iterator[ObjectInfo]:
    """Yield what fsspec found below `root`, with keys that begin with `prefix`.

    For example, the prefix `zip://in::/a.zip` has the root `in`; the name `in/1.jpg` becomes the key
    `zip://in/1.jpg::/a.zip`: names are inside the first link, the rest of the chain follows unchanged.
    """
    inner, chain = split_chain(prefix)
    root_folder = root.rstrip("/") + "/"
    # The root of an archive is `zip://`, whose slashes belong to the scheme.
    folder = inner if not inner or inner.endswith("://") else inner.rstrip("/") + "/"
    names = {f"{folder}{name.removeprefix(root_folder)}{chain}": name for name in found}
    for key in sorted(names, key=_utf8):
        if after is None or _utf8(key) > _utf8(after):
            info = found[names[key]]
            yield _object_info(key, info, info.get("size") or 0)


def _object_info(key: str, info: Mapping[str, Any], size: int) -> ObjectInfo:
    etag = info.get("ETag") or info.get("etag") or info.get("e_tag")
    return ObjectInfo(key, size, unquote_etag(str(etag)) if etag else None)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
