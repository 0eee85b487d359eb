"""How stores are reached, as a job may say it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from batchjob.settings import Settings

__all__ = ["Options", "StorageOptions", "options_for", "patience_or_default"]


class StorageOptions(Settings):
    """How a store is reached. Never credentials.

    Attributes:
        endpoint: URL of an S3-compatible server; default AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the profile's.
        region: of the bucket; default AWS_REGION or the profile's, else us-east-1.
        anonymous: send no credentials (public buckets).
        requester_pays: agree to pay for the requests (S3).
    """

    endpoint: str | None = None
    region: str | None = None
    anonymous: bool = False
    requester_pays: bool = False


Options = Mapping[str, StorageOptions]
"""URI prefix, such as `s3://` or `s3://bucket`, → options; the longest that fits wins."""


def options_for(uri: str, options: Options) -> StorageOptions:
    fits = [prefix for prefix in options if uri.startswith(prefix) and _whole(uri, prefix)]
    return options[max(fits, key=len)] if fits else StorageOptions()


def _whole(uri: str, prefix: str) -> bool:
    """`s3://bucket` is no prefix of `s3://bucket2/`."""
    return prefix.endswith("/") or uri[len(prefix) : len(prefix) + 1] in ("", "/")


def patience_or_default(given: float | None) -> float:
    return float(os.environ.get("BATCHJOB_PATIENCE", "30")) if given is None else given
