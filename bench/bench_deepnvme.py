"""Direct reads by preadv, by DeepNVMe and by io_uring: first that bytes are equal, then what they cost.

1000 random reads of whole pages, of one to eight pages and of experts' sizes, by two threads, must give what preadv
gives. Then random reads of one size into page-aligned memory, methods in turn; the limit is the disk, so CPU seconds
count as much as MiB/s. DeepNVMe reads into memory that it locked; `+ copy` adds the copy into a slot, as the store has
it. io_uring needs the package liburing and is left out without it.

    make test-deepspeed        # or: python bench/bench_deepnvme.py [--folder DIR] [--mib 512]
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from moe.offload.deepnvme import LockedReads, aio_handles
from moe.offload.stores import aligned_bytes

PAGE = 4096
SIZES = (1 << 19, 1 << 22, 9 << 20)
REPEATS = 5
Read = Callable[[int, int], None]  # (thread, offset)


def check(path: Path, num_reads: int = 1000) -> None:
    """Raises AssertionError where a read by DeepNVMe differs from preadv's, into locked memory or into any other."""
    rng, total = np.random.default_rng(0), path.stat().st_size
    pages = rng.integers(1, 9, num_reads)
    pages[::5] = rng.choice([size // PAGE for size in SIZES], len(pages[::5]))
    starts = [int(rng.integers(0, total // PAGE - n)) * PAGE for n in pages]
    reads = LockedReads(aio_handles())
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def work(thread: int) -> None:
        ours, theirs = aligned_bytes(max(SIZES)), aligned_bytes(max(SIZES))
        for start, count in list(zip(starts, pages.tolist()))[thread::2]:
            nbytes = count * PAGE
            ours[:nbytes].fill_(7)
            reads.read(path, start, ours[:nbytes])
            assert os.preadv(file, [theirs.numpy().data[:nbytes]], start) == nbytes
            assert torch.equal(ours[:nbytes], theirs[:nbytes]), (start, nbytes)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    os.close(file)
    reads.close()
    print(f"{num_reads} random reads of {pages.min() * PAGE} to {pages.max() * PAGE} bytes: equal to preadv's\n")


def ways(path: Path, size: int, depth: int) -> dict[str, Read]:
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffers = [aligned_bytes(size) for _ in range(depth)]
    handles = [aio_handles()() for _ in range(depth)]
    locked = [handle.new_cpu_locked_tensor(size, torch.empty(0, dtype=torch.uint8)) for handle in handles]

    def preadv(thread: int, offset: int) -> None:
        assert os.preadv(file, [buffers[thread].numpy().data], offset) == size

    def deepnvme(thread: int, offset: int) -> None:
        assert handles[thread].sync_pread(locked[thread], str(path), offset) == 1

    def deepnvme_copied(thread: int, offset: int) -> None:
        deepnvme(thread, offset)
        buffers[thread].copy_(locked[thread])

    found = {"preadv": preadv, "DeepNVMe": deepnvme, "DeepNVMe + copy": deepnvme_copied}
    if (uring := io_uring(file, size, depth)) is not None:
        found["io_uring (liburing)"] = uring
    return found


def io_uring(file: int, size: int, depth: int) -> Read | None:
    """A ring for each thread; a read is split as DeepNVMe splits it, so that the disk has several parts at once."""
    try:
        import liburing as u
    except ImportError:
        return None
    rings = [u.Ring() for _ in range(depth)]
    for ring in rings:
        u.io_uring_queue_init(32, ring)
    starts = range(0, size, min(size, 1 << 20))
    buffers = [aligned_bytes(size).numpy().data for _ in range(depth)]
    parts = [[u.Iovec([memoryview(b)[a : a + (1 << 20)]]) for a in starts] for b in buffers]

    def read(thread: int, offset: int) -> None:
        ring, cqe = rings[thread], u.Cqe()
        for start, part in zip(starts, parts[thread]):
            u.io_uring_prep_readv(u.io_uring_get_sqe(ring), file, part, offset + start)
        u.io_uring_submit(ring)
        for _ in starts:
            u.io_uring_wait_cqe(ring, cqe)
            assert cqe[0].res > 0
            u.io_uring_cq_advance(ring, 1)

    return read


def rate(read: Read, offsets: np.ndarray, size: int, depth: int) -> tuple[float, float]:
    """(MiB/s, CPU seconds per GiB)."""

    def work(thread: int) -> None:
        for offset in offsets[thread::depth].tolist():
            read(thread, offset)

    wall, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(depth) as pool:
        list(pool.map(work, range(depth)))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    mib = len(offsets) * size / 2**20
    return mib / wall, cpu / mib * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--mib", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    print(f"python {' '.join(sys.argv)}\n")
    rows, order = [], np.random.default_rng(1)
    with tempfile.NamedTemporaryFile(dir=args.folder, prefix=".deepnvme-") as made:
        for _ in range(args.mib // 4):
            made.write(order.bytes(1 << 22))
        made.flush()
        os.fsync(made.fileno())
        path = Path(made.name)
        check(path)
        print("| read KiB | at a time | by | MiB/s (least, most) | x preadv | CPU s/GiB |\n|---|---|---|---|---|---|")
        for size in SIZES:
            for depth in (1, 2):
                found: dict[str, list[tuple[float, float]]] = {}
                each = ways(path, size, depth)
                for _ in range(REPEATS):
                    offsets = order.permutation(path.stat().st_size // size)[: (48 << 20) // size] * size
                    for name, read in each.items():
                        found.setdefault(name, []).append(rate(read, offsets, size, depth))
                first = [mib for mib, _ in found["preadv"]]
                for name, runs in found.items():
                    rates = [mib for mib, _ in runs]
                    ratio = statistics.median(mine / base for mine, base in zip(rates, first))
                    cpu = statistics.median(c for _, c in runs)
                    print(
                        f"| {size >> 10} | {depth} | {name} | {statistics.median(rates):.0f} ({min(rates):.0f}, "
                        f"{max(rates):.0f}) | {ratio:.2f} | {cpu:.2f} |",
                        flush=True,
                    )
                    rows.append({"size": size, "depth": depth, "by": name, "mib_per_s": statistics.median(rates)} | {
                        "x_preadv": ratio, "cpu_s_per_gib": cpu})  # fmt: skip
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
