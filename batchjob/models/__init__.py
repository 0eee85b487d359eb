"""Weights to a ready module, with the preprocessing it was trained with: one file a format."""

from __future__ import annotations

from batchjob.models.checkpoint import CheckpointModel
from batchjob.models.exported import ExportedModel
from batchjob.models.huggingface import HuggingfaceModel
from batchjob.models.loaded import LoadedModel
from batchjob.models.onnx import OnnxModel
from batchjob.models.pickle import PickleModel
from batchjob.models.python import PythonModel
from batchjob.models.tensorrt import TensorrtModel
from batchjob.models.timm import TimmModel
from batchjob.models.torchscript import TorchScriptModel
from batchjob.models.torchvision import TorchvisionModel

__all__ = [
    "CheckpointModel",
    "ExportedModel",
    "HuggingfaceModel",
    "LoadedModel",
    "OnnxModel",
    "PickleModel",
    "PythonModel",
    "TensorrtModel",
    "TimmModel",
    "TorchScriptModel",
    "TorchvisionModel",
]
