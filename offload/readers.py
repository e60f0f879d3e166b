"""The threads that read experts into slots, and what they do first: misses, then speculation, by when it is due."""

import atexit
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import NamedTuple

log = logging.getLogger(__name__)

_SAY_S = 30.0  # between two words of a read that does not end
_CLOSE_S = 10.0  # for reads to end when the threads do


class Batch:
    """Reads that somebody waits for together: where they arrive, and whether anyone still wants them."""

    def __init__(self) -> None:
        self.done: SimpleQueue[Arrival] = SimpleQueue()
        self.num_reading = 0
        self.is_cancelled = False

    def next_arrival(self) -> "Arrival":
        """Waits for it, and says so where that takes long: nobody can end a read that the system does not."""
        waited = 0.0
        while True:
            try:
                return self.done.get(timeout=_SAY_S)
            except Empty:
                waited += _SAY_S
                log.warning("waits for experts since %g s: the disk, or its file system, does not answer", waited)


@dataclass(slots=True, eq=False)
class Job:
    """One expert to read into one slot."""

    layer: int
    expert: int
    slot: int
    batch: Batch
    due: int = -1  # of speculation: the visit of a layer that it is for, counted through; -1: it was asked for
    is_late: bool = False  # asked for while its speculative read was under way
    is_cancelled: bool = False  # begun, and not wanted: it ends after the part that is being read

    @property
    def is_ahead(self) -> bool:
        return self.due >= 0


class Arrival(NamedTuple):
    job: Job
    nbytes: int  # -1: cancelled, or an error, before it was read
    error: BaseException | None
    lost_bytes: int = 0  # read before it was cancelled


class Readers:
    """`num_readers` threads that run `read(job)`, which must not raise, and hand what it returns to the job's batch.

    Misses go first. Speculation starts only while another thread is free for the next miss, and between its parts
    (`goes_on`) its thread reads the misses that wait. Threads start with the first job. They end with `close`, at the
    latest as the process does: Python aborts a process whose threads are within torch while it ends.
    """

    def __init__(self, num_readers: int, read: Callable[[Job], Arrival]) -> None:
        self.threads = [
            threading.Thread(target=self._serve, name=f"expert-reader-{n}", daemon=True) for n in range(num_readers)
        ]
        self._read = read
        self._changed = threading.Condition()
        self._misses: deque[Job] = deque()
        self._ahead: deque[Job] = deque()
        self._reading_ahead: set[Job] = set()
        self._most_ahead = max(1, num_readers - 1)
        self._has_started = self._is_closed = False
        atexit.register(self.close)  # before those of whoever steps, which are called first

    def put(self, jobs: Sequence[Job]) -> None:
        """Misses, in their order."""
        self._start()
        with self._changed:
            self._misses.extend(jobs)
            self._changed.notify(len(jobs))

    def put_ahead(self, jobs: Sequence[Job]) -> None:
        """Speculative jobs, best first; those that are due sooner go before all others."""
        self._start()
        with self._changed:
            self._ahead = deque(sorted([*self._ahead, *jobs], key=lambda job: job.due))
            self._changed.notify(len(jobs))

    def adopt(self, job: Job, batch: Batch) -> bool:
        """Makes a speculative job a miss of `batch`, begun or not; False if it has arrived already."""
        with self._changed:
            if job in self._reading_ahead:
                job.is_late = True
            elif job in self._ahead:
                self._ahead.remove(job)
                job.due = -1
                self._misses.append(job)
                self._changed.notify()
            else:
                return False
            job.batch = batch
            return True

    def take_back(self, layer: int | None = None, keep: Collection[int] = ()) -> list[Job]:
        """Speculative jobs that have not begun, which are then not done: of all layers, or of one but for `keep`."""
        with self._changed:
            taken = [job for job in self._ahead if layer in (None, job.layer) and job.expert not in keep]
            for job in taken:
                self._ahead.remove(job)
            return taken

    def goes_on(self, job: Job, may_nest: bool) -> bool:
        """Asked by the thread that reads `job` ahead, between two parts: False once nobody wants it.

        may_nest: the thread may read the misses that wait before it goes on.
        """
        while may_nest and not job.is_cancelled and not job.is_late:
            with self._changed:
                if not self._misses:
                    break
                miss = self._misses.popleft()
            self._hand_over(miss)
        return not job.is_cancelled

    def close(self) -> None:
        """Ends the threads once all misses are read; speculation that has not begun is dropped, and so is a thread
        whose read does not end."""
        atexit.unregister(self.close)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._has_started:
            for thread in self.threads:
                thread.join(_CLOSE_S)
                if thread.is_alive():
                    log.warning("a read has not ended after %g s, and is left behind", _CLOSE_S)

    def _start(self) -> None:
        if not self._has_started:
            self._has_started = True
            for thread in self.threads:
                thread.start()

    def _next(self) -> Job | None:
        with self._changed:
            while True:
                if self._misses:
                    return self._misses.popleft()
                if self._is_closed:
                    return None
                if self._ahead and len(self._reading_ahead) < self._most_ahead:
                    job = self._ahead.popleft()
                    self._reading_ahead.add(job)
                    return job
                self._changed.wait()  # no limit: until there is a job, or `close`

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            self._hand_over(job)

    def _hand_over(self, job: Job) -> None:
        arrival = self._read(job)
        with self._changed:  # or the job could be adopted between looking up its batch and handing it over
            job.batch.done.put(arrival)
            self._reading_ahead.discard(job)
            if self._ahead:
                self._changed.notify()
