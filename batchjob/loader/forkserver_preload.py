"""Module to preload in the fork server: torchvision's transforms, without torch's compiler.

The fork server imports modules by name, so this import needs a module of its own.
"""

from __future__ import annotations

import importlib

from batchjob.system import import_torchvision

import_torchvision()
importlib.import_module("torchvision.transforms")
