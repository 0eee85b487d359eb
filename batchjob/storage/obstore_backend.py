"""Buckets on S3, Google Cloud Storage and Azure through obstore: reads, listings and conditional PUTs."""

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
from batchjob.storage.backend import LIST_PAGE_SIZE, Backend, is_plain_key, unquote_etag
from batchjob.storage.boto3_backend import Boto3Backend
from batchjob.storage.client_errors import check_etag, check_size, translate_errors, treat_416_as_empty
from batchjob.storage.fsspec_backend import FsspecBackend
from batchjob.storage.listing_filter import ListingFilter
from batchjob.storage.objects import ObjectData, ObjectInfo
from batchjob.storage.options import StorageOptions
from batchjob.storage.retry_policy import CONNECT_TIMEOUT, FIRST_BACKOFF, MAX_BACKOFF, RetryPolicy, upload_timeout
from batchjob.system import install_command
from batchjob.uris import CLOUD_SCHEMES, explain_bad_bucket

if TYPE_CHECKING:
    from obstore import PutMode
    from obstore.store import AzureStore, ClientConfig, GCSStore, RetryConfig, S3Store

    CloudClient = S3Store | GCSStore | AzureStore
    # Creates a client from `client_options` and `retry_config`; its endpoint; a backend that can name every key.
    Connection = tuple[Callable[..., CloudClient], str | None, Backend]

__all__ = ["ObstoreBackend", "open_bucket"]

T = TypeVar("T")

_EXTRAS = {"s3": "s3", "gs": "gcs", "az": "azure"}
_AZURE_ACCOUNT_VARIABLES = (
    *("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "AZURE_STORAGE_USE_EMULATOR"),
)
_AZURE_KEY_VARIABLES = (
    *("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY"),
)
_MAX_RETRIES = 1000  # more than fit into any retry timeout, so that the timeout decides and not the count
_READ_SECONDS = 600  # for one answer that is being read


class ObstoreBackend:
    """A bucket through obstore; keys that obstore cannot name, and listings that hold one, go to `fallback`.

    Args:
        provider: `s3`, `gs` or `az`.
        base: URI of the bucket; base + key is the URI of an object.
        connection: Function that creates an obstore client, the endpoint, and the fallback.
        policy: Retries and timeouts.
    """

    def __init__(self, provider: str, base: str, connection: Connection, policy: RetryPolicy) -> None:
        self._provider, self._base, self._policy = provider, base, policy
        self._connect, endpoint, self._fallback = connection
        self._allow_http = (endpoint or "").startswith("http://")
        self._clients: dict[int, CloudClient] = {}
        self._lock = Lock()

    def get(self, key: str, etag: str | None = None, limit: int | None = None) -> ObjectData:
        """Return an object. See `Backend.get`."""
        if not is_plain_key(key):
            return self._fallback.get(key, etag, limit)

        def request() -> ObjectData:
            answer = self._client().get(key)
            tag = unquote_etag(answer.meta["e_tag"])
            check_etag(etag, tag, self._base + key)
            check_size(limit, answer.meta["size"], self._base + key)
            return ObjectData(answer.bytes().to_bytes(), tag, self._version(answer.meta))

        return self._send(key, request)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`."""
        if not is_plain_key(key):
            return self._fallback.get_range(key, start, end)
        request = partial(self._client().get_range, key, start=start, end=end)
        return self._send(key, lambda: treat_416_as_empty(lambda: request().to_bytes()))

    def get_tail(self, key: str, size: int) -> bytes:
        """Return the last `size` bytes, or all of them."""
        # Azure knows no suffix ranges.
        if self._provider == "az":
            end = self.head(key).size
            return self.get_range(key, max(0, end - size), end) if end else b""
        request = partial(self._client().get, key, options={"range": {"suffix": size}})
        return self._send(key, lambda: treat_416_as_empty(lambda: request().bytes().to_bytes()))

    def head(self, key: str) -> ObjectInfo:
        """Return size and tag of an object."""
        if not is_plain_key(key):
            return self._fallback.head(key)
        return self._send(key, lambda: self._object_info(self._client().head(key)))

    def list(self, prefix: str, after: str | None, recursive: bool) -> Iterator[ObjectInfo]:
        """Yield the objects below a prefix, page by page. Objects of size 0 that stand for a folder are left out.

        One level of GCS or Azure is listed at once, which holds it in memory.
        """
        from obstore.exceptions import InvalidPathError

        # At the root of a bucket obstore would drop a leading slash; only S3 gets a listing without that fault, because
        # through fsspec a whole bucket would be held in memory.
        nameable = is_plain_key(prefix.removesuffix("/")) or (not prefix and self._provider != "s3")
        # obstore streams recursive listings only; boto3 streams one level, too.
        obstore_lists = nameable and is_plain_key(after or "any") and (recursive or self._provider != "s3")
        try:
            for meta in self._list_metas(prefix, after, recursive) if obstore_lists else ():
                after = meta["path"]
                if meta["size"] or self._exists(after):
                    yield self._object_info(meta)
        except InvalidPathError:
            obstore_lists = False
        if not obstore_lists:
            yield from self._fallback.list(prefix, after, recursive)

    def _list_metas(self, prefix: str, after: str | None, recursive: bool) -> Iterator[Any]:
        """Yield the objects after a key as obstore describes them. Raises InvalidPathError for one it cannot name."""
        from obstore.exceptions import InvalidPathError

        pages: Iterator[Any] | None = None
        new_objects = _listing_filter(after)

        def next_page() -> Any:
            nonlocal pages, new_objects
            try:
                if pages is None:
                    pages, new_objects = self._iter_pages(prefix, after, recursive), _listing_filter(after)
                return next(pages, None)
            except Exception:
                # A listing that broke off is started again after the last object that it returned.
                pages = None
                raise

        while (page := self._send(prefix, next_page, reraise=InvalidPathError)) is not None:
            for meta in new_objects.feed(page):
                after = meta["path"]
                yield meta
        yield from new_objects.finish()

    def _iter_pages(self, prefix: str, after: str | None, recursive: bool) -> Iterator[Any]:
        if recursive:
            # Azure's servers differ in what they make of "start after": some ignore it, some answer with nothing.
            offset = None if self._provider == "az" else after
            return iter(self._client().list(prefix, offset=offset, chunk_size=LIST_PAGE_SIZE))
        found = self._client().list_with_delimiter(prefix)["objects"]
        return iter([sorted(found, key=lambda meta: meta["path"])])

    def put(self, key: str, body: bytes | Path, mode: PutMode) -> ObjectInfo:
        """Write an object in one conditional PUT, never multipart.

        Args:
            key: Key of the object.
            body: Its bytes, or a file that holds them.
            mode: `"create"` to fail if the object exists, or `update_mode` to fail if it has another version.

        Raises:
            AlreadyExists, PreconditionFailed, Unavailable, InvalidJob: As `Store.put_if_absent` and
                `Store.replace_if_match`.
        """
        data = body.read_bytes() if isinstance(body, Path) else body

        def request() -> ObjectInfo:
            result = self._client(len(data)).put(key, data, mode=mode, use_multipart=False)
            return ObjectInfo(key, len(data), unquote_etag(result["e_tag"]), self._version(result))

        return self._send(key, request, writing=True)

    def update_mode(self, version: str) -> PutMode:
        """Return the mode of a PUT that replaces this version only."""
        return {"version": version} if self._provider == "gs" else {"e_tag": version}

    def delete(self, key: str) -> None:
        """Delete an object; one that does not exist is no error."""
        with suppress(NotFound):
            self._send(key, lambda: self._client().delete(key))

    def _send(
        self, key: str, request: Callable[[], T], *, writing: bool = False, reraise: type[Exception] | None = None
    ) -> T:
        return self._policy.send(self._base + key, request, client_retries=True, writing=writing, reraise=reraise)

    def _exists(self, key: str) -> bool:
        """Return False for the key `a/` that stands for a folder: obstore lists it as `a`, with size 0."""
        with suppress(NotFound):
            self.head(key)
            return True
        return False

    def _object_info(self, meta: Mapping[str, Any]) -> ObjectInfo:
        return ObjectInfo(meta["path"], meta["size"], unquote_etag(meta["e_tag"]), self._version(meta))

    def _version(self, meta: Mapping[str, Any]) -> str | None:
        version: str | None = meta["version"] if self._provider == "gs" else meta["e_tag"]
        return version

    def _client(self, upload_bytes: int | None = None) -> CloudClient:
        """Return the client for reading, or for an upload of so many bytes: a client has one timeout."""
        timeout = 0 if upload_bytes is None else upload_timeout(upload_bytes)
        with self._lock:
            if timeout not in self._clients:
                options: ClientConfig = {**_client_config(timeout, self._policy), "allow_http": self._allow_http}
                self._clients[timeout] = self._connect(client_options=options, retry_config=_retry_config(self._policy))
            return self._clients[timeout]


def _listing_filter(after: str | None) -> ListingFilter[Any]:
    return ListingFilter(after, lambda meta: str(meta["path"]))


def open_bucket(scheme: str, bucket: str, options: StorageOptions, policy: RetryPolicy) -> ObstoreBackend:
    """Return the backend of a bucket, without a request.

    Raises:
        InvalidJob: No bucket is named, an option does not fit the provider, or the provider's extra is not installed.
        Unavailable: There are no credentials.
    """
    provider, base = CLOUD_SCHEMES[scheme.lower()], f"{scheme}://{bucket}/"
    if not bucket:
        raise InvalidJob(f"{scheme}://: names no bucket; write {scheme}://bucket/prefix")
    if reason := explain_bad_bucket(bucket):
        raise InvalidJob(f"{base} {reason}")
    if options.requester_pays and provider != "s3":
        raise InvalidJob(f"{base}: requester_pays is known on s3:// only; remove it")
    prepare = {"s3": _prepare_s3, "gs": _prepare_gs, "az": _prepare_azure}[provider]
    try:
        with translate_errors(base):
            connection = prepare(bucket, base, options, policy)
    except ImportError as error:
        raise InvalidJob(f"{scheme}:// needs another package; {install_command(_EXTRAS[provider])}") from error
    return ObstoreBackend(provider, base, connection, policy)


def _prepare_s3(bucket: str, base: str, options: StorageOptions, policy: RetryPolicy) -> Connection:
    from obstore.store import S3Store

    fallback = Boto3Backend(bucket, base, options, policy)
    endpoint = fallback.client.meta.endpoint_url
    credentials = None if options.anonymous else _aws_credentials(fallback, base)
    connect = partial(
        S3Store,
        bucket,
        # Of obstore's two names for the endpoint, this one wins over the environment.
        aws_endpoint_url_s3=endpoint,
        region=fallback.client.meta.region_name,
        request_payer=options.requester_pays,
        skip_signature=options.anonymous,
        credential_provider=credentials,
    )
    return connect, endpoint, fallback


def _aws_credentials(fallback: Boto3Backend, base: str) -> Any:
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        return Boto3CredentialProvider(fallback.session)
    except ValueError as error:
        raise Unavailable(
            f"{base}: no AWS credentials found; set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or `anonymous: true` in the storage options for a public bucket"
        ) from error


def _prepare_gs(
    bucket: str,
    base: str,  # noqa: ARG001 - all providers share this signature
    options: StorageOptions,
    policy: RetryPolicy,
) -> Connection:
    from obstore.store import GCSStore

    # Only credentials need a package of Google's. obstore signs a PUT all the same, and without a provider of ours it
    # would ask the machine's metadata address for a token.
    credentials: Any = _anonymous_token
    if not options.anonymous:
        credentials = import_module("obstore.auth.google").GoogleCredentialProvider()
    endpoint = {"base_url": options.endpoint} if options.endpoint else {}
    fallback_arguments: dict[str, Any] = {"token": "anon"} if options.anonymous else {}
    fallback_arguments |= {"endpoint_url": options.endpoint} if options.endpoint else {}
    connect = partial(
        GCSStore,
        bucket,
        skip_signature=options.anonymous,
        credential_provider=credentials,
        **endpoint,  # type: ignore[arg-type]
    )
    return connect, options.endpoint, FsspecBackend(f"gs://{bucket}/", fallback_arguments, policy)


def _anonymous_token() -> dict[str, Any]:
    return {"token": "anonymous", "expires_at": None}


def _prepare_azure(bucket: str, base: str, options: StorageOptions, policy: RetryPolicy) -> Connection:
    from obstore.store import AzureStore

    # `abfss://container@account.dfs.core.windows.net/` names the account, `az://container/` does not.
    container, _, host = bucket.partition("@")
    account = {"account_name": host.partition(".")[0]} if host else {}
    account |= {"endpoint": options.endpoint} if options.endpoint else {}
    if not account and not any(os.environ.get(name) for name in _AZURE_ACCOUNT_VARIABLES):
        raise InvalidJob(
            f"{base}: names no storage account; set AZURE_STORAGE_ACCOUNT_NAME, "
            f"or write abfss://{container}@account.dfs.core.windows.net/prefix"
        )
    credentials: Any = None
    if not options.anonymous and not any(os.environ.get(name) for name in _AZURE_KEY_VARIABLES):
        credentials = import_module("obstore.auth.azure").AzureCredentialProvider()
    connect = partial(
        AzureStore,
        container,
        skip_signature=options.anonymous,
        credential_provider=credentials,
        **account,  # type: ignore[arg-type]
    )
    return connect, options.endpoint, FsspecBackend(f"abfs://{container}/", _adlfs_arguments(host, options), policy)


def _adlfs_arguments(host: str, options: StorageOptions) -> dict[str, Any]:
    """Return the arguments of adlfs for an account, by its host or by the endpoint of the storage options."""
    account = host.partition(".")[0] or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
    if not options.endpoint:
        return {"anon": options.anonymous} | ({"account_name": account} if host else {})
    # adlfs takes an endpoint, such as that of an emulator, in a connection string only.
    names = {"AccountKey": _AZURE_KEY_VARIABLES[:2], "SharedAccessSignature": _AZURE_KEY_VARIABLES[2:]}
    fields = {"BlobEndpoint": options.endpoint, "AccountName": account} | {
        field: next(filter(None, map(os.environ.get, variables)), "") for field, variables in names.items()
    }
    return {"connection_string": ";".join(f"{name}={value}" for name, value in fields.items() if value)}


def _client_config(upload_seconds: int, policy: RetryPolicy) -> ClientConfig:
    config: ClientConfig = {
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT),
        "timeout": timedelta(seconds=upload_seconds or _READ_SECONDS),
    }
    # During an upload nothing is read: a read timeout would count the time of the upload itself.
    if not upload_seconds:
        config["read_timeout"] = timedelta(seconds=policy.read_timeout)
    return config


def _retry_config(policy: RetryPolicy) -> RetryConfig:
    return {
        "max_retries": _MAX_RETRIES if policy.retry_timeout else 0,
        "retry_timeout": timedelta(seconds=policy.retry_timeout),
        "backoff": {
            "init_backoff": timedelta(seconds=FIRST_BACKOFF),
            "max_backoff": timedelta(seconds=MAX_BACKOFF),
            "base": 2,
        },
    }
