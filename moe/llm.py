"""`LLM`: load a checkpoint, generate; the shape that users of offline batch APIs know."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import TemplateError

from moe.comm.groups import Groups
from moe.config import EngineConfig
from moe.engine.engine import Engine
from moe.engine.requests import FinishReason, Request
from moe.engine.sampling import Logprobs, SamplingParams
from moe.engine.text import TextStream
from moe.models.load import load_tokenizer

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. `logprobs` has one entry per token if they were asked for."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[Logprobs] | None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One prompt and its n answers."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[Completion]


class Generation:
    """A request on its way: as the engine has it, and its text so far."""

    def __init__(self, request: Request, text: TextStream) -> None:
        self.request, self.text = request, text

    def completion(self) -> Completion:
        request = self.request
        assert request.finish_reason is not None
        tokens = request.tokens[request.num_prompt :]
        logprobs = request.logprobs if request.params.logprobs is not None else None
        return Completion(self.text.text, tokens, request.finish_reason, logprobs)


class LLM:
    """A model from its Hugging Face folder (or a packed one), with its experts in slots.

    experts_in_memory: "0.25" (fraction), "64" (experts) or "6GiB", over config.offload.budget. Close it, or use it in
    a `with` block. groups: of a run of several ranks; each then has prompts of its own (there may be none), and
    `generate` is a collective. Raises ValueError, with the remedy, for whatever cannot be served.
    """

    def __init__(
        self,
        model: str | Path,
        config: EngineConfig | None = None,
        *,
        experts_in_memory: str | float | None = None,
        groups: Groups | None = None,
    ) -> None:
        config = config or EngineConfig()
        if experts_in_memory is not None:
            config = config.with_budget(str(experts_in_memory))
        self.engine = Engine(model, config, groups)
        self.tokenizer = load_tokenizer(Path(model))
        self._open: dict[int, Generation] = {}

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.engine.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answers every prompt (text or token ids); results in the order of the prompts."""
        listed = _as_prompts(prompts)
        each = [params or SamplingParams()] * len(listed) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(listed):
            raise ValueError(f"{len(each)} sampling parameters for {len(listed)} prompts; give one, or one for each")
        tokens = [self.encode(p) for p in listed]
        samples: list[list[Generation]] = []
        try:
            for ids, one in zip(tokens, each):
                samples.append([self.add(ids, replace(one, n=1, seed=one.seed + i)) for i in range(one.n)])
            self.engine.start()
            while self.engine.has_work:
                self.step()
        except BaseException:
            self.abort(g for group in samples for g in group)
            raise
        return [
            RequestOutput(p if isinstance(p, str) else None, ids, [g.completion() for g in group])
            for p, ids, group in zip(listed, tokens, samples)
        ]

    def chat(self, messages: Sequence[dict[str, str]], params: SamplingParams | None = None) -> RequestOutput:
        """Answers one conversation, written out by the model's own chat template."""
        return self.generate([self.encode_chat(messages)], params)[0]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The answer's text, piece by piece, as it is certain (a possible beginning of a stop string is held back)."""
        generation = self.add(self.encode(prompt), params or SamplingParams())
        try:
            is_finished = False
            while not is_finished:
                if generation.request.finish_reason is None:  # another call may have moved it on meanwhile
                    self.step()
                is_finished = generation.request.finish_reason is not None
                if piece := generation.text.delta(is_finished):
                    yield piece
        finally:
            self.abort([generation])

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises ValueError if it is empty, or text and the model has no tokenizer."""
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError(f"{self.engine.blueprint.folder} has no tokenizer; give token ids")
        _check_text(prompt)
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        if not ids and self.tokenizer.bos_token_id is not None:
            return [self.tokenizer.bos_token_id]
        return ids

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise ValueError(f"{self.engine.blueprint.folder} has no chat template; use generate with a written prompt")
        try:
            text: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the model's chat template does not take these messages: {error}") from None
        _check_text(text)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def add(self, tokens: Sequence[int], params: SamplingParams) -> Generation:
        """Queues one sample; `step` moves it on. For callers that run their own loop."""
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer; use stop_token_ids")
        request = self.engine.add_request(tokens, params)
        generation = Generation(request, TextStream(self.tokenizer, params.stop))
        self._open[request.id] = generation
        return generation

    def step(self) -> list[Generation]:
        """One engine step. Returns the generations that finished in it."""
        finished = []
        for request in self.engine.step():
            generation = self._open[request.id]
            ended_by_token = request.finish_reason == "stop"
            if not ended_by_token:  # the token that ends a text is not part of it
                generation.text.add(request.tokens[-1])
            if generation.text.is_stopped:
                self.engine.finish(request, "stop")
            if request.finish_reason is not None:
                generation.text.finish()
                finished.append(self._open.pop(request.id))
        return finished

    def abort(self, generations: Iterable[Generation]) -> None:
        """Drops what is not finished yet."""
        for generation in generations:
            if generation.request.finish_reason is None:
                self.engine.finish(generation.request, "abort")
                self._open.pop(generation.request.id, None)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid text: character {error.start} is half a surrogate pair") from None


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    tokens = [p for p in prompts if isinstance(p, int)]
    if tokens and len(tokens) == len(prompts):
        return [tokens]
    if tokens:
        raise ValueError("prompts must be either texts or lists of token ids; a token id stands among them")
    return [p for p in prompts if not isinstance(p, int)]
