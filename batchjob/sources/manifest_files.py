"""Files of a manifest: the one that is named, or the part files of a folder or glob, with their format."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from batchjob.errors import InvalidJob
from batchjob.sources.glob_patterns import make_folder_filter
from batchjob.sources.lake_tables import is_log_folder, refuse_lake_tables
from batchjob.sources.locations import InputLocation, list_location, name_slice, require_location
from batchjob.sources.source import IMAGE_EXTENSIONS
from batchjob.sources.table_files import TableFormat, guess_table_format
from batchjob.storage.objects import ObjectInfo

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["list_manifest_files"]


def list_manifest_files(
    reader: Reader,
    uri: str,
    requested_format: TableFormat | None,
    excluded_folder: str | None,
    *,
    refuse_tables: bool,
) -> list[tuple[ObjectInfo, TableFormat]]:
    """List the files of a manifest in the order of their names, each with its format.

    Args:
        reader: Reader with the job's storage options.
        uri: A file, folder or glob. Names that begin with `_` or `.` are left out of folders and globs.
        requested_format: Format that the job asks for; None goes by the name of each file.
        excluded_folder: URI of a folder that is never read.
        refuse_tables: Look for the log of a Delta table or its like, by some requests more.

    Raises:
        InvalidJob: There are no such files, they are of two formats, or they belong to a Delta table or its like.
    """
    location = require_location(reader, uri)
    folders = _ManifestFolders(location)
    listed = list_location(reader, location, None, False, excluded_folder, folders)
    infos = [info for info in listed if location.file or not _is_hidden(info, location)]
    if requested_format is not None:
        accepted = {None, requested_format}
        files: list[tuple[ObjectInfo, TableFormat]] = [
            (info, requested_format) for info in infos if location.file or guess_table_format(info.uri) in accepted
        ]
    else:
        alone = location.file is not None
        files = [(info, found) for info in infos if (found := guess_table_format(info.uri, alone))]
    if location.file and not files:
        raise InvalidJob(f"input.uri {location.uri}: no known ending; give input.format: parquet, csv or jsonl")
    if not files:
        has_images = any(info.uri.lower().endswith(IMAGE_EXTENSIONS) for info in infos)
        images = "; for the images themselves write input.type: prefix" if has_images else ""
        raise InvalidJob(
            f"input.uri {location.uri}: no manifest files in it ({len(infos)} others); name a file, give "
            f"input.format, or reach into folders below with '**/*.parquet'{images}"
        )
    if len(formats := sorted({table_format for _, table_format in files})) > 1:
        raise InvalidJob(
            f"input.uri {location.uri}: both {' and '.join(formats)} files; choose with a glob or input.format"
        )
    if refuse_tables:
        refuse_lake_tables(reader, location, [info for info, _ in files], folders.log_folders)
    return files


class _ManifestFolders:
    """Filter of the folders below a location: hidden ones, and those where its glob cannot match, are not entered.

    Attributes:
        log_folders: Folders met so far in which a table may keep its log.
    """

    def __init__(self, location: InputLocation) -> None:
        self._location = location
        self._may_hold = make_folder_filter(location.pattern or "**")
        self.log_folders: list[str] = []

    def enters(self, folder: str) -> bool:
        name = folder[folder.rfind("/", 0, -1) + 1 : -1]
        if is_log_folder(name):
            self.log_folders.append(folder)
        return not name.startswith(("_", ".")) and self._may_hold(folder)

    def skip_unreadable(self, folder: str, reason: str) -> None:
        raise InvalidJob(
            f"input.uri {self._location.uri}: {self._location.folder}{folder} cannot be listed ({reason}); give this "
            f"user access to it, or name a folder or glob that leaves it out"
        )


def _is_hidden(info: ObjectInfo, location: InputLocation) -> bool:
    names = PurePosixPath(info.uri[name_slice(location.folder)]).parts
    return any(name.startswith(("_", ".")) for name in names)
