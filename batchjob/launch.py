"""Deprecated name of `batchjob.api`."""

from __future__ import annotations

import warnings

from batchjob.api import make_plan as plan
from batchjob.api import make_pool, retry, run, validate

__all__ = ["make_pool", "plan", "retry", "run", "validate"]

warnings.warn("batchjob.launch is now batchjob.api", DeprecationWarning, stacklevel=2)
