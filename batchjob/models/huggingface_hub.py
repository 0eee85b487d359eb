"""The Hugging Face Hub: what timm and transformers say while they load, and what it means when they fail."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from batchjob.errors import InvalidJob, JobError, Unavailable

__all__ = ["convert_hub_error", "hub_offline", "silence_hub_libraries"]

_CHATTY = ("huggingface_hub", "timm", "torch.utils._pytree", "transformers")  # what importing torchao says, too


@contextmanager
def silence_hub_libraries() -> Iterator[None]:
    """No warnings and no progress bars of these libraries; afterwards as before."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), _without_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _without_bars() -> Iterator[None]:
    from huggingface_hub import utils

    hub: Any = utils
    theirs: Any = sys.modules.get("transformers.utils.logging")  # not imported for timm's sake
    bars, their_bars = not hub.are_progress_bars_disabled(), theirs is not None and theirs.is_progress_bar_enabled()
    if their_bars:
        theirs.disable_progress_bar()
    if bars:
        hub.disable_progress_bars()
    try:
        yield
    finally:
        if their_bars:
            theirs.enable_progress_bar()
        if bars:
            hub.enable_progress_bars()


@contextmanager
def hub_offline() -> Iterator[None]:
    """Nothing is fetched from the Hub, as with HF_HUB_OFFLINE=1; afterwards as before."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def convert_hub_error(error: Exception, what: str, advice: str) -> JobError | None:
    """What an exception from the Hub means to a job; None where it has nothing to do with the Hub.

    Args:
        error: as `huggingface_hub` or its HTTP client raised it.
        what: what was wanted from it.
        advice: how it can be had otherwise.
    """
    from huggingface_hub import errors

    wanted = f"{what} cannot be had from the Hugging Face Hub"
    if isinstance(error, errors.GatedRepoError):
        return InvalidJob(f"{wanted}: access is granted on its page, and proved by a token in HF_TOKEN; or {advice}")
    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError | errors.HFValidationError):
        reason = "there is none of that name, or it is private (then set HF_TOKEN)"
        return InvalidJob(f"{wanted}: {reason}; correct it, or {advice}")
    unreachable = Unavailable(f"{wanted} (it cannot be reached, and the local cache has not got it): {advice}")
    if isinstance(error, errors.LocalEntryNotFoundError | ConnectionError | TimeoutError):
        return unreachable
    if isinstance(error, errors.EntryNotFoundError):
        return InvalidJob(f"{wanted}: it lacks a file that is needed; {advice}")
    if isinstance(error, errors.HfHubHTTPError):
        code = error.response.status_code
        kind = Unavailable if code == 429 or code >= 500 else InvalidJob
        return kind(f"{wanted} (HTTP {code}): {advice}")
    client = errors.HfHubHTTPError.__mro__[1]  # the error of whichever HTTP client this version uses
    return unreachable if isinstance(error, client) else None
