"""Import of torchvision without torch's compiler, which is loaded at its first use."""

from __future__ import annotations

import subprocess
import sys

IMPORT_WITHOUT_COMPILER = """
import sys
from batchjob.system import import_torchvision
import_torchvision()
import torch, torchvision
from torchvision.ops import roi_align
assert "torch._dynamo" not in sys.modules
"""
USE_DETERMINISTIC_ROI_ALIGN = """
torch.use_deterministic_algorithms(True)
image, boxes = torch.rand(1, 3, 16, 16), [torch.tensor([[0.0, 0.0, 8.0, 8.0]])]
print(tuple(roi_align(image, boxes, 4).shape))
"""
USE_COMPILER = """
double = torch.compile(lambda x: x * 2, backend="eager")
print(double(torch.ones(2)).tolist(), torch._dynamo.utils.__name__)
"""


def test_torchvision_loads_the_compiler_at_first_use() -> None:
    assert run_program(IMPORT_WITHOUT_COMPILER + USE_DETERMINISTIC_ROI_ALIGN) == "(1, 3, 4, 4)"


def test_compilation_works_after_the_import() -> None:
    assert run_program(IMPORT_WITHOUT_COMPILER + USE_COMPILER) == "[2.0, 2.0] torch._dynamo.utils"


def test_compiler_that_is_imported_already_stays() -> None:
    program = "import torch._dynamo.utils as before\n" + IMPORT_WITHOUT_COMPILER.replace("not in", "in")
    assert run_program(program + "print(sys.modules['torch._dynamo.utils'] is before)") == "True"


def run_program(program: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
