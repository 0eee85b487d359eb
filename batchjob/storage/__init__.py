"""URI → bytes. The only room that knows a storage client: obstore where it can, the cloud's SDK or fsspec where not.

Credentials come from the SDK's own chain, never from a job. Transient faults are retried with jitter for `patience`
seconds (30; environment variable BATCHJOB_PATIENCE), then raised as `Unavailable`; faults of credentials at once.
"""

from __future__ import annotations

from batchjob.storage.options import Options, StorageOptions
from batchjob.storage.reader import Reader
from batchjob.storage.store import Store, open_store, probe, settle

__all__ = ["Options", "Reader", "StorageOptions", "Store", "open_store", "probe", "settle"]
