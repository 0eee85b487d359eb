"""Options of `batchjob convert`, which are checked before torch is imported and before the input is listed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from batchjob.errors import InvalidJob

__all__ = ["ConversionFormat", "ConversionOptions"]

ConversionFormat = Literal["onnx", "exported", "aoti", "torchscript", "int8", "pruned", "tensorrt"]


@dataclass(frozen=True)
class ConversionOptions:
    """Options of a conversion.

    Attributes:
        to: Format of the file; `int8` is a quantised AOTInductor package, `pruned` a state dict with zeros in it.
        file: File to write.
        images: Images of the job on which the model is compared; `int8` is calibrated on as many others.
        tolerance: Largest deviation to accept, as a share of the largest output; None takes the format's default.
        amount: For `pruned`: share of the weights of each layer that become zero, from 0 to 1.
        structured: For `pruned`: whole channels in place of single weights.
        force: Replace a file that exists.
    """

    to: ConversionFormat
    file: Path
    images: int = 32
    tolerance: float | None = None
    amount: float = 0.5
    structured: bool = False
    force: bool = False

    @property
    def images_to_draw(self) -> int:
        """Images to draw from the input, with some to spare for those that cannot be used."""
        return 4 * self.images

    def check_file(self) -> None:
        """Check that the file can be written. Raises InvalidJob."""
        if not self.file.parent.is_dir():
            raise InvalidJob(f"-o {self.file}: there is no folder {self.file.parent}; create it")
        if self.file.exists() and not self.force:
            raise InvalidJob(f"-o {self.file}: there is such a file already; take another name, or add --force")
