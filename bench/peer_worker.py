"""One engine of bench/compare.py in a process of its own and, for peers, in an environment of its own.

    argv[1]  {"kind": "ours", "folder": …, "threads": 1, …}    see `ENGINES`
    stdin    {"prompts": [[1, 2], …], "new": 32}
    stdout   {"load": s}, then per job {"tokens": …, "prefill": {"wall", "cpu"}, "decode": …, "step": s, "disk": bytes}

Prefill ends when every prompt has its first token; decode is what follows; a step's time is the median of the decode's.
Imports nothing of this project at the top: the peers' environments do not have it.
"""

import ctypes
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from functools import cache
from math import floor
from pathlib import Path
from typing import Any, Protocol

Prompts = Sequence[Sequence[int]]


def bytes_from_disk() -> int:
    return int(Path("/proc/self/io").read_text().split("\nread_bytes: ")[1].split("\n")[0])


class Clock:
    """Wall and CPU seconds and bytes from disk at the start, at each step's end, and which end was the prefill's."""

    def __init__(self) -> None:
        self.marks = [self._now()]
        self.first = 0

    @staticmethod
    def _now() -> tuple[float, float, int]:
        return time.perf_counter(), time.process_time(), bytes_from_disk()

    def step(self, all_have_begun: bool) -> None:
        self.marks.append(self._now())
        if all_have_begun and not self.first:
            self.first = len(self.marks) - 1

    def answer(self, tokens: list[list[int]], notes: dict[str, float]) -> dict[str, Any]:
        begin, middle, end = self.marks[0], self.marks[self.first], self.marks[-1]
        steps = [b[0] - a[0] for a, b in zip(self.marks[self.first :], self.marks[self.first + 1 :])]
        return {
            "tokens": tokens,
            "prefill": {"wall": middle[0] - begin[0], "cpu": middle[1] - begin[1], "disk": middle[2] - begin[2]},
            "decode": {"wall": end[0] - middle[0], "cpu": end[1] - middle[1], "disk": end[2] - middle[2]},
            "step": statistics.median(steps) if steps else 0.0,
            "notes": notes,
        }


class Engine(Protocol):
    def run(self, prompts: Prompts, new: int, clock: Clock) -> tuple[list[list[int]], dict[str, float]]:
        """Greedy tokens of every prompt, end tokens ignored, and figures of this engine's own."""


class Ours:
    """{"set": ["offload.budget=0.25", …], "profile": false}

    profile: what the compiled calls take, and the weights that they read, are among the figures.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        from moe.launch.lean import import_only_what_runs

        import_only_what_runs()  # as the commands do: this process runs nothing else
        from moe.config import EngineConfig
        from moe.llm import LLM

        self.profile: dict[str, float] = _timed_calls() if job.get("profile") else {}
        settings = [f"threads={job['threads']}", "batch.prefix_sharing=false", *job.get("set", [])]
        self.llm = LLM(job["folder"], EngineConfig.load(None, settings))

    def run(self, prompts: Prompts, new: int, clock: Clock) -> tuple[list[list[int]], dict[str, float]]:
        from moe import SamplingParams

        params = SamplingParams(max_tokens=new, ignore_eos=True, temperature=0.0)
        running = [self.llm.add(p, params).request for p in prompts]
        before = self._figures()
        while self.llm.engine.has_work:
            self.llm.step()
            clock.step(all(s.num_output for s in running))
            if clock.first == len(clock.marks) - 1:
                before = self._figures()
        after = self._figures()
        return [s.tokens[s.num_prompt :] for s in running], {name: after[name] - before[name] for name in after}

    def _figures(self) -> dict[str, float]:
        layers, names = self.llm.engine.layer_stats(), ("hits", "misses", "bytes_read", "stall_seconds")
        figures = {name: float(sum(getattr(s, name) for s in layers)) for name in names}
        asked = (figures["hits"] + figures["misses"]) * self.llm.engine.experts.cache.blob_bytes
        return figures | {"expert_bytes": asked} | self.profile


def _timed_calls() -> dict[str, float]:
    """Seconds in the compiled calls of experts and of dense layers, and bytes of the latter's weights, so far."""
    from moe.kernels.cpu import CpuExperts
    from moe.kernels.cpu_block import CpuBlock
    from moe.kernels.cpu_linear import CpuLinear
    from moe.layer import runners

    runners.why_not = lambda blocks, layers: "each call is timed"  # all layers in one call could not be divided
    sums = {"expert_seconds": 0.0, "dense_seconds": 0.0, "dense_bytes": 0.0}

    @cache  # to add it up takes longer than much of what is timed
    def nbytes(one: Any) -> int:
        linears = (one,) if isinstance(one, CpuLinear) else (one.block.q, one.block.k, one.block.v, one.block.o)
        tensors = [t for linear in linears for t in (linear.weight, *(linear.coding or ()))]
        return sum(t.nbytes for t in tensors if hasattr(t, "nbytes"))

    def timed(kind: Any, method: str, what: str) -> None:
        plain = getattr(kind, method)

        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            result = plain(self, *arguments, **options)
            sums[f"{what}_seconds"] += time.perf_counter() - begin
            if what == "dense":
                sums["dense_bytes"] += nbytes(self)
            return result

        setattr(kind, method, call)

    timed(CpuExperts, "_call", "expert")
    timed(CpuBlock, "__call__", "dense")
    timed(CpuLinear, "__call__", "dense")
    return sums


class Transformers:
    """{"experts": "eager" | "grouped_mm"}; accelerate: also {"resident": 0.25, "scratch": folder}."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(job["threads"])
        places: dict[str, Any] = {}
        if "resident" in job:
            places = {"device_map": _device_map(job["folder"], job["resident"]), "offload_folder": job["scratch"]}
        self.model = AutoModelForCausalLM.from_pretrained(
            job["folder"], dtype=torch.bfloat16, experts_implementation=job["experts"], **places
        ).eval()
        self.model.generation_config.eos_token_id = None

    def run(self, prompts: Prompts, new: int, clock: Clock) -> tuple[list[list[int]], dict[str, float]]:
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        class Watch(StoppingCriteria):
            def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
                clock.step(True)
                return torch.zeros(len(ids), dtype=torch.bool)

        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Watch()]),
            )
        return out[:, ids.shape[1] :].tolist(), {}


class ZeroInference(Transformers):
    """{"experts": …, "scratch": folder, "buffers": 4}: DeepSpeed's ZeRO-Inference, weights on NVMe.

    Everything but vectors and routers is on disk, as every weight is read for every step anyway: DeepSpeed 0.19.8 gives
    wrong tokens on a CPU where larger ones stay in memory (stage3_param_persistence_threshold of a million).
    """

    def __init__(self, job: dict[str, Any]) -> None:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT="0", DS_ACCELERATOR="cpu")
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # ninja, which compiles its reader
        import deepspeed
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.integrations import HfDeepSpeedConfig

        torch.set_num_threads(job["threads"])
        config = AutoConfig.from_pretrained(job["folder"])
        with torch.device("meta"):
            largest = max(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        deepspeed.init_distributed("gloo")
        places = {
            "device": "nvme",
            "nvme_path": job["scratch"],
            "pin_memory": True,
            "buffer_count": job["buffers"],
            "buffer_size": largest,
        }
        zero = {
            "stage": 3,
            "offload_param": places,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        }
        reads = {"block_size": 1 << 20, "queue_depth": 8, "overlap_events": True, "single_submit": False}
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": zero,
            "aio": {**reads, "intra_op_parallelism": 1},
        }
        self._config = HfDeepSpeedConfig(settings)  # transformers looks for it while it lives
        super().__init__(job)
        self.model = deepspeed.initialize(model=self.model, config=settings)[0].module.eval()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what loading took: the limit counts from here on


def _device_map(folder: str, resident: float) -> dict[str, str]:
    """Whole experts modules on disk, but for the first `resident` of the layers, rounded down."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kept = floor(config.num_hidden_layers * resident)
    places = {}
    for name, module in model.named_modules():
        if [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            on_disk = name.endswith(".mlp.experts") and int(name.split(".")[2]) >= kept
            places[name] = "disk" if on_disk else "cpu"
    return places


class Vllm:
    """{"eager": false}"""

    def __init__(self, job: dict[str, Any]) -> None:
        settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        os.environ.update(settings, VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="WARNING")
        from vllm import LLM

        self.llm = LLM(
            job["folder"],
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=2048,
            max_num_seqs=16,
            enforce_eager=job["eager"],
        )

    def run(self, prompts: Prompts, new: int, clock: Clock) -> tuple[list[list[int]], dict[str, float]]:
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        params = SamplingParams(max_tokens=new, ignore_eos=True, temperature=0.0, detokenize=False)
        got: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            got.update({o.request_id: list(o.outputs[0].token_ids) for o in engine.step()})
            clock.step(len(got) == len(prompts))
        return [got[str(i)] for i in range(len(prompts))], {}


class LlamaCpp:
    """{"file": "model-f16.gguf"}, read through mmap as llama.cpp does by default."""

    def __init__(self, job: dict[str, Any]) -> None:
        import llama_cpp as lc

        self.lc = lc
        lc.llama_backend_init()
        self._log = lc.llama_log_callback(lambda *_: None)
        lc.llama_log_set(self._log, ctypes.c_void_p(0))
        self.model = lc.llama_model_load_from_file(job["file"].encode(), lc.llama_model_default_params())
        params = lc.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 8192, 2048, 512, 8
        params.n_threads = params.n_threads_batch = job["threads"]
        self.context = lc.llama_init_from_model(self.model, params)
        self.vocabulary = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(self.model))
        self.batch = lc.llama_batch_init(2048, 0, 1)

    def run(self, prompts: Prompts, new: int, clock: Clock) -> tuple[list[list[int]], dict[str, float]]:
        self.lc.llama_memory_clear(self.lc.llama_get_memory(self.context), True)
        tokens: list[list[int]] = [[] for _ in prompts]
        todo = [(t, i, s, i == len(p) - 1) for s, p in enumerate(prompts) for i, t in enumerate(p)]
        for begin in range(0, len(todo), 2048):
            for s, token in self._decode(todo[begin : begin + 2048]).items():
                tokens[s].append(token)
        clock.step(True)
        for n in range(new - 1):
            step = [(tokens[s][-1], len(prompt) + n, s, True) for s, prompt in enumerate(prompts)]
            for s, token in self._decode(step).items():
                tokens[s].append(token)
            clock.step(True)
        return tokens, {}

    def _decode(self, items: Sequence[tuple[int, int, int, bool]]) -> dict[int, int]:
        """(token, position, sequence, wanted) -> the next token of the wanted ones."""
        import numpy as np

        self.batch.n_tokens = len(items)
        for i, (token, position, sequence, wanted) in enumerate(items):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, wanted
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
        status = self.lc.llama_decode(self.context, self.batch)
        assert status == 0, f"llama_decode gave {status}"
        chosen = {}
        for i, (_, _, sequence, wanted) in enumerate(items):
            if wanted:
                logits = self.lc.llama_get_logits_ith(self.context, i)
                chosen[sequence] = int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())
        return chosen


ENGINES = {
    "ours": Ours,
    "transformers": Transformers,
    "accelerate": Transformers,
    "zero": ZeroInference,
    "vllm": Vllm,
    "llama.cpp": LlamaCpp,
}


def main() -> None:
    job = json.loads(sys.argv[1])
    # What a library prints goes to standard error; the answers keep the pipe for themselves.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    begin = time.perf_counter()
    engine: Engine = ENGINES[job["kind"]](job)
    print(json.dumps({"load": time.perf_counter() - begin}), file=pipe, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        clock = Clock()
        tokens, notes = engine.run(asked["prompts"], asked["new"], clock)
        print(json.dumps(clock.answer(tokens, notes)), file=pipe, flush=True)


if __name__ == "__main__":
    main()
