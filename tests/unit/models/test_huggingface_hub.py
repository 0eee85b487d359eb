"""Hugging Face Hub: conversion of its errors, which a local server provokes; offline mode; suppressed output."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers.utils.logging
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from batchjob.errors import InvalidJob, JobError, Unavailable
from batchjob.models.huggingface_hub import convert_hub_error, hub_offline, silence_hub_libraries
from tests.support.http_server import HttpServer, Response, run_http_server

transformers_logging: Any = transformers.utils.logging  # partly without types
MODEL_PATH = "/api/models/me/net"


@pytest.fixture(scope="module")
def hub() -> Iterator[HttpServer]:
    with run_http_server() as server:
        yield server


def catch_hub_error(endpoint: str, name: str = "me/net") -> Exception:
    """Ask a Hub for a model, and return the exception of its client."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - its type is what each test is about
        HfApi(endpoint=endpoint, token=False).model_info(name)
    return caught.value


@pytest.mark.parametrize(
    ("status", "code", "error_type", "reason"),
    [
        (
            403,
            "GatedRepo",
            InvalidJob,
            "access is granted on its page, and proved by a token in HF_TOKEN; or use a copy",
        ),
        (404, "RepoNotFound", InvalidJob, "there is none of that name, or it is private"),
        (404, "RevisionNotFound", InvalidJob, "there is none of that name, or it is private"),
        (404, "EntryNotFound", InvalidJob, "it lacks a file that is needed; use a copy"),
        (400, "", InvalidJob, "(HTTP 400): use a copy"),
        (403, "", InvalidJob, "(HTTP 403): access is refused; a token in HF_TOKEN that may read it, or use a copy"),
        (401, "", InvalidJob, "(HTTP 401): access is refused; a token in HF_TOKEN that may read it, or use a copy"),
        (429, "", Unavailable, "(HTTP 429): use a copy"),
        (500, "", Unavailable, "(HTTP 500): use a copy"),
        (503, "", Unavailable, "(HTTP 503): use a copy"),
    ],
)
def test_http_error_of_the_hub_is_an_invalid_job_or_unavailable(
    hub: HttpServer, status: int, code: str, error_type: type[JobError], reason: str
) -> None:
    hub.responses[MODEL_PATH] = Response(status=status, headers={"X-Error-Code": code} if code else {})
    error = convert_hub_error(catch_hub_error(hub.url), "the model me/net", "use a copy")
    assert type(error) is error_type
    assert error.message.startswith("the model me/net cannot be had from the Hugging Face Hub")
    assert reason in error.message


@pytest.mark.parametrize(("status", "error_type"), [(403, InvalidJob), (503, Unavailable)])
def test_answer_of_the_hub_counts_where_the_local_cache_has_nothing(
    hub: HttpServer, status: int, error_type: type[JobError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.responses[f"{MODEL_PATH}/revision/main"] = Response(status=status)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - its type is what this test is about
        snapshot_download("me/net", endpoint=hub.url, cache_dir=tmp_path, token=False)
    error = convert_hub_error(caught.value, "the model me/net", "use a copy")
    assert type(error) is error_type
    assert f"(HTTP {status})" in error.message


def test_impossible_model_name_is_an_invalid_job(hub: HttpServer) -> None:
    error = convert_hub_error(catch_hub_error(hub.url, "me/../net"), "the model", "use a copy")
    assert isinstance(error, InvalidJob)


def test_hub_that_refuses_connections_is_unavailable() -> None:
    with run_http_server() as server:
        url = server.url
    error = convert_hub_error(catch_hub_error(url), "the model", "use a copy")
    assert isinstance(error, Unavailable)
    assert "it cannot be reached" in error.message


@pytest.mark.parametrize("error", [ValueError("size mismatch"), OSError("disk full"), KeyError("model")])
def test_errors_from_elsewhere_are_not_converted(error: Exception) -> None:
    assert convert_hub_error(error, "the model", "use a copy") is None


def test_offline_nothing_is_requested_until_the_context_ends(hub: HttpServer, tmp_path: Path) -> None:
    def download() -> Exception:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - only its conversion matters
            hf_hub_download("me/net", "config.json", endpoint=hub.url, cache_dir=tmp_path, token=False)
        return caught.value

    hub.requests.clear()
    with hub_offline():
        error = download()
    assert hub.requests == []
    assert isinstance(convert_hub_error(error, "the model", "use a copy"), Unavailable)


def test_offline_mode_ends_after_an_error_too(hub: HttpServer) -> None:
    hub.responses[MODEL_PATH] = Response(status=500)
    with pytest.raises(ZeroDivisionError), hub_offline():
        raise ZeroDivisionError
    hub.requests.clear()
    catch_hub_error(hub.url)
    assert [path for path, _ in hub.requests] == [MODEL_PATH]


def test_offline_mode_that_was_already_set_stays_set(hub: HttpServer) -> None:
    hub.requests.clear()
    with hub_offline():
        with hub_offline():
            pass
        catch_hub_error(hub.url)
    assert hub.requests == []


# -- silence ---------------------------------------------------------------------------------------------------


def read_progress_bars() -> tuple[bool, bool]:
    """Return the state of the Hub's progress bars and of those of transformers, True if they are on."""
    return not are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()


@pytest.fixture(autouse=True)
def restore_progress_bars() -> Iterator[None]:
    hub_bars, transformers_bars = read_progress_bars()
    yield
    (enable_progress_bars if hub_bars else disable_progress_bars)()
    (transformers_logging.enable_progress_bar if transformers_bars else transformers_logging.disable_progress_bar)()


def set_progress_bars(shown: bool) -> None:
    if shown:
        enable_progress_bars()
        transformers_logging.enable_progress_bar()
    else:
        disable_progress_bars()
        transformers_logging.disable_progress_bar()


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_off_inside_and_as_before_afterwards(shown: bool) -> None:
    set_progress_bars(shown)
    with silence_hub_libraries():
        assert read_progress_bars() == (False, False)
    assert read_progress_bars() == (shown, shown)


class MessageList(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.mark.parametrize("name", ["huggingface_hub", "timm", "transformers"])
def test_warnings_of_the_libraries_are_dropped_and_errors_kept(name: str) -> None:
    message_list = MessageList()
    logger = logging.getLogger(f"{name}.download")
    logger.addHandler(message_list)
    try:
        with silence_hub_libraries():
            logger.warning("please upgrade")
            logger.error("cannot go on")
    finally:
        logger.removeHandler(message_list)
    assert message_list.messages == ["cannot go on"]


def test_python_warnings_are_ignored_inside_only() -> None:
    with silence_hub_libraries():
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
    with pytest.raises(FutureWarning):
        warnings.warn("deprecated", FutureWarning, stacklevel=1)


def test_settings_are_restored_after_an_error() -> None:
    set_progress_bars(True)
    logger = logging.getLogger("transformers")
    level = logger.level
    with pytest.raises(ZeroDivisionError), silence_hub_libraries():
        raise ZeroDivisionError
    assert (logger.level, read_progress_bars()) == (level, (True, True))
    with pytest.raises(FutureWarning):
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
