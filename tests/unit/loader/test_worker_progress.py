"""Progress of a loader process in shared memory: the suspect is known, also after death, and only an image is late."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence

import pytest

from batchjob.concurrency import clean_process_start
from batchjob.loader.worker_limits import ProgressSnapshot, WorkerProgress

Step = Callable[[WorkerProgress], None]


def idle(progress: WorkerProgress) -> None:
    progress.set_idle()


def request(number: int) -> Step:
    return lambda progress: progress.start_request(number)


def fetch(progress: WorkerProgress) -> None:
    progress.set_fetching()


def image(row: int, etag: str | None = None) -> Step:
    return lambda progress: progress.set_image(row, etag)


def send(progress: WorkerProgress) -> None:
    progress.set_sending()


def make_progress(*steps: Step) -> WorkerProgress:
    """Return the progress of a process that has taken these steps."""
    progress = WorkerProgress(multiprocessing.get_context("spawn"))
    for step in steps:
        step(progress)
    return progress


@pytest.mark.parametrize(
    ("steps", "snapshot"),
    [
        ([], None),
        ([idle], None),
        ([idle, request(7)], ProgressSnapshot(7, None, None)),
        ([idle, request(7), fetch, fetch], ProgressSnapshot(7, None, None)),
        ([idle, request(7), fetch, image(0, "tag")], ProgressSnapshot(7, 0, "tag")),
        ([idle, request(7), fetch, image(0, "tag"), image(1)], ProgressSnapshot(7, 1, None)),
        # A second fetch blames no image: the storage client may have crashed.
        ([idle, request(7), fetch, image(0, "tag"), fetch], ProgressSnapshot(7, None, None)),
        ([idle, request(7), fetch, image(0, "tag"), send], ProgressSnapshot(7, None, None)),
        ([idle, request(7), fetch, image(0, "tag"), send, idle], None),
        # The next request begins without an image, although the row of the last one is still in memory.
        ([idle, request(7), fetch, image(3, "tag"), send, idle, request(8)], ProgressSnapshot(8, None, None)),
    ],
)
def test_snapshot_names_request_and_image(steps: Sequence[Step], snapshot: ProgressSnapshot | None) -> None:
    assert make_progress(*steps).snapshot == snapshot


@pytest.mark.parametrize(
    ("etag", "kept"),
    [
        ("", None),
        ('"d41d8cd98f00b204e9800998ecf8427e-12"', '"d41d8cd98f00b204e9800998ecf8427e-12"'),
        ("x" * 300, "x" * 255),
        # 2 bytes each: 255 bytes hold 127 letters and half of one.
        ("é" * 200, "é" * 127 + "\N{REPLACEMENT CHARACTER}"),
    ],
    ids=["empty", "S3", "long", "not ASCII"],
)
def test_etag_is_kept_up_to_255_bytes(etag: str, kept: str | None) -> None:
    assert make_progress(request(7), image(0, etag)).snapshot == ProgressSnapshot(7, 0, kept)


@pytest.mark.parametrize(
    ("steps", "started"), [([], False), ([idle], True), ([idle, request(1)], True), ([idle, request(1), fetch], True)]
)
def test_process_has_started_once_it_waits_for_a_request(steps: Sequence[Step], started: bool) -> None:
    assert make_progress(*steps).started == started


def test_every_step_changes_the_version() -> None:
    progress = make_progress()
    versions = [progress.version]
    steps = [idle, request(1), fetch, fetch, image(0), image(1), image(1), send, idle, request(2), fetch, image(1)]
    for step in steps:
        step(progress)
        versions.append(progress.version)
    assert len(set(versions)) == len(steps) + 1


def test_without_a_step_the_version_stays() -> None:
    progress = make_progress(idle, request(1), fetch, image(0))
    assert progress.version == progress.version


@pytest.mark.parametrize(
    ("steps", "has_limit"),
    [
        ([], False),
        ([idle], False),
        ([idle, request(1)], False),
        ([idle, request(1), fetch], False),  # an object may take as long as its store does
        ([idle, request(1), fetch, image(0)], True),
        ([idle, request(1), fetch, image(0), fetch], False),
        ([idle, request(1), fetch, image(0), send], True),
        ([idle, request(1), fetch, image(0), send, idle], False),
    ],
)
def test_only_an_image_and_the_sending_of_a_batch_can_be_overdue(steps: Sequence[Step], has_limit: bool) -> None:
    # A limit below zero is over at once, without waiting for a clock.
    assert make_progress(*steps).is_overdue(-1.0) == has_limit


def test_image_within_its_limit_is_not_overdue() -> None:
    assert not make_progress(idle, request(1), fetch, image(0)).is_overdue(3600.0)


def die_at_an_image(progress: WorkerProgress) -> None:
    progress.set_idle()
    progress.start_request(7)
    progress.set_fetching()
    progress.set_image(2, "tag")
    os.kill(os.getpid(), signal.SIGKILL)


def test_suspect_of_a_killed_process_is_known() -> None:
    context = multiprocessing.get_context("spawn")
    progress = WorkerProgress(context)
    process = context.Process(target=die_at_an_image, args=(progress,))
    with clean_process_start():
        process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert progress.snapshot == ProgressSnapshot(7, 2, "tag")
