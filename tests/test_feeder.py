"""The thread that lists: what it hands on, in which order, what stops it; and the source as the driver sees it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pools import job

from batchjob.driver.plan_prefetcher import PlanPrefetcher
from batchjob.errors import InvalidJob, Temporary, Unavailable
from batchjob.plan.chunks import Chunk
from batchjob.plan.head import PlanHead, new_head
from batchjob.sources.listing import DEFAULT_IMAGE_BYTES, SourceListing, preview_listing
from batchjob.storage.reader import Reader
from batchjob.types import Cursor

PATIENCE = 60.0  # seconds, for what another thread does at once


def chunk(number: int) -> Chunk:
    return Chunk(number, number * 10, Cursor(number * 10 + 10), is_last=False, shards=())


def chunks(count: int, asked: list[int] | None = None) -> Iterator[Chunk]:
    """So many chunks; `asked` grows as they are asked for."""
    for number in range(count):
        if asked is not None:
            asked.append(number)
        yield chunk(number)


def until(holds: Callable[[], bool]) -> None:
    """Wait for what another thread will make true."""
    pause = threading.Event()
    for _ in range(int(PATIENCE * 200)):
        if holds():
            return
        pause.wait(0.005)
    raise AssertionError("it never came true")


def take(feeder: PlanPrefetcher) -> Chunk | None:
    """The next chunk, or None after the last."""
    found: list[Chunk] = []

    def came() -> bool:
        if (item := feeder.next_chunk()) is not None:
            found.append(item)
        return bool(found) or feeder.finished

    until(came)
    return found[0] if found else None


def ended(feeder: PlanPrefetcher) -> bool:
    return not feeder._thread.is_alive()


# --- Feeder ---------------------------------------------------------------------------------------------------------


def test_chunks_come_in_order_and_then_the_end() -> None:
    feeder = PlanPrefetcher(chunks(20))
    numbers = []
    while (item := take(feeder)) is not None:
        numbers.append(item.number)
    assert numbers == list(range(20))
    assert feeder.finished
    assert feeder.next_chunk() is None  # as often as one asks
    assert feeder.finished
    until(lambda: ended(feeder))


def test_taking_never_waits() -> None:
    go_on = threading.Event()

    def late() -> Iterator[Chunk]:
        go_on.wait(PATIENCE)
        yield chunk(0)

    feeder = PlanPrefetcher(late())
    assert feeder.next_chunk() is None
    assert not feeder.finished  # nothing is there yet, which is not the end
    go_on.set()
    assert take(feeder) == chunk(0)
    assert take(feeder) is None


def test_taking_may_wait_a_while() -> None:
    feeder = PlanPrefetcher(chunks(2))
    assert feeder.next_chunk(PATIENCE) == chunk(0)
    assert feeder.next_chunk(PATIENCE) == chunk(1)
    assert feeder.next_chunk(PATIENCE) is None
    assert feeder.finished
    assert feeder.next_chunk(PATIENCE) is None  # and does not wait for what cannot come


def test_only_a_few_are_read_ahead() -> None:
    asked: list[int] = []
    feeder = PlanPrefetcher(chunks(1000, asked))
    until(lambda: len(asked) >= 5)
    for _ in range(10):
        assert take(feeder) is not None
        assert len(asked) <= 10 + 6
    feeder.close()
    until(lambda: ended(feeder))


@pytest.mark.parametrize("error", [InvalidJob("the manifest changed"), Unavailable("no network"), KeyError("a bug")])
def test_what_stops_the_source_is_raised_by_take(error: Exception) -> None:
    def breaks() -> Iterator[Chunk]:
        yield from chunks(2)
        raise error

    feeder = PlanPrefetcher(breaks())
    assert take(feeder) == chunk(0)
    assert take(feeder) == chunk(1)
    with pytest.raises(type(error)) as caught:
        take(feeder)
    assert caught.value is error
    assert not feeder.finished
    until(lambda: ended(feeder))


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_after_close_nothing_more_is_listed(taken: int) -> None:
    asked: list[int] = []
    feeder = PlanPrefetcher(chunks(1000, asked))
    for _ in range(taken):
        take(feeder)
    feeder.close()
    until(lambda: ended(feeder))
    assert len(asked) <= taken + 6
    assert not feeder.finished


def test_close_does_not_wait_for_a_source_that_hangs() -> None:
    go_on, listing = threading.Event(), threading.Event()
    asked: list[int] = []

    def hangs() -> Iterator[Chunk]:
        listing.set()
        go_on.wait(PATIENCE)
        yield from chunks(1000, asked)

    feeder = PlanPrefetcher(hangs())
    assert listing.wait(PATIENCE)
    feeder.close()
    assert not ended(feeder)
    go_on.set()
    until(lambda: ended(feeder))
    assert asked == [0]


def test_an_error_after_close_is_nobodys() -> None:
    listing, go_on = threading.Event(), threading.Event()

    def breaks() -> Iterator[Chunk]:
        listing.set()
        go_on.wait(PATIENCE)
        yield from chunks(0)
        raise Unavailable("no network")

    feeder = PlanPrefetcher(breaks())
    assert listing.wait(PATIENCE)
    feeder.close()
    go_on.set()
    until(lambda: ended(feeder))
    assert feeder.next_chunk() is None


# --- Input and peek -------------------------------------------------------------------------------------------------


def source(tmp_path: Path, count: int, **sections: object) -> SourceListing:
    return SourceListing(job(tmp_path, [f"{number:04}.png" for number in range(count)], **sections), Reader())


@pytest.mark.parametrize(("enough", "rows", "whole"), [(5, 7, False), (7, 7, True), (100, 7, True)])
def test_a_peek_sees_enough_or_all(tmp_path: Path, enough: int, rows: int, whole: bool) -> None:
    seen = preview_listing(source(tmp_path, 7), enough)
    assert (seen.rows, seen.complete) == (rows, whole)
    assert [Path(location).name for location in seen.sample] == [f"{number:04}.png" for number in range(7)]


def test_a_peek_samples_no_more_than_it_needs(tmp_path: Path) -> None:
    seen = preview_listing(source(tmp_path, 300), 1000)
    assert (seen.rows, len(seen.sample)) == (300, 256)


def test_a_peek_tells_how_wide_the_passthrough_is(tmp_path: Path) -> None:
    lines = "".join(f"{number}.png,{'x' * 100}\n" for number in range(50))
    (tmp_path / "images.csv").write_text(f"path,note\n{lines}")
    manifest = {"type": "manifest", "uri": "images.csv", "uri_column": "path", "passthrough": ["note"]}
    assert 100 <= preview_listing(source(tmp_path, 0, input=manifest), 1000).row_bytes <= 120
    assert preview_listing(source(tmp_path, 7), 1000).row_bytes == 0


def test_a_peek_adds_up_the_images_that_it_sees(tmp_path: Path) -> None:
    the = source(tmp_path, 7)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.png"))
    assert preview_listing(the, 1000).image_bytes == size > 0
    (tmp_path / "images.csv").write_text("path\n0000.png\n")
    manifest = {"type": "manifest", "uri": "images.csv", "uri_column": "path"}
    assert preview_listing(source(tmp_path, 0, input=manifest), 1000).image_bytes == DEFAULT_IMAGE_BYTES, (
        "it does not say"
    )


def test_a_closed_input_is_listed_no_further(tmp_path: Path) -> None:
    the = source(tmp_path, 3)
    batches = the.refs(Cursor())
    the.close()
    with pytest.raises(Temporary, match="nobody waits"):
        list(batches)


def test_a_peek_at_nothing(tmp_path: Path) -> None:
    assert preview_listing(source(tmp_path, 0), 10) == preview_listing(source(tmp_path, 0), 0)
    assert (preview_listing(source(tmp_path, 0), 10).rows, preview_listing(source(tmp_path, 0), 10).complete) == (
        0,
        True,
    )


@pytest.mark.parametrize(
    ("require", "said"),
    [({"marker": "_DONE"}, "_DONE"), ({"min_images": 4}, "lists 3 images, input.require.min_images asks for 4")],
)
def test_what_is_required_and_missing_is_temporary(tmp_path: Path, require: dict[str, object], said: str) -> None:
    the = source(tmp_path, 3, input={"type": "prefix", "uri": "images/", "require": require})
    with pytest.raises(Temporary, match=said):
        the.check_requirements()
    source(tmp_path, 4)
    (tmp_path / "images/_DONE").touch()
    notes: list[str] = []
    the.check_requirements(notes.append)
    assert notes == (["counting at least 4 images"] if "min_images" in require else [])


def test_a_manifest_that_changes_while_it_is_planned_stops_the_plan(tmp_path: Path) -> None:
    manifest = tmp_path / "images.csv"
    manifest.write_text("path\na.png\nb.png\n")
    the = source(tmp_path, 0, input={"type": "manifest", "uri": "images.csv", "uri_column": "path"})
    head = head_of(the)
    assert head.source_version is not None
    the.check_unchanged(head)
    manifest.write_text("path\na.png\nc.png\n")
    with pytest.raises(InvalidJob, match=r"images.csv changed while its plan was being written; restore it, or `.*"):
        the.check_unchanged(head)


def test_a_folder_has_no_version_and_may_grow(tmp_path: Path) -> None:
    the = source(tmp_path, 2)
    head = head_of(the)
    assert head.source_version is None
    source(tmp_path, 3)
    the.check_unchanged(head)


def head_of(the: SourceListing) -> PlanHead:
    return new_head(0, job={}, fingerprint={}, shard_size=2, source_version=the.version, batchjob="1")
