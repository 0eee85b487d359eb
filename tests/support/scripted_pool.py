"""Scripted worker pool, which commits real parts without torch and fails as the script of a test says; a job for it."""

from __future__ import annotations

import secrets
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import yaml

from batchjob.errors import AttemptFailed, BatchjobError, Temporary
from batchjob.job.job import Job
from batchjob.output import retry
from batchjob.output.commit import commit_part
from batchjob.output.part_writer import PartWriter, build_rows
from batchjob.output.provenance import PartFooter, ShardResult
from batchjob.output.schema import build_row_schema
from batchjob.plan.contract import Contract, put_or_read
from batchjob.plan.head import is_discarded, read_current_head
from batchjob.plan.reader import PlanReader
from batchjob.storage.store import Store, open_store
from batchjob.types import ErrorRecord, ImageInfo, ImageRef, ShardKey
from batchjob.worker.messages import (
    ShardCommitted,
    ShardFailed,
    WorkerEvent,
    WorkerFailed,
    WorkerInfo,
    WorkerReady,
    WorkerSetup,
)
from tests.support.part_footers import make_footer

__all__ = [
    "AttemptScript",
    "ScriptedPool",
    "call_first",
    "commit",
    "commit_after",
    "commit_twice",
    "fail",
    "fail_after_commit",
    "fail_worker",
    "hang",
    "make_job",
    "make_part",
]

WORKER_INFO = WorkerInfo("cpu", "fp32", "fake@000000000000", ("score",), batch_size=4, seconds=0.0)
_WAIT_SECONDS = 0.005

# Events of one attempt, one for each call of `wait`; None if nothing happens in that call.
AttemptScript = Callable[["ScriptedPool", ShardKey], Iterator[WorkerEvent | None]]


def commit(pool: ScriptedPool, key: ShardKey) -> Iterator[WorkerEvent | None]:
    """Commit the shard."""
    yield ShardCommitted(pool.commit(key))


def commit_twice(pool: ScriptedPool, key: ShardKey) -> Iterator[WorkerEvent | None]:
    """Commit the shard, and report it a second time two calls later."""
    done = ShardCommitted(pool.commit(key))
    yield from (done, None, done)


def hang(pool: ScriptedPool, key: ShardKey) -> Iterator[WorkerEvent | None]:
    """Report nothing, ever."""
    while True:
        yield None


def commit_after(ticks: int) -> AttemptScript:
    """Commit the shard after this many calls in which nothing happens."""

    def run_attempt(pool: ScriptedPool, key: ShardKey) -> Iterator[WorkerEvent | None]:
        yield from [None] * ticks
        yield ShardCommitted(pool.commit(key))

    return run_attempt


def fail(error: BatchjobError | None = None) -> AttemptScript:
    """Fail without a commit, with this error; by default the worker was lost."""
    return lambda pool, key: iter([ShardFailed(key, error or AttemptFailed("worker 0 was lost"))])


def fail_after_commit(pool: ScriptedPool, key: ShardKey) -> Iterator[WorkerEvent | None]:
    """Commit the shard, and lose the worker before it reports that."""
    pool.commit(key)
    yield ShardFailed(key, AttemptFailed("worker 0 was lost"))


def fail_worker(error: BatchjobError) -> AttemptScript:
    """Fail the worker with this error, which is no shard's fault."""
    return lambda pool, key: iter([WorkerFailed(error)])


def call_first(call: Callable[[], object], then: AttemptScript = commit) -> AttemptScript:
    """Call something while the shard runs, and go on with another script."""

    def run_attempt(pool: ScriptedPool, key: ShardKey) -> Iterator[WorkerEvent | None]:
        call()
        yield from then(pool, key)

    return run_attempt


@dataclass
class _Attempt:
    key: ShardKey
    events: Iterator[WorkerEvent | None]


class ScriptedPool:
    """Pool whose attempts follow scripts. Images with `bad` in their name become error rows, the others get a score.

    Args:
        scripts: Scripts of a shard's first attempts, by shard index; all other attempts commit.
        size: Number of workers.
        ready: Events before the first shard is taken; the pool is ready once a `WorkerReady` is among them.
        newest_first: Let the newest attempt make progress first.

    Attributes:
        submitted: Indexes of the shards submitted, in order, also for speculative attempts.
        speculated: Indexes of the shards submitted for a speculative attempt.
        setup: Setup that `start` was given.
        closed: Whether `close` was called.
    """

    def __init__(
        self,
        scripts: Mapping[int, Sequence[AttemptScript]] = {},
        *,
        size: int = 2,
        ready: Iterable[WorkerEvent | None] = (WorkerReady("0", WORKER_INFO),),
        newest_first: bool = False,
    ) -> None:
        self._scripts = {index: list(attempts) for index, attempts in scripts.items()}
        self._start_events, self._newest_first = iter(ready), newest_first
        self._attempts: list[_Attempt] = []
        self._ready = False
        self._closed_event = threading.Event()
        self._plan: int | None = None
        self._store: Store
        self.size = size
        self.submitted: list[int] = []
        self.speculated: list[int] = []
        self.setup: WorkerSetup | None = None
        self.closed = False

    @property
    def attempts(self) -> Counter[int]:
        """Number of attempts, by shard index."""
        return Counter(self.submitted)

    def start(self, setup: WorkerSetup) -> None:
        folder = Path(setup.job_folder)
        self.setup = setup
        self._job = Job.deserialize(setup.job, folder, folder)
        self._store = open_store(self._job.output.uri, self._job.storage)

    def free_slots(self) -> int:
        return 2 * self.size - len(self._attempts) if self._ready else 0

    def submit(self, key: ShardKey, plan_number: int) -> None:
        assert self.free_slots() > 0, "submitted although no slot is free"
        self._start_attempt(key, plan_number)

    def idle_workers(self) -> int:
        # As if each attempt had a worker of its own, while there are enough.
        return max(0, self.size - len(self._attempts)) if self._ready else 0

    def submit_speculative(self, key: ShardKey, plan_number: int) -> None:
        assert self.idle_workers() > 0, "no worker is idle"
        assert any(attempt.key == key for attempt in self._attempts), "the shard is not running"
        self.speculated.append(key.index)
        self._start_attempt(key, plan_number)

    def _start_attempt(self, key: ShardKey, plan: int) -> None:
        assert not self.closed
        self._plan = plan
        scripts = self._scripts.get(key.index)
        run_attempt = scripts.pop(0) if scripts else commit
        self.submitted.append(key.index)
        self._attempts.append(_Attempt(key, run_attempt(self, key)))

    def wait(self, timeout: float) -> list[WorkerEvent]:
        """Return one event of one attempt, or nothing after a short wait."""
        assert not self.closed
        if (start_event := next(self._start_events, None)) is not None:
            self._ready = self._ready or isinstance(start_event, WorkerReady)
            return [start_event]
        for attempt in self._attempts[::-1] if self._newest_first else list(self._attempts):
            event = next(attempt.events, attempt)
            if isinstance(event, _Attempt):
                self._attempts.remove(attempt)
            elif event is not None:
                return [event]
        self._closed_event.wait(min(timeout, _WAIT_SECONDS))
        return []

    def close(self) -> None:
        self.closed = True
        self._closed_event.set()

    def commit(self, key: ShardKey) -> ShardResult:
        """Make the shard's part and commit it, as a worker does."""
        number, head = read_current_head(self._store)
        assert head is not None
        assert number == self._plan
        schema, files_id = pa.schema([pa.field("score", pa.float64())]), self.setup.files_id if self.setup else ""
        put_or_read(self._store, head, Contract(schema, "m", None, files_id=files_id))
        with tempfile.TemporaryDirectory() as folder:
            writer, footer = make_part(Path(folder) / "part", self._store, self._job, key)
            examples = writer.examples

            def raise_if_discarded() -> None:
                if is_discarded(self._store, head):
                    raise Temporary("the plan was discarded")

            if key.revision:
                result, examples = retry.replace_part(self._store, key, writer.path, footer, raise_if_discarded)
            else:
                result = commit_part(self._store, key, writer.path, footer, raise_if_discarded)
        return ShardResult(key, result.footer, examples, result.committed_here, result.info.etag)


def make_part(path: Path, store: Store, job: Job, key: ShardKey) -> tuple[PartWriter, PartFooter]:
    """Write the part of a shard of the plan in force to a local file; in a retry its error rows, all of them good."""
    _, head = read_current_head(store)
    assert head is not None
    reader = PlanReader(store, head)
    shard = reader.read_shard(key)
    if key.revision:
        shard = retry.select_error_rows(store, shard)
    image_infos = [ImageInfo(ref.etag, 8, 8) if key.revision else _make_image_info(ref) for ref in shard.refs]
    scores = pa.array(
        [float(ref.position) for ref, info in zip(shard.refs, image_infos, strict=True) if info.error is None]
    )
    schema = build_row_schema(list(reader.passthrough_schema), [pa.field("score", pa.float64())], job.input.has_id)
    with PartWriter(path, schema) as writer:
        writer.add(
            build_rows(
                schema,
                shard=shard,
                start=0,
                image_infos=image_infos,
                columns=[scores],
                error_records=[None] * len(scores),
                run_id="run",
                model_id=WORKER_INFO.model,
            )
        )
        counts = {"rows": writer.rows, "failed": writer.failed, "errors": dict(writer.errors)}
        seconds = {"wall": 0.5, "predict": 0.25}
        footer = make_footer(key, plan=head.plan, attempt=secrets.token_hex(8), seconds=seconds, **counts)
        writer.close(footer)
    return writer, footer


def _make_image_info(ref: ImageRef) -> ImageInfo:
    if "bad" in ref.uri:
        return ImageInfo(error=ErrorRecord("decode", "truncated", "ends too early"))
    return ImageInfo(ref.etag, 8, 8)


def make_job(folder: Path, images: Sequence[str], **sections: object) -> Job:
    """Write a job over files of these names, with two images per shard and the output `folder/out`; no torch needed."""
    (folder / "images").mkdir(exist_ok=True)
    for name in images:
        (folder / "images" / name).write_bytes(b"pixels of " + name.encode())
    (folder / "net.py").write_text("def build():\n    raise AssertionError('nobody loads it here')\n")
    doc = {
        "input": {"type": "prefix", "uri": "images/"},
        "model": {"type": "python", "target": "net:build"},
        "task": {"type": "embedding"},
        "runtime": {"shard_size": 2},
        "output": {"uri": "out"},
        **sections,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(doc))
    return Job.from_file(folder / "job.yaml")
