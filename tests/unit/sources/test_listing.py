"""The listing of an input and its preview: requirements, versions, sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchjob.errors import InvalidJob, Temporary
from batchjob.sources.listing import DEFAULT_IMAGE_BYTES, SourceListing, draw_locations, preview_listing
from batchjob.sources.manifest import ManifestSource
from batchjob.sources.prefix import PrefixSource
from batchjob.storage.reader import Reader
from batchjob.types import Cursor


def write_images(tmp_path: Path, count: int) -> None:
    (tmp_path / "images").mkdir(exist_ok=True)
    for number in range(count):
        (tmp_path / f"images/{number:04}.png").write_bytes(b"x" * (number + 1))


def list_folder(tmp_path: Path, count: int, **settings: object) -> SourceListing:
    """A listing of a folder with `count` images."""
    write_images(tmp_path, count)
    source = PrefixSource(uri=f"{tmp_path}/images/", **settings)
    return SourceListing(source, Reader(), f"{tmp_path}/out")


def list_manifest(tmp_path: Path, text: str, **settings: object) -> SourceListing:
    """A listing of a CSV manifest with this text."""
    (tmp_path / "images.csv").write_text(text)
    source = ManifestSource(uri=f"{tmp_path}/images.csv", uri_column="path", **settings)
    return SourceListing(source, Reader(), f"{tmp_path}/out")


@pytest.mark.parametrize(("min_rows", "rows", "complete"), [(5, 7, True), (7, 7, True), (100, 7, True)])
def test_preview_reads_enough_rows_or_all(tmp_path: Path, min_rows: int, rows: int, complete: bool) -> None:
    preview = preview_listing(list_folder(tmp_path, 7), min_rows)
    assert (preview.rows, preview.complete) == (rows, complete)
    assert [Path(location).name for location in preview.sample] == [f"{number:04}.png" for number in range(7)]


def test_preview_samples_256_locations_at_most(tmp_path: Path) -> None:
    preview = preview_listing(list_folder(tmp_path, 300), 1000)
    assert (preview.rows, len(preview.sample)) == (300, 256)


def test_preview_measures_the_width_of_passthrough_columns(tmp_path: Path) -> None:
    rows = "".join(f"{number}.png,{'x' * 100}\n" for number in range(50))
    listing = list_manifest(tmp_path, f"path,note\n{rows}", passthrough=["note"])
    assert 100 <= preview_listing(listing, 1000).row_bytes <= 120
    assert preview_listing(list_folder(tmp_path, 7), 1000).row_bytes == 0


def test_preview_sums_image_sizes_and_estimates_unknown_ones(tmp_path: Path) -> None:
    listing = list_folder(tmp_path, 7)
    total = sum(path.stat().st_size for path in tmp_path.rglob("*.png"))
    assert preview_listing(listing, 1000).image_bytes == total > 0
    unknown = list_manifest(tmp_path, "path\n0000.png\n")
    assert preview_listing(unknown, 1000).image_bytes == DEFAULT_IMAGE_BYTES


def test_preview_of_an_empty_input_is_complete(tmp_path: Path) -> None:
    assert preview_listing(list_folder(tmp_path, 0), 10) == preview_listing(list_folder(tmp_path, 0), 0)
    preview = preview_listing(list_folder(tmp_path, 0), 10)
    assert (preview.rows, preview.complete) == (0, True)


def test_closed_listing_ends_at_its_next_batch(tmp_path: Path) -> None:
    listing = list_folder(tmp_path, 3)
    batches = listing.refs(Cursor())
    listing.close()
    with pytest.raises(Temporary, match="nobody waits"):
        list(batches)


@pytest.mark.parametrize(
    ("require", "message"),
    [({"marker": "_DONE"}, "_DONE"), ({"min_images": 4}, "lists 3 images, input.require.min_images asks for 4")],
)
def test_unmet_requirements_are_temporary(tmp_path: Path, require: dict[str, object], message: str) -> None:
    listing = list_folder(tmp_path, 3, require=require)
    with pytest.raises(Temporary, match=message):
        listing.check_requirements()
    write_images(tmp_path, 4)
    (tmp_path / "images/_DONE").touch()
    notes: list[str] = []
    listing.check_requirements(notes.append)
    assert notes == (["counting at least 4 images"] if "min_images" in require else [])


def test_manifest_that_changes_while_it_is_planned_is_an_error(tmp_path: Path) -> None:
    listing = list_manifest(tmp_path, "path\na.png\nb.png\n")
    planned_version = listing.version
    assert planned_version is not None
    listing.check_unchanged(planned_version)
    (tmp_path / "images.csv").write_text("path\na.png\nc.png\n")
    with pytest.raises(InvalidJob, match=r"images.csv changed while its plan was being written; restore it, or `.*"):
        listing.check_unchanged(planned_version)


def test_folder_has_no_version_and_may_grow(tmp_path: Path) -> None:
    listing = list_folder(tmp_path, 2)
    planned_version = listing.version
    assert planned_version is None
    write_images(tmp_path, 3)
    listing.check_unchanged(planned_version)


def test_images_are_drawn_from_the_whole_listing_and_alike_each_time(tmp_path: Path) -> None:
    names = [f"{folder}/{number:03}.jpg" for folder in "abcd" for number in range(100)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listing = SourceListing(PrefixSource(uri=str(tmp_path)), Reader(), "out")
    drawn = draw_locations(listing, 40)
    assert len(set(drawn)) == 40
    assert {Path(location).parent.name for location in drawn} == set("abcd")
    assert draw_locations(listing, 40) == drawn
    assert len(draw_locations(listing, 1000)) == 400
