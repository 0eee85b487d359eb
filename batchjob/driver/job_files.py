"""Files that a job names: weights, code, labels, manifest. A plan keeps tags and digests, to notice other files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from batchjob.concurrency import DaemonThreadPool, run_in_background
from batchjob.errors import InvalidJob, StorageError, Unavailable
from batchjob.job.job import Job
from batchjob.plan.contract import read_contract
from batchjob.plan.head import PlanHead, report_damage
from batchjob.sources.listing import SourceListing
from batchjob.storage.reader import Reader
from batchjob.storage.store import Store, put_or_get, read_if_present
from batchjob.uris import is_local

__all__ = ["FileFacts", "FileRecorder", "JobFiles", "check_files", "find_changed_files", "has_record"]

_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileFacts:
    """A file that a job names.

    Attributes:
        size: Size in bytes.
        etag: Tag of its store; on a local disk, time stamp and size. None if the store has no tags.
        sha256: Digest of its content, in hex; None if it was not computed, as for files in a bucket.
        is_input: True for a file that names images.
    """

    size: int
    etag: str | None
    sha256: str | None = None
    is_input: bool = False


class JobFiles:
    """Files that a job names, as they are now. Published weights, which are named by their names, are none.

    The record of a plan is bound to the rows in two steps, so that no kill can separate them:

        driver    looks at the files, and gives their id (a digest of the tags) to its workers
        worker    loads the model; the first one puts digest of the model and id of the files into the contract
        driver    hashes the files meanwhile, and puts the record under this id before it puts `_SUCCESS`

    Args:
        job: The job.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._reader = job, Reader(job.storage)
        self._listing = SourceListing(job.input, self._reader, job.output.uri)
        self._uris: dict[str, str] = {}  # by name

    @cached_property
    def facts(self) -> Mapping[str, FileFacts]:
        """Size and tag of each file, by its path from the job's folder or its URI; without digests.

        Raises:
            InvalidJob: A file that names others (an index, a source) is not there.
            Unavailable: A store cannot be reached.
        """
        found = {}
        for uri in dict.fromkeys(self._list_uris()):
            if (facts := self._look_at(uri)) is not None:
                found[self._name(uri)] = facts
        # A plan that is complete needs its manifest no more.
        with suppress(InvalidJob):
            for info in self._listing.files:
                found[self._name(info.uri)] = FileFacts(info.size, info.etag, is_input=True)
        return found

    @cached_property
    def id(self) -> str:
        """Digest of all names, sizes and tags; empty if the job names no file."""
        tags = [[name, facts.size, facts.etag] for name, facts in sorted(self.facts.items())]
        return hashlib.sha256(json.dumps(tags).encode()).hexdigest()[:32] if tags else ""

    def look_again(self, name: str) -> FileFacts | None:
        """Return the facts of a file that a record names, used or not by now; None if it is not there."""
        return self.facts.get(name) or self._look_at(str(self._job.folder / name) if is_local(name) else name)

    def add_digest(self, name: str, facts: FileFacts) -> FileFacts:
        """Return the facts with the digest of a local file; without one if the file has changed or is not there."""
        uri = self._uris.get(name) or str(self._job.folder / name)
        if not is_local(name):
            return facts
        digest = hashlib.sha256()
        with suppress(StorageError, Unavailable), self._reader.open(uri) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
            if self._reader.stat(uri).etag == facts.etag:
                return replace(facts, sha256=digest.hexdigest())
        return facts

    def make_record(self) -> bytes:
        """Return the record of these files: facts and digests by name. Reads all local ones."""
        facts = {name: asdict(self.add_digest(name, found)) for name, found in self.facts.items()}
        return json.dumps(facts, indent=1).encode()

    def put_record(self, store: Store, head: PlanHead, make_record: Callable[[], bytes]) -> None:
        """Put the record beside the plan if the plan's rows were made with these files and it has none.

        Args:
            store: The output.
            head: Head of the plan.
            make_record: Returns the record; called only if it is needed.
        """
        contract = read_contract(store, head)
        is_ours = contract is not None and contract.files_id and contract.files_id == self.id
        if is_ours and _read_record(store, head, self.id) is None:
            put_or_get(store, _record_key(head, self.id), make_record())

    def is_other_input(self, store: Store, head: PlanHead) -> bool:
        """Return True if a plan that no worker has begun lists a manifest in another version."""
        return (
            head.source_version is not None
            and read_contract(store, head) is None
            and head.source_version != self._listing.version
        )

    def _list_uris(self) -> Iterator[str]:
        job = self._job
        # A file that is gone is found by its name in the record.
        with suppress(StorageError):
            yield from job.model.list_files(self._reader, job.folder)
        yield from job.task.list_files(job.folder)
        if job.preprocess is not None:
            yield from job.preprocess.list_files(job.folder)

    def _look_at(self, uri: str) -> FileFacts | None:
        try:
            info = self._reader.stat(uri)
        except StorageError:
            return None
        return FileFacts(info.size, info.etag)

    def _name(self, uri: str) -> str:
        name = self._job.shorten_path(uri)
        self._uris[name] = uri
        return name


class FileRecorder:
    """Recorder of a job's files for one run: hashes them while the workers load, and puts the record once.

    Args:
        files: The job's files.
    """

    def __init__(self, files: JobFiles) -> None:
        self._files, self._thread = files, DaemonThreadPool(1, "job-files")
        self._pending: Future[bytes] | None = None
        self._is_done = False

    @property
    def is_ready(self) -> bool:
        """True if the files are hashed, and their record is still to be put."""
        return not self._is_done and self._pending is not None and self._pending.done()

    def start(self) -> None:
        """Hash the files in a thread of their own, unless the plan has their record."""
        if not self._is_done:
            self._pending = self._thread.submit(self._files.make_record)

    def skip(self) -> None:
        """Make no record: the plan has one."""
        self._is_done = True

    def put(self, store: Store, head: PlanHead, heartbeat: Callable[[], object]) -> None:
        """Put the record once, after the plan's contract; wait for it with heartbeats, for the workers may be gone."""
        if self._is_done:
            return
        make_record = self._files.make_record if self._pending is None else self._pending.result
        run_in_background(lambda: self._files.put_record(store, head, make_record), heartbeat)
        self._is_done = True


def has_record(store: Store, head: PlanHead) -> bool:
    """Return True if the plan has a record of the files that its rows are made with."""
    return _read_plan_record(store, head) is not None


def find_changed_files(store: Store, head: PlanHead, files: JobFiles, *, with_input: bool) -> list[str]:
    """Compare the files that a plan's rows were made with to those that are there now, by tag, then by digest.

    A file that is gone is no difference.

    Args:
        store: The output.
        head: Head of the plan.
        files: The job's files now.
        with_input: Compare the files that name images, too.

    Returns:
        One line for each file that differs; none if the plan has no record, as those of earlier versions.

    Raises:
        InvalidJob, Unavailable: See `JobFiles.facts`.
    """
    found = _read_plan_record(store, head)
    if found is None or found[0] == files.id:
        return []
    record, lines = found[1], []
    for name in sorted({*record, *files.facts}):
        there, here = record.get(name), files.look_again(name)
        if not with_input and any(facts is not None and facts.is_input for facts in (there, here)):
            continue
        # A complete output outlives weights and manifests that were put up for its run and deleted since.
        if here is None:
            continue
        if there is not None:
            if there.size == here.size and there.etag == here.etag:
                continue
            here = files.add_digest(name, here)
            if _is_same_content(there, here):
                continue
        lines.append(f"{name}: {_describe(there)} there, {_describe(here)} here")
    return lines


def check_files(store: Store, head: PlanHead, files: JobFiles, *, with_input: bool) -> None:
    """Check that the plan's rows were made with the files that the job names now; see `find_changed_files`.

    Raises:
        InvalidJob: They were made with others; the message shows the difference.
    """
    if lines := find_changed_files(store, head, files, with_input=with_input):
        listed = "\n".join(f"  {line}" for line in lines)
        raise InvalidJob(
            f"{store.uri} was made with other files than those that the job names now:\n{listed}\nrestore them, choose "
            "another output.uri, or start anew with `batchjob run --fresh`, which throws these rows away"
        )


def _is_same_content(there: FileFacts, here: FileFacts) -> bool:
    """Return True if two files of other tags are the same: by digest, or by size where the store has no tags."""
    if there.size != here.size:
        return False
    if there.sha256 is not None and here.sha256 is not None:
        return there.sha256 == here.sha256
    return there.etag is None or here.etag is None


def _describe(facts: FileFacts | None) -> str:
    if facts is None:
        return "not"
    tag = f"sha256 {facts.sha256[:12]}" if facts.sha256 else f"tag {facts.etag}" if facts.etag else "no tag"
    return f"{facts.size:,} bytes, {tag},"


def _record_key(head: PlanHead, files_id: str) -> str:
    return f"{head.folder}files/{files_id}.json"


def _read_plan_record(store: Store, head: PlanHead) -> tuple[str, dict[str, FileFacts]] | None:
    """Return id and facts of the files that the plan's rows are made with; None if the plan has no record yet."""
    contract = read_contract(store, head)
    if contract is None or not contract.files_id:
        return None
    record = _read_record(store, head, contract.files_id)
    return None if record is None else (contract.files_id, record)


def _read_record(store: Store, head: PlanHead, files_id: str) -> dict[str, FileFacts] | None:
    key = _record_key(head, files_id)
    if (stored := read_if_present(store, key)) is None:
        return None
    with report_damage(store, key):
        document: dict[str, dict[str, Any]] = json.loads(stored.data)
        return {name: FileFacts(**facts) for name, facts in document.items()}
