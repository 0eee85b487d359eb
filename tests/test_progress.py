"""What a person sees of a run, on a terminal and in a log."""

from __future__ import annotations

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


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_meter_counts_and_foretells() -> None:
    clock = Clock()
    meter = ProgressMeter(clock)
    meter.total, meter.final = 1000, False
    assert meter.describe() == "1,000 images planned so far"
    clock.now += 10
    meter.advance(200, 1)
    meter.final = True
    assert meter.describe() == "200/1,000 images, 1 error, 20.0 images/s, ETA 0:00:40"


def test_the_rate_forgets_what_is_long_ago() -> None:
    clock = Clock()
    meter = ProgressMeter(clock)
    clock.now += 1000
    meter.advance(1, 0)
    for _ in range(60):
        clock.now += 10
        meter.advance(100, 0)
    assert meter.rate == pytest.approx(10.0)


def test_images_of_an_earlier_run_are_no_measure_of_speed() -> None:
    clock = Clock()
    meter = ProgressMeter(clock)
    meter.add_resumed(500)
    clock.now += 10
    meter.advance(100, 0)
    assert (meter.done, meter.rate) == (600, 10.0)


def test_a_log_gets_a_line_at_each_beat_and_one_at_the_end() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = ProgressLog(stream, clock, interval=0)
    lines.start(None)
    lines.write_line()
    lines.set_planned(100, final=False)
    lines.add_resumed(20)
    clock.now += 30
    lines.advance(60, 2)
    lines.write_line()
    lines.note("worker 1 was replaced")
    lines.set_planned(80, final=True)
    clock.now += 30
    lines.stop()
    assert stream.getvalue().splitlines() == [
        "starting",
        "80/100+ images, 2 errors, 2.0 images/s",
        "worker 1 was replaced",
        "80 images, 2 errors, in 0:01:00",
    ]


def test_a_log_of_a_plan_tells_what_was_planned() -> None:
    clock, stream = Clock(), io.StringIO()
    lines = ProgressLog(stream, clock, interval=0)
    lines.start(None)
    lines.set_planned(65_536, final=False)
    lines.write_line()
    lines.set_planned(65_537, final=True)
    clock.now += 5
    lines.stop()
    assert stream.getvalue().splitlines() == ["65,536 images planned so far", "65,537 images planned, in 0:00:05"]


def test_one_is_no_plural() -> None:
    stream = io.StringIO()
    lines = ProgressLog(stream, Clock(), interval=0)
    lines.start(None)
    lines.advance(1, 1)
    lines.write_line()
    lines.stop()
    assert stream.getvalue().splitlines() == ["1 image, 1 error, 0.0 images/s", "1 image, 1 error, in 0:00:00"]


def test_a_log_gets_its_lines_without_being_asked() -> None:
    class Heard(io.StringIO):
        """Ends the wait of the test as soon as the thread has written."""

        def write(self, text: str) -> int:
            count = super().write(text)
            written.set()
            return count

    import threading

    written = threading.Event()
    lines = ProgressLog(Heard(), interval=0.001)
    lines.start(5)
    assert written.wait(30)
    lines.stop()


def test_a_terminal_gets_one_bar() -> None:
    clock, stream = Clock(), io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None)
    bar = ProgressBar(console, clock)
    bar.start(None)
    bar.set_planned(1000, final=True)
    clock.now += 10
    bar.add_resumed(100)
    bar.advance(200, 3)
    bar.note("shard [7] failed")
    bar.stop()
    said = stream.getvalue()
    assert "300/1,000 images, 3 errors, 20.0 images/s, ETA 0:00:35" in said
    assert "shard [7] failed" in said


@pytest.mark.parametrize("quiet", [True, False])
def test_the_view_fits_where_it_goes(quiet: bool) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    kinds: tuple[type[ProgressReporter], type[ProgressReporter]] = (
        (NoProgress, NoProgress) if quiet else (ProgressLog, ProgressBar)
    )
    assert type(pick_progress(quiet, io.StringIO())) is kinds[0]
    assert type(pick_progress(quiet, Terminal())) is kinds[1]


def test_quiet_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    quiet = NoProgress()
    quiet.start(3)
    quiet.set_planned(3, final=True)
    quiet.add_resumed(1)
    quiet.advance(2, 1)
    quiet.note("x")
    quiet.stop()
    assert capfd.readouterr() == ("", "")
