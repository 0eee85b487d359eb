"""Google Cloud Storage and Azure behind `storage.endpoint`: every verb, every listing, a listing that breaks off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from batchjob.errors import AlreadyExists, NotFound, PreconditionFailed
from batchjob.sources.prefix import PrefixSource
from batchjob.storage.options import OptionsByPrefix, StorageOptions
from batchjob.storage.probe import probe_store
from batchjob.storage.reader import Reader
from batchjob.storage.store import open_store
from batchjob.types import Cursor
from tests.support.azurite import Azurite, azure_environment, find_azurite, run_azurite
from tests.support.fake_clouds import FakeCloud, run_fake_cloud
from tests.support.fault_proxy import RESET, Reply, run_fault_proxy

AZURITE = find_azurite()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in azure_environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["gs", "az"])
def cloud(request: pytest.FixtureRequest) -> Iterator[FakeCloud]:
    with run_fake_cloud(request.param) as running:
        yield running


def options_of(cloud: FakeCloud) -> OptionsByPrefix:
    return {f"{cloud.provider}://": StorageOptions(endpoint=cloud.endpoint, anonymous=cloud.provider == "gs")}


def open_reader(cloud: FakeCloud) -> Reader:
    return Reader(options_of(cloud), retry_timeout=2)


def plan_names(reader: Reader, uri: str, after: str | None = None, recursive: bool = True) -> list[str]:
    source = PrefixSource(uri=uri, recursive=recursive)
    batches = source.refs(reader, Cursor(0, after))
    return [uri for batch in batches for uri in batch.column("location").to_pylist()]


def test_endpoint_holds_for_every_verb(cloud: FakeCloud) -> None:
    store = open_store(f"{cloud.uri}out", options_of(cloud), retry_timeout=2)
    probe_store(store)
    assert cloud.objects == {}
    info = store.put_if_absent("a/b.txt", b"one")
    with pytest.raises(AlreadyExists):
        store.put_if_absent("a/b.txt", b"two")
    assert info.version is not None
    with pytest.raises(PreconditionFailed):
        store.replace_if_match("a/b.txt", b"two", "12345")
    store.replace_if_match("a/b.txt", b"three", store.stat("a/b.txt").version or "")
    assert (store.read("a/b.txt").data, store.read_tail("a/b.txt", 2)) == (b"three", b"ee")
    assert (store.read_head("a/b.txt", 2), store.open("a/b.txt").read()) == (b"th", b"three")
    assert [one.uri for one in store.list("a/")] == ["a/b.txt"]
    store.delete("a/b.txt")
    with pytest.raises(NotFound):
        store.stat("a/b.txt")


@pytest.mark.parametrize("page_size", [3, 1000])
def test_listing_goes_on_after_every_key(cloud: FakeCloud, page_size: int) -> None:
    names = [
        "in/1.jpg",
        "in/a b.jpg",
        "in/a%20b.jpg",
        "in/d/2.jpg",
        "in/d-/3.jpg",
        "in/d.jpg",
        "in/ü.jpg",
        "other/9.jpg",
    ]
    cloud.objects.update({name: name.encode() for name in names})
    cloud.page_size = page_size
    reader = open_reader(cloud)
    expected = [cloud.uri + name for name in sorted(names, key=str.encode) if name.startswith("in/")]
    listed = [one.uri for one in reader.list(f"{cloud.uri}in/")]
    assert listed == expected
    for at, after in enumerate(expected):
        assert [one.uri for one in reader.list(f"{cloud.uri}in/", after)] == expected[at + 1 :]
    assert reader.read(expected[1]).data == b"in/a b.jpg"


def test_globs_and_single_levels_ask_the_endpoint(cloud: FakeCloud) -> None:
    names = ["in/1.jpg", "in/2.jpg", "in/d/3.jpg", "in/d/e/4.jpg", "in/note.txt", "5.jpg"]
    cloud.objects.update({name: name.encode() for name in names}, **{"in/": b"", "in/empty/": b""})
    cloud.page_size = 2
    reader = open_reader(cloud)
    for uri, recursive, expected in (
        (f"{cloud.uri}in/*.jpg", True, names[:2]),
        (f"{cloud.uri}in/**/*.jpg", True, names[:4]),
        (f"{cloud.uri}in/*/[3]*.jpg", True, names[2:3]),
        (f"{cloud.uri}in/", False, names[:2]),
        (f"{cloud.uri}in", True, names[:4]),
        (cloud.uri, False, names[5:]),
        (f"{cloud.uri}*.jpg", True, names[5:]),
    ):
        assert plan_names(reader, uri, recursive=recursive) == [cloud.uri + name for name in expected], uri
    after = f"{cloud.uri}in/1.jpg"
    assert plan_names(reader, f"{cloud.uri}in/", after, recursive=False) == [f"{cloud.uri}in/2.jpg"]


def test_listing_that_breaks_off_is_taken_up_without_gaps_or_repetition(cloud: FakeCloud) -> None:
    names = [f"in/{number:04}.jpg" for number in range(500)]
    cloud.objects.update(dict.fromkeys(names, b"x"))
    cloud.page_size, cloud.cut = 50, lambda number: number in (3, 4, 9)
    assert plan_names(open_reader(cloud), f"{cloud.uri}in/") == [cloud.uri + name for name in names]
    assert cloud.listings > 10


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    if AZURITE is None:
        pytest.skip("needs Azurite: npm install azurite, then BATCHJOB_TEST_AZURITE=…/.bin/azurite-blob")
    with run_azurite(AZURITE, tmp_path_factory.mktemp("azurite")) as server:
        yield server


def test_azurite_lists_500_keys_in_pages_although_the_connection_breaks(azurite: Azurite, tmp_path: Path) -> None:
    container = azurite.container()
    for number in range(500):
        azurite.put(f"{container}in/{number:04}.jpg", b"x")
    expected = [f"{container}in/{number:04}.jpg" for number in range(500)]
    with run_fault_proxy(azurite.endpoint) as proxy:
        endpoint = f"{proxy.endpoint}/{azurite.endpoint.rpartition('/')[2]}"
        listings: list[str] = []

        def page_of_100(method: str, path: str) -> Reply | str | None:
            if "comp=list" not in path:
                return None
            listings.append(path)
            cut = len(listings) in (4, 8)
            return RESET if cut else Reply(200, azurite.list_page(path, 100), {"content-type": "application/xml"})

        proxy.decide = page_of_100
        # Without retries in the client, a listing begins again.
        reader = Reader({"az://": StorageOptions(endpoint=endpoint)}, retry_timeout=0, outage_timeout=30)
        assert plan_names(reader, f"{container}in/") == expected
        assert len(listings) > 8
        assert plan_names(reader, f"{container}in/", expected[459]) == expected[460:]
        assert plan_names(reader, f"{container}in/*9.jpg") == expected[9::10]
    store = open_store(f"{container}out", {"az://": StorageOptions(endpoint=azurite.endpoint)}, retry_timeout=2)
    probe_store(store)
    store.put_if_absent("a", b"1")
    with pytest.raises(AlreadyExists):
        store.put_if_absent("a", b"2")
    store.replace_if_match("a", b"3", store.stat("a").version or "")
    assert [one.uri for one in store.list("")] == ["a"]
