"""How stores are reached, as a job may say it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, Field

from batchjob.settings import Settings
from batchjob.text import explain_uri_secret

__all__ = ["OptionsByPrefix", "StorageOptions", "options_for", "resolve_retry_timeout"]


def _without_secrets(uri: str) -> str:
    if why := explain_uri_secret(uri):
        raise ValueError(why)
    return uri


class StorageOptions(Settings):
    """How a store is reached. Never credentials.

    Attributes:
        endpoint: URL of an S3-compatible server; default AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the profile's.
        region: of the bucket; default AWS_REGION or the profile's, else us-east-1.
        anonymous: send no credentials (public buckets).
        requester_pays: agree to pay for the requests (S3).
        private: a web host may lie in a private network, or be this machine. Where clouds hand out credentials is never
            read.
        max_bytes: of one object on the web.
        seconds: that one answer of a web host may take, its redirects included.
    """

    endpoint: Annotated[str, AfterValidator(_without_secrets)] | None = None
    region: str | None = None
    anonymous: bool = False
    requester_pays: bool = False
    private: bool = False
    max_bytes: Annotated[int, Field(ge=1)] = 256 * 1024 * 1024
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0


OptionsByPrefix = Mapping[str, StorageOptions]
"""URI prefix, such as `s3://` or `s3://bucket`, → options; the longest that fits wins.

The web is read only where a host stands here, such as `https://images.example.com` (`https://` is every public one).
"""


def options_for(uri: str, options: OptionsByPrefix) -> StorageOptions:
    fits = [prefix for prefix in options if uri.startswith(prefix) and _whole(uri, prefix)]
    return options[max(fits, key=len)] if fits else StorageOptions()


def _whole(uri: str, prefix: str) -> bool:
    """`s3://bucket` is no prefix of `s3://bucket2/`."""
    return prefix.endswith("/") or uri[len(prefix) : len(prefix) + 1] in ("", "/")


def resolve_retry_timeout(retry_timeout: float | None, outage_timeout: float) -> float:
    """Seconds that one request is retried by the client itself; no longer than an outage is waited for, where it is."""
    seconds = float(os.environ.get("BATCHJOB_PATIENCE", "30")) if retry_timeout is None else retry_timeout
    return min(seconds, outage_timeout) if outage_timeout else seconds
