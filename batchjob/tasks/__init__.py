"""Model output to Arrow columns with a declared schema: one file a task."""

from __future__ import annotations

from batchjob.tasks.classification import ClassificationTask
from batchjob.tasks.embedding import EmbeddingTask
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess

__all__ = ["EXAMPLE_ROWS", "ClassificationTask", "EmbeddingTask", "Postprocess"]
