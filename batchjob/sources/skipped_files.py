"""Counts of the files that a listing leaves out, and the lines that tell them to the user."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from posixpath import splitext

from batchjob.text import format_count

__all__ = ["SkippedFiles"]

_MAX_EXTENSIONS = 5  # in a line
# Names such as `scan.0000017` have an extension each: counts by extension end here, so that memory stays bounded.
_MAX_COUNTED = 1000


@dataclass
class SkippedFiles:
    """Files and folders that a listing left out so far, though no pattern of the job named them.

    Attributes:
        extensions: Files by their extension, which is not one of the job's; the first 1,000 extensions.
        other_extensions: Files of all further extensions.
        hidden_files: Hidden files outside hidden folders.
        hidden_folders: Hidden folders; the files in them are not counted.
        unreadable_folders: Folders `lost+found` that may not be read.
    """

    extensions: Counter[str] = field(default_factory=Counter)
    other_extensions: int = 0
    hidden_files: int = 0
    hidden_folders: int = 0
    unreadable_folders: list[str] = field(default_factory=list)

    def add_extension(self, name: str) -> None:
        """Count a file by the extension of its name."""
        extension = splitext(name)[1].lower()
        if extension in self.extensions or len(self.extensions) < _MAX_COUNTED:
            self.extensions[extension] += 1
        else:
            self.other_extensions += 1

    def describe(self) -> list[str]:
        """Return a line for each kind, such as `12 files skipped by extension: .txt (7), .json (5)`; none if empty."""
        lines = []
        if self.extensions:
            listed = [f"{name or 'none'} ({count:,})" for name, count in self.extensions.most_common(_MAX_EXTENSIONS)]
            more = len(self.extensions) - len(listed)
            listed += [f"{'over ' if self.other_extensions else ''}{more:,} more"] if more else []
            files = format_count(self.extensions.total() + self.other_extensions, "file")
            lines.append(f"{files} skipped by extension: {', '.join(listed)}")
        counts = ((self.hidden_files, "hidden file"), (self.hidden_folders, "hidden folder"))
        if hidden := [format_count(count, noun) for count, noun in counts if count]:
            lines.append(f"{' and '.join(hidden)} skipped; input.hidden: true takes them")
        lines += [f"{folder} skipped: it may not be read" for folder in self.unreadable_folders]
        return lines
