"""Fuzzing: job files, manifests and objects of an output with any bytes are read, or refused with one sentence."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from batchjob.driver.lease import Lease
from batchjob.errors import BatchjobError
from batchjob.job.job import Job
from batchjob.output import commit
from batchjob.output.listed_parts import find_part_mismatches
from batchjob.output.success import Part, read_success, write_success
from batchjob.plan import chunks, contract
from batchjob.plan.contract import Contract
from batchjob.plan.head import PlanHead, is_plan_id_discarded, new_head, put_head, read_current_head
from batchjob.plan.reader import PlanReader
from batchjob.report import output_status
from batchjob.sources.manifest import ManifestSource
from batchjob.sources.source import REF_FIELDS
from batchjob.storage.reader import Reader
from batchjob.types import Cursor
from tests.support.figures import Figure
from tests.support.memory_store import MemoryStore
from tests.support.scripted_pool import WORKER_INFO, make_job, make_part

MAX_EXAMPLES = int(os.environ.get("BATCHJOB_EXAMPLES") or 2_000)
SEED = int(os.environ.get("BATCHJOB_SEED") or 1)
MAX_MESSAGE_LENGTH = 4_000  # in characters

MANIFEST = [{"image": f"s3://lake/{n}.jpg", "size": n, "sku": f"née \u2028 {n}"} for n in range(20)]
JOB_TEXT = """\
name: digits
params: {dt: {type: date}, n: {type: int, default: 3}}
input: {type: manifest, uri: "in/dt=${dt}/", uri_column: image, passthrough: {sku: string}}
model: {type: torchvision, name: resnet50, weights: IMAGENET1K_V2}
preprocess: &p {resize: [32, 32], mean: [0.5, .5, 5e-1], std: [1, 1, 1]}
task: {type: classification, top_k: 5}
runtime: {workers: {min: 1, max: 8}, batch_size: auto}
errors: {max_rate: 0.01, max_count: null}
output: {uri: "out/dt=${dt}/"}
"""
PASSED: list[str] = []  # kinds of files whose tests passed

EDITS = st.lists(
    st.tuples(
        st.sampled_from(("flip", "cut", "insert", "repeat", "drop")), st.integers(0, 1 << 16), st.binary(max_size=6)
    ),
    max_size=6,
)


def fuzz(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test over `MAX_EXAMPLES` examples, the same ones for the same seed."""
    chosen = settings(
        max_examples=MAX_EXAMPLES,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    return seed(SEED)(chosen(test))


@pytest.fixture
def done(request: pytest.FixtureRequest) -> Iterator[None]:
    """Counts the test once it has passed."""
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed == failed:
        PASSED.append(request.node.name)


def apply_edits(data: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    """Apply edits to bytes."""
    for how, where, more in changes:
        at = where % (len(data) + 1)
        match how:
            case "flip":
                data = data[:at] + bytes(b ^ m for b, m in zip(data[at:], more, strict=False)) + data[at + len(more) :]
            case "cut":
                data = data[:at]
            case "insert":
                data = data[:at] + more + data[at:]
            case "repeat":
                data = data[:at] + data[max(0, at - 40) :]
            case _:
                data = data[:at] + data[at + len(more) :]
    return data


@contextmanager
def expect_readable_error() -> Iterator[None]:
    """Accept a BatchjobError with a readable message, or no error."""
    said = "nothing"
    try:
        yield
    except BatchjobError as error:
        said = error.message
    assert said.strip()
    assert len(said) < MAX_MESSAGE_LENGTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


@pytest.mark.usefixtures("done")
@fuzz
@given(text=st.one_of(st.binary(max_size=300), EDITS.map(lambda changes: apply_edits(JOB_TEXT.encode(), changes))))
def test_job_file_of_any_bytes_gives_a_readable_error(folder: Path, text: bytes) -> None:
    path = folder / "job.yaml"
    path.write_bytes(text)
    with expect_readable_error():
        Job.from_file(path, params={"dt": "2026-11-20"})


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.just("${dt}"))
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ("name", "params", "input", "model", "preprocess", "task", "runtime", "errors", "output", "storage", "decode")
)


@pytest.mark.usefixtures("done")
@fuzz
@given(
    key=KEYS, inner=st.sampled_from(("type", "uri", "name", "uri_column", "batch_size", "workers", None)), value=TREES
)
def test_job_with_any_value_gives_a_readable_error(folder: Path, key: str, inner: str | None, value: object) -> None:
    doc: dict[str, Any] = {
        "input": {"type": "prefix", "uri": "in/"},
        "model": {"type": "torchvision", "name": "resnet50", "weights": "DEFAULT"},
        "task": {"type": "embedding"},
        "output": {"uri": "out/"},
    }
    doc[key] = value if inner is None else {**doc.get(key, {}), inner: value}
    path = folder / "any.json"
    path.write_text(json.dumps(doc))  # JSON is YAML
    with expect_readable_error():
        Job.from_file(path, params={"dt": "2026-11-20"})


def write_csv() -> bytes:
    rows = [",".join(MANIFEST[0]), *(f'{row["image"]},{row["size"]},"{row["sku"]}"' for row in MANIFEST)]
    return "\r\n".join(rows).encode()


def write_jsonl() -> bytes:
    return "\n".join(json.dumps(row) for row in MANIFEST).encode()


def write_parquet(**options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(MANIFEST), sink, row_group_size=7, **options)
    return sink.getvalue()


MANIFESTS = {
    "m.csv": write_csv(),
    "m.csv.gz": gzip.compress(write_csv(), mtime=0),
    "m.jsonl": write_jsonl(),
    "m.jsonl.gz": gzip.compress(write_jsonl(), mtime=0),
    "m.parquet": write_parquet(compression="none", use_dictionary=False),
    "m.pq": write_parquet(compression="zstd"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_of_any_bytes_gives_a_readable_error(folder: Path, name: str) -> None:
    path = folder / name
    source = ManifestSource(uri=str(path), uri_column="image", size_column="size", passthrough=("sku",))

    @fuzz
    @given(
        text=st.one_of(st.binary(max_size=200), EDITS.map(lambda changes: apply_edits(MANIFESTS[name], changes))),
        after=st.sampled_from((0, 3, 19, 100)),
    )
    def read(text: bytes, after: int) -> None:
        path.write_bytes(text)
        with expect_readable_error():
            for batch in source.refs(Reader({}), Cursor(rows=after)):
                batch.validate(full=True)
                batch.to_pylist()

    read()
    PASSED.append(name)


@pytest.fixture(scope="module")
def output(folder: Path) -> tuple[MemoryStore, PlanHead, Job]:
    """A plan of three shards, in an output that holds every kind of object."""
    (folder / "finished").mkdir()
    the = make_job(folder / "finished", ["0.png", "1.png", "bad.png", "3.png", "4.png"])
    store = MemoryStore()
    head = put_head(
        store,
        new_head(
            0,
            job=the.serialize(),
            fingerprint=the.fingerprint(),
            shard_size=2,
            source_version=None,
            batchjob="1",
            defaults=the.resolved_settings(),
        ),
    )
    names = ["0.png", "1.png", "bad.png", "3.png", "4.png"]
    columns = [names, names, [1] * 5, ["tag"] * 5]
    refs = pa.record_batch(
        [pa.array(c, f.type) for c, f in zip(columns, REF_FIELDS, strict=True)], pa.schema(REF_FIELDS)
    )
    (chunk,) = chunks.extend_plan(store, head, lambda after: iter([refs]), lambda: None)
    parts = []
    for key in chunk.shards:
        writer, made = make_part(folder / "part", store, the, key)
        stands = commit.commit_part(store, key, writer.path, made, lambda: None)
        parts.append(Part(key.part_key, made.rows, made.failed, stands.info.etag, stands.info.size))
    contract.put_or_read(store, head, Contract(pa.schema([pa.field("score", pa.float64())]), WORKER_INFO.model, None))
    Lease.acquire(store).release()
    counts = {"planned": 5, "predicted": 4, "failed": 1}
    write_success(store, {"plan": head.plan, "status": "complete", "counts": counts}, parts)
    return store, head, the


def list_reads(store: MemoryStore, head: PlanHead) -> list[Callable[[], object]]:
    """Return every function that reads an output."""
    ours = Contract(pa.schema([pa.field("score", pa.float64())]), WORKER_INFO.model, None)

    def members() -> None:
        reader = PlanReader(store, head)
        for chunk in chunks.read_chunks(store, head):
            for key in chunk.shards:
                assert len(reader.read_shard(key).refs) == key.rows

    def success() -> None:
        if (found := read_success(store)) is not None:
            find_part_mismatches(store, found[0], commit.list_parts(store))

    def lease() -> None:
        clock = iter(range(0, 10_000, 5))
        Lease.acquire(store, clock=lambda: float(next(clock)), sleep=lambda seconds: None).release()

    return [
        lambda: read_current_head(store),
        lambda: is_plan_id_discarded(store, "0" * 16),
        members,
        success,
        lambda: contract.put_or_read(store, head, ours),
        lambda: list(commit.read_footers(store, sorted(commit.list_parts(store)))),
        lambda: output_status.read_status(store),
        lambda: output_status.count_errors(store),
        lambda: list(output_status.read_errors(store)),
        lease,
    ]


@pytest.mark.parametrize(
    "which", ["head.json", "chunk-", "schema.arrow", "_batchjob/lease/", "_SUCCESS", "part-0000001"]
)
def test_damaged_output_gives_a_readable_error(output: tuple[MemoryStore, PlanHead, Job], which: str) -> None:
    store, head, _ = output
    (key,) = [key for key in store.stored_keys() if which in key]
    sound, objects = store.state.objects[key], dict(store.state.objects)

    @fuzz
    @given(
        st.one_of(st.binary(max_size=80), EDITS.map(lambda changes: apply_edits(sound.data, changes))),
        st.integers(0, 9),
    )
    def read(data: bytes, which_read: int) -> None:
        store.state.objects.clear()
        store.state.objects.update(objects)
        store.delete(key)
        store.put_if_absent(key, data)
        with expect_readable_error():
            list_reads(store, head)[which_read]()

    try:
        read()
        PASSED.append(which)
    finally:
        store.state.objects.clear()
        store.state.objects.update(objects)


def test_undamaged_output_can_be_read(output: tuple[MemoryStore, PlanHead, Job]) -> None:
    store, head, _ = output
    for read in list_reads(store, head):
        read()


def test_all_kinds_were_fuzzed(figure: Figure) -> None:
    figure("parsers", f"{len(PASSED)} kinds of files × {MAX_EXAMPLES:,} damaged ones: 0 odd exceptions")
    assert len(PASSED) == 2 + len(MANIFESTS) + 6
