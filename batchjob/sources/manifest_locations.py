"""Locations of a manifest's images: relative ones below the manifest's folder; those that lie in the output."""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.compute as pc

from batchjob.uris import CLOUD_SCHEMES, encode_path, is_below, is_local, uri_scheme

__all__ = ["are_below", "resolve_locations"]

_ABSOLUTE = r"^(/|(?i:file):|[A-Za-z][A-Za-z0-9+.-]*://)"
_DOT_SEGMENT = r"(^|/)\.\.?(/|$)"


def resolve_locations(uris: pa.StringArray, folder: str) -> pa.StringArray:
    """Return each image's location: an absolute URI unchanged, a relative one below `folder`, which ends with `/`.

    For example, `../a.jpg` below `s3://lake/index/` is `s3://lake/a.jpg`.
    """
    is_absolute = pc.match_substring_regex(uris, _ABSOLUTE)
    if (encoded := encode_path(folder)) != folder:  # The folder's path is not UTF-8; in a URI, `%` begins a byte.
        folder, uris = encoded, pc.if_else(is_absolute, uris, pc.replace_substring(uris, "%", "%25"))
    joined = pc.if_else(is_absolute, uris, pc.binary_join_element_wise(pa.scalar(folder), uris, pa.scalar("")))
    has_dots = pc.and_not(pc.match_substring_regex(uris, _DOT_SEGMENT), is_absolute)
    if not pc.any(has_dots).as_py():
        return joined
    resolved = [_resolve_dots(uri.as_py()) for uri in joined.filter(has_dots)]
    return pc.replace_with_mask(joined, has_dots, pa.array(resolved, pa.string()))


def are_below(locations: pa.StringArray, folder: str) -> pa.BooleanArray:
    """Return which locations lie in a folder, whatever the spelling of their schemes."""
    same_spelling = pc.starts_with(locations, folder)
    if is_local(folder):
        others = pc.match_substring_regex(locations, "^(?i:file):")
    else:
        scheme = uri_scheme(folder)
        spellings = [one for one, store in CLOUD_SCHEMES.items() if store == CLOUD_SCHEMES.get(scheme)] or [scheme]
        is_of_store = pc.match_substring_regex(locations, f"^(?i:{'|'.join(map(re.escape, spellings))})://")
        others = pc.and_not(is_of_store, pc.starts_with(locations, f"{scheme}://"))
    if not pc.any(others).as_py():
        return same_spelling
    return pa.array([is_below(location, folder) for location in locations.to_pylist()], pa.bool_())


def _resolve_dots(uri: str) -> str:
    """Return a URI without `.` and `..`, which no object store knows; unchanged if it climbs out of the bucket."""
    match = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://[^/]*/|/", uri)
    root = match[0] if match else ""
    kept: list[str] = []
    for segment in uri.removeprefix(root).split("/"):
        if segment == ".." and not kept and not is_local(uri):
            return uri
        if segment == "..":
            kept = kept[:-1]
        elif segment != ".":
            kept.append(segment)
    return root + "/".join(kept)
