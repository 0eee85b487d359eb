"""What the formats have in common whose file is code: one file, trusted by its digest before anything is done to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from batchjob.models.filekind import Kind, expect
from batchjob.models.selected import SelectedOutput
from batchjob.models.trust import CodeFile, verified
from batchjob.models.weights import read_file, stat_file
from batchjob.settings import Uri

if TYPE_CHECKING:
    from batchjob.storage import Reader

__all__ = ["CodeModel"]


class CodeModel(CodeFile, SelectedOutput):
    """Settings of a model that is one file of code.

    Attributes:
        weights: the file, wherever it lies; on any device when it was saved.
    """

    weights: Uri
    what: ClassVar[str]
    kinds: ClassVar[tuple[Kind, ...]]

    @property
    def title(self) -> str:
        """What `model_id` calls it, before the digest."""
        return self.weights.rsplit("/", 1)[-1]

    @property
    def where(self) -> str:
        """How sentences about it begin."""
        return f"model.weights: {self.weights}"

    def check(self, reader: Reader, base: Path) -> None:  # noqa: ARG002 - one face for all formats
        """Looks without torch whether the file is there and trusted. Raises InvalidJob, Unavailable."""
        stat_file(reader, self.weights, "model.weights")
        if not self.trust or self.sha256 is None:
            self.read(reader)  # it will be refused; read, so that the sentence can give its digest

    def read(self, reader: Reader) -> tuple[bytes, str, Kind]:
        """The file, its digest and its kind; of none that is not trusted.

        Raises:
            InvalidJob: not there, another digest, of another kind, or not trusted.
            Unavailable: the store cannot be reached.
        """
        data = read_file(reader, self.weights, "model.weights")
        digest = verified(data, self.weights, self.sha256)
        kind = expect(data, self.where, *self.kinds, wish=self.what)
        if not self.trust or self.sha256 is None:
            self.trusted(data, self.weights, self.what)
        return data, digest, kind
