"""The live view of a run: one bar on a terminal, a line every 30 seconds elsewhere, or nothing."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TextIO

from batchjob.text import format_count, sanitize

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["NoProgress", "ProgressBar", "ProgressLog", "ProgressMeter", "ProgressReporter", "pick_progress"]

Clock = Callable[[], float]


class ProgressReporter(Protocol):
    """What a run tells a person while it goes on. Calls may come from any thread."""

    def start(self, planned: int | None) -> None:
        """The run begins; `planned` images if that is known yet."""

    def set_planned(self, images: int, final: bool) -> None:
        """The plan holds `n` images by now; no more when `final`."""

    def add_resumed(self, images: int) -> None:
        """So many images were committed before this run: done, and no measure of its speed."""

    def advance(self, images: int, failed: int) -> None:
        """So many more images are committed, `failed` of them as error rows."""

    def note(self, text: str) -> None:
        """One sentence of its own, such as a worker that was replaced."""

    def stop(self) -> None:
        """The run has ended."""


class NoProgress:
    """Says nothing."""

    def start(self, planned: int | None) -> None: ...

    def set_planned(self, images: int, final: bool) -> None: ...

    def add_resumed(self, images: int) -> None: ...

    def advance(self, images: int, failed: int) -> None: ...

    def note(self, text: str) -> None: ...

    def stop(self) -> None: ...


class ProgressMeter:
    """Counts, rate and time to go.

    The rate is over the last minutes, so that neither the start-up nor an old slow stretch spoils it.
    """

    WINDOW_SECONDS = 180.0

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._marks: deque[tuple[float, int]] = deque([(self._began, 0)])
        self.done = self.failed = 0
        self.total: int | None = None
        self.final = False

    def add_resumed(self, images: int) -> None:
        """Counts images as done, as if they had been so from the start."""
        self.done += images
        self._marks = deque((then, done + images) for then, done in self._marks)

    def advance(self, images: int, failed: int) -> None:
        now = self._clock()
        self.done += images
        self.failed += failed
        self._marks.append((now, self.done))
        while len(self._marks) > 2 and self._marks[1][0] <= now - self.WINDOW_SECONDS:
            self._marks.popleft()

    @property
    def seconds(self) -> float:
        return self._clock() - self._began

    @property
    def rate(self) -> float:
        """Images a second."""
        then, done = self._marks[0]
        elapsed = self._clock() - then
        return (self.done - done) / elapsed if elapsed > 0 else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to go; None while the end or the rate is unknown."""
        if self.total is None or not self.final or self.rate <= 0:
            return None
        return max(0, self.total - self.done) / self.rate

    def describe(self) -> str:
        """`1,200/5,000 images, 3 errors, 84.1 images/s, ETA 0:00:45`; before the first image what is known by then."""
        if self.total is None:
            return "starting" if not self.done else self._pace(format_count(self.done, "image"))
        if not self.done:
            return f"{format_count(self.total, 'image')} planned{'' if self.final else ' so far'}"
        return self._pace(f"{self.done:,}/{self.total:,}{'' if self.final else '+'} images")

    def summarize(self) -> str:
        """`5,000 images, 3 errors, in 0:01:00`; what was planned where nothing was done."""
        if not self.done and self.total:
            return f"{self.describe()}, in {_span(self.seconds)}"
        return f"{format_count(self.done, 'image')}, {format_count(self.failed, 'error')}, in {_span(self.seconds)}"

    def _pace(self, done: str) -> str:
        eta = "" if self.eta_seconds is None else f", ETA {_span(self.eta_seconds)}"
        return f"{done}, {format_count(self.failed, 'error')}, {self.rate:,.1f} images/s{eta}"


class ProgressLog:
    """For logs: a line every `every` seconds, also when nothing moves, and one at the end.

    Args:
        stream: where to.
        clock: seconds, monotonic.
        every: seconds between lines; 0 writes them only when `beat` is called.
    """

    def __init__(self, stream: TextIO | None = None, clock: Clock = time.monotonic, interval: float = 30.0) -> None:
        self._stream = stream or sys.stderr
        self._clock, self._every = clock, interval
        self._meter = ProgressMeter(clock)
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, planned: int | None) -> None:
        with self._lock:
            self._meter = ProgressMeter(self._clock)
            self._meter.total, self._meter.final = planned, planned is not None
        if self._every and self._thread is None:
            self._over.clear()
            self._thread = threading.Thread(target=self._run, name="batchjob-progress", daemon=True)
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
        """Writes the line that is due."""
        with self._lock:
            self._write(self._meter.describe())

    def stop(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._meter.done or self._meter.total:  # of a run that found fault with its job, the fault says it all
            self._write(self._meter.summarize())

    def _run(self) -> None:
        while not self._over.wait(self._every):
            self.write_line()

    def _write(self, text: str) -> None:
        with self._lock:
            print(text, file=self._stream, flush=True)


class ProgressBar:
    """For terminals: one line that moves."""

    def __init__(self, console: Console | None = None, clock: Clock = time.monotonic) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._clock = clock
        self._lock = threading.RLock()
        self._meter = ProgressMeter(clock)
        self._rich = RichProgress(
            SpinnerColumn(),
            BarColumn(bar_width=30),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console or Console(stderr=True),
            get_time=clock,
        )
        self._task = self._rich.add_task("planning", total=None)

    def start(self, planned: int | None) -> None:
        with self._lock:
            self._meter = ProgressMeter(self._clock)
            self._meter.total, self._meter.final = planned, planned is not None
            self._rich.reset(self._task, total=planned, description="starting")
            self._rich.start()

    def set_planned(self, images: int, final: bool) -> None:
        with self._lock:
            self._meter.total, self._meter.final = images, final
            self._show()

    def add_resumed(self, images: int) -> None:
        with self._lock:
            self._meter.add_resumed(images)
            self._show()

    def advance(self, images: int, failed: int) -> None:
        with self._lock:
            self._meter.advance(images, failed)
            self._show()

    def note(self, text: str) -> None:
        self._rich.console.print(sanitize(text), markup=False, highlight=False)

    def stop(self) -> None:
        with self._lock:
            self._show()
        self._rich.stop()

    def _show(self) -> None:
        meter = self._meter
        self._rich.update(self._task, total=meter.total, completed=meter.done, description=meter.describe())


def pick_progress(quiet: bool = False, stream: TextIO | None = None) -> ProgressReporter:
    """The view that fits: nothing if `quiet`, a bar where `stream` (stderr) is a terminal, else lines."""
    stream = stream or sys.stderr
    if quiet:
        return NoProgress()
    if stream.isatty():
        from rich.console import Console

        return ProgressBar(Console(file=stream))
    return ProgressLog(stream)


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
