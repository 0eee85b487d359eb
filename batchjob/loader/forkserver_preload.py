"""Torchvision's transforms without torch's compiler, for a fork server: it imports modules by their names alone."""

from __future__ import annotations

import importlib

from batchjob.system import import_torchvision

import_torchvision()
importlib.import_module("torchvision.transforms")
