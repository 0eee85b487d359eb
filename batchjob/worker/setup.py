"""One loaded model that turns shards into committed parts: the only file that knows the whole data path."""

from __future__ import annotations

_WARM_UP_ROWS = 8
_SLOW_SECONDS = 60.0  # for a few images, at the pace of the first call, which is the slowest: then tuning may pay, too
_BRING_TRANSFORMS = {"timm", "huggingface", "python"}
_TRANSFORMS = "batchjob.loader.forkserver_preload"  # torchvision's, for the fork server alone
