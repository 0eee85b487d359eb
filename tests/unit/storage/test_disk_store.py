"""Outputs on file systems without hard links, without locks, or with promises that they do not keep."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from batchjob.errors import AlreadyExists, AttemptFailed, InvalidJob, Unavailable
from batchjob.storage import disk_store
from batchjob.storage.disk_store import DiskStore
from batchjob.storage.probe import probe_store


def fail_with(code: int) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EIO, errno.ENOSYS, errno.EINVAL, errno.EACCES])
def test_without_hard_links_a_rename_that_replaces_nothing_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "link", fail_with(code))
    store = DiskStore(tmp_path)
    probe_store(store)
    info = store.put_if_absent("a", b"one")
    assert store.stat("a") == info
    with pytest.raises(AlreadyExists):
        store.put_if_absent("a", b"two")
    assert store.read("a").data == b"one"
    assert store.replace_if_match("a", b"three", info.version or "").size == 5
    assert not [path for path in (tmp_path / "_batchjob/tmp").iterdir() if path.name != "lock"]

    def create(number: int) -> bool:
        try:
            DiskStore(tmp_path).put_if_absent("race", b"%d" % number)
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(create, range(64))) == 1


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EIO, errno.EPERM])
def test_without_both_the_output_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(os, "link", fail_with(code))
    monkeypatch.setattr(disk_store, "_rename_to_free_name", fail_with(errno.EINVAL))
    with pytest.raises(InvalidJob, match=r"neither hard links .* choose an output"):
        probe_store(DiskStore(tmp_path))
    assert not list((tmp_path / "_batchjob/tmp").iterdir())


def test_full_disk_stays_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", fail_with(errno.EIO))
    monkeypatch.setattr(disk_store, "_rename_to_free_name", fail_with(errno.ENOSPC))
    with pytest.raises(AttemptFailed, match="full"):
        DiskStore(tmp_path).put_if_absent("a", b"x")


@pytest.mark.parametrize("primitive", ["link", "rename"])
def test_probe_refuses_a_file_system_that_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, primitive: str
) -> None:
    if primitive == "link":
        monkeypatch.setattr(os, "link", shutil.copyfile)
    else:
        monkeypatch.setattr(os, "link", fail_with(errno.EPERM))
        monkeypatch.setattr(disk_store, "_rename_to_free_name", os.replace)
    with pytest.raises(InvalidJob, match="two writers"):
        probe_store(DiskStore(tmp_path))


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_the_output_is_refused_by_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", fail_with(code))
    with pytest.raises(InvalidJob, match="no locks"):
        probe_store(DiskStore(tmp_path))


def test_failing_disk_is_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fail_with(errno.EIO))
    with pytest.raises(Unavailable, match="the disk failed"):
        DiskStore(tmp_path).put_if_absent("a", b"x")


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["y" * 200] * 30)])
def test_names_that_are_too_long_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidJob, match="too long"):
        DiskStore(tmp_path / name).put_if_absent("a", b"x")
    with pytest.raises(InvalidJob, match="too long"):
        DiskStore(tmp_path).put_if_absent(name, b"x")


def test_last_control_file_takes_its_folders_along(tmp_path: Path) -> None:
    out = tmp_path / "out"
    store = DiskStore(out)
    probe_store(store)
    assert not out.exists()
    out.mkdir()
    probe_store(DiskStore(out))
    assert list(out.iterdir()) == []  # a folder that it has not made stays
    store.put_if_absent("_batchjob/plans/0000/head.json", b"{}")
    store.put_if_absent("_batchjob/lease/1", b"{}")
    store.delete("_batchjob/lease/1")
    assert sorted(path.name for path in (out / "_batchjob").iterdir()) == ["plans", "tmp"]


def test_folders_that_vanish_under_writers_are_made_again(tmp_path: Path) -> None:
    def come_and_go(number: int) -> None:
        store, key = DiskStore(tmp_path / "out"), f"_batchjob/lease/{number % 4}"
        for _ in range(20):
            try:
                info = store.put_if_absent(key, b"%d" % number)
            except AlreadyExists:
                continue
            assert store.read(key).data == b"%d" % number
            store.delete_if_match(key, info.version or "")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(come_and_go, range(8)))
    assert not (tmp_path / "out/_batchjob").exists()
