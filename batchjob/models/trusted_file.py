"""Model files and trust: check the digest of a file, and load a file that is code only if the job trusts it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from batchjob.errors import InvalidJob
from batchjob.models.file_format import FileFormat, require_format
from batchjob.models.output_selection import OutputSelection
from batchjob.models.state_dict_selection import StateDictSelection
from batchjob.models.weights import check_file_exists, read_file
from batchjob.settings import Settings, Uri

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["StateDictFile", "TrustedFileModel", "WeightsFile", "verify_digest"]

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{64}$")]


class WeightsFile(Settings):
    """Settings of a model with a file of weights.

    Attributes:
        sha256: SHA-256 digest of the file, 64 hexadecimal digits; a file with another digest is refused.
    """

    sha256: Sha256 | None = None


class StateDictFile(WeightsFile):
    """Settings of a model whose weights are a state dict in a file.

    Attributes:
        checkpoint: Place of the weights in the file. `auto` finds the one dict and the one prefix that fit the model.
    """

    checkpoint: Literal["auto"] | StateDictSelection = "auto"

    @property
    def selection(self) -> StateDictSelection:
        """Place of the weights, with nulls for what is to be found."""
        return self.checkpoint if isinstance(self.checkpoint, StateDictSelection) else StateDictSelection()


class TrustedFileModel(WeightsFile, OutputSelection):
    """Settings of a model whose file is code: to load it or to run it is to run its author's code.

    A subclass is one format: it sets the two class variables and adds `load`.

    Attributes:
        trust: `true` states that you trust the author of the file with the given `sha256`; without it nothing is
            loaded.
        weights: Local path or URI of the file; it may have been saved on any device.
        format_name: Description of the format for error messages: "a TorchScript archive".
        accepted_formats: Formats of the file that the subclass can load.
    """

    trust: bool = Field(default=False)
    weights: Uri
    format_name: ClassVar[str]
    accepted_formats: ClassVar[tuple[FileFormat, ...]]

    @property
    def title(self) -> str:
        """Name in the column `model_id`, before the digest."""
        return self.weights.rsplit("/", 1)[-1]

    @property
    def where(self) -> str:
        """Job key and file, the start of error messages."""
        return f"model.weights: {self.weights}"

    def check(self, reader: Reader, folder: Path) -> None:  # noqa: ARG002 - all formats share this signature
        """Check, without torch, that the file exists and is trusted.

        Raises:
            InvalidJob: The file does not exist or is not trusted.
            Unavailable: The store cannot be reached.
        """
        check_file_exists(reader, self.weights, "model.weights")
        if not self.trust or self.sha256 is None:
            # It will be refused. Read it all the same, so that the message can state its digest.
            self.read_trusted(reader)

    def list_files(self, reader: Reader, folder: Path) -> list[str]:  # noqa: ARG002
        """Return the URIs of the files that decide the outputs of the model."""
        return [self.weights]

    def read_trusted(self, reader: Reader) -> tuple[bytes, str, FileFormat]:
        """Read the file if the job trusts it.

        Returns:
            Its content, its hexadecimal SHA-256 digest and its format.

        Raises:
            InvalidJob: The file does not exist, has another digest or another format, or `trust` or `sha256` is missing
                (the message states the digest).
            Unavailable: The store cannot be reached.
        """
        data = read_file(reader, self.weights, "model.weights")
        digest = verify_digest(data, self.weights, self.sha256)
        file_format = require_format(data, self.where, *self.accepted_formats, expected=self.format_name)
        if not self.trust or self.sha256 is None:
            raise InvalidJob(
                f"{self.where} is {self.format_name}, which is code that runs when it is loaded; if you trust its "
                f"author, write model.trust: true and model.sha256: {digest}"
            )
        return data, digest, file_format


def verify_digest(data: bytes, uri: str, sha256: str | None) -> str:
    """Compute the digest of a file and compare it with the job's `sha256`.

    Args:
        data: Content of the file.
        uri: Location of the file, for the error message.
        sha256: Digest in the job; None if it states none.

    Returns:
        SHA-256 of the content, 64 lower-case hexadecimal digits.

    Raises:
        InvalidJob: The job states another digest.
    """
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and digest != sha256.lower():
        raise InvalidJob(
            f"model.weights: {uri} has the sha256 {digest}, but model.sha256 is {sha256}; it is not the file you "
            "meant, or model.sha256 must be corrected"
        )
    return digest
