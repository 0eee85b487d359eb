"""S3 through boto3, for what obstore cannot do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import TypeVar

from batchjob.records import Blob, Stat
from batchjob.storage.answers import expect, faults, or_empty, retrying, stall, within
from batchjob.storage.options import StorageOptions
from batchjob.storage.outage import Outage
from batchjob.storage.place import PAGE, THREADS, tag

__all__ = ["Boto"]

T = TypeVar("T")


class Boto:
    """An S3 bucket through boto3: slower, but it can name every key, and lists them one level at a time."""

    def __init__(self, bucket: str, base: str, options: StorageOptions, patience: float, outage: Outage) -> None:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config

        self._bucket, self._base, self._patience, self._outage = bucket, base, patience, outage
        self._payer = {"RequestPayer": "requester"} if options.requester_pays else {}
        with faults(base):
            self.session = boto3.Session()
            region = options.region or self.session.region_name or "us-east-1"
            unsigned = {"signature_version": UNSIGNED} if options.anonymous else {}
            style = {"addressing_style": "path"}
            wait = {"connect_timeout": 5, "read_timeout": stall(patience), "max_pool_connections": THREADS}
            config = Config(retries={"total_max_attempts": 1}, s3=style, **wait, **unsigned)
            self.client = self.session.client("s3", region_name=region, endpoint_url=options.endpoint, config=config)

    def get(self, key: str, etag: str | None = None, limit: int | None = None) -> Blob:
        def ask() -> Blob:
            answer = self.client.get_object(Bucket=self._bucket, Key=key, **self._payer)
            with closing(answer["Body"]) as body:
                expect(etag, tag(answer["ETag"]), self._base + key)
                within(limit, answer["ContentLength"], self._base + key)
                return Blob(body.read(), tag(answer["ETag"]), answer["ETag"])

        return self._ask(key, ask)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        part = f"bytes={start}-{end - 1}"
        ask = partial(self.client.get_object, Bucket=self._bucket, Key=key, Range=part, **self._payer)
        return self._ask(key, lambda: or_empty(lambda: bytes(ask()["Body"].read())))

    def head(self, key: str) -> Stat:
        found = self._ask(key, lambda: self.client.head_object(Bucket=self._bucket, Key=key, **self._payer))
        return Stat(key, found["ContentLength"], tag(found["ETag"]), found["ETag"])

    def list(self, prefix: str, after: str | None, recursive: bool) -> Iterator[Stat]:
        where = {"Bucket": self._bucket, "Prefix": prefix, "MaxKeys": PAGE, **self._payer}
        where |= {"StartAfter": after} if after else {}
        where |= {} if recursive else {"Delimiter": "/"}
        while True:
            page = self._ask(prefix, partial(self.client.list_objects_v2, **where))
            for found in page.get("Contents", ()):
                if found["Size"] or not found["Key"].endswith("/"):
                    yield Stat(found["Key"], found["Size"], tag(found["ETag"]), found["ETag"])
            if not page.get("IsTruncated"):
                return
            where["ContinuationToken"] = page["NextContinuationToken"]

    def _ask(self, key: str, question: Callable[[], T]) -> T:
        def once() -> T:
            with faults(self._base + key, odd_key=True):
                return retrying(self._patience, question)

        return self._outage.ridden_out(once)
