"""Two drivers at one output, a driver that vanishes, one that is asked to stop: on a local disk and on SeaweedFS."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import Ended, ends, footers, kill, plans, run, start, table, until, write_slow_job
from seaweed import Seaweed

from batchjob.storage import open_store

IMAGES, SHARD = 60, 4
NAP = {"BATCHJOB_TEST_NAP": "0.8"}  # a batch; 15 of them take longer than ten seconds


@dataclass(frozen=True)
class Story:
    """What became of five drivers: two at once, the winner killed, a heir asked to stop, and one to the end."""

    output: str
    loser: Ended
    after_kill: dict[str, str]
    heir_waited: float
    heir: Ended
    after_stop: dict[str, str]
    last: Ended


def attempts(output: str) -> dict[str, str]:
    """The attempt that made each committed part."""
    return {key: made.attempt for key, made in footers(output).items()}


def epochs(output: str) -> int:
    """The newest epoch of the lease: each owner begins one."""
    names = [stat.uri for stat in open_store(output).list("_batchjob/lease/")]
    return max(int(Path(name).stem) for name in names)


def tell(folder: Path, output: str) -> Story:
    write_slow_job(folder, IMAGES)
    command: tuple[str, ...] = ("run", str(folder / "job.yaml"), f"output.uri={output}", "--json")
    with ExitStack() as stack:
        two = [stack.enter_context(ends(start(*command, env=NAP))) for _ in range(2)]
        loser = until(lambda: next((one for one in two if one.process.poll() is not None), None))
        lost = loser.end()
        (winner,) = (one for one in two if one is not loser)
        until(lambda: len(attempts(output)) >= 3, command=winner)
        kill(winner)
        after_kill, before = attempts(output), epochs(output)

        heir = stack.enter_context(ends(start(*command, env=NAP)))
        until(lambda: epochs(output) > before, command=heir)
        waited = time.monotonic() - heir.began
        until(lambda: attempts(output).keys() - after_kill.keys(), command=heir)
        heir.process.send_signal(signal.SIGTERM)
        stopped = heir.end()
        after_stop = attempts(output)
        return Story(output, lost, after_kill, waited, stopped, after_stop, run(*command))


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory, s3: Seaweed) -> Iterator[dict[str, Story]]:
    """Both stories side by side: they sleep most of the time."""
    local, remote = tmp_path_factory.mktemp("local"), tmp_path_factory.mktemp("remote")
    with ThreadPoolExecutor(2) as pool:
        told = {
            "local": pool.submit(tell, local, str(local / "out")),
            "s3": pool.submit(tell, remote, s3.bucket() + "out/"),
        }
        yield {name: story.result() for name, story in told.items()}


@pytest.mark.parametrize("where", ["local", "s3"])
def test_of_two_drivers_one_works_and_the_other_says_so_at_once(stories: dict[str, Story], where: str) -> None:
    story = stories[where]
    print(f"{where}: the loser left after {story.loser.seconds:.1f} s: {story.loser.answer['message']}")
    assert story.loser.code == 75
    assert story.loser.answer["status"] == "temporary"
    assert "another driver" in story.loser.answer["message"]
    assert story.loser.seconds < 10
    assert len(plans(story.output)) == 1


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_vanished_owner_is_replaced(stories: dict[str, Story], where: str) -> None:
    story = stories[where]
    print(f"{where}: the heir held the lease {story.heir_waited:.1f} s after its start")
    assert story.heir_waited < 30
    assert "waiting up to 20 s" in story.heir.err
    assert story.after_kill.items() <= story.after_stop.items(), "a committed part was done again"


@pytest.mark.parametrize("where", ["local", "s3"])
def test_sigterm_drains_and_the_next_run_resumes_at_once(stories: dict[str, Story], where: str) -> None:
    story = stories[where]
    assert (story.heir.code, story.heir.answer["status"]) == (75, "temporary"), story.heir.err
    assert "resumes" in story.heir.answer["message"]
    assert len(story.after_kill) < len(story.after_stop) < IMAGES // SHARD
    assert (story.last.code, story.last.answer["status"]) == (0, "complete"), story.last.err
    assert "waiting" not in story.last.err
    print(f"{where}: {len(story.after_kill)} parts before SIGKILL, {len(story.after_stop)} before SIGTERM, then all")


@pytest.mark.parametrize("where", ["local", "s3"])
def test_one_plan_one_set_of_parts(stories: dict[str, Story], where: str) -> None:
    story = stories[where]
    rows = table(story.output)
    assert sorted(rows["position"].to_pylist()) == list(range(IMAGES))
    assert len(plans(story.output)) == 1
    assert story.after_stop.items() <= attempts(story.output).items(), "a committed part was done again"
    assert {made.plan for made in footers(story.output).values()} == set(rows["run_id"].to_pylist())
