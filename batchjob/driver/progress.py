"""Progress of a run for a person: a bar on a terminal, a line every 30 seconds in a log, or nothing."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TextIO, cast

from batchjob.text import TolerantStream, format_count, sanitize

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["NoProgress", "ProgressBar", "ProgressLog", "ProgressMeter", "ProgressReporter", "pick_progress"]

Clock = Callable[[], float]
_LOG_SECONDS = 30.0
_NOTEBOOK_SECONDS = 5.0


class ProgressReporter(Protocol):
    """Receiver of a run's progress. Calls may come from any thread.

    Example of a resumed run: start(None), note("resuming …"), set_planned(1000, final=True), add_resumed(400),
    advance(100, 2), …, stop().
    """

    def start(self, planned: int | None) -> None:
        """Begin a run of `planned` images; None if that is unknown."""

    def set_planned(self, images: int, final: bool) -> None:
        """Set the number of images planned so far; `final` if the plan is complete."""

    def add_resumed(self, images: int) -> None:
        """Add images that were committed before this run. They are done, but do not count for its speed."""

    def advance(self, images: int, failed: int) -> None:
        """Add images that are committed now; `failed` of them are error rows."""

    def note(self, text: str) -> None:
        """Show one sentence, such as a worker that was replaced."""

    def stop(self) -> None:
        """End the run."""


class NoProgress:
    """Progress reporter that shows nothing."""

    def start(self, planned: int | None) -> None: ...

    def set_planned(self, images: int, final: bool) -> None: ...

    def add_resumed(self, images: int) -> None: ...

    def advance(self, images: int, failed: int) -> None: ...

    def note(self, text: str) -> None: ...

    def stop(self) -> None: ...


class ProgressMeter:
    """Counts of a run, its speed over the last three minutes, and the time to go.

    Args:
        clock: Monotonic clock, in seconds.

    Attributes:
        done: Images done, also those of earlier runs.
        failed: Error rows among them.
        total: Images planned so far; None while nothing is known.
        final: True if `total` counts all of them.
    """

    # The speed is measured over a window, so that neither the start-up nor an old slow stretch distorts it.
    WINDOW_SECONDS = 180.0

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._samples: deque[tuple[float, int]] = deque([(self._started, 0)])  # time, images done
        self.done = self.failed = 0
        self.total: int | None = None
        self.final = False

    def add_resumed(self, images: int) -> None:
        """Add images as if they had been done from the start."""
        self.done += images
        self._samples = deque((sampled, done + images) for sampled, done in self._samples)

    def advance(self, images: int, failed: int) -> None:
        """Add images that are done now; `failed` of them are error rows."""
        now = self._clock()
        self.done += images
        self.failed += failed
        self._samples.append((now, self.done))
        while len(self._samples) > 2 and self._samples[1][0] <= now - self.WINDOW_SECONDS:
            self._samples.popleft()

    @property
    def seconds(self) -> float:
        """Time since the start, in seconds."""
        return self._clock() - self._started

    @property
    def rate(self) -> float:
        """Images per second, over the window."""
        window_start, done = self._samples[0]
        seconds = self._clock() - window_start
        return (self.done - done) / seconds if seconds > 0 else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Time to go, in seconds; None while the plan is incomplete or the speed is unknown."""
        if self.total is None or not self.final or self.rate <= 0:
            return None
        return max(0, self.total - self.done) / self.rate

    def describe(self) -> str:
        """Describe the run in a line, such as `1,200/5,000 images, 3 errors, 84.1 images/s, ETA 0:00:45`.

        Before the first image is done, the line says what is known by then.
        """
        if self.total is None:
            return "starting" if not self.done else self._add_speed(format_count(self.done, "image"))
        if not self.done:
            return f"{format_count(self.total, 'image')} planned{'' if self.final else ' so far'}"
        return self._add_speed(f"{self.done:,}/{self.total:,}{'' if self.final else '+'} images")

    def summarize(self) -> str:
        """Describe the run at its end, such as `5,000 images, 3 errors, in 0:01:00`; the plan if nothing was done."""
        if not self.done and self.total:
            return f"{self.describe()}, in {_format_duration(self.seconds)}"
        counts = f"{format_count(self.done, 'image')}, {format_count(self.failed, 'error')}"
        return f"{counts}, in {_format_duration(self.seconds)}"

    def _add_speed(self, counts: str) -> str:
        eta = "" if self.eta_seconds is None else f", ETA {_format_duration(self.eta_seconds)}"
        return f"{counts}, {format_count(self.failed, 'error')}, {self.rate:,.1f} images/s{eta}"


class ProgressLog:
    """Progress reporter for logs: a line at regular intervals, also when nothing moves, and one at the end.

    Args:
        stream: Stream to write to, stderr by default. What it does not take is lost; the run goes on.
        clock: Monotonic clock, in seconds.
        interval: Time between two lines, in seconds; 0 writes a line only when `write_line` is called.
    """

    def __init__(
        self, stream: TextIO | None = None, clock: Clock = time.monotonic, interval: float = _LOG_SECONDS
    ) -> None:
        self._stream = TolerantStream(stream or sys.stderr)
        self._clock, self._interval = clock, interval
        self._meter = ProgressMeter(clock)
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, planned: int | None) -> None:
        with self._lock:
            self._meter = ProgressMeter(self._clock)
            self._meter.total, self._meter.final = planned, planned is not None
        if self._interval and self._thread is None:
            self._stopped.clear()
            self._thread = threading.Thread(target=self._write_lines, name="batchjob-progress", daemon=True)
            self._thread.start()

    def set_planned(self, images: int, final: bool) -> None:
        with self._lock:
            self._meter.total, self._meter.final = images, final

    def add_resumed(self, images: int) -> None:
        with self._lock:
            self._meter.add_resumed(images)

    def advance(self, images: int, failed: int) -> None:
        with self._lock:
            self._meter.advance(images, failed)

    def note(self, text: str) -> None:
        self._write(sanitize(text))

    def write_line(self) -> None:
        """Write the counts and the speed of this moment."""
        with self._lock:
            self._write(self._meter.describe())

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        # A run that refuses its job has no counts; its error says everything.
        if self._meter.done or self._meter.total:
            self._write(self._meter.summarize())

    def _write_lines(self) -> None:
        while not self._stopped.wait(self._interval):
            self.write_line()

    def _write(self, text: str) -> None:
        with self._lock:
            print(text, file=self._stream, flush=True)


class ProgressBar:
    """Progress reporter for terminals: one line that moves.

    Args:
        console: Rich console; one on stderr by default.
        clock: Monotonic clock, in seconds.
    """

    def __init__(self, console: Console | None = None, clock: Clock = time.monotonic) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._clock = clock
        self._lock = threading.RLock()
        self._meter = ProgressMeter(clock)
        self._rich_progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=30),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console or _make_console(sys.stderr),
            get_time=clock,
        )
        self._task = self._rich_progress.add_task("planning", total=None)

    def start(self, planned: int | None) -> None:
        with self._lock:
            self._meter = ProgressMeter(self._clock)
            self._meter.total, self._meter.final = planned, planned is not None
            self._rich_progress.reset(self._task, total=planned, description="starting")
            self._rich_progress.start()

    def set_planned(self, images: int, final: bool) -> None:
        with self._lock:
            self._meter.total, self._meter.final = images, final
            self._update()

    def add_resumed(self, images: int) -> None:
        with self._lock:
            self._meter.add_resumed(images)
            self._update()

    def advance(self, images: int, failed: int) -> None:
        with self._lock:
            self._meter.advance(images, failed)
            self._update()

    def note(self, text: str) -> None:
        self._rich_progress.console.print(sanitize(text), markup=False, highlight=False)

    def stop(self) -> None:
        with self._lock:
            self._update()
        self._rich_progress.stop()

    def _update(self) -> None:
        meter = self._meter
        self._rich_progress.update(self._task, total=meter.total, completed=meter.done, description=meter.describe())


def pick_progress(quiet: bool = False, stream: TextIO | None = None) -> ProgressReporter:
    """Pick the progress reporter: none if `quiet` or without a stream, a bar if the stream is a terminal, else a log.

    Args:
        quiet: Show nothing.
        stream: Stream to write to; stderr by default.
    """
    # A process that was started without a stderr has None there.
    stream = stream or sys.stderr
    if quiet or not stream:
        return NoProgress()
    if stream.isatty():
        return ProgressBar(_make_console(stream))
    # Someone looks at a notebook while it runs, and nobody at a log.
    return ProgressLog(stream, interval=_NOTEBOOK_SECONDS if "ipykernel" in sys.modules else _LOG_SECONDS)


def _make_console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=cast("TextIO", TolerantStream(stream)))


def _format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
