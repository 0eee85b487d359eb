"""The store's host name stops resolving during a run: no error rows, exit 75, and the next run resumes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from batchjob.output import commit
from tests.support.batchjob_process import (
    Command,
    delete_lease,
    kill_on_exit,
    open_output,
    read_all_footers,
    start_program,
    wait_until,
)
from tests.support.color_coded_job import check_output, format_overrides, format_range, list_committed_parts, upload_job
from tests.support.fault_proxy import RESET, run_fault_proxy
from tests.support.figures import Figure
from tests.support.seaweed import Seaweed

IMAGES, SHARD, NAME = 120, 10, "store.batchjob.test"
# At most so many connections are open when the name is removed; each sends one more request. With the name, the driver
# would send 160 more.
CONNECTIONS = 30

# The files that the C library reads are replaced in a mount namespace: the machine's own are unchanged.
IN_A_NAMESPACE = """\
mount --bind "$1" /etc/hosts && mount --bind "$2" /etc/nsswitch.conf || exit 99
shift 2
exec "$@"
"""


@dataclass(frozen=True)
class HostsFile:
    """The `/etc/hosts` of the processes that it starts, which is their only source of names."""

    folder: Path

    def add_name(self) -> None:
        """Let the name resolve to this machine."""
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.0.1 {NAME}\n")
        (self.folder / "nsswitch.conf").write_text("hosts: files\n")

    def remove_name(self) -> None:
        """Stop the name from resolving."""
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n")

    def start(self, *arguments: str, **environment: str) -> Command:
        """Start a program with its arguments."""
        files = [str(self.folder / "hosts"), str(self.folder / "nsswitch.conf")]
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", IN_A_NAMESPACE, "sh", *files]
        return start_program([*command, *arguments], env=environment)


@pytest.fixture
def hosts_file(tmp_path: Path) -> HostsFile:
    """A hosts file that the test may change; skips the test if it may not mount."""
    found = HostsFile(tmp_path)
    found.add_name()
    ask = [sys.executable, "-c", f"import socket; socket.gethostbyname({NAME!r})"]
    try:
        result = found.start(*ask).wait()
    except OSError as error:
        pytest.skip(f"a process cannot be given names of its own here: {error}")
    if result.exit_code:
        pytest.skip(f"a process cannot be given names of its own here: {result.stderr.strip()}")
    return found


def test_lost_dns_name_leaves_no_error_rows_and_the_next_run_resumes(
    s3: Seaweed, hosts_file: HostsFile, tmp_path: Path, figure: Figure
) -> None:
    """The run has a loader process, which reads from the same host name."""
    job, output = upload_job(tmp_path / "job", IMAGES, s3), s3.bucket() + "out/"
    settings = format_overrides(
        output__uri=output,
        runtime__shard_size=SHARD,
        runtime__loader__processes=1,
        errors__attempts=1,
        errors__outage_seconds=6,
    )
    command = [sys.executable, "-m", "batchjob", "run", job, *settings, "--json"]
    with run_fault_proxy(s3.endpoint) as proxy:
        env = {
            "AWS_ENDPOINT_URL": proxy.endpoint.replace("127.0.0.1", NAME),
            "BATCHJOB_PATIENCE": "2",
            "BATCHJOB_TEST_NAP": "0.3",
        }
        with kill_on_exit(hosts_file.start(*command, **env)) as driver:
            wait_until(lambda: len(commit.list_parts(open_output(output))) >= 2, command=driver)
            hosts_file.remove_name()
            began, request_times = driver.seconds, list[float]()

            def reset_connection(method: str, path: str) -> str:
                request_times.append(driver.seconds - began)
                return RESET

            proxy.decide = reset_connection  # open connections need no name
            result = driver.wait()
        seconds = result.seconds - began
        print(
            f"{seconds:.1f} s, {len(request_times)} requests came through after {format_range(request_times)} s\n"
            f"{result.stderr}"
        )
        assert len(request_times) <= CONNECTIONS, "it is not the name that keeps them away"
        assert (result.exit_code, result.json_result["status"]) == (75, "temporary"), result.stderr
        assert "Traceback" not in result.stderr
        before = list_committed_parts(output)
        assert 2 <= len(before) < IMAGES // SHARD
        assert sum(footer.failed for footer in read_all_footers(output).values()) == 0
        delete_lease(output)  # the driver could not release it
        hosts_file.add_name()
        proxy.decide = lambda method, path: None
        with kill_on_exit(hosts_file.start(*command, **env)) as driver:
            again = driver.wait()
    assert (again.exit_code, again.json_result["predicted"], again.json_result["failed"]) == (0, IMAGES, 0), (
        again.stderr
    )
    assert before.items() <= list_committed_parts(output).items(), "a committed part was made again"
    assert check_output(output, IMAGES).is_correct
    figure(
        "systemic faults",
        f"the endpoint's name ceases to resolve: exit 75 after {seconds:.0f} s, 0 error rows, {len(before)} parts "
        "kept; once it resolves again the next run completes",
    )
