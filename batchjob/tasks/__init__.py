"""Model output to Arrow columns with a declared schema: one file a task."""

from __future__ import annotations

from batchjob.tasks.classification import ClassificationTask
from batchjob.tasks.detection import DetectionTask
from batchjob.tasks.embedding import EmbeddingTask
from batchjob.tasks.multilabel import MultilabelTask
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess
from batchjob.tasks.python import PythonTask
from batchjob.tasks.raw import RawTask
from batchjob.tasks.regression import RegressionTask
from batchjob.tasks.segmentation import SegmentationTask

__all__ = [
    "EXAMPLE_ROWS",
    "ClassificationTask",
    "DetectionTask",
    "EmbeddingTask",
    "MultilabelTask",
    "Postprocess",
    "PythonTask",
    "RawTask",
    "RegressionTask",
    "SegmentationTask",
]
