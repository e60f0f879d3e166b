"""Reading experts: every store on the original and the packed form of one checkpoint, cold and from the page cache.

Limit: the disk when cold (measured here: O_DIRECT, 8 MiB pieces in order, two threads), memory bandwidth when warm.
The second table is what one `acquire` with two misses costs in the calling thread and with reader threads, by size of
the expert, from the page cache: where they cross is `INLINE_READ_BYTES`.

    python bench/bench_stores.py [--folder DIR] [--mib 512]
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import moe.offload.cache as cache_module
from moe.offload.cache import ExpertCache
from moe.offload.checkpoint import Checkpoint
from moe.offload.index import ExpertIndex, index_experts
from moe.offload.layout import ExpertSite
from moe.offload.pack import pack
from moe.offload.stores import ExpertStore, FileStore, MmapStore, RamStore, aligned_bytes

REPEATS = 5
NUM_THREADS = 2


def make_checkpoint(folder: Path, site: ExpertSite) -> Checkpoint:
    """Random experts under the names of Qwen3-MoE."""
    folder.mkdir()
    rows, columns = site.intermediate_size, site.hidden_size
    shapes = {"gate_proj": (rows, columns), "up_proj": (rows, columns), "down_proj": (columns, rows)}
    tensors = {
        f"{site.module}.{expert}.{name}.weight": torch.randint(0, 255, (2 * rows * columns,), dtype=torch.uint8)
        .view(torch.bfloat16)
        .view(shape)
        for expert in range(site.num_experts)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint.open(folder)


def make_both(folder: Path, site: ExpertSite) -> dict[str, ExpertIndex]:
    transforms = get_checkpoint_conversion_mapping("qwen3_moe")
    checkpoint = make_checkpoint(folder / "original", site)
    index = index_experts(checkpoint, [site], transforms)
    packed = index_experts(Checkpoint.open(pack(checkpoint, index, folder / "packed")), [site])
    os.sync()
    return {"original": index, "packed": packed}


def forget(paths: Iterable[Path]) -> None:
    """Drops the files from the page cache."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def bytes_from_disk() -> int:
    """What this process had fetched from storage so far."""
    return int(Path("/proc/self/io").read_text().split("\nread_bytes: ")[1].split("\n")[0])


def timed(read: Callable[[], None]) -> tuple[float, float]:
    """(seconds, CPU seconds of the process)."""
    wall, cpu = time.perf_counter(), time.process_time()
    read()
    return time.perf_counter() - wall, time.process_time() - cpu


def read_all(store: ExpertStore, order: list[int], slots: list[torch.Tensor]) -> None:
    def work(thread: int) -> None:
        for expert in order[thread::NUM_THREADS]:
            store.read_into(0, expert, slots[thread])

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(work, range(NUM_THREADS)))


def disk_limit(path: Path) -> float:
    """MiB/s of large direct reads, the best of a few."""
    piece = 8 << 20
    offsets = range(0, path.stat().st_size - piece, piece)
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffers = [aligned_bytes(piece).numpy().data for _ in range(NUM_THREADS)]

    def work(thread: int) -> None:
        for offset in offsets[thread::NUM_THREADS]:
            os.preadv(file, [buffers[thread]], offset)

    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            list(pool.map(work, range(NUM_THREADS)))
        best = max(best, len(offsets) * piece / (1 << 20) / (time.perf_counter() - start))
    os.close(file)
    return best


def bench_stores(folder: Path, mib: int) -> list[dict[str, object]]:
    site = ExpertSite(module="mlp.experts", num_experts=mib // 9, hidden_size=2048, intermediate_size=768)  # 9 MiB
    indexes = make_both(folder, site)
    nbytes = indexes["original"].layouts[0].nbytes
    kinds: dict[str, Callable[[ExpertIndex], ExpertStore]] = {
        "mmap": MmapStore,
        "file, buffered": lambda index: FileStore(index, direct=False),
        "file, direct": lambda index: FileStore(index, direct=True),
    }
    reference = RamStore.read_from(kinds["file, buffered"](indexes["original"]))
    for index in indexes.values():  # correctness first
        for make in kinds.values():
            assert torch.equal(RamStore.read_from(make(index)).blobs[0], reference.blobs[0])
    limit = disk_limit(indexes["packed"].files()[0])
    slots = [aligned_bytes(nbytes) for _ in range(NUM_THREADS)]
    random = np.random.default_rng(0)
    seconds: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for _ in range(REPEATS):
        for name, make in kinds.items():  # interleaved
            for form, index in indexes.items():
                for state in ("cold", "warm") if name != "file, direct" else ("cold",):
                    if state == "cold":
                        forget(index.files())
                    store = make(index)  # anew: pages that are mapped stay in the cache
                    order = random.permutation(site.num_experts).tolist()
                    before = bytes_from_disk()
                    run = timed(lambda s=store, o=order: read_all(s, o, slots))  # type: ignore[misc]
                    store.close()
                    share = (bytes_from_disk() - before) / (site.num_experts * nbytes)
                    assert share > 0.95 if state == "cold" else share < 0.05, (form, name, state, share)
                    seconds.setdefault((form, name, state), []).append(run)
    total = site.num_experts * nbytes / (1 << 20)
    print(f"\n{site.num_experts} experts of {nbytes / (1 << 20):.1f} MiB in random order, {NUM_THREADS} threads; ")
    print(f"disk limit {limit:.0f} MiB/s; median of {REPEATS} (least, most)\n")
    print("| form | store | state | MiB/s | x mmap | % of disk | CPU s/GiB |\n|---|---|---|---|---|---|---|")
    rows: list[dict[str, object]] = []
    for (form, name, state), runs in seconds.items():
        rates = sorted(total / wall for wall, _ in runs)
        rate = statistics.median(rates)
        base = statistics.median(total / wall for wall, _ in seconds[form, "mmap", state])
        cpu = statistics.median(c for _, c in runs) / total * 1024
        of_disk = f"{100 * rate / limit:.0f}" if state == "cold" else "-"
        print(
            f"| {form} | {name} | {state} | {rate:.0f} ({rates[0]:.0f}, {rates[-1]:.0f}) | {rate / base:.2f} "
            f"| {of_disk} | {cpu:.2f} |"
        )
        rows.append({"form": form, "store": name, "state": state, "mib_per_s": rate, "x_mmap": rate / base,
                     "cpu_s_per_gib": cpu})  # fmt: skip
    return rows


def bench_inline(folder: Path) -> list[dict[str, object]]:
    print("\n| expert KiB | us per acquire of two misses, calling thread | with 2 readers |\n|---|---|---|")
    rows: list[dict[str, object]] = []
    for kib in (36, 144, 576, 2304):
        site = ExpertSite(
            module="mlp.experts", num_experts=16, hidden_size=192, intermediate_size=kib * 1024 // (192 * 6)
        )
        target = folder / str(kib)
        target.mkdir()
        store = FileStore(make_both(target, site)["packed"], direct=False)
        caches = []
        for limit in (1 << 62, 0):
            cache_module.INLINE_READ_BYTES = limit
            caches.append(ExpertCache(store, 2))
        times: list[list[float]] = [[], []]
        for _ in range(REPEATS):
            for which, cache in enumerate(caches):
                start = time.perf_counter()
                for step in range(400):
                    for _wave in cache.acquire(0, [2 * step % 16, 2 * step % 16 + 1]):
                        pass
                times[which].append((time.perf_counter() - start) / 400 * 1e6)
        assert all(c.stats[0].hits == 0 for c in caches)
        inline, readers = (statistics.median(t) for t in times)
        print(f"| {kib} | {inline:.0f} | {readers:.0f} |")
        rows.append({"kib": kib, "inline_us": inline, "readers_us": readers})
        for cache in caches:
            cache.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the files are made (default: the temporary folder)")
    parser.add_argument("--mib", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, ", end=""
    )
    print(f"Python {platform.python_version()}, torch {torch.__version__}: python {' '.join(sys.argv)}")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        (folder / "large").mkdir()
        (folder / "small").mkdir()
        result = {"stores": bench_stores(folder / "large", arguments.mib), "inline": bench_inline(folder / "small")}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
