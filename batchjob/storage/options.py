"""Storage options of a job, by URI prefix; never credentials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, Field

from batchjob.settings import Settings
from batchjob.text import explain_uri_secret
from batchjob.uris import is_below

__all__ = ["OptionsByPrefix", "StorageOptions", "options_for"]


def _refuse_secrets(uri: str) -> str:
    if reason := explain_uri_secret(uri):
        raise ValueError(reason)
    return uri


class StorageOptions(Settings):
    """Access to a store; never credentials.

    Attributes:
        endpoint: URL of an S3-compatible server; default AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the profile's. On gs://
            and az:// the URL of another server, with the account in its path if Azure's names it there.
        region: Region of the bucket; default AWS_REGION or the profile's, else us-east-1.
        anonymous: Send no credentials (public buckets).
        requester_pays: Agree to pay for the requests (S3).
        private: Allow a web host in a private network, or this machine itself. Addresses where clouds give out
            credentials are never read.
        max_bytes: Largest size of one object on the web, in bytes.
        seconds: Longest time that one answer of a web host may take, redirects included.
    """

    endpoint: Annotated[str, AfterValidator(_refuse_secrets)] | None = None
    region: str | None = None
    anonymous: bool = False
    requester_pays: bool = False
    private: bool = False
    max_bytes: Annotated[int, Field(ge=1)] = 256 * 1024 * 1024
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0


OptionsByPrefix = Mapping[str, StorageOptions]
"""URI prefix, such as `s3://` or `s3://bucket`, → options; the longest prefix that matches wins.

The web is read only if a prefix names the host, such as `https://images.example.com`; `https://` names every public
host.
"""


def options_for(uri: str, options: OptionsByPrefix) -> StorageOptions:
    """Return the options of the longest prefix that matches; defaults if none does.

    For example, `s3://bucket` matches `s3://bucket/a.jpg` and `s3a://bucket/a.jpg`, but not `s3://bucket2/a.jpg`.
    """
    matching = [prefix for prefix in options if is_below(uri, prefix)]
    return options[max(matching, key=len)] if matching else StorageOptions()
