"""S3 buckets through boto3, for the keys and listings that obstore cannot do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, TypeVar

from batchjob.errors import InvalidJob
from batchjob.storage.backend import LIST_PAGE_SIZE, READ_THREADS, unquote_etag
from batchjob.storage.client_errors import check_etag, check_size, translate_errors, treat_416_as_empty
from batchjob.storage.listing_filter import ListingFilter
from batchjob.storage.objects import ObjectData, ObjectInfo
from batchjob.storage.options import StorageOptions
from batchjob.storage.retry_policy import CONNECT_TIMEOUT, RetryPolicy

__all__ = ["Boto3Backend"]

T = TypeVar("T")


class Boto3Backend:
    """An S3 bucket through boto3: slower than obstore, but it can name every key and lists one level at a time.

    Args:
        bucket: Name of the bucket.
        base: URI of the bucket; base + key is the URI of an object.
        options: Storage options of the bucket.
        policy: Retries and timeouts.

    Attributes:
        session: boto3 session, with the credentials of the SDK's own chain.
        client: boto3 client of the bucket.
    """

    def __init__(self, bucket: str, base: str, options: StorageOptions, policy: RetryPolicy) -> None:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config

        self._bucket, self._base, self._policy = bucket, base, policy
        self._payer = {"RequestPayer": "requester"} if options.requester_pays else {}
        with translate_errors(base):
            self.session = boto3.Session()
            region = options.region or self.session.region_name or "us-east-1"
            config: dict[str, Any] = {"signature_version": UNSIGNED} if options.anonymous else {}
            config |= {"connect_timeout": CONNECT_TIMEOUT, "read_timeout": policy.read_timeout}
            config |= {"max_pool_connections": READ_THREADS, "s3": {"addressing_style": "path"}}
            config |= {"retries": {"total_max_attempts": 1}}
            self.client = self.session.client(
                "s3", region_name=region, endpoint_url=options.endpoint, config=Config(**config)
            )

    def get(self, key: str, etag: str | None = None, limit: int | None = None) -> ObjectData:
        """Return an object. See `Backend.get`."""

        def request() -> ObjectData:
            answer = self.client.get_object(Bucket=self._bucket, Key=key, **self._payer)
            with closing(answer["Body"]) as body:
                check_etag(etag, unquote_etag(answer["ETag"]), self._base + key)
                check_size(limit, answer["ContentLength"], self._base + key)
                return ObjectData(body.read(), unquote_etag(answer["ETag"]), answer["ETag"])

        return self._send(key, request)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to `end`. For example, bytes 2 to 5 are `Range: bytes=2-4`."""

        def request() -> bytes:
            answer = self.client.get_object(
                Bucket=self._bucket, Key=key, Range=f"bytes={start}-{end - 1}", **self._payer
            )
            return bytes(answer["Body"].read())

        return self._send(key, lambda: treat_416_as_empty(request))

    def head(self, key: str) -> ObjectInfo:
        """Return size and tag of an object."""
        answer = self._send(key, lambda: self.client.head_object(Bucket=self._bucket, Key=key, **self._payer))
        return ObjectInfo(key, answer["ContentLength"], unquote_etag(answer["ETag"]), answer["ETag"])

    def list(self, prefix: str, after: str | None, recursive: bool) -> Iterator[ObjectInfo]:
        """Yield the objects below a prefix, page by page."""
        arguments = {"Bucket": self._bucket, "Prefix": prefix, "MaxKeys": LIST_PAGE_SIZE, **self._payer}
        arguments |= {"StartAfter": after} if after else {}
        arguments |= {} if recursive else {"Delimiter": "/"}
        new_objects: ListingFilter[Any] = ListingFilter(after, lambda found: str(found["Key"]))
        is_last = False
        while not is_last:
            page = self._send(prefix, lambda: self.client.list_objects_v2(**arguments))
            is_last = not page.get("IsTruncated")
            for found in [*new_objects.feed(page.get("Contents", ())), *(new_objects.finish() if is_last else ())]:
                if found["Size"] or not found["Key"].endswith("/"):
                    yield ObjectInfo(found["Key"], found["Size"], unquote_etag(found["ETag"]), found["ETag"])
            token = page.get("NextContinuationToken")
            if not is_last and token in (None, arguments.get("ContinuationToken")):
                raise InvalidJob(f"{self._base}{prefix}: the store's listing never ends; name the images in a manifest")
            arguments["ContinuationToken"] = token

    def _send(self, key: str, request: Callable[[], T]) -> T:
        return self._policy.send(self._base + key, request, unaddressable_on_400=True)
