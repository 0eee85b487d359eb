"""A real Azure blob server for tests: Azurite, where it is installed (npm install azurite), on a free loopback port."""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import urllib3

from tests.support.loopback import find_free_port

__all__ = ["ACCOUNT", "Azurite", "azure_environment", "find_azurite", "run_azurite"]

ACCOUNT = "devstoreaccount1"
# The public key of every Azurite.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_VERSION = "2021-08-06"


@dataclass(frozen=True)
class Azurite:
    """A running Azurite server.

    Attributes:
        endpoint: URL of the account, such as `http://127.0.0.1:12345/devstoreaccount1`.
    """

    endpoint: str

    def container(self) -> str:
        """Create a container and return its URI `az://<unique>/`."""
        name = f"c{uuid.uuid4().hex[:12]}"
        self._request("PUT", f"/{name}", {"restype": "container"})
        return f"az://{name}/"

    def put(self, uri: str, body: bytes) -> None:
        """Write one object; the key is taken literally."""
        path = "/" + uri.removeprefix("az://")
        self._request("PUT", quote(path), {}, body, {"x-ms-blob-type": "BlockBlob"})

    def list_page(self, path: str, size: int) -> bytes:
        """Answer the listing request of this path and query with a page of so many keys, as XML."""
        parts = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()} | {"maxresults": str(size)}
        return self._request("GET", parts.path.removeprefix(urlsplit(self.endpoint).path), query)

    def _request(
        self, method: str, path: str, query: dict[str, str], body: bytes = b"", headers: dict[str, str] | None = None
    ) -> bytes:
        """Send a request, signed with the shared key."""
        sent = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": _VERSION, **(headers or {})}
        account_path = urlsplit(self.endpoint).path
        signed_headers = "".join(f"{name}:{sent[name]}\n" for name in sorted(sent) if name.startswith("x-ms-"))
        resource = "".join([f"/{ACCOUNT}{account_path}{path}", *(f"\n{name}:{query[name]}" for name in sorted(query))])
        length = str(len(body)) if body else ""
        text = f"{method}\n\n\n{length}\n\n\n\n\n\n\n\n\n{signed_headers}{resource}"
        signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), hashlib.sha256)).decode()
        sent["Authorization"] = f"SharedKey {ACCOUNT}:{signature}"
        url = (
            self.endpoint + path + ("?" + "&".join(f"{name}={value}" for name, value in query.items()) if query else "")
        )
        answer = urllib3.request(method, url, body=body, headers=sent, retries=3)
        assert answer.status < 300, (answer.status, unquote(url), answer.data[:500])
        return answer.data


def find_azurite() -> list[str] | None:
    """Return the command of Azurite's blob server: `BATCHJOB_TEST_AZURITE`, or from the search path; None without."""
    named = os.environ.get("BATCHJOB_TEST_AZURITE") or shutil.which("azurite-blob")
    return [named] if named and Path(named).exists() else None


def azure_environment() -> dict[str, str]:
    """Return the environment variables with the credentials of every Azurite."""
    return {"AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": KEY}


@contextmanager
def run_azurite(command: list[str], folder: Path) -> Iterator[Azurite]:
    """Run a server that keeps its objects in memory."""
    port = find_free_port()
    arguments = ["--disableTelemetry", "--skipApiVersionCheck", "--inMemoryPersistence", "--blobHost", "127.0.0.1"]
    log = (folder / "azurite.log").open("wb")
    process = subprocess.Popen(
        [*command, *arguments, "--blobPort", str(port)], cwd=folder, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert process.poll() is None, (folder / "azurite.log").read_text()
            assert time.monotonic() < deadline, "Azurite did not start within 30 s"
            time.sleep(0.1)
        yield Azurite(f"http://127.0.0.1:{port}/{ACCOUNT}")
    finally:
        process.terminate()
        process.wait(10)
        log.close()
