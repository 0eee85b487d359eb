"""Progress of a run as a bar on a terminal and as lines in a log."""

from __future__ import annotations

import errno
import io

import pytest
from rich.console import Console

from batchjob.driver.progress import (
    NoProgress,
    ProgressBar,
    ProgressLog,
    ProgressMeter,
    ProgressReporter,
    pick_progress,
)


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_meter_counts_images_and_estimates_the_time_to_go() -> None:
    clock = FakeClock()
    meter = ProgressMeter(clock)
    meter.total, meter.final = 1000, False
    assert meter.describe() == "1,000 images planned so far"
    clock.now += 10
    meter.advance(200, 1)
    meter.final = True
    assert meter.describe() == "200/1,000 images, 1 error, 20.0 images/s, ETA 0:00:40"


def test_rate_covers_only_the_last_minutes() -> None:
    clock = FakeClock()
    meter = ProgressMeter(clock)
    clock.now += 1000
    meter.advance(1, 0)
    for _ in range(60):
        clock.now += 10
        meter.advance(100, 0)
    assert meter.rate == pytest.approx(10.0)


def test_resumed_images_do_not_count_for_the_rate() -> None:
    clock = FakeClock()
    meter = ProgressMeter(clock)
    meter.add_resumed(500)
    clock.now += 10
    meter.advance(100, 0)
    assert (meter.done, meter.rate) == (600, 10.0)


def test_log_has_a_line_at_each_interval_and_one_at_the_end() -> None:
    clock, stream = FakeClock(), io.StringIO()
    progress = ProgressLog(stream, clock, interval=0)
    progress.start(None)
    progress.write_line()
    progress.set_planned(100, final=False)
    progress.add_resumed(20)
    clock.now += 30
    progress.advance(60, 2)
    progress.write_line()
    progress.note("worker 1 was replaced")
    progress.set_planned(80, final=True)
    clock.now += 30
    progress.stop()
    assert stream.getvalue().splitlines() == [
        "starting",
        "80/100+ images, 2 errors, 2.0 images/s",
        "worker 1 was replaced",
        "80 images, 2 errors, in 0:01:00",
    ]


def test_log_of_a_plan_shows_the_planned_images() -> None:
    clock, stream = FakeClock(), io.StringIO()
    progress = ProgressLog(stream, clock, interval=0)
    progress.start(None)
    progress.set_planned(65_536, final=False)
    progress.write_line()
    progress.set_planned(65_537, final=True)
    clock.now += 5
    progress.stop()
    assert stream.getvalue().splitlines() == ["65,536 images planned so far", "65,537 images planned, in 0:00:05"]


def test_log_uses_the_singular_for_one() -> None:
    stream = io.StringIO()
    progress = ProgressLog(stream, FakeClock(), interval=0)
    progress.start(None)
    progress.advance(1, 1)
    progress.write_line()
    progress.stop()
    assert stream.getvalue().splitlines() == ["1 image, 1 error, 0.0 images/s", "1 image, 1 error, in 0:00:00"]


def test_log_thread_writes_lines() -> None:
    class SignallingStream(io.StringIO):
        """Stream that tells the test when the thread has written."""

        def write(self, text: str) -> int:
            count = super().write(text)
            has_written.set()
            return count

    import threading

    has_written = threading.Event()
    progress = ProgressLog(SignallingStream(), interval=0.001)
    progress.start(5)
    assert has_written.wait(30)
    progress.stop()


def test_terminal_shows_one_bar() -> None:
    clock, stream = FakeClock(), io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    progress = ProgressBar(console, clock)
    progress.start(None)
    progress.set_planned(1000, final=True)
    clock.now += 10
    progress.add_resumed(100)
    progress.advance(200, 3)
    progress.note("shard [7] failed")
    progress.stop()
    text = stream.getvalue()
    assert "300/1,000 images, 3 errors, 20.0 images/s, ETA 0:00:35" in text
    assert "shard [7] failed" in text


@pytest.mark.parametrize("quiet", [True, False])
def test_picked_reporter_fits_the_stream(quiet: bool) -> None:
    class FakeTerminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    expected: tuple[type[ProgressReporter], type[ProgressReporter]] = (
        (NoProgress, NoProgress) if quiet else (ProgressLog, ProgressBar)
    )
    assert type(pick_progress(quiet, io.StringIO())) is expected[0]
    assert type(pick_progress(quiet, FakeTerminal())) is expected[1]


def test_no_progress_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    quiet = NoProgress()
    quiet.start(3)
    quiet.set_planned(3, final=True)
    quiet.add_resumed(1)
    quiet.advance(2, 1)
    quiet.note("x")
    quiet.stop()
    assert capfd.readouterr() == ("", "")


class BrokenStream(io.StringIO):
    """Stream that fails as a closed pipe, a full disk or a closed terminal does."""

    def __init__(self, error: Exception, terminal: bool) -> None:
        super().__init__()
        self.error, self.terminal, self.writes = error, terminal, 0

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.writes += 1
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(errno.EPIPE, "its reader is gone"),
        OSError(errno.ENOSPC, "its disk is full"),
        OSError(errno.EIO, "its terminal is closed"),
        ValueError("it is closed"),
    ],
)
def test_stream_that_cannot_be_written_is_no_error(error: Exception, terminal: bool) -> None:
    stream = BrokenStream(error, terminal)
    progress = pick_progress(stream=stream)
    progress.start(None)
    progress.note("a worker was replaced")
    progress.set_planned(10, final=True)
    progress.advance(10, 0)
    progress.stop()
    assert stream.writes > 0


def test_log_goes_on_once_its_disk_has_space_again() -> None:
    class FullDisk(io.StringIO):
        full = True

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "no space left")
            return super().write(text)

    stream = FullDisk()
    progress = ProgressLog(stream, interval=0)
    progress.note("lost")
    stream.full = False
    progress.note("written")
    assert stream.getvalue() == "written\n"


def test_process_without_stderr_shows_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    assert type(pick_progress()) is NoProgress
