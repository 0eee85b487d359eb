"""The cache of tuning tables on this machine's disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from batchjob.inference.autotune.cache import TuningCache, use_compile_cache


def test_entry_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with TuningCache({"model": 1}).lock():
        TuningCache({"model": 1}).write(b"table")
    assert TuningCache({"model": 1}).read() == b"table"
    assert TuningCache({"model": 2}).read() is None


def test_user_without_home_folder_has_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    # A user id that has no entry in the table of users, as in a container with `--user`.
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    monkeypatch.chdir(tmp_path)
    use_compile_cache()
    cache = TuningCache({"model": 1})
    with cache.lock():
        cache.write(b"table")
    assert cache.read() is None
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    assert list(tmp_path.iterdir()) == []
