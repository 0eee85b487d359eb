"""A `Pool` without torch that commits real parts and misbehaves as scripted, and a job for it."""

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
from batchjob.output.commit import commit_part as commit_of_commit
from batchjob.output.part_writer import PartWriter, build_rows
from batchjob.output.provenance import PartFooter, ShardResult
from batchjob.output.schema import build_row_schema
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

__all__ = [
    "Act",
    "ScriptedPool",
    "commit",
    "fail",
    "fail_after_commit",
    "first",
    "hang",
    "job",
    "make_part",
    "slow",
    "twice",
    "worker_fails",
]

LOADED = WorkerInfo("cpu", "fp32", "fake@000000000000", ("score",), batch_size=4, seconds=0.0)
_REST_SECONDS = 0.005

# What becomes of one attempt: events, one a turn of `wait`; None for a turn in which nothing happens.
Act = Callable[["ScriptedPool", ShardKey], Iterator[WorkerEvent | None]]


def commit(pool: ScriptedPool, key: ShardKey) -> Iterator[WorkerEvent | None]:
    """As it should be."""
    yield ShardCommitted(pool.commit(key))


def twice(pool: ScriptedPool, key: ShardKey) -> Iterator[WorkerEvent | None]:
    """The answer comes a second time, some turns later."""
    done = ShardCommitted(pool.commit(key))
    yield from (done, None, done)


def hang(pool: ScriptedPool, key: ShardKey) -> Iterator[WorkerEvent | None]:
    """Nothing is heard of it again."""
    while True:
        yield None


def slow(turns: int) -> Act:
    """Commits after so many turns."""

    def act(pool: ScriptedPool, key: ShardKey) -> Iterator[WorkerEvent | None]:
        yield from [None] * turns
        yield ShardCommitted(pool.commit(key))

    return act


def fail(error: BatchjobError | None = None) -> Act:
    """The attempt fails with nothing committed; the worker was lost where no error is given."""
    return lambda pool, key: iter([ShardFailed(key, error or AttemptFailed("worker 0 was lost"))])


def fail_after_commit(pool: ScriptedPool, key: ShardKey) -> Iterator[WorkerEvent | None]:
    """The worker is lost between its PUT and its answer."""
    pool.commit(key)
    yield ShardFailed(key, AttemptFailed("worker 0 was lost"))


def worker_fails(error: BatchjobError) -> Act:
    """No shard is to blame."""
    return lambda pool, key: iter([WorkerFailed(error)])


def first(happens: Callable[[], object], then: Act = commit) -> Act:
    """Something happens while the shard runs, and the act takes its course."""

    def act(pool: ScriptedPool, key: ShardKey) -> Iterator[WorkerEvent | None]:
        happens()
        yield from then(pool, key)

    return act


@dataclass
class _Attempt:
    key: ShardKey
    events: Iterator[WorkerEvent | None]


class ScriptedPool:
    """See `Pool`. Images with `bad` in their name become error rows, the others get a score.

    Args:
        script: of a shard's index, what becomes of its first attempts; all others are committed.
        size: workers.
        ready: events of the turns before the first shard is taken; `Ready` is among them, or the pool never is.
        newest_first: the shard that came last is the first to make progress.

    Attributes:
        submitted: indexes of the shards handed out, in order; second attempts beside a first one among them.
        backed_up: those of second attempts beside a first one.
        setup: what `start` was given.
        closed: whether `close` was called.
    """

    def __init__(
        self,
        script: Mapping[int, Sequence[Act]] = {},
        *,
        size: int = 2,
        ready: Iterable[WorkerEvent | None] = (WorkerReady("0", LOADED),),
        newest_first: bool = False,
    ) -> None:
        self._script = {index: list(acts) for index, acts in script.items()}
        self._waking, self._newest_first = iter(ready), newest_first
        self._attempts: list[_Attempt] = []
        self._ready = False
        self._over = threading.Event()
        self._plan: int | None = None
        self._store: Store
        self.size = size
        self.submitted: list[int] = []
        self.backed_up: list[int] = []
        self.setup: WorkerSetup | None = None
        self.closed = False

    @property
    def attempts(self) -> Counter[int]:
        """How often each shard was handed out."""
        return Counter(self.submitted)

    def start(self, setup: WorkerSetup) -> None:
        folder = Path(setup.job_folder)
        self.setup = setup
        self._job = Job.deserialize(setup.job, folder, folder)
        self._store = open_store(self._job.output.uri, self._job.storage)

    def free_slots(self) -> int:
        return 2 * self.size - len(self._attempts) if self._ready else 0

    def submit(self, key: ShardKey, plan_number: int) -> None:
        assert self.free_slots() > 0, "more than was asked for"
        self._begin(key, plan_number)

    def idle_workers(self) -> int:
        """As if each attempt had a worker of its own, as long as there are so many."""
        return max(0, self.size - len(self._attempts)) if self._ready else 0

    def submit_speculative(self, key: ShardKey, plan_number: int) -> None:
        assert self.idle_workers() > 0, "nobody is idle"
        assert any(attempt.key == key for attempt in self._attempts), "nobody has it in hand"
        self.backed_up.append(key.index)
        self._begin(key, plan_number)

    def _begin(self, key: ShardKey, plan: int) -> None:
        assert not self.closed
        self._plan = plan
        acts = self._script.get(key.index)
        act = acts.pop(0) if acts else commit
        self.submitted.append(key.index)
        self._attempts.append(_Attempt(key, act(self, key)))

    def wait(self, timeout: float) -> list[WorkerEvent]:
        """One event of one shard's, or a short rest."""
        assert not self.closed
        if (waking := next(self._waking, None)) is not None:
            self._ready = self._ready or isinstance(waking, WorkerReady)
            return [waking]
        for attempt in self._attempts[::-1] if self._newest_first else list(self._attempts):
            event = next(attempt.events, attempt)
            if isinstance(event, _Attempt):
                self._attempts.remove(attempt)
            elif event is not None:
                return [event]
        self._over.wait(min(timeout, _REST_SECONDS))
        return []

    def close(self) -> None:
        self.closed = True
        self._over.set()

    def commit(self, key: ShardKey) -> ShardResult:
        """Make the shard's part and commit it, as a worker does."""
        number, head = read_current_head(self._store)
        assert head is not None
        assert number == self._plan
        with tempfile.TemporaryDirectory() as spool:
            writer, made = make_part(Path(spool) / "part", self._store, self._job, key)
            examples = writer.examples

            def wanted() -> None:
                if is_discarded(self._store, head):
                    raise Temporary("the plan was discarded")

            if key.revision:
                stands, examples = retry.replace_part(self._store, key, writer.path, made, wanted)
            else:
                stands = commit_of_commit(self._store, key, writer.path, made, wanted)
        return ShardResult(key, stands.footer, examples, stands.committed_here, stands.info.etag)


def make_part(path: Path, store: Store, job: Job, key: ShardKey) -> tuple[PartWriter, PartFooter]:
    """The part of a shard of the plan in force, on the local spool; at a retry its error rows, all of them good now."""
    _, head = read_current_head(store)
    assert head is not None
    reader = PlanReader(store, head)
    shard = reader.read_shard(key)
    if key.revision:
        shard = retry.select_error_rows(store, shard)
    facts = [ImageInfo(ref.etag, 8, 8) if key.revision else _facts(ref) for ref in shard.refs]
    scores = pa.array([float(ref.position) for ref, fact in zip(shard.refs, facts, strict=True) if fact.error is None])
    schema = build_row_schema(list(reader.passthrough_schema), [pa.field("score", pa.float64())], job.input.has_id)
    with PartWriter(path, schema) as writer:
        writer.add(
            build_rows(
                schema,
                shard=shard,
                start=0,
                image_infos=facts,
                columns=[scores],
                error_records=[None] * len(scores),
                run_id="run",
                model_id=LOADED.model,
            )
        )
        made = PartFooter(
            plan=head.plan,
            shard=key.id,
            index=key.index,
            attempt=secrets.token_hex(8),
            revision=key.revision,
            fingerprint="f",
            model="m",
            rows=writer.rows,
            failed=writer.failed,
            errors=dict(writer.errors),
            seconds={"wall": 0.5, "predict": 0.25},
            versions={},
        )
        writer.close(made)
    return writer, made


def _facts(ref: ImageRef) -> ImageInfo:
    if "bad" in ref.uri:
        return ImageInfo(error=ErrorRecord("decode", "truncated", "ends too early"))
    return ImageInfo(ref.etag, 8, 8)


def job(folder: Path, images: Sequence[str], **sections: object) -> Job:
    """A job of two images a shard over files of these names, `folder/out` its output; nothing in it needs torch."""
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
