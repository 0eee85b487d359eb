"""What this machine remembers between runs, for this user alone: compiled kernels, and tables of what was tried."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

__all__ = ["TuningCache", "use_compile_cache"]

_LOOK_SECONDS = 0.5


def use_compile_cache() -> None:
    """Have the compiler keep its kernels here, where the environment names no other place; they are code."""
    with suppress(OSError):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_folder("inductor")))


class TuningCache:
    """One thing to remember, under a name made of all that it hangs on. On a disk that cannot be written, nothing.

    Args:
        facts: what tells it from others; values that JSON holds.
    """

    def __init__(self, key_fields: Mapping[str, Any]) -> None:
        self._name = hashlib.sha256(json.dumps(key_fields, sort_keys=True, default=str).encode()).hexdigest()

    @contextmanager
    def lock(self, is_stopped: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Wait until no other process of this machine is at it, or until `stopped` says so."""
        try:
            lock = (_folder("tuning") / f"{self._name}.lock").open("w")
        except OSError:
            yield
            return
        with lock:
            while not is_stopped() and not _locked(lock):
                time.sleep(_LOOK_SECONDS)
            yield

    def read(self) -> bytes | None:
        """What was remembered."""
        with suppress(OSError):
            return self._path.read_bytes()
        return None

    def write(self, data: bytes) -> None:
        """Remember it, in place of what was there."""
        with suppress(OSError):
            handle, name = tempfile.mkstemp(dir=_folder("tuning"))
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(name).replace(self._path)

    @property
    def _path(self) -> Path:
        return _folder("tuning") / f"{self._name}.json"


def _locked(file: IO[str]) -> bool:
    """Whether it is ours now; on a disk that knows no locks it always is."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _folder(name: str) -> Path:
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchjob"
    except RuntimeError as error:  # a container's user without a name
        raise OSError(str(error)) from error
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    root.chmod(0o700)
    return folder
