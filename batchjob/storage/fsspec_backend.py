"""Every other protocol through fsspec, for reading."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from functools import partial
from typing import Any, BinaryIO, TypeVar

from batchjob.errors import InvalidJob, NotFound
from batchjob.storage.backend import LIST_PAGE_SIZE, READ_THREADS, unquote_etag
from batchjob.storage.client_errors import (
    check_etag,
    check_size,
    read_timeout,
    retry_transient,
    translate_errors,
    treat_416_as_empty,
)
from batchjob.storage.objects import ObjectData, ObjectInfo
from batchjob.storage.options import StorageOptions
from batchjob.storage.outage import Outage

__all__ = ["Boto3Backend", "FsspecBackend"]

T = TypeVar("T")


class FsspecBackend:
    """Any protocol of fsspec, for reading. `base` + key is the URI."""

    def __init__(self, base: str, arguments: Mapping[str, Any], retry_timeout: float, outage: Outage) -> None:
        self._base, self._arguments, self._patience, self._outage = base, arguments, retry_timeout, outage

    def get(self, key: str, etag: str | None = None, limit: int | None = None) -> ObjectData:
        system, path = self._find(key)
        if etag is not None or limit is not None:  # a read brings neither tag nor size
            found = self._ask(key, lambda: system.info(path))
            check_etag(etag, self._stat(key, found, 0).etag, self._base + key)
            check_size(limit, found.get("size") or 0, self._base + key)
        return ObjectData(self._ask(key, lambda: bytes(system.cat_file(path))), etag)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        system, path = self._find(key)
        return self._ask(key, lambda: bytes(system.cat_file(path, start=start, end=end)))

    def head(self, key: str) -> ObjectInfo:
        system, path = self._find(key)
        found = self._ask(key, lambda: system.info(path))
        if found.get("type") == "directory":
            raise NotFound(f"{self._base}{key}: a folder, not a file; name a file")
        return self._stat(key, found, found.get("size") if found.get("size") is not None else len(self.get(key).data))

    def list(self, prefix: str, after: str | None, recursive: bool) -> Iterator[ObjectInfo]:
        system, root = self._find(prefix)
        depth = None if recursive else 1
        with suppress(NotFound):
            found: dict[str, Any] = self._ask(prefix, lambda: system.find(root, maxdepth=depth, detail=True))
            yield from self._in_order(found, prefix, root, after)

    def _in_order(self, found: Mapping[str, Any], prefix: str, root: str, after: str | None) -> Iterator[ObjectInfo]:
        # A chained URI (`zip://folder::s3://…`) lists names inside the first link; the rest of the chain stays.
        head, link, chain = prefix.partition("::")
        below, above = root.rstrip("/") + "/", head.rstrip("/") + "/" if head else ""
        keys = {f"{above}{name.removeprefix(below)}{link}{chain}": name for name in found}
        for key in sorted(keys, key=_utf8):
            if after is None or _utf8(key) > _utf8(after):
                yield self._stat(key, found[keys[key]], found[keys[key]].get("size") or 0)

    def open(self, key: str) -> BinaryIO:
        system, path = self._find(key)
        file: BinaryIO = self._ask(key, lambda: system.open(path, "rb"))
        return file if file.seekable() else io.BytesIO(self.get(key).data)

    def _stat(self, key: str, found: Mapping[str, Any], size: int) -> ObjectInfo:
        etag = found.get("ETag") or found.get("etag") or found.get("e_tag")
        return ObjectInfo(key, size, unquote_etag(str(etag)) if etag else None)

    def _find(self, key: str) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        uri = self._base + key
        try:
            with translate_errors(uri, reraise=ValueError):
                system, path = url_to_fs(uri, **self._arguments)
        except (ImportError, ValueError) as error:  # no such protocol, or its package is missing
            raise InvalidJob(f"{uri}: no reader for {uri.partition('://')[0]}:// ({error})") from error
        system.invalidate_cache()
        return system, path

    def _ask(self, key: str, question: Callable[[], T]) -> T:
        def once() -> T:
            with translate_errors(self._base + key, unaddressable_on_400=True):
                return retry_transient(self._patience, question)

        return self._outage.retry_until_answered(once)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


class Boto3Backend:
    """An S3 bucket through boto3: slower, but it can name every key, and lists them one level at a time."""

    def __init__(self, bucket: str, base: str, options: StorageOptions, retry_timeout: float, outage: Outage) -> None:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config

        self._bucket, self._base, self._patience, self._outage = bucket, base, retry_timeout, outage
        self._payer = {"RequestPayer": "requester"} if options.requester_pays else {}
        with translate_errors(base):
            self.session = boto3.Session()
            region = options.region or self.session.region_name or "us-east-1"
            unsigned = {"signature_version": UNSIGNED} if options.anonymous else {}
            style = {"addressing_style": "path"}
            wait = {
                "connect_timeout": 5,
                "read_timeout": read_timeout(retry_timeout),
                "max_pool_connections": READ_THREADS,
            }
            config = Config(retries={"total_max_attempts": 1}, s3=style, **wait, **unsigned)
            self.client = self.session.client("s3", region_name=region, endpoint_url=options.endpoint, config=config)

    def get(self, key: str, etag: str | None = None, limit: int | None = None) -> ObjectData:
        def ask() -> ObjectData:
            answer = self.client.get_object(Bucket=self._bucket, Key=key, **self._payer)
            with closing(answer["Body"]) as body:
                check_etag(etag, unquote_etag(answer["ETag"]), self._base + key)
                check_size(limit, answer["ContentLength"], self._base + key)
                return ObjectData(body.read(), unquote_etag(answer["ETag"]), answer["ETag"])

        return self._ask(key, ask)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        part = f"bytes={start}-{end - 1}"
        ask = partial(self.client.get_object, Bucket=self._bucket, Key=key, Range=part, **self._payer)
        return self._ask(key, lambda: treat_416_as_empty(lambda: bytes(ask()["Body"].read())))

    def head(self, key: str) -> ObjectInfo:
        found = self._ask(key, lambda: self.client.head_object(Bucket=self._bucket, Key=key, **self._payer))
        return ObjectInfo(key, found["ContentLength"], unquote_etag(found["ETag"]), found["ETag"])

    def list(self, prefix: str, after: str | None, recursive: bool) -> Iterator[ObjectInfo]:
        where = {"Bucket": self._bucket, "Prefix": prefix, "MaxKeys": LIST_PAGE_SIZE, **self._payer}
        where |= {"StartAfter": after} if after else {}
        where |= {} if recursive else {"Delimiter": "/"}
        while True:
            page = self._ask(prefix, partial(self.client.list_objects_v2, **where))
            for found in page.get("Contents", ()):
                if found["Size"] or not found["Key"].endswith("/"):
                    yield ObjectInfo(found["Key"], found["Size"], unquote_etag(found["ETag"]), found["ETag"])
            if not page.get("IsTruncated"):
                return
            where["ContinuationToken"] = page["NextContinuationToken"]

    def _ask(self, key: str, question: Callable[[], T]) -> T:
        def once() -> T:
            with translate_errors(self._base + key, unaddressable_on_400=True):
                return retry_transient(self._patience, question)

        return self._outage.retry_until_answered(once)
