"""Precision of float32 on CUDA: IEEE or TF32, set and restored so that every getter of torch can be read.

torch keeps the precision twice: in flags of its older API (`allow_tf32`, `set_float32_matmul_precision`), and per
backend and operator in its newer one (`fp32_precision`). Getters of the older one raise where the two differ, in the
user's code and in `torch.export` too. So both are set here, the older one first, since it also writes the newer one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch

__all__ = ["float32_precision"]


@contextmanager
def float32_precision(tf32: bool) -> Iterator[None]:
    """Make float32 mean TF32, or IEEE float32, in matrix products, convolutions and RNNs on CUDA; restore afterwards.

    Convolutions use TF32 by torch's default.
    """
    before = _Flags.read()
    operator = "tf32" if tf32 else "ieee"
    # A precision of "none" would be inherited from the user's `torch.backends.fp32_precision`.
    _Flags("high" if tf32 else "highest", tf32, operator, operator, operator, operator).write()
    try:
        yield
    finally:
        before.write()


@dataclass(frozen=True)
class _Flags:
    """torch's flags for float32.

    Attributes:
        matmul_precision: `torch.get_float32_matmul_precision()`; None where the user's flags contradict each other.
        cudnn_tf32: `torch.backends.cudnn.allow_tf32`; None where the user's flags contradict each other.
        matmul: Precision of matrix products on CUDA: ieee, tf32, or none to inherit it.
        conv: Precision of convolutions on CUDA.
        rnn: Precision of RNNs on CUDA.
        mkldnn_matmul: Precision of matrix products on a CPU, which `set_float32_matmul_precision` sets as well.
    """

    matmul_precision: str | None
    cudnn_tf32: bool | None
    matmul: str
    conv: str
    rnn: str
    mkldnn_matmul: str

    @classmethod
    def read(cls) -> Self:
        """Read the flags."""
        backends: Any = torch.backends
        return cls(
            matmul_precision=_read(torch.get_float32_matmul_precision),
            cudnn_tf32=_read(lambda: backends.cudnn.allow_tf32),
            matmul=backends.cuda.matmul.fp32_precision,
            conv=backends.cudnn.conv.fp32_precision,
            rnn=backends.cudnn.rnn.fp32_precision,
            mkldnn_matmul=backends.mkldnn.matmul.fp32_precision,
        )

    def write(self) -> None:
        """Set the flags."""
        backends: Any = torch.backends
        if self.matmul_precision is not None:
            torch.set_float32_matmul_precision(self.matmul_precision)
        if self.cudnn_tf32 is not None:
            backends.cudnn.allow_tf32 = self.cudnn_tf32
        backends.cuda.matmul.fp32_precision = self.matmul
        backends.cudnn.conv.fp32_precision = self.conv
        backends.cudnn.rnn.fp32_precision = self.rnn
        backends.mkldnn.matmul.fp32_precision = self.mkldnn_matmul


def _read(getter: Callable[[], Any]) -> Any:
    """Return a flag; None where torch refuses to tell it."""
    try:
        return getter()
    except RuntimeError:
        return None
