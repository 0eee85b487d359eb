"""Readers that poll an output while drivers write it and are killed: they see whole parts and nothing else."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.support.color_coded_job import check_output, format_overrides, write_job
from tests.support.driver_server import DriverServer
from tests.support.figures import Figure

IMAGES, SHARD = 240, 10
READS = 1000
NAP = {"BATCHJOB_TEST_NAP": "0.2"}  # seconds a batch; 48 batches
KILLS = 3

Read = Callable[[], int]


def make_readers(output: Path) -> dict[str, Read]:
    """Return for each common reader a function that counts the rows it sees, with one plain call."""
    import duckdb
    import pandas as pd
    import polars as pl
    import pyarrow.parquet as pq

    predictions = f"{output}/predictions/"

    def by_duckdb(glob: str) -> int:
        with duckdb.connect() as connection:
            return len(connection.execute("select position, embedding from read_parquet(?)", [glob]).fetchall())

    return {
        "pyarrow": lambda: pq.read_table(predictions).num_rows,
        "DuckDB": lambda: by_duckdb(f"{predictions}*.parquet"),
        "DuckDB **": lambda: by_duckdb(f"{output}/**/*.parquet"),
        "Polars": lambda: pl.read_parquet(predictions).height,
        "pandas": lambda: len(pd.read_parquet(predictions)),
    }


class ReaderThread:
    """A thread that reads again and again. The number of rows must only grow, by whole parts."""

    def __init__(self, read: Read, stop: threading.Event) -> None:
        self._read, self._stop = read, stop
        self.counts: list[int] = []
        self.errors: list[str] = []
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                count = self._read()
            except Exception as error:  # noqa: BLE001 - any exception of a reader is a failed read
                self.errors.append(f"{type(error).__name__}: {error}")
                continue
            if count % SHARD or count < max(self.counts, default=0):
                self.errors.append(f"{count} rows after {self.counts[-1:]}")
            self.counts.append(count)


def test_readers_see_only_whole_parts_through_kills(
    tmp_path: Path, driver_server: DriverServer, seed: int, figure: Figure
) -> None:
    """Every reader polls from the first committed part, through kills and resumes, until the run is complete."""
    chance = random.Random(f"readers {seed}")
    job, output, stop = write_job(tmp_path, IMAGES), tmp_path / "out", threading.Event()

    def run_and_poll() -> list[ReaderThread]:
        settings = format_overrides(output__uri=output, runtime__shard_size=SHARD)
        driver = driver_server.start("run", job, *settings, env=NAP, short_lease=True)
        driver.wait_until(lambda: any(output.glob("predictions/*")))
        polls = [ReaderThread(read, stop) for read in make_readers(output).values()]
        for _ in range(KILLS):
            assert driver.run_for(chance.uniform(0.5, 2.0))
            driver.kill()
            driver = driver_server.start("run", job, *settings, env=NAP, short_lease=True)
        ended = driver.wait()
        assert ended.exit_code == 0, ended.stderr
        while sum(len(poll.counts) for poll in polls) < READS and not any(poll.errors for poll in polls):
            stop.wait(0.1)
        return polls

    polls: list[ReaderThread] = []
    try:
        polls = run_and_poll()
    finally:
        stop.set()
    for poll in polls:
        poll.join()
    reads = {name: len(poll.counts) for name, poll in zip(make_readers(output), polls, strict=True)}
    wrong = Counter(said for poll in polls for said in poll.errors)
    partly = sum(0 < count < IMAGES for poll in polls for count in poll.counts)
    figure(
        "no reader sees a partial or foreign file",
        f"{wrong.total()} failed of {sum(reads.values()):,} reads, {partly:,} of them while rows were missing: "
        + ", ".join(f"{name} {count:,}" for name, count in reads.items()),
    )
    assert not wrong
    assert sum(reads.values()) >= READS
    assert {poll.counts[-1] for poll in polls} == {IMAGES}
    assert check_output(str(output), IMAGES).is_correct
