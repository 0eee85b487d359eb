"""Weights to a ready module, with the preprocessing it was trained with: one file a format."""

from __future__ import annotations

from batchjob.models.checkpoint import CheckpointModel
from batchjob.models.loaded import LoadedModel
from batchjob.models.python import PythonModel
from batchjob.models.torchvision import TorchvisionModel

__all__ = ["CheckpointModel", "LoadedModel", "PythonModel", "TorchvisionModel"]
