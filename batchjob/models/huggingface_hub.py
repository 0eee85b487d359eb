"""Hugging Face Hub, as timm and transformers use it: silence both libraries, stay offline, convert their errors."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from batchjob.errors import InvalidJob, JobError, Unavailable

__all__ = ["convert_hub_error", "hub_offline", "silence_hub_libraries"]

# torch.utils._pytree warns when torchao is imported.
_LOGGERS = ("huggingface_hub", "timm", "torch.utils._pytree", "transformers")


@contextmanager
def silence_hub_libraries() -> Iterator[None]:
    """Context without warnings and progress bars of these libraries; their settings are restored afterwards."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), _without_progress_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def hub_offline() -> Iterator[None]:
    """Context in which nothing is fetched from the Hub, as with HF_HUB_OFFLINE=1; restored afterwards."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def convert_hub_error(error: Exception, what: str, advice: str) -> JobError | None:
    """Convert an exception of the Hub to an error of the job.

    Args:
        error: Exception raised by `huggingface_hub` or its HTTP client.
        what: Object that was requested, for the message: "the model google/vit".
        advice: Another way to provide it, for the message.

    Returns:
        `Unavailable` if a later try may work, else `InvalidJob`; None if the exception does not come from the Hub.
    """
    from huggingface_hub import errors

    problem = f"{what} cannot be had from the Hugging Face Hub"
    if isinstance(error, errors.GatedRepoError):
        return InvalidJob(f"{problem}: access is granted on its page, and proved by a token in HF_TOKEN; or {advice}")
    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError | errors.HFValidationError):
        reason = "there is none of that name, or it is private (then set HF_TOKEN)"
        return InvalidJob(f"{problem}: {reason}; correct it, or {advice}")
    unreachable = Unavailable(f"{problem} (it cannot be reached, and the local cache has not got it): {advice}")
    answer = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(answer, errors.HfHubHTTPError):
        # The Hub has answered, and its client looked into the local cache all the same.
        return convert_hub_error(answer, what, advice)
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError | TimeoutError):
        return unreachable
    if isinstance(error, errors.EntryNotFoundError):
        return InvalidJob(f"{problem}: it lacks a file that is needed; {advice}")
    if isinstance(error, errors.HfHubHTTPError):
        code = error.response.status_code
        if code in {401, 403}:
            reason = "access is refused; a token in HF_TOKEN that may read it"
            return InvalidJob(f"{problem} (HTTP {code}): {reason}, or {advice}")
        error_type = Unavailable if code == 429 or code >= 500 else InvalidJob
        return error_type(f"{problem} (HTTP {code}): {advice}")
    # The error class of the HTTP client that this version of huggingface_hub uses: requests or httpx.
    client_error = errors.HfHubHTTPError.__mro__[1]
    return unreachable if isinstance(error, client_error) else None


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from huggingface_hub import utils

    hub: Any = utils
    # Only if transformers is imported already: timm does not need it.
    transformers: Any = sys.modules.get("transformers.utils.logging")
    hub_bars = not hub.are_progress_bars_disabled()
    transformers_bars = transformers is not None and transformers.is_progress_bar_enabled()
    if transformers_bars:
        transformers.disable_progress_bar()
    if hub_bars:
        hub.disable_progress_bars()
    try:
        yield
    finally:
        if transformers_bars:
            transformers.enable_progress_bar()
        if hub_bars:
            hub.enable_progress_bars()
