"""Buckets through obstore: S3, Google Cloud Storage, Azure."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

from batchjob.errors import InvalidJob, NotFound, Unavailable
from batchjob.storage.backend import CLOUD_SCHEMES, LIST_PAGE_SIZE, Backend, is_plain_key, unquote_etag
from batchjob.storage.client_errors import check_etag, check_size, read_timeout, translate_errors, treat_416_as_empty
from batchjob.storage.fsspec_backend import Boto3Backend, FsspecBackend
from batchjob.storage.objects import ObjectData, ObjectInfo
from batchjob.storage.options import StorageOptions
from batchjob.storage.outage import Outage, upload_timeout

if TYPE_CHECKING:
    from obstore import PutMode
    from obstore.store import AzureStore, ClientConfig, GCSStore, RetryConfig, S3Store

    CloudClient = S3Store | GCSStore | AzureStore

__all__ = ["ObstoreBackend", "open_bucket"]

T = TypeVar("T")
_EXTRAS = {"s3": "s3", "gs": "gcs", "az": "azure"}
_ACCOUNT = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "AZURE_STORAGE_USE_EMULATOR")
_NO_RETRY_AFTER = 1000  # the window in seconds decides, not the count


class ObstoreBackend:
    """A bucket through obstore; keys that it cannot name, and listings that hold one, through `other`."""

    def __init__(
        self,
        kind: str,
        base: str,
        connect: Callable[..., CloudClient],
        fallback: Backend,
        retry_timeout: float,
        outage: Outage,
    ) -> None:
        self._kind, self._base, self._connect, self._other = kind, base, connect, fallback
        self._patience, self._outage = retry_timeout, outage
        self._clients: dict[int, CloudClient] = {}
        self._lock = Lock()

    def get(self, key: str, etag: str | None = None, limit: int | None = None) -> ObjectData:
        if not is_plain_key(key):
            return self._other.get(key, etag, limit)

        def question() -> ObjectData:
            answer = self._client().get(key)
            check_etag(etag, unquote_etag(answer.meta["e_tag"]), self._base + key)
            check_size(limit, answer.meta["size"], self._base + key)
            return ObjectData(answer.bytes().to_bytes(), unquote_etag(answer.meta["e_tag"]), self._version(answer.meta))

        return self._ask(key, question)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        if not is_plain_key(key):
            return self._other.get_range(key, start, end)
        ask = partial(self._client().get_range, key, start=start, end=end)
        return self._ask(key, lambda: treat_416_as_empty(lambda: ask().to_bytes()))

    def get_tail(self, key: str, size: int) -> bytes:
        if self._kind == "az":  # knows no suffix ranges
            end = self.head(key).size
            return self.get_range(key, max(0, end - size), end) if end else b""
        ask = partial(self._client().get, key, options={"range": {"suffix": size}})
        return self._ask(key, lambda: treat_416_as_empty(lambda: ask().bytes().to_bytes()))

    def head(self, key: str) -> ObjectInfo:
        if not is_plain_key(key):
            return self._other.head(key)
        return self._ask(key, lambda: self._stat(self._client().head(key)))

    def list(self, prefix: str, after: str | None, recursive: bool) -> Iterator[ObjectInfo]:
        # One level at a time obstore does not stream; at the root of a bucket it would drop a leading slash (which
        # only S3 gets right here: through fsspec a whole bucket would be held in memory).
        nameable = is_plain_key(prefix.removesuffix("/")) or (not prefix and self._kind != "s3")
        if not recursive or not nameable or not is_plain_key(after or "any"):
            yield from self._other.list(prefix, after, recursive)
            return
        from obstore.exceptions import InvalidPathError

        pages: Iterator[Any] | None = None

        def next_page() -> Any:
            nonlocal pages
            try:
                pages = pages or iter(self._client().list(prefix, offset=after, chunk_size=LIST_PAGE_SIZE))
                return next(pages, None)
            except Exception:
                pages = None  # a listing that broke off is begun anew, after what it has brought
                raise

        try:
            while (page := self._ask(prefix, next_page, let=InvalidPathError)) is not None:
                for meta in page:
                    after = meta["path"]
                    if meta["size"] or self._is_object(after):
                        yield self._stat(meta)
        except InvalidPathError:
            yield from self._other.list(prefix, after, recursive)

    def put(self, key: str, body: bytes | Path, mode: PutMode) -> ObjectInfo:
        data = body.read_bytes() if isinstance(body, Path) else body

        def question() -> ObjectInfo:
            done = self._client(len(data)).put(key, data, mode=mode, use_multipart=False)
            return ObjectInfo(key, len(data), unquote_etag(done["e_tag"]), self._version(done))

        return self._ask(key, question, writing=True)

    def update_mode(self, version: str) -> PutMode:
        return {"version": version} if self._kind == "gs" else {"e_tag": version}

    def delete(self, key: str) -> None:
        with suppress(NotFound):
            self._ask(key, lambda: self._client().delete(key))

    def _ask(
        self, key: str, question: Callable[[], T], *, writing: bool = False, let: type[Exception] | None = None
    ) -> T:
        """What the client answers, in our words, once the store is there again."""

        def once() -> T:
            with translate_errors(self._base + key, writing=writing, reraise=let):
                return question()

        return self._outage.retry_until_answered(once)

    def _is_object(self, key: str) -> bool:
        """False for the `a/` that stands for a folder: obstore lists it as `a`, empty."""
        with suppress(NotFound):
            self.head(key)
            return True
        return False

    def _stat(self, meta: Mapping[str, Any]) -> ObjectInfo:
        return ObjectInfo(meta["path"], meta["size"], unquote_etag(meta["e_tag"]), self._version(meta))

    def _version(self, meta: Mapping[str, Any]) -> str | None:
        found: str | None = meta["version"] if self._kind == "gs" else meta["e_tag"]
        return found

    def _client(self, upload: int | None = None) -> CloudClient:
        """For reading, or for an upload of so many bytes."""
        timeout = 0 if upload is None else upload_timeout(upload)
        with self._lock:
            if timeout not in self._clients:
                self._clients[timeout] = self._connect(
                    _client_config(timeout, self._patience), _retries(self._patience)
                )
            return self._clients[timeout]


def open_bucket(
    scheme: str, bucket: str, options: StorageOptions, retry_timeout: float, outage: Outage
) -> ObstoreBackend:
    """Raises InvalidJob without a bucket or where the extra is missing, Unavailable without credentials."""
    kind, base = CLOUD_SCHEMES[scheme.lower()], f"{scheme}://{bucket}/"
    if not bucket:
        raise InvalidJob(f"{scheme}://: names no bucket; write {scheme}://bucket/prefix")
    if options.requester_pays and kind != "s3":
        raise InvalidJob(f"{base}: requester_pays is known on s3:// only; remove it")
    connect = {"s3": _connect_s3, "gs": _connect_gs, "az": _connect_az}[kind]
    try:
        with translate_errors(base):
            client, other = connect(bucket, base, options, retry_timeout, outage)
    except ImportError as error:
        raise InvalidJob(f"{scheme}:// needs the extra: pip install 'batchjob[{_EXTRAS[kind]}]'") from error
    return ObstoreBackend(kind, base, client, other, retry_timeout, outage)


_Connection = tuple["Callable[..., CloudClient]", Backend]


def _connect_s3(bucket: str, base: str, options: StorageOptions, patience: float, outage: Outage) -> _Connection:
    from obstore.store import S3Store

    boto = Boto3Backend(bucket, base, options, patience, outage)
    endpoint = boto.client.meta.endpoint_url
    provider = None if options.anonymous else _aws_credentials(boto, base)

    def connect(config: ClientConfig, retries: RetryConfig) -> CloudClient:
        if endpoint.startswith("http://"):
            config = {**config, "allow_http": True}
        return S3Store(
            bucket,
            aws_endpoint_url_s3=endpoint,  # of obstore's two names for it, the one that wins over the environment
            region=boto.client.meta.region_name,
            request_payer=options.requester_pays,
            skip_signature=options.anonymous,
            credential_provider=provider,
            client_options=config,
            retry_config=retries,
        )

    return connect, boto


def _aws_credentials(boto: Boto3Backend, base: str) -> Any:
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        return Boto3CredentialProvider(boto.session)
    except ValueError as error:
        raise Unavailable(
            f"{base}: no AWS credentials found; set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or `anonymous: true` in the storage options for a public bucket"
        ) from error


def _connect_gs(bucket: str, base: str, options: StorageOptions, patience: float, outage: Outage) -> _Connection:
    from obstore.auth.google import GoogleCredentialProvider
    from obstore.store import GCSStore

    provider = None if options.anonymous else GoogleCredentialProvider()
    place = {"base_url": options.endpoint} if options.endpoint else {}

    def connect(config: ClientConfig, retries: RetryConfig) -> CloudClient:
        config = {**config, "allow_http": (options.endpoint or "").startswith("http://")}
        skip = options.anonymous
        return GCSStore(
            bucket,
            skip_signature=skip,
            credential_provider=provider,
            client_options=config,
            retry_config=retries,
            **place,  # type: ignore[arg-type]
        )

    return connect, FsspecBackend(base, {"token": "anon"} if options.anonymous else {}, patience, outage)


def _connect_az(bucket: str, base: str, options: StorageOptions, patience: float, outage: Outage) -> _Connection:
    from obstore.store import AzureStore

    container, _, host = bucket.partition("@")
    place = {"account_name": host.partition(".")[0]} if host else {}
    place |= {"endpoint": options.endpoint} if options.endpoint else {}
    if not place and not any(os.environ.get(name) for name in _ACCOUNT):
        raise InvalidJob(
            f"{base}: names no storage account; set AZURE_STORAGE_ACCOUNT_NAME, "
            f"or write abfss://{container}@account.dfs.core.windows.net/prefix"
        )
    keys = ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY")
    provider: Any = None
    if not options.anonymous and not any(os.environ.get(name) for name in keys):
        provider = import_module("obstore.auth.azure").AzureCredentialProvider()

    def connect(config: ClientConfig, retries: RetryConfig) -> CloudClient:
        config = {**config, "allow_http": (options.endpoint or "").startswith("http://")}
        return AzureStore(
            container,
            skip_signature=options.anonymous,
            credential_provider=provider,
            client_options=config,
            retry_config=retries,
            **place,  # type: ignore[arg-type]
        )

    return connect, FsspecBackend(base, {"anon": options.anonymous}, patience, outage)


def _client_config(timeout: int, patience: float) -> ClientConfig:
    config: ClientConfig = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(seconds=timeout or 600)}
    if not timeout:  # during an upload nothing is read: there it would count the upload itself
        config["read_timeout"] = timedelta(seconds=read_timeout(patience))
    return config


def _retries(patience: float) -> RetryConfig:
    return {
        "max_retries": _NO_RETRY_AFTER if patience else 0,
        "retry_timeout": timedelta(seconds=patience),
        "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2},
    }
