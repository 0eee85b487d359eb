"""Existing output in a local folder: the job it belongs to, whether it is finished, and its stale parts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchjob.driver.existing_output import (
    apply_plan_defaults,
    are_stale_parts,
    check_fingerprint,
    delete_stale_parts,
    discard_current_plan,
    find_finished_result,
    find_plan_to_discard,
    list_stale_parts,
    read_present_footers,
)
from batchjob.errors import BatchjobError, CheckFailed, InvalidJob, Temporary
from batchjob.job.job import Job
from batchjob.output.commit import list_parts, read_footer
from batchjob.output.provenance import PartFooter
from batchjob.output.success import SUCCESS, Part, read_success, write_success
from batchjob.plan.head import PlanHead, discard_plan, new_head, put_head, read_current_head
from batchjob.report.run_result import RunResult
from batchjob.storage.store import Store, open_store
from batchjob.types import ShardKey
from tests.support.part_footers import make_footer
from tests.support.scripted_pool import make_job


class Output:
    """Local output of one job, with plans and parts as a test puts them there."""

    def __init__(self, folder: Path) -> None:
        self.job = make_job(folder, [])
        self.store: Store = open_store(self.job.output.uri)

    def plan(self, number: int = 0, job: Job | None = None) -> PlanHead:
        """Put the head of a plan of this job, or of another one."""
        job = job or self.job
        return put_head(
            self.store,
            new_head(
                number,
                job=job.serialize(),
                fingerprint=job.fingerprint(),
                shard_size=2,
                source_version=None,
                batchjob="1",
                defaults=job.resolved_settings(),
            ),
            lambda _: None,
        )

    def put_part(self, plan: str, index: int, revision: int = 0) -> str:
        """Put a part of two rows; return its key."""
        shard = ShardKey(index, f"{index:016x}", 2, 0, 0, revision)
        footer = make_footer(shard, plan=plan, attempt=f"attempt-{index}-{revision}")
        table = pa.table({"position": [0, 1]}).replace_schema_metadata({PartFooter.KEY: footer.to_json()})
        key = shard.part_key
        with tempfile.NamedTemporaryFile() as file:
            pq.write_table(table, file.name)
            self.store.delete(key)
            self.store.put_if_absent(key, Path(file.name))
        return key

    def finish(self, head: PlanHead, *, failed: int = 0) -> None:
        """Put `_SUCCESS` over the parts that are there."""
        parts = [
            Part(key, 2, 0, info.etag, info.size, read_footer(self.store, key).attempt)
            for key, info in list_parts(self.store).items()
        ]
        planned = 2 * len(parts)
        counts = {"planned": planned, "predicted": planned - failed, "failed": failed}
        write_success(self.store, {"plan": head.plan, "counts": counts, "truth": {"accuracy": 0.5}}, parts)

    def find_result(self, *, repair: bool = False, retry: bool = False) -> RunResult | None:
        return find_finished_result(self.store, self.job, repair, retry)


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(tmp_path)


@pytest.fixture
def other_job(tmp_path: Path) -> Job:
    """Another job with the same output."""
    (tmp_path / "other").mkdir()
    uri = str(tmp_path / "out")
    return make_job(tmp_path / "other", [], task={"type": "embedding", "normalize": True}, output={"uri": uri})


# -- the job that a plan belongs to


def test_plan_of_the_same_job_is_accepted(output: Output) -> None:
    check_fingerprint(output.store, output.job, output.plan())


def test_plan_of_another_job_is_refused_with_the_differences_and_the_way_out(output: Output, other_job: Job) -> None:
    with pytest.raises(InvalidJob) as caught:
        check_fingerprint(output.store, output.job, output.plan(job=other_job))
    first, difference, last = caught.value.message.splitlines()
    assert first == f"{output.store.uri} belongs to another job:"
    assert difference == "  task.normalize: true there, not set here"
    assert f"`batchjob discard {output.store.uri} --yes`" in last


def test_job_without_a_plan_keeps_its_own_defaults(output: Output) -> None:
    assert apply_plan_defaults(output.job, output.store, None) is output.job


def test_job_takes_over_the_defaults_of_its_plan(output: Output) -> None:
    head = output.plan()
    # The version that planned had another default for a field that the job does not set.
    defaults = {**head.defaults, "input": {**head.defaults["input"], "recursive": False}}
    assert output.job.input.model_dump()["recursive"] is True
    resumed = apply_plan_defaults(output.job, output.store, replace(head, defaults=defaults))
    assert resumed.input.model_dump()["recursive"] is False
    assert resumed.fingerprint() == output.job.fingerprint()


def test_job_does_not_take_over_the_defaults_of_another_job(output: Output, other_job: Job) -> None:
    with pytest.raises(InvalidJob, match="belongs to another job"):
        apply_plan_defaults(output.job, output.store, output.plan(job=other_job))


# -- is it finished?


def finish_plan(output: Output) -> None:
    head = output.plan()
    output.put_part(head.plan, 0)
    output.finish(head)


def leave_empty(output: Output) -> None:
    pass


def leave_unfinished(output: Output) -> None:
    output.put_part(output.plan().plan, 0)


def leave_success_of_a_discarded_plan(output: Output) -> None:
    finish_plan(output)
    _, head = read_current_head(output.store)
    assert head is not None
    discard_plan(output.store, head)


def begin_anew_beside_an_old_success(output: Output) -> None:
    leave_success_of_a_discarded_plan(output)
    output.plan(1)


@pytest.mark.parametrize(
    "prepare", [leave_empty, leave_unfinished, leave_success_of_a_discarded_plan, begin_anew_beside_an_old_success]
)
def test_output_without_a_success_of_its_plan_is_not_finished(
    output: Output, prepare: Callable[[Output], None]
) -> None:
    prepare(output)
    assert output.find_result() is None


def test_finished_output_gives_the_counts_of_its_success(output: Output) -> None:
    head = output.plan()
    output.put_part(head.plan, 0)
    output.put_part(head.plan, 1)
    output.finish(head, failed=1)
    uri = output.store.uri
    result = output.find_result()
    assert result is not None
    assert replace(result, message="") == RunResult("already_complete", 4, 3, 1, output=uri, truth={"accuracy": 0.5})
    assert result.message == (
        f"{uri}: already complete: 4 images, 3 predicted, 1 failed; new files below the input are not looked for: "
        "`batchjob run --check-input` does"
    )


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (leave_empty, "nothing has been run there yet"),
        (leave_success_of_a_discarded_plan, "its plan was discarded and nothing has been run since"),
    ],
)
def test_retry_needs_a_plan(output: Output, prepare: Callable[[Output], None], reason: str) -> None:
    prepare(output)
    with pytest.raises(InvalidJob, match=reason):
        output.find_result(retry=True)


@pytest.mark.parametrize(("failed", "finished"), [(0, True), (1, False)])
def test_retry_of_a_finished_output_has_work_if_there_are_error_rows(
    output: Output, failed: int, finished: bool
) -> None:
    head = output.plan()
    output.put_part(head.plan, 0)
    output.finish(head, failed=failed)
    result = output.find_result(retry=True)
    assert (result is not None) is finished
    if result is not None:
        assert result.message == f"{output.store.uri}: no row holds an error, so there is nothing to retry"


def test_finished_output_of_another_job_is_refused(output: Output, other_job: Job) -> None:
    output.finish(output.plan(job=other_job))
    with pytest.raises(InvalidJob, match="belongs to another job"):
        output.find_result()


def lose_a_part(output: Output, key: str) -> None:
    output.store.delete(key)


def add_a_foreign_part(output: Output, key: str) -> None:
    output.put_part("another plan", 1)


def rewrite_a_part_without_a_retry(output: Output, key: str) -> None:
    _, head = read_current_head(output.store)
    assert head is not None
    output.store.delete(key)
    pq.write_table(pa.table({"position": [2]}), Path(output.store.uri) / key)


@pytest.mark.parametrize("damage", [lose_a_part, add_a_foreign_part, rewrite_a_part_without_a_retry])
def test_parts_that_differ_from_success_are_an_error_except_in_a_repair(
    output: Output, damage: Callable[[Output, str], None]
) -> None:
    head = output.plan()
    key = output.put_part(head.plan, 0)
    output.finish(head)
    damage(output, key)
    with pytest.raises(CheckFailed, match=r"1 part gone, changed or added \(predictions/part-000000\d-.*--repair"):
        output.find_result()
    assert output.find_result(repair=True) is None


def test_output_is_unfinished_if_a_retry_replaced_a_part_after_success(output: Output) -> None:
    head = output.plan()
    output.put_part(head.plan, 0)
    output.finish(head)
    output.put_part(head.plan, 0, revision=1)
    assert output.find_result() is None


@pytest.mark.parametrize("stale", [True, False])
def test_added_part_makes_an_output_unfinished_if_stale_and_is_an_error_otherwise(output: Output, stale: bool) -> None:
    old = output.plan(0)
    discard_plan(output.store, old)
    head = output.plan(1)
    output.put_part(head.plan, 0)
    output.finish(head)
    # A retried part beside it: the driver of a retry lost its lease, and another one has put `_SUCCESS` meanwhile.
    output.put_part(head.plan, 0, revision=1)
    output.put_part(old.plan if stale else "another plan", 7)
    if stale:
        assert output.find_result() is None
    else:
        with pytest.raises(CheckFailed, match=r"2 parts gone, changed or added \(.*part-0000007"):
            output.find_result()


# -- which parts are stale?


def test_footers_are_read_in_key_order_and_a_deleted_part_has_none(output: Output) -> None:
    later, first = output.put_part("p", 2), output.put_part("p", 0)
    gone = "predictions/part-0000001-gone.parquet"
    found = list(read_present_footers(output.store, [later, gone, first], lambda: None))
    assert [(key, footer and footer.index) for key, footer in found] == [(first, 0), (gone, None), (later, 2)]


def test_lost_lease_ends_the_reading_of_footers(output: Output) -> None:
    def lose_lease() -> None:
        raise Temporary("another driver is at work")

    with pytest.raises(Temporary, match="at work"):
        list(read_present_footers(output.store, [output.put_part("p", index) for index in range(3)], lose_lease))


@pytest.mark.parametrize(
    ("plans", "stale"),
    [
        ([], True),
        (["discarded"], True),
        (["discarded", "in force"], False),
        (["discarded", "unknown"], False),
        (["gone"], True),
    ],
)
def test_parts_are_stale_if_all_belong_to_discarded_plans(output: Output, plans: list[str], stale: bool) -> None:
    discarded = output.plan(0)
    discard_plan(output.store, discarded)
    ids = {"discarded": discarded.plan, "in force": output.plan(1).plan, "unknown": "another plan"}
    keys = [
        output.put_part(ids[plan], index) if plan in ids else "predictions/part-0000009-gone.parquet"
        for index, plan in enumerate(plans)
    ]
    assert are_stale_parts(output.store, keys) is stale


def test_file_of_another_program_is_not_called_stale(output: Output) -> None:
    output.store.put_if_absent("predictions/notes.txt", b"mine")
    with pytest.raises(CheckFailed, match=r"notes\.txt was not written by batchjob"):
        are_stale_parts(output.store, ["predictions/notes.txt"])


def test_stale_parts_are_deleted_and_no_others(output: Output) -> None:
    old = output.plan(0)
    stale = [output.put_part(old.plan, index) for index in (0, 1)]
    discard_plan(output.store, old)
    kept = output.put_part(output.plan(1).plan, 2)
    delete_stale_parts(output.store, stale)
    assert list(list_parts(output.store)) == [kept]


@pytest.mark.parametrize(
    ("owner", "error", "words"),
    [
        ("in force", Temporary, "another driver has begun plan .* meanwhile; run again"),
        ("unknown", CheckFailed, "is a part of plan another plan, not of this output's; remove it"),
    ],
)
def test_nothing_is_deleted_if_one_part_is_not_stale(
    output: Output, owner: str, error: type[BatchjobError], words: str
) -> None:
    old = output.plan(0)
    discard_plan(output.store, old)
    current = output.plan(1)
    keys = [output.put_part(old.plan, 0), output.put_part(current.plan if owner == "in force" else "another plan", 1)]
    with pytest.raises(error, match=words):
        delete_stale_parts(output.store, keys)
    assert sorted(list_parts(output.store)) == sorted(keys)


# -- what there is to discard


def test_plan_in_force_is_the_one_to_discard(output: Output) -> None:
    discard_plan(output.store, output.plan(0))
    head = output.plan(1)
    assert find_plan_to_discard(output.store) == head


def test_interrupted_discard_has_no_plan_and_is_no_error(output: Output) -> None:
    leave_success_of_a_discarded_plan(output)
    assert find_plan_to_discard(output.store) is None


def discard_completely(output: Output) -> None:
    discard_plan(output.store, output.plan(0))


def leave_a_part_without_a_plan(output: Output) -> None:
    output.put_part("another plan", 0)


@pytest.mark.parametrize("prepare", [leave_empty, discard_completely, leave_a_part_without_a_plan])
def test_there_is_nothing_to_discard_without_a_plan(output: Output, prepare: Callable[[Output], None]) -> None:
    prepare(output)
    with pytest.raises(InvalidJob, match="no plan in force, nothing to discard"):
        find_plan_to_discard(output.store)


def test_discarded_plan_has_neither_head_nor_success(output: Output) -> None:
    finish_plan(output)
    discard_current_plan(output.store, find_plan_to_discard(output.store))
    assert read_current_head(output.store) == (1, None)
    assert read_success(output.store) is None


def test_interrupted_discard_is_completed_without_a_plan(output: Output) -> None:
    leave_success_of_a_discarded_plan(output)
    discard_current_plan(output.store, None)
    assert read_success(output.store) is None


def test_success_of_a_later_plan_survives_the_discard_of_an_earlier_one(output: Output) -> None:
    old = output.plan(0)
    discard_plan(output.store, old)
    output.finish(output.plan(1))  # another driver was faster
    discard_current_plan(output.store, old)
    assert (Path(output.store.uri) / SUCCESS).exists()


def test_all_parts_are_stale_after_a_discard(output: Output) -> None:
    leave_success_of_a_discarded_plan(output)
    assert list_stale_parts(output.store) == list(list_parts(output.store))
    assert len(list_stale_parts(output.store)) == 1


def test_parts_are_not_listed_as_stale_once_another_driver_has_a_plan(output: Output) -> None:
    begin_anew_beside_an_old_success(output)
    with pytest.raises(Temporary, match=r"another driver has begun plan .* nothing of it was deleted"):
        list_stale_parts(output.store)
