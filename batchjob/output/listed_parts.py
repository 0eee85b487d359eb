"""Comparison of the parts that are there with those that `_SUCCESS` lists: by ETag, or by footer in a copied folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from batchjob.concurrency import parallel_map
from batchjob.errors import CheckFailed, NotFound
from batchjob.output.commit import read_footer
from batchjob.storage.objects import ObjectInfo
from batchjob.storage.store import Store
from batchjob.uris import is_local

__all__ = ["find_part_mismatches"]


def find_part_mismatches(store: Store, success: Mapping[str, Any], listing: Mapping[str, ObjectInfo]) -> list[str]:
    """Find parts that `_SUCCESS` lists and that are gone or changed, and parts that it does not list.

    A bucket is compared by ETag. On a local disk the tag holds the time stamp, which `cp -r` and a restored backup do
    not keep: there a part of the same size and another tag is compared by its footer.

    Args:
        store: The output.
        success: JSON object of `_SUCCESS`.
        listing: Objects in `predictions/`, by key.

    Returns:
        Keys of these parts, sorted.
    """
    listed: dict[str, Mapping[str, Any]] = {part["name"]: part for part in success["parts"]}
    mismatches = {*listed.keys() ^ listing.keys()}
    doubtful = {name for name in listed.keys() & listing.keys() if listed[name]["etag"] != listing[name].etag}
    if is_local(store.uri):
        same_size = {name for name in doubtful if listed[name].get("size") == listing[name].size}
        doubtful -= same_size
        doubtful.update(_find_other_footers(store, success, {name: listed[name] for name in same_size}))
    return sorted(mismatches | doubtful)


def _find_other_footers(
    store: Store, success: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Yield the names of parts whose footer is not that of the part that `_SUCCESS` lists."""

    def compare(name: str) -> tuple[str, bool]:
        part = parts[name]
        try:
            footer = read_footer(store, name)
        except (NotFound, CheckFailed):
            return name, False
        # Versions that listed no attempt listed the rows.
        same_attempt = part.get("attempt") in {None, footer.attempt}
        return name, same_attempt and (footer.plan, footer.rows, footer.failed) == (
            success.get("plan"),
            part.get("rows"),
            part.get("failed"),
        )

    return (name for name, same in parallel_map(compare, sorted(parts)) if not same)
