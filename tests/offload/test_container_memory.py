"""What a process may still take, against made-up /proc and /sys/fs/cgroup trees, and in a process with a limit."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from moe.offload.files_in_use import open_in_use
from moe.offload.memory import available_memory
from moe.offload.promised import Promise, owed_by_processes, own_memory, own_promised
from tests.distributed import MULTIPROCESSING
from tests.moe.moe_cases import TINYMOE
from tests.moe.test_memory import write_checkpoint
from tests.patience import PATIENCE_S

MIB, GIB = 1 << 20, 1 << 30
ROOT = Path(__file__).resolve().parent.parent.parent


def tree(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    return folder


def machine(tmp_path, cgroup, files):
    proc = tree(tmp_path / "proc", {"meminfo": f"MemTotal: 1 kB\nMemAvailable: {8 * GIB // 1024} kB\n"})
    tree(proc, {"self/cgroup": cgroup, "self/status": "VmSize: 1 kB\n"})
    (tmp_path / "shared").mkdir(exist_ok=True)
    return proc, tree(tmp_path / "cgroup", files), tmp_path / "shared"


def test_no_limit(tmp_path):
    (tmp_path / "cgroup").mkdir()
    assert available_memory(*machine(tmp_path, "0::/\n", {})) == 8 * GIB
    assert available_memory(*machine(tmp_path, "0::/a/b\n4:memory:/gone\n", {})) == 8 * GIB


def test_version_2_counts_every_group_around(tmp_path):
    files = {
        "a/b/memory.max": "max\n",
        "a/b/memory.current": 5 * GIB,
        "a/memory.max": 4 * GIB,
        "a/memory.high": 3 * GIB,
        "a/memory.current": 2 * GIB,
        "a/memory.stat": f"anon 7\ninactive_file {GIB // 2}\nactive_file {GIB // 4}\nshmem 9\n",
    }
    assert available_memory(*machine(tmp_path, "0::/a/b\n", files)) == 3 * GIB - (2 * GIB - 3 * GIB // 4)


def test_version_2_beside_version_1(tmp_path):
    files = {"unified/a/memory.max": 2 * GIB, "unified/a/memory.current": GIB}
    assert available_memory(*machine(tmp_path, "1:cpu:/\n0::/a\n", files)) == GIB


def test_version_1(tmp_path):
    files = {
        "memory/a/memory.limit_in_bytes": 2 * GIB,
        "memory/a/memory.usage_in_bytes": GIB,
        "memory/a/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}\ntotal_active_file {GIB // 8}\n",
        "memory/memory.limit_in_bytes": 9223372036854771712,
        "memory/memory.usage_in_bytes": 7 * GIB,
    }
    assert available_memory(*machine(tmp_path, "4:cpu,memory:/a\n", files)) == GIB + GIB // 2 + GIB // 8


def test_the_path_of_the_host_is_not_here(tmp_path):
    """A container without a namespace of its own: /proc/self/cgroup has the host's path, the mount only the group."""
    files = {"memory/memory.limit_in_bytes": GIB, "memory/memory.usage_in_bytes": GIB + MIB}
    assert available_memory(*machine(tmp_path, "4:memory:/docker/123\n", files)) == 0


@pytest.mark.parametrize("is_seen", [True, False])
def test_what_a_process_has_promised_and_not_taken_is_not_free(tmp_path, is_seen):
    """Of a machine, and of the groups that both are in; one that cannot be seen may take all that it promised."""
    cgroup, files = "0::/a/b\n", {"a/memory.max": 6 * GIB, "a/memory.current": GIB, "a/b/memory.max": 4 * GIB}
    proc, cgroups, shared = machine(tmp_path, cgroup, files | {"a/b/memory.current": GIB})
    free = available_memory(proc, cgroups, shared)
    assert free == 3 * GIB
    (proc / str(os.getpid())).mkdir()
    other = tree(proc / (str(os.getpid()) if is_seen else "1"), {"cgroup": "0::/a/c\n", "status": "RssAnon: 0 kB\n"})
    has = own_memory()
    promise = Promise(shared)
    assert available_memory(proc, cgroups, shared) == free
    promise.renew(4 * GIB)
    (only,) = owed_by_processes(proc, shared)
    (other / "status").write_text(f"RssAnon: {has // 1024 + 2 * GIB // 1024} kB\n")  # it has taken 2 GiB meanwhile
    (owed,) = owed_by_processes(proc, shared)
    if is_seen:
        assert 4 * GIB <= only.nbytes - has <= 4 * GIB + 64 * MIB
        assert 2 * GIB - 64 * MIB <= owed.nbytes <= 2 * GIB + 64 * MIB
        assert available_memory(proc, cgroups, shared) == 5 * GIB - owed.nbytes  # of the group around both
    else:
        assert only.nbytes == owed.nbytes == 4 * GIB
        assert available_memory(proc, cgroups, shared) == free  # 8 GiB - 4 GiB are no less
    (other / "status").write_text("State: Z (zombie)\n")  # it has ended, and what it had locked is about to be free
    (ended,) = owed_by_processes(proc, shared)
    assert ended.nbytes == (0 if is_seen else 4 * GIB)
    promise.close()
    promise.close()
    assert available_memory(proc, cgroups, shared) == free


def promises(folder: Path, hears, goes) -> None:
    promise = Promise(folder)
    promise.renew(GIB)
    hears.set()
    goes.wait(PATIENCE_S)


def test_a_promise_ends_with_its_process(tmp_path):
    hears, goes = MULTIPROCESSING.Event(), MULTIPROCESSING.Event()
    process = MULTIPROCESSING.Process(target=promises, args=(tmp_path, hears, goes))
    process.start()
    assert hears.wait(PATIENCE_S)
    ((pid, nbytes),) = owed_by_processes(folder=tmp_path)
    assert (pid, GIB - 64 * MIB < nbytes <= GIB) == (process.pid, True)
    assert own_promised(folder=tmp_path) == 0
    process.kill()
    process.join(PATIENCE_S)
    assert list(owed_by_processes(folder=tmp_path)) == []
    Promise(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


NO_PROMISES = [b"", b"1 2 3", b"one two three four", b"1 2 -3 4", "1 2 ³ 4".encode(), b"\xff" * 200]


def test_what_is_no_promise_promises_nothing(tmp_path):
    """Anybody of the machine may put a file there."""
    files = [open_in_use(tmp_path / f"moe-promised-1-{n}", 0o644) for n in range(len(NO_PROMISES))]
    for file, text in zip(files, NO_PROMISES):
        os.pwrite(file, text, 0)
    try:
        with MULTIPROCESSING.Pool(1) as pool:  # to it the files are in use
            assert pool.apply(owed_in, (tmp_path,)) == []
    finally:
        for file in files:
            os.close(file)


def owed_in(folder: Path) -> list[tuple[int, int]]:
    return [(owed.pid, owed.nbytes) for owed in owed_by_processes(folder=folder)]


def test_where_nothing_can_be_said_to_others_a_line_says_so(tmp_path, caplog):
    promise = Promise(tmp_path / "missing")
    promise.renew(GIB)
    promise.close()
    assert "other processes do not know what memory this one will still take" in caplog.text


CHILD = """
from moe.offload.memory import available_memory
print(available_memory())
"""


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_ulimit(kind):
    limit = 3 * GIB
    run = subprocess.run(
        [sys.executable, "-c", CHILD],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        preexec_fn=lambda: resource.setrlimit(getattr(resource, kind), (limit, limit)),
    )
    assert 0 < int(run.stdout) <= limit


def own_group():
    """A new control group of version 1 or 2 that this user may make, or the reason why not."""
    for root, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        folder = root / f"moe-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        if (folder / limit).exists():
            return folder, folder / limit
        folder.rmdir()
    pytest.skip("this machine lets nobody here make a control group with a memory limit")


def run_in_group(code: str, limit_mib: int) -> str:
    """What a program said that joined a new group; `limit` there writes another limit, `MIB` above what is used."""
    folder, limit = own_group()
    begin = (
        f"import os; open({str(folder / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        "def limit(more):\n"
        "    anonymous = next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon'))\n"
        f"    open({str(limit)!r}, 'w').write(str((anonymous << 10) + (more << 20)))\n"
    )
    try:
        try:
            limit.write_text(str(limit_mib * MIB))
            run = subprocess.run(
                [sys.executable, "-c", begin + code], capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_S
            )
        except PermissionError as error:
            pytest.skip(f"this machine lets nobody here set a memory limit: {error}")
        if "PermissionError" in run.stderr:
            pytest.skip("this machine lets nobody here join a control group")
        assert run.returncode == 0, (run.returncode, run.stderr[-2000:])
        return run.stdout
    finally:
        folder.rmdir()


def test_the_default_budget_keeps_within_a_real_group():
    said = run_in_group(
        "from moe import LLM, SamplingParams\n"
        "from moe.offload.memory import available_memory\n"
        "assert available_memory() <= 900 << 20, available_memory()\n"
        f"with LLM({str(TINYMOE)!r}) as llm:\n"
        "    print(len(llm.generate('Once', SamplingParams(max_tokens=4))[0].outputs[0].token_ids))\n",
        900,
    )
    assert said.strip() == "4"


@pytest.mark.heavy
def test_the_default_budget_has_room_for_kv_steps_and_reads(tmp_path):
    """Experts that do not fit, wide steps of prompts, a KV that takes all it may: slots make way, nothing is killed."""
    write_checkpoint(tmp_path / "model", 8, 16, 512, 640, 2048, heads=8)  # 240 MiB of experts, KV of 32 KiB a token
    said = run_in_group(
        "from moe import LLM, SamplingParams\n"
        "import moe.opening\n"  # what it takes in memory is not counted
        f"limit({180})\n"
        f"with LLM({str(tmp_path / 'model')!r}) as llm:\n"
        "    slots, pool = [llm.engine.state().slots], llm.engine.scheduler.pool\n"
        "    for _ in range(2):\n"
        "        tokens = pool.room // 16 * 16\n"
        "        prompts = [[n + 1] * (tokens - 8) for n in range(16)]\n"
        "        done = llm.generate(prompts, SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)\n"
        "        assert [len(one.outputs[0].token_ids) for one in done] == [8] * 16\n"
        "        slots.append(llm.engine.state().slots)\n"
        "    print(pool.num_blocks == pool.room, slots[0] > slots[1], slots[0], *slots[1:])\n",
        1200,
    )
    assert said.split()[:2] == ["True", "True"], said
    assert 8 < int(said.split()[2]) < 128, said
