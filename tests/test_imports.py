"""Torchvision comes without torch's compiler, and finds it when it asks."""

from __future__ import annotations

import subprocess
import sys

BEGIN = """
import sys
from batchjob.system import import_torchvision
import_torchvision()
import torch, torchvision
from torchvision.ops import roi_align
assert "torch._dynamo" not in sys.modules
"""
DETERMINISTIC = """
torch.use_deterministic_algorithms(True)
image, boxes = torch.rand(1, 3, 16, 16), [torch.tensor([[0.0, 0.0, 8.0, 8.0]])]
print(tuple(roi_align(image, boxes, 4).shape))
"""
COMPILED = """
double = torch.compile(lambda x: x * 2, backend="eager")
print(double(torch.ones(2)).tolist(), torch._dynamo.utils.__name__)
"""


def test_torchvision_leaves_the_compiler_where_it_is_and_gets_answers_from_it() -> None:
    assert _printed(BEGIN + DETERMINISTIC) == "(1, 3, 4, 4)"


def test_what_is_compiled_later_is_compiled() -> None:
    assert _printed(BEGIN + COMPILED) == "[2.0, 2.0] torch._dynamo.utils"


def test_where_the_compiler_is_imported_already_it_stays() -> None:
    begun = "import torch._dynamo.utils as before\n" + BEGIN.replace("not in", "in")
    assert _printed(begun + "print(sys.modules['torch._dynamo.utils'] is before)") == "True"


def _printed(program: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
