"""What `import batchjob` offers, pinned: a name that comes or goes is a decision, and stands in CHANGELOG.md."""

from __future__ import annotations

import subprocess
import sys

import batchjob

NAMES = {"Job", "JobError", "RunResult", "__version__", "retry", "run", "validate"}


def test_the_public_names_are_these() -> None:
    assert set(batchjob.__all__) == NAMES
    assert list(batchjob.__all__) == sorted(batchjob.__all__)


def test_each_is_there() -> None:
    assert [name for name in batchjob.__all__ if getattr(batchjob, name, None) is None] == []


def test_star_import_brings_them_and_nothing_heavy() -> None:
    code = "import sys; from batchjob import *; sys.exit(bool({'torch', 'torchvision', 'ray'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
