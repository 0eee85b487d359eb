"""Shards to batches, in processes that are cheap to lose: a bad image is a fault in its place, a deadly one too.

`loader.py` is the face; `crew.py` keeps the processes and the order of batches, `process.py` is one process from both
sides, `limits.py` what it may take, `mark.py` the shared memory that says what it is at; `trial.py` tries a suspect
alone, and `quarantine.py` remembers the verdict beside the plan; `images.py` and `pixels.py` make a request a batch;
`samples.py` looks at a few images beforehand.
"""

from __future__ import annotations

from batchjob.forkserver import preload
from batchjob.loader.images import Prepare
from batchjob.loader.loader import Loader, ShardFeed
from batchjob.loader.quarantine import Quarantine
from batchjob.loader.samples import Once, samples
from batchjob.loader.settled import FEW_IMAGES, TYPICAL_BYTES, LoaderPlan, LoaderSettings, settle

__all__ = [
    "FEW_IMAGES",
    "TYPICAL_BYTES",
    "Loader",
    "LoaderPlan",
    "LoaderSettings",
    "Once",
    "Prepare",
    "Quarantine",
    "ShardFeed",
    "preload",
    "samples",
    "settle",
]
