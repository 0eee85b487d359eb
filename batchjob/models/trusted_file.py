"""How far a model's file is trusted: its digest is checked; code is run only where the job says so."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, StringConstraints

from batchjob.errors import InvalidJob
from batchjob.models.file_format import FileFormat, require_format
from batchjob.models.output_selection import OutputSelection
from batchjob.models.weights import check_file_exists, read_file
from batchjob.settings import Settings, Uri

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["CodeFile", "TrustedFileModel", "WeightsFile", "verify_digest"]

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$")]


class WeightsFile(Settings):
    """Settings of a model that lies in a file.

    Attributes:
        sha256: digest of the file, 64 hexadecimal digits; a file that has another is refused.
    """

    sha256: Sha256 | None = None


class CodeFile(WeightsFile):
    """Settings of a model whose file is code: loading it, or running it, can do whatever its author wished.

    Attributes:
        trust: `true` says that you trust the author of the file with the given `sha256`; nothing is loaded without.
    """

    trust: bool = Field(default=False)

    def require_trust(self, data: bytes, uri: str, what: str) -> str:
        """The file's digest, once the job has named and trusted it.

        Args:
            data: the file.
            uri: where it lies.
            what: what it is ("a pickled module"), for the sentence.

        Raises:
            InvalidJob: `trust` or `sha256` is missing (the sentence gives the digest), or the digest is another.
        """
        if self.trust and self.sha256 is not None:
            return verify_digest(data, uri, self.sha256)
        found = hashlib.sha256(data).hexdigest()
        raise InvalidJob(
            f"model.weights: {uri} is {what}, which is code that runs when it is loaded; if you trust its author, "
            f"write model.trust: true and model.sha256: {found}"
        )


def verify_digest(data: bytes, uri: str, sha256: str | None, key: str = "model.weights") -> str:
    """Hex sha256 of a file. Raises InvalidJob where the job names another."""
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise InvalidJob(
            f"{key}: {uri} has the sha256 {found}, but model.sha256 is {sha256}; it is not the file you meant, "
            "or model.sha256 must be corrected"
        )
    return found


class TrustedFileModel(CodeFile, OutputSelection):
    """Settings of a model that is one file of code.

    Attributes:
        weights: the file, wherever it lies; on any device when it was saved.
    """

    weights: Uri
    format_name: ClassVar[str]
    accepted_formats: ClassVar[tuple[FileFormat, ...]]

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
        check_file_exists(reader, self.weights, "model.weights")
        if not self.trust or self.sha256 is None:
            self.read_trusted(reader)  # it will be refused; read, so that the sentence can give its digest

    def read_trusted(self, reader: Reader) -> tuple[bytes, str, FileFormat]:
        """The file, its digest and its kind; of none that is not trusted.

        Raises:
            InvalidJob: not there, another digest, of another kind, or not trusted.
            Unavailable: the store cannot be reached.
        """
        data = read_file(reader, self.weights, "model.weights")
        digest = verify_digest(data, self.weights, self.sha256)
        kind = require_format(data, self.where, *self.accepted_formats, expected=self.format_name)
        if not self.trust or self.sha256 is None:
            self.require_trust(data, self.weights, self.format_name)
        return data, digest, kind
