"""Where images come from: one file a kind, each an ordered, resumable stream of refs."""

from __future__ import annotations

from batchjob.sources.manifest import ManifestSource
from batchjob.sources.prefix import PrefixSource
from batchjob.sources.refs import REF_FIELDS, Require, Source

__all__ = ["REF_FIELDS", "ManifestSource", "PrefixSource", "Require", "Source"]
