"""URI → bytes. The only room that knows a storage client: obstore where it can, the cloud's SDK or fsspec where not.

Credentials come from the SDK's own chain, never from a job. Transient faults of a request are retried with jitter for
`patience` seconds (30; environment variable BATCHJOB_PATIENCE). Who gives an `outage` has a store that does not answer
at all waited for so long, all requests together. Then they are raised as `Unavailable`; faults of credentials at once.
"""

from __future__ import annotations

from batchjob.storage.options import Options, StorageOptions
from batchjob.storage.outage import Outage, upload_seconds
from batchjob.storage.reader import Reader
from batchjob.storage.store import Store, open_store, probe, settle

__all__ = ["Options", "Outage", "Reader", "StorageOptions", "Store", "open_store", "probe", "settle", "upload_seconds"]
