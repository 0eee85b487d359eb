"""The store's name ceases to resolve in the middle of a run: no error row, exit 75, and the next run goes on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from batchjob_process import (
    Command,
    delete_lease,
    kill_on_exit,
    open_output,
    read_all_footers,
    start_program,
    wait_until,
)
from color_coded_job import check_output, format_overrides, format_range, list_committed_parts, upload_job
from fault_proxy import RESET, run_fault_proxy
from figures import Figure
from seaweed import Seaweed

from batchjob.output import commit

IMAGES, SHARD, NAME = 120, 10, "store.batchjob.test"
CONNECTIONS = 30  # that may stand as the name goes: each brings one more request; with the name they are 160

# What the C library asks lies beneath mounts of its own: the machine's names are left as they are.
IN_A_NAMESPACE = """\
mount --bind "$1" /etc/hosts && mount --bind "$2" /etc/nsswitch.conf || exit 99
shift 2
exec "$@"
"""


@dataclass(frozen=True)
class Names:
    """What processes that are started by it find in `/etc/hosts`, and nowhere else, at each look."""

    folder: Path

    def know(self) -> None:
        """The name is that of this machine."""
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.0.1 {NAME}\n")
        (self.folder / "nsswitch.conf").write_text("hosts: files\n")

    def forget(self) -> None:
        """Nobody knows the name any more."""
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n")

    def start(self, *arguments: str, **environment: str) -> Command:
        """A program with its arguments."""
        files = [str(self.folder / "hosts"), str(self.folder / "nsswitch.conf")]
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", IN_A_NAMESPACE, "sh", *files]
        return start_program([*command, *arguments], env=environment)


@pytest.fixture
def names(tmp_path: Path) -> Names:
    """Names that a test may take back; skipped where nobody may mount."""
    found = Names(tmp_path)
    found.know()
    ask = [sys.executable, "-c", f"import socket; socket.gethostbyname({NAME!r})"]
    try:
        ended = found.start(*ask).wait()
    except OSError as error:
        pytest.skip(f"a process cannot be given names of its own here: {error}")
    if ended.exit_code:
        pytest.skip(f"a process cannot be given names of its own here: {ended.stderr.strip()}")
    return found


def test_a_name_that_ceases_to_resolve_leaves_no_rows_and_the_next_run_goes_on(
    s3: Seaweed, names: Names, tmp_path: Path, figure: Figure
) -> None:
    """With a loader process, whose store has the same name."""
    job, output = upload_job(tmp_path / "job", IMAGES, s3), s3.bucket() + "out/"
    settings = format_overrides(
        output__uri=output,
        runtime__shard_size=SHARD,
        runtime__loader__processes=1,
        errors__attempts=1,
        errors__outage_seconds=6,
    )
    command = [sys.executable, "-m", "batchjob", "run", job, *settings, "--json"]
    with run_fault_proxy(s3.endpoint) as gate:
        env = {
            "AWS_ENDPOINT_URL": gate.endpoint.replace("127.0.0.1", NAME),
            "BATCHJOB_PATIENCE": "2",
            "BATCHJOB_TEST_NAP": "0.3",
        }
        with kill_on_exit(names.start(*command, **env)) as driver:
            wait_until(lambda: len(commit.list_parts(open_output(output))) >= 2, command=driver)
            names.forget()
            began, arrived = driver.seconds, list[float]()

            def broken(method: str, path: str) -> str:
                arrived.append(driver.seconds - began)
                return RESET

            gate.decide = broken  # connections that stand need no name
            ended = driver.wait()
        took = ended.seconds - began
        print(f"{took:.1f} s, {len(arrived)} requests came through after {format_range(arrived)} s\n{ended.stderr}")
        assert len(arrived) <= CONNECTIONS, "it is not the name that keeps them away"
        assert (ended.exit_code, ended.json_result["status"]) == (75, "temporary"), ended.stderr
        assert "Traceback" not in ended.stderr
        before = list_committed_parts(output)
        assert 2 <= len(before) < IMAGES // SHARD
        assert sum(made.failed for made in read_all_footers(output).values()) == 0
        delete_lease(output)  # it could not be given back
        names.know()
        gate.decide = lambda method, path: None
        with kill_on_exit(names.start(*command, **env)) as driver:
            again = driver.wait()
    assert (again.exit_code, again.json_result["predicted"], again.json_result["failed"]) == (0, IMAGES, 0), (
        again.stderr
    )
    assert before.items() <= list_committed_parts(output).items(), "a committed part was made again"
    assert check_output(output, IMAGES).is_correct
    figure(
        "systemic faults",
        f"the endpoint's name ceases to resolve: exit 75 after {took:.0f} s, 0 error rows, {len(before)} parts kept; "
        "once it resolves again the next run completes",
    )
