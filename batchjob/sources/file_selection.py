"""Selection of files in a listing: by extension, by `include` and `exclude`, and without hidden names."""

from __future__ import annotations

from collections.abc import Sequence

from batchjob.errors import InvalidJob
from batchjob.sources.glob_patterns import (
    is_hidden,
    make_folder_filter,
    make_hidden_folder_filter,
    make_hidden_path_filter,
    make_path_filter,
)
from batchjob.sources.locations import InputLocation, escape_magic, name_slice
from batchjob.sources.skipped_files import SkippedFiles
from batchjob.storage.objects import ObjectInfo

__all__ = ["FileSelection"]

_MAX_SHOWN_PATH = 1000  # characters of a path in a message


class FileSelection:
    """Selection of the files below a location; counts those that it leaves out.

    Args:
        location: Location that is listed.
        extensions: Extensions in lower case, each with its dot; None takes every file.
        include: Globs of which one must match; none take every file.
        exclude: Globs of which none may match; folders that one matches are not entered.
        hidden: Take hidden names too. False takes those that `include` or the location's own glob names.
        marker: Name of a file in the location's folder that is never taken.
        skipped: Counts to add to.
    """

    def __init__(
        self,
        location: InputLocation,
        extensions: Sequence[str] | None,
        include: tuple[str, ...],
        exclude: tuple[str, ...],
        hidden: bool,
        marker: str | None,
        skipped: SkippedFiles,
    ) -> None:
        self._location, self._marker, self._skipped = location, marker, skipped
        self._names = name_slice(location.folder)
        self._extensions = None if extensions is None else tuple(extensions)
        self._is_chosen = make_path_filter(include, exclude) if include or exclude else None
        self._is_excluded = make_path_filter(exclude, ()) if exclude else None
        # A single file is taken by whatever name the job gives it.
        self._skips_hidden = not hidden and location.file is None
        self._may_hold = make_folder_filter(location.pattern) if location.pattern else None
        self._names_path = make_hidden_path_filter(include, location.pattern)
        self._names_folder = make_hidden_folder_filter(include, location.pattern)
        self._last_hidden_folder: str | None = None

    def takes(self, found: ObjectInfo) -> bool:
        """Return True if a listed file is one of the input's images."""
        name = found.uri[self._names]
        if name == self._marker or (self._is_chosen is not None and not self._is_chosen(name)):
            return False
        if self._skips_hidden and is_hidden(name) and not self._names_path(name):
            self._skipped.hidden_files += 1
            return False
        if self._extensions is not None and not name.lower().endswith(self._extensions):
            self._skipped.add_extension(name)
            return False
        return True

    def enters(self, folder: str) -> bool:
        """Return True if images may lie below a folder. The folders above it have been entered."""
        if self._may_hold is not None and not self._may_hold(folder):
            return False
        if self._is_excluded is not None and self._is_excluded(folder):
            return False
        if not self._skips_hidden:
            return True
        name = folder[folder.rfind("/", 0, -1) + 1 : -1]
        if not is_hidden(name) or self._names_folder(name):
            return True
        if folder != self._last_hidden_folder:
            self._last_hidden_folder = folder
            self._skipped.hidden_folders += 1
        return False

    def skip_unreadable(self, folder: str, reason: str) -> None:
        """Leave out an unreadable `lost+found`. Raises InvalidJob for any other folder that cannot be read."""
        whole = self._location.folder + folder
        if folder.endswith("lost+found/"):
            self._skipped.unreadable_folders.append(whole)
            return
        if not folder:
            raise InvalidJob(f"input.uri {self._location.uri} cannot be listed ({reason}); give this user access to it")
        if len(whole) > _MAX_SHOWN_PATH:
            folder = f"{folder.partition('/')[0]}/"
            whole = f"a folder deep below {self._location.folder}{folder}"
        raise InvalidJob(
            f"input.uri: {whole} cannot be listed ({reason}); give this user access to it, or leave it out with "
            f"input.exclude: ['{escape_magic(folder)}']"
        )
