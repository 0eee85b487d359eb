"""Trial of a suspect image in a real process: an image that kills it again, one that does not, and other causes."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from batchjob.concurrency import start_forkserver
from batchjob.errors import AttemptFailed, ImageError, StorageError, Unavailable
from batchjob.loader.dataset import BatchRequest, ImageDataset, TransformFn
from batchjob.loader.fetch import Fetcher
from batchjob.loader.settings import LoaderConfig
from batchjob.loader.suspect_trial import TrialResult, start_trial, wait_for_trial
from batchjob.loader.worker_process import LoaderProcess
from batchjob.storage.objects import ObjectData
from batchjob.storage.reader import Reader
from batchjob.types import ImageRef, PreparedImage


@dataclass(frozen=True)
class DecodeByWord:
    """Transform that harms its process, or raises, as the word in the file says."""

    def __call__(self, data: bytes) -> PreparedImage:
        match data:
            case b"crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case b"exit":
                os._exit(9)
            case b"memory":
                os.kill(os.getpid(), signal.SIGKILL)
            case b"hang":
                time.sleep(600)
            case b"bad":
                raise ImageError("decode", "truncated", "the file ends early")
        return PreparedImage(torch.zeros(3, 2, 2, dtype=torch.uint8), 2, 2)


class DieOnArrival:
    """Transform that ends the process which unpickles it."""

    def __call__(self, data: bytes) -> PreparedImage:
        raise AssertionError("no process lives to call it")

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


class CrashingReader(Reader):
    """Storage client that crashes."""

    def read_many(self, uris: Sequence[str], *how: Any, **more: Any) -> list[ObjectData | StorageError | Unavailable]:
        os._exit(11)


READER, DECODE_BY_WORD = Reader(), DecodeByWord()


def make_request(location: str) -> BatchRequest:
    return BatchRequest(0, 0, 0, (ImageRef(0, "image", location),))


@pytest.fixture(scope="module", autouse=True)
def forkserver() -> None:
    """Import torch once, and not in each process."""
    start_forkserver("batchjob.loader.loader")


@contextmanager
def run_trial(path: Path, transform: TransformFn = DECODE_BY_WORD, reader: Reader = READER) -> Iterator[LoaderProcess]:
    dataset = ImageDataset(Fetcher(reader), transform, None, False)
    process = start_trial(dataset, make_request(str(path)), LoaderConfig(1, 1, False))
    try:
        yield process
    finally:
        process.close(0)


def try_word(folder: Path, word: str) -> TrialResult:
    """Try a file that holds a word."""
    (folder / "image").write_text(word)
    with run_trial(folder / "image") as process:
        return wait_for_trial(process, 60.0)


def test_image_that_decodes_alone_is_not_to_blame(tmp_path: Path) -> None:
    assert try_word(tmp_path, "good") == TrialResult(None)


def test_ordinary_error_of_the_image_is_found_without_a_death(tmp_path: Path) -> None:
    trial = try_word(tmp_path, "bad")
    assert trial.exit is None
    assert trial.info is not None
    assert trial.info.error is not None
    assert (trial.info.error.type, trial.info.error.message) == ("truncated", "the file ends early")


def test_image_that_is_gone_by_now_has_the_error_of_its_fetch(tmp_path: Path) -> None:
    with run_trial(tmp_path / "absent") as process:
        trial = wait_for_trial(process, 60.0)
    assert trial.info is not None
    assert trial.info.error is not None
    assert (trial.info.error.stage, trial.info.error.type) == ("fetch", "not_found")


@pytest.mark.parametrize(
    ("word", "kind", "message"),
    [
        ("crash", "crash", "the process that decoded it was ended by SIGSEGV, alone too"),
        ("exit", "crash", "the process that decoded it ended with exit code 9, alone too"),
        ("memory", "memory", "the process that decoded it was killed (SIGKILL), as for want of memory, alone too"),
    ],
)
def test_image_that_kills_again_gets_the_cause_as_its_error(tmp_path: Path, word: str, kind: str, message: str) -> None:
    trial = try_word(tmp_path, word)
    assert trial.exit is not None
    assert trial.info is not None
    assert trial.info.error is not None
    assert (trial.info.error.stage, trial.info.error.type, trial.info.error.message) == ("decode", kind, message)
    assert trial.info.etag == READER.stat(str(tmp_path / "image")).etag, "the version that was tried"


def test_image_that_the_callers_clock_ends_gets_the_limit_in_its_error(tmp_path: Path) -> None:
    (tmp_path / "image").write_text("hang")
    with run_trial(tmp_path / "image") as process:

        def kill_in_decoder() -> None:
            while (snapshot := process.progress.snapshot) is None or snapshot.row is None:
                time.sleep(0.001)
            process.kill("hang")

        clock = threading.Thread(target=kill_in_decoder)
        clock.start()
        trial = wait_for_trial(process, 2.5)
        clock.join()
    assert trial.info is not None
    assert trial.info.error is not None
    assert trial.info.error.type == "hang"
    assert "not decoded within 2.5 s (runtime.loader.image_seconds)" in trial.info.error.message


def test_death_while_the_image_is_fetched_is_not_the_images_fault(tmp_path: Path) -> None:
    (tmp_path / "image").write_text("good")
    with run_trial(tmp_path / "image", reader=CrashingReader()) as process:
        trial = wait_for_trial(process, 60.0)
    assert trial.info is None
    assert trial.exit is not None
    assert trial.exit.description == "ended with exit code 11"


def test_process_that_never_starts_fails_the_attempt(tmp_path: Path) -> None:
    with (
        run_trial(tmp_path / "image", DieOnArrival()) as process,
        pytest.raises(AttemptFailed, match="a loader process ended with exit code 3 as it started"),
    ):
        wait_for_trial(process, 60.0)
