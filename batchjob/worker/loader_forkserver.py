"""Fork server from which loader processes and tuning trials start, with their modules imported in advance."""

from __future__ import annotations

from batchjob.concurrency import start_forkserver
from batchjob.job.job import Job

__all__ = ["start_loader_forkserver"]

_MODULES = [
    "batchjob.loader.loader",
    "batchjob.preprocessing.transforms",
    "batchjob.inference.autotune.trial_process",
]
# Imported in the fork server only.
_TRANSFORMS_MODULE = "torchvision.transforms"
# Formats whose weights come with a transform of another package, most often torchvision's.
_MODELS_WITH_TRANSFORMS = {"timm", "huggingface", "python"}


def start_loader_forkserver(job: Job) -> None:
    """Start the fork server, unless the job loads without processes; return at once, while it imports torch.

    A fork server that is running stays as it is.
    """
    if job.runtime.loader.processes == 0:
        return
    # A transform that is not ours most likely imports torchvision: once here, and not in each loader process.
    is_foreign = job.preprocess is not None and job.preprocess.transform is not None
    if is_foreign or job.model.type in _MODELS_WITH_TRANSFORMS:
        start_forkserver(*_MODULES, _TRANSFORMS_MODULE)
    else:
        start_forkserver(*_MODULES)
