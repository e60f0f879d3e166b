"""One candidate of bench_engine.py in a process of its own: loads a model, then answers jobs, a JSON line each way.

    stdin   {"prompts": [[1, 2], …], "new_tokens": 32, "cold": false}
    stdout  {"tokens": …, "prefill": {"wall": s, "cpu": s}, "decode": …, "peak_rss": bytes, …}

Prefill ends when every prompt has its first token; decode is what follows. Memory is the process's own high-water mark
(VmHWM) less what it held after its imports. A cold job drops the page cache of the model's files before every step and
leaves the time that this takes out.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging as transformers_logging

from moe.config import BatchConfig, EngineConfig, OffloadConfig
from moe.llm import LLM
from moe.params import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """What to load. `resident`: fraction of the experts in memory; None is a model without offloading."""

    kind: Literal["ours", "transformers", "accelerate"]
    folder: str
    dtype: Literal["float32", "bfloat16"]
    experts: str = ""  # transformers' experts implementation
    resident: float = 1.0
    direct: bool | None = None  # ours: O_DIRECT
    scratch: str = ""  # accelerate: where it writes what it offloads


@dataclass(frozen=True, slots=True)
class Times:
    wall: float
    cpu: float


@dataclass(slots=True)
class Answer:
    """What one job gave and cost.

    bytes_moved: of experts, read into slots; for accelerate the experts it maps anew in every step, which are read only
    as far as they are touched and not cached.
    """

    tokens: list[list[int]]
    prefill: Times
    decode: Times
    decode_steps: int
    decode_experts: int = 0  # distinct experts of every layer and step after the prefill
    bytes_moved: int = 0
    bytes_from_disk: int = 0
    hits: int = 0
    misses: int = 0
    stall: float = 0.0
    peak_rss: int = 0
    notes: dict[str, float] = field(default_factory=dict)


class Clock:
    """Wall and CPU time (all threads) at the end of the prefill and of the job, without what is spent in `pause`."""

    def __init__(self, between: Callable[[], None]) -> None:
        self._between, self._out, self._marks = between, Times(0, 0), [self._now()]

    def _now(self) -> Times:
        return Times(time.perf_counter(), time.process_time())

    def mark(self) -> None:
        """The end of a step."""
        now = self._now()
        self._marks.append(Times(now.wall - self._out.wall, now.cpu - self._out.cpu))
        self._between()
        then = self._now()
        self._out = Times(self._out.wall + then.wall - now.wall, self._out.cpu + then.cpu - now.cpu)

    def spent(self, first_decode: int) -> tuple[Times, Times]:
        start, middle, end = self._marks[0], self._marks[first_decode], self._marks[-1]
        return (
            Times(middle.wall - start.wall, middle.cpu - start.cpu),
            Times(end.wall - middle.wall, end.cpu - middle.cpu),
        )


class Model(Protocol):
    files: Sequence[Path]

    def run(self, prompts: list[list[int]], new_tokens: int, between: Callable[[], None]) -> Answer: ...


class Ours:
    def __init__(self, candidate: Candidate) -> None:
        config = EngineConfig(
            dtype=candidate.dtype,
            device="cpu",
            threads=torch.get_num_threads(),
            offload=OffloadConfig(budget=repr(candidate.resident), direct=candidate.direct),
            batch=BatchConfig(prefix_sharing=False),  # every round repeats the prompts
        )
        self.llm = LLM(candidate.folder, config)
        self.files = list(Path(candidate.folder).glob("*.safetensors"))

    def run(self, prompts: list[list[int]], new_tokens: int, between: Callable[[], None]) -> Answer:
        llm, engine = self.llm, self.llm.engine
        assert engine.experts is not None
        engine.experts.cache.reset_stats()
        params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
        between()
        clock = Clock(between)
        running = [llm.add(prompt, params).request for prompt in prompts]
        steps = first_decode = before = 0
        while engine.has_work:
            llm.step()
            steps += 1
            clock.mark()
            if not first_decode and all(request.num_output for request in running):
                first_decode = steps
                before = sum(s.hits + s.misses for s in engine.layer_stats())
        prefill, decode = clock.spent(first_decode)
        stats = engine.layer_stats()
        return Answer(
            [s.tokens[s.num_prompt :] for s in running],
            prefill,
            decode,
            steps - first_decode,
            decode_experts=sum(s.hits + s.misses for s in stats) - before,
            bytes_moved=sum(s.bytes_read for s in stats),
            hits=sum(s.hits for s in stats),
            misses=sum(s.misses for s in stats),
            stall=sum(s.stall_seconds for s in stats),
            notes={"dense_bytes": engine.blueprint.dense_bytes, "blob_bytes": engine.experts.cache.blob_bytes},
        )


class _Marks(StoppingCriteria):  # type: ignore[misc]
    """Marks the end of each of `generate`'s steps; never stops it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.clock.mark()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Theirs:
    """transformers' own `generate`; with `resident` below 1 accelerate keeps the other layers' experts on disk."""

    def __init__(self, candidate: Candidate) -> None:
        arguments: dict[str, Any] = {}
        if candidate.kind == "accelerate":
            arguments = {"device_map": _device_map(candidate), "offload_folder": candidate.scratch}
        self.model = AutoModelForCausalLM.from_pretrained(
            candidate.folder,
            dtype=getattr(torch, candidate.dtype),
            attn_implementation="sdpa",
            experts_implementation=candidate.experts,
            **arguments,
        ).eval()
        self.model.generation_config.eos_token_id = None  # all candidates give the same number of tokens
        self.files = [*Path(candidate.folder).glob("*.safetensors")]
        if candidate.scratch:
            self.files += [path for path in Path(candidate.scratch).rglob("*") if path.is_file()]
        weights = self.model.parameters()  # those on disk are on the meta device between their uses
        self.offloaded = sum(weight.numel() * weight.element_size() for weight in weights if weight.is_meta)
        assert (self.offloaded > 0) == (candidate.resident < 1), (candidate.resident, self.offloaded)

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], new_tokens: int, between: Callable[[], None]) -> Answer:
        assert len({len(prompt) for prompt in prompts}) == 1, "of one length: nothing is padded"
        inputs = torch.tensor(prompts)
        between()
        clock = Clock(between)
        out = self.model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([_Marks(clock)]),
        )
        prefill, decode = clock.spent(1)
        tokens = out[:, inputs.shape[1] :].tolist()
        return Answer(tokens, prefill, decode, new_tokens - 1, bytes_moved=self.offloaded * new_tokens)


def _device_map(candidate: Candidate) -> dict[str, str]:
    """The experts of the last layers on disk, all else in memory: as many layers as `resident` allows, rounded up."""
    config = AutoConfig.from_pretrained(candidate.folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kept = ceil(config.num_hidden_layers * candidate.resident)
    places = {}
    for name, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if own:
            is_offloaded = name.endswith(".mlp.experts") and int(name.split(".")[2]) >= kept
            places[name] = "disk" if is_offloaded else "cpu"
    return places


def status_bytes(name: str) -> int:
    """A size from /proc/self/status: VmRSS, or VmHWM, its largest value so far."""
    return int(Path("/proc/self/status").read_text().split(f"\n{name}:")[1].split()[0]) * 1024


def bytes_from_disk() -> int:
    """What this process had fetched from storage so far."""
    return int(Path("/proc/self/io").read_text().split("\nread_bytes: ")[1].split("\n")[0])


def forget(paths: Sequence[Path]) -> None:
    """Drops the files from the page cache, as far as nobody has them mapped."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def serve(candidate: Candidate) -> None:
    transformers_logging.disable_progress_bar()
    imported = status_bytes("VmRSS")
    answers = sys.stdout
    with redirect_stdout(sys.stderr):
        start = time.perf_counter()
        model: Model = Ours(candidate) if candidate.kind == "ours" else Theirs(candidate)
        loaded = time.perf_counter() - start
        print(json.dumps({"load_seconds": loaded}), file=answers, flush=True)
        for line in sys.stdin:
            job = json.loads(line)
            before = bytes_from_disk()
            between = (lambda: forget(model.files)) if job["cold"] else (lambda: None)
            answer = model.run(job["prompts"], job["new_tokens"], between)
            answer.bytes_from_disk = bytes_from_disk() - before
            answer.peak_rss = status_bytes("VmHWM") - imported
            print(json.dumps(asdict(answer)), file=answers, flush=True)


if __name__ == "__main__":
    serve(Candidate(**json.loads(sys.argv[1])))
