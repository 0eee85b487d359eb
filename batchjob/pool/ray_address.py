"""Address of a Ray cluster: its form, and whether a Ray answers there and accepts the token."""

from __future__ import annotations

import logging
import re
from contextlib import closing
from typing import Any

from batchjob.errors import InvalidJob, Temporary

__all__ = ["check_address", "check_cluster", "token_error"]

_HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})")
_MAX_PORT = 65_535
# With the start of Python, a wrong address is reported within 10 s. Ray itself waits 40 s, and prints lines of its own.
_ANSWER_SECONDS = 5.0


def check_address(address: str) -> None:
    """Check the form of an address: `HOST:PORT`, `auto` or `local`.

    Raises:
        InvalidJob: It has another form; the message says what that form is for.
    """
    if address in {"auto", "local"}:
        return
    if address.startswith("ray://"):
        raise InvalidJob(
            f"--address or RAY_ADDRESS: {address} is for Ray Client, which batchjob does not use; give HOST:6379 on a "
            "machine of the cluster, or start the run there with `ray job submit`"
        )
    if address.startswith(("http://", "https://")):
        raise InvalidJob(
            f"--address or RAY_ADDRESS: {address} is a dashboard, which `ray job submit` finds by "
            "RAY_API_SERVER_ADDRESS; give the cluster's own address, HOST:6379, or auto"
        )
    match = _HOST_PORT.fullmatch(address)
    if match is None or not 0 < int(match["port"]) <= _MAX_PORT:
        raise InvalidJob(
            f"--address or RAY_ADDRESS: {address!r} is no address of a Ray cluster; give HOST:PORT such as "
            "127.0.0.1:6379, auto for the Ray that runs on this machine, or local to start one"
        )


def check_cluster(address: str) -> None:
    """Ask the cluster for its id, before Ray does so with its own patience and its own lines on the terminal.

    Args:
        address: Address that `check_address` has accepted.

    Raises:
        InvalidJob: The cluster refuses the token, or there is none.
        Temporary: No Ray answers there.
    """
    import grpc
    from ray._private.services import canonicalize_bootstrap_address
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    from ray.exceptions import AuthenticationError

    try:
        found = canonicalize_bootstrap_address(address)
    except ConnectionError:
        found = None
    if found is None:
        raise Temporary(
            "no Ray runs on this machine (--address or RAY_ADDRESS is auto); `ray start --head` starts one, and "
            "`--address local` one for this run alone"
        )
    if address == "auto":
        _use_token_file()
    try:
        with closing(_open_channel(found)) as channel:
            messages: Any = gcs_service_pb2
            stub: Any = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
            stub.GetClusterId(messages.GetClusterIdRequest(), timeout=_ANSWER_SECONDS)
    except AuthenticationError as error:  # a token is to be used, and there is none
        raise token_error(address) from error
    except grpc.RpcError as error:
        code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
        if code in {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}:
            raise token_error(address) from error
        raise Temporary(
            f"no Ray answers at {address} ({code.name.lower().replace('_', ' ')}); is it running, and is this the "
            "port that `ray start --head` printed?"
        ) from error


def token_error(address: str) -> InvalidJob:
    """Make the error of a cluster that refuses our token, or that we have none for."""
    return InvalidJob(
        f"the cluster at {address} refuses the token of this process, or there is none: export RAY_AUTH_MODE=token, "
        "with the cluster's token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
    )


def _open_channel(address: str) -> Any:
    """Open a gRPC channel as Ray does, with its TLS settings and its token, and past any HTTP proxy."""
    from ray._private.grpc_utils import init_grpc_channel

    return init_grpc_channel(address, options=[("grpc.enable_http_proxy", 0)])


def _use_token_file() -> None:
    """Use the token in the home folder, as Ray does for a Ray that it finds on this machine."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    logging.getLogger("ray").setLevel(logging.ERROR)  # it prints a line otherwise
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
