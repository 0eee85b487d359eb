"""Precision of float32 on CUDA: set and restored, with both of torch's APIs readable at any time. Needs no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from batchjob.inference.execution_config import ExecutionConfig
from batchjob.inference.float32_precision import _Flags, float32_precision
from batchjob.inference.forward import ForwardOptions, ForwardPass

BACKENDS: Any = torch.backends


@pytest.fixture(autouse=True)
def restored_flags() -> Iterator[None]:
    """Leave torch's flags to other tests as they were."""
    before = _Flags.read()
    yield
    BACKENDS.fp32_precision = "none"
    before.write()


def read_older_api() -> tuple[bool, bool, str]:
    """Read the getters that raise where the two APIs differ."""
    return BACKENDS.cuda.matmul.allow_tf32, BACKENDS.cudnn.allow_tf32, torch.get_float32_matmul_precision()


def allow_tf32(value: bool) -> None:
    BACKENDS.cuda.matmul.allow_tf32 = BACKENDS.cudnn.allow_tf32 = value


USERS: dict[str, Callable[[], object]] = {
    "default": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "tf32-off": lambda: allow_tf32(False),
    "tf32-on": lambda: allow_tf32(True),
}


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize(("tf32", "expected"), [(False, (False, False, "highest")), (True, (True, True, "high"))])
def test_both_apis_can_be_read_inside_and_afterwards(user: str, tf32: bool, expected: tuple[Any, ...]) -> None:
    USERS[user]()
    before, older = _Flags.read(), read_older_api()
    with float32_precision(tf32):
        assert read_older_api() == expected
        operator = "tf32" if tf32 else "ieee"
        precisions = [BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn]
        assert [item.fp32_precision for item in precisions] == [operator] * 3
    assert read_older_api() == older
    assert _Flags.read() == before


@pytest.mark.parametrize("tf32", [False, True])
def test_precision_that_the_user_set_for_everything_does_not_leak_in(tf32: bool) -> None:
    BACKENDS.fp32_precision = "tf32"
    with float32_precision(tf32):
        assert BACKENDS.cudnn.conv.fp32_precision == ("tf32" if tf32 else "ieee")
        assert read_older_api() == ((True, True, "high") if tf32 else (False, False, "highest"))
    assert BACKENDS.fp32_precision == BACKENDS.cudnn.conv.fp32_precision == "tf32"


def test_flags_of_the_user_that_contradict_each_other_are_left_so() -> None:
    BACKENDS.cudnn.conv.fp32_precision = "ieee"  # RNNs stay with TF32
    before = _Flags.read()
    assert before.cudnn_tf32 is None
    with float32_precision(tf32=True):
        read_older_api()
    assert (BACKENDS.cudnn.conv.fp32_precision, BACKENDS.cudnn.rnn.fp32_precision) == (before.conv, before.rnn)


class Exporter(nn.Module):
    """Model for `cuda` that stays on the host; it exports another module while it runs, as user code may."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool, str]] = []

    def to(self, *_: Any, **__: Any) -> Exporter:
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(read_older_api())
        torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
        return x


@pytest.mark.parametrize(
    ("precision", "expected"), [("fp32", (False, False, "highest")), ("tf32", (True, True, "high"))]
)
def test_export_and_user_code_read_the_flags_during_and_after_a_forward_pass(
    precision: Any, expected: tuple[Any, ...]
) -> None:
    older, module = read_older_api(), Exporter()
    options = ForwardOptions(config=ExecutionConfig(precision=precision))
    forward = ForwardPass(module, lambda pixels, dtype: pixels.to(dtype), torch.device("cuda"), options)
    forward(torch.ones(1, 2))
    assert module.seen == [expected]
    assert read_older_api() == older
    torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
