"""Files of a manifest: the one that is named, or the part files of a folder or glob, with their format."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from batchjob.errors import InvalidJob
from batchjob.sources.locations import InputLocation, list_location, name_slice, require_location
from batchjob.sources.table_files import TableFormat, guess_table_format
from batchjob.storage.objects import ObjectInfo

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["list_manifest_files"]


def list_manifest_files(
    reader: Reader, uri: str, requested_format: TableFormat | None, excluded_folder: str | None
) -> list[tuple[ObjectInfo, TableFormat]]:
    """List the files of a manifest in the order of their names, each with its format.

    Args:
        reader: Reader with the job's storage options.
        uri: A file, folder or glob. Names that begin with `_` or `.` are left out of folders and globs.
        requested_format: Format that the job asks for; None goes by the name of each file.
        excluded_folder: URI of a folder that is never read.

    Raises:
        InvalidJob: There are no such files, or they are of two formats.
    """
    location = require_location(reader, uri)
    listed = list_location(reader, location, None, False, excluded_folder, _AllFolders(location))
    infos = [info for info in listed if location.file or not _is_hidden(info, location)]
    if requested_format is not None:
        accepted = {None, requested_format}
        files: list[tuple[ObjectInfo, TableFormat]] = [
            (info, requested_format) for info in infos if location.file or guess_table_format(info.uri) in accepted
        ]
    else:
        files = [(info, found) for info in infos if (found := guess_table_format(info.uri))]
    if location.file and not files:
        raise InvalidJob(f"input.uri {location.uri}: no known ending; give input.format: parquet, csv or jsonl")
    if not files:
        raise InvalidJob(
            f"input.uri {location.uri}: no manifest files in it ({len(infos)} others); name a file, give "
            f"input.format, or reach into folders below with '**/*.parquet'"
        )
    if len(formats := sorted({table_format for _, table_format in files})) > 1:
        raise InvalidJob(
            f"input.uri {location.uri}: both {' and '.join(formats)} files; choose with a glob or input.format"
        )
    return files


class _AllFolders:
    """Filter that enters every folder below a location."""

    def __init__(self, location: InputLocation) -> None:
        self._location = location

    def enters(self, folder: str) -> bool:  # noqa: ARG002 - FolderFilter
        return True

    def skip_unreadable(self, folder: str, reason: str) -> None:
        raise InvalidJob(
            f"input.uri {self._location.uri}: {self._location.folder}{folder} cannot be listed ({reason}); give this "
            f"user access to it, or name a folder or glob that leaves it out"
        )


def _is_hidden(info: ObjectInfo, location: InputLocation) -> bool:
    names = PurePosixPath(info.uri[name_slice(location.folder)]).parts
    return any(name.startswith(("_", ".")) for name in names)
