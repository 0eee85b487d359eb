"""Cache on this machine's disk, one per user: kernels of torch's compiler, and tables of earlier tuning trials."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

__all__ = ["TuningCache", "use_compile_cache"]

_POLL_SECONDS = 0.5


def use_compile_cache() -> None:
    """Make torch's compiler keep its kernels in this cache, unless the environment names another folder.

    Kernels are code: the folder is readable by its owner only.
    """
    with suppress(OSError):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_make_folder("inductor")))


class TuningCache:
    """One entry of the cache, under a name derived from all that it depends on; without a writable disk, no entry.

    Args:
        key_fields: Everything on which the entry depends, as values that JSON can hold.
    """

    def __init__(self, key_fields: Mapping[str, Any]) -> None:
        self._name = hashlib.sha256(json.dumps(key_fields, sort_keys=True, default=str).encode()).hexdigest()

    @contextmanager
    def lock(self, is_stopped: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Hold the entry's lock among the processes of this machine; enter without it if `is_stopped()` turns true."""
        # A disk that does not support locks lets everyone in.
        with ExitStack() as held:
            with suppress(OSError, NotImplementedError):
                lock = FileLock(_make_folder("tuning") / f"{self._name}.lock")
                while not is_stopped() and not lock.is_locked:
                    with suppress(Timeout):
                        held.enter_context(lock.acquire(timeout=_POLL_SECONDS))
            yield

    def read(self) -> bytes | None:
        """Return the entry; None if there is none."""
        with suppress(OSError):
            return self._path.read_bytes()
        return None

    def write(self, data: bytes) -> None:
        """Write the entry, in place of an earlier one."""
        with suppress(OSError):
            descriptor, name = tempfile.mkstemp(dir=_make_folder("tuning"))
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            Path(name).replace(self._path)

    @property
    def _path(self) -> Path:
        return _make_folder("tuning") / f"{self._name}.json"


def _make_folder(name: str) -> Path:
    try:
        root = user_cache_path("batchjob", appauthor=False)
    except RuntimeError as error:  # the user id of a container has no home folder
        raise FileNotFoundError(str(error)) from error
    if not root.is_absolute():  # earlier versions of platformdirs return `~` then
        raise FileNotFoundError(root)
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    root.chmod(0o700)
    return folder
