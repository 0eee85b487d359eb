"""Archives as file systems of fsspec: compressed tar files, names that begin with `./`, archives that were cut off."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Mapping
from typing import Any

from batchjob.errors import InvalidJob
from batchjob.uris import split_chain, uri_scheme

__all__ = ["archive_arguments", "check_archive_is_whole", "find_member", "is_archive_fault"]

# fsspec knows `.gz`, `.bz2`, `.xz` and `.zst` itself.
_TAR_COMPRESSIONS = {
    **dict.fromkeys((".tgz", ".taz"), "gzip"),
    **dict.fromkeys((".tbz", ".tbz2", ".tz2"), "bz2"),
    ".txz": "xz",
    ".tzst": "zstd",
}
_END_BLOCK = bytes(tarfile.BLOCKSIZE)  # A tar archive ends with two blocks of zeros.
_FAULTS = {"BadZipFile", "TarError", "BadGzipFile"}


def archive_arguments(uri: str) -> Mapping[str, Any]:
    """Return arguments for fsspec that an archive's name calls for: `/x.tgz` is a tar file compressed with gzip."""
    _, chain = split_chain(uri)
    archive = chain.removeprefix("::").partition("::")[0].lower()
    compression = next((name for ending, name in _TAR_COMPRESSIONS.items() if archive.endswith(ending)), None)
    return {"tar": {"compression": compression}} if uri_scheme(uri) == "tar" and compression else {}


def find_member(filesystem: Any, path: str) -> str:
    """Return the path of a member of a tar archive as the archive spells it: `tar cf x.tar .` writes `./a.png`."""
    names = getattr(filesystem, "index", None)
    if not path or not isinstance(getattr(filesystem, "tar", None), tarfile.TarFile) or not isinstance(names, dict):
        return path
    other = path[2:] if path.startswith("./") else f"./{path}"

    def exists(name: str) -> bool:
        return name in names or any(member.startswith(f"{name.rstrip('/')}/") for member in names)

    return path if not other or exists(path) or not exists(other) else other


def check_archive_is_whole(filesystem: Any, uri: str) -> None:
    """Raise InvalidJob for a tar archive without its end.

    Python's tarfile takes the first header that it cannot read for the end, so the members behind it would be missing
    without a word.
    """
    archive = getattr(filesystem, "tar", None)
    if not isinstance(archive, tarfile.TarFile) or archive.fileobj is None:
        return
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != _END_BLOCK:
        count = len(archive.getnames())
        raise InvalidJob(
            f"{uri}: the archive is cut off or damaged after {count:,} member{'' if count == 1 else 's'}: its end, "
            "blocks of zeros, is not there; write it there again"
        )


def is_archive_fault(error: Exception, uri: str) -> bool:
    """Return True for an error that says that an archive, or a member of it, is damaged, encrypted, or no archive."""
    if _FAULTS & {kind.__name__ for kind in type(error).__mro__}:
        return True
    if not split_chain(uri)[1]:
        return False
    if isinstance(error, RuntimeError) and "encrypted" in str(error):
        return True
    # bz2 raises an OSError without a number.
    is_bad_data = isinstance(error, EOFError | zlib.error | lzma.LZMAError)
    return is_bad_data or (type(error) is OSError and error.errno is None and "Invalid data" in str(error))
