"""Reading one expert into its slot, what a reader thread does with a job: whole, or ahead of its use in parts."""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from moe.offload.copies import Filling, InPlace
from moe.offload.host_copies import HostCopies
from moe.offload.readers import Arrival, Job
from moe.offload.stores import ExpertStore, PartedStore, bytes_moved


class _Cancelled(Exception):
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class SlotReads:
    """blobs: by layer, uint8 [slots, bytes], of all slots. from_host: copies instead of reads, where it can."""

    def __init__(
        self, store: ExpertStore, blobs: Sequence[Tensor], filling: Filling, from_host: HostCopies | None
    ) -> None:
        self.store, self.filling, self.from_host = store, filling, from_host
        self._blobs = blobs
        # Asked between two parts of a read ahead: whether it goes on. may_nest: misses may be read meanwhile.
        self.goes_on: Callable[[Job, bool], bool] = lambda job, may_nest: not job.is_cancelled

    def read(self, job: Job) -> Arrival:
        """Never raises: an error travels to the thread that waits for the read."""
        if job.batch.is_cancelled:
            return Arrival(job, -1, None)
        ahead = job.is_ahead
        try:
            if self.from_host is not None:
                return self.from_host.fill([job], ahead=ahead)[0]
            if ahead and isinstance(self.store, PartedStore):
                read = partial(self._parts, self.store, job)
            else:
                read = partial(self.store.read_into, job.layer, job.expert)
            target = self._blobs[job.layer][job.slot, : self.store.layouts[job.layer].size_of(job.expert)]
            return Arrival(job, self.filling.fill(job.slot, target, read, ahead=ahead), None)
        except _Cancelled as cancelled:
            return Arrival(job, -1, None, cancelled.nbytes)
        except BaseException as error:
            return Arrival(job, -1, error)

    def _parts(self, store: PartedStore, job: Job, out: Tensor) -> int:
        # A nested read would take the buffers of a device's copies from under this one.
        may_nest = isinstance(self.filling, InPlace)

        def goes_on(nbytes: int) -> None:
            if not self.goes_on(job, may_nest):
                raise _Cancelled(nbytes)

        return bytes_moved(store.read_parts(job.layer, job.expert, out), goes_on)
