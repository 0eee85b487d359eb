"""Address of a Ray cluster: forms that are refused, and servers that are no Ray."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchjob.errors import InvalidJob, Temporary
from batchjob.pool.ray_address import check_address, check_cluster, token_error


@pytest.mark.parametrize("address", ["auto", "local", "10.0.0.1:6379", "head-node.cluster.local:6379", "[::1]:6379"])
def test_address_of_a_cluster_is_accepted(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize(
    "address", ["head", "10.0.0.1", "10.0.0.1:", ":6379", "10.0.0.1:99999", "10.0.0.1:0", "a b:6379", "redis://h:6379"]
)
def test_malformed_address_is_refused_with_the_form_it_should_have(address: str) -> None:
    with pytest.raises(InvalidJob, match=r"is no address of a Ray cluster; give HOST:PORT such as 127\.0\.0\.1:6379"):
        check_address(address)


def test_address_of_ray_client_is_refused() -> None:
    with pytest.raises(InvalidJob, match=r"ray://head:10001 is for Ray Client, which batchjob does not use; give HOST"):
        check_address("ray://head:10001")


def test_address_of_a_dashboard_is_refused() -> None:
    with pytest.raises(InvalidJob, match=r"http://127\.0\.0\.1:8265 is a dashboard, .* RAY_API_SERVER_ADDRESS"):
        check_address("http://127.0.0.1:8265")


@contextlib.contextmanager
def serve(answer: bytes | None) -> Iterator[str]:
    """Serve connections: answer and close, or never answer; yield the address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections: list[socket.socket] = []

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connections.append(connection)
                    if answer is not None:
                        connection.sendall(answer)
                        connection.close()

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"-ERR unknown command\r\n", b"", None])
def test_server_that_is_no_ray_is_temporary_and_soon(answer: bytes | None, capfd: pytest.CaptureFixture[str]) -> None:
    """Another service on that port, and one that accepts connections and says nothing."""
    with serve(answer) as address:
        started = time.monotonic()
        with pytest.raises(Temporary, match=rf"no Ray answers at {address} \("):
            check_cluster(address)
    assert time.monotonic() - started < 10
    assert capfd.readouterr().err == ""


def test_port_without_a_server_is_temporary(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(Temporary, match=f"no Ray answers at 127.0.0.1:{port} .* is it running"):
        check_cluster(f"127.0.0.1:{port}")
    assert capfd.readouterr().err == ""


def test_error_of_a_token_says_where_it_belongs() -> None:
    assert "export RAY_AUTH_MODE=token, with the cluster's token in ~/.ray/auth_token" in token_error("h:1").message


def test_no_ray_on_this_machine_is_told_with_the_way_to_start_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import services

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Other tests may have one running.
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    monkeypatch.setattr("ray._common.utils.get_ray_address_file", lambda _: str(tmp_path / "none"))
    with pytest.raises(Temporary, match=r"no Ray runs on this machine .*`ray start --head` starts one"):
        check_cluster("auto")
