"""`LLM`: load a checkpoint, generate; the shape that users of offline batch APIs know.

Importing it is cheap: torch and transformers' code of models, which take seconds, are imported where an `LLM` is made.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe import porting
from moe.config import EngineConfig
from moe.engine.text import TextStream
from moe.generation import Event, Generation
from moe.guard import Guard
from moe.openai import Ask
from moe.outputs import Completion, RequestOutput, RequestTimes
from moe.params import Logprob, SamplingParams
from moe.prompts import Message, Prompt, PromptEncoder, as_conversations, as_prompts, text_of
from moe.tools import ToolFormat, format_of
from moe.uncollected import uncollected

if TYPE_CHECKING:
    from moe.comm.groups import Groups
    from moe.engine.layer_major import Workload
    from moe.engine.requests import Request
    from moe.engine.sampling import Logprobs


class _Answer:
    """A prompt whose n samples are on their way; they are queued as there is room."""

    def __init__(self, prompt: Prompt, tokens: list[int], params: SamplingParams) -> None:
        self.prompt, self.tokens, self.params = prompt, tokens, params
        self.samples: list[Generation] = []


class LLM:
    """A model from its Hugging Face folder (or a packed one), with its experts in slots.

    experts_in_memory: 0.25 (fraction), 64 (experts) or "6GiB", over config.offload.budget. Close it, or use it in
    a `with` block. groups: of a run of several ranks; each then has prompts of its own (there may be none), and
    `generate` is a collective. hosts: that many actors of the Ray cluster at `address` serve the model instead of this
    process, and any of them may be lost (docs/ray.md); controller: by a detached actor of that name, which outlives
    this process. workload: all requests that will come, which batch.schedule=layer_major splits the memory for.
    options: what offline scripts for vLLM pass (docs/porting.md). One thread at a time.

    Raises ValueError, with the remedy, for whatever cannot be served; UnusableError if it is closed or not ours.
    """

    def __init__(
        self,
        model: str | Path,
        config: EngineConfig | None = None,
        *,
        experts_in_memory: str | float | None = None,
        groups: "Groups | None" = None,
        hosts: int | None = None,
        address: str | None = None,
        controller: str | None = None,
        workload: "Workload | None" = None,
        **options: Any,
    ) -> None:
        config, notes = porting.with_options(config or EngineConfig(), options)
        if experts_in_memory is not None:
            config = config.with_budget(experts_in_memory)
        with uncollected():
            from moe import opening  # torch and transformers' code of models: seconds
        self.engine, self.tokenizer, self._grammars = (
            opening.here(model, config, groups, workload)
            if hosts is None
            else opening.on_hosts(model, config, hosts, address, controller)
        )
        self.notes = [*notes, *self.engine.notes]
        if self.recommended:
            said = ", ".join(f"{name} {value:g}" for name, value in self.recommended.items())
            self.notes.append(f"sampling is as generation_config.json recommends where nothing else is said: {said}")
        self.encoder = PromptEncoder(self.tokenizer, Path(model).name)
        self.name = Path(model).name
        self._config = config  # as it was asked for
        self.guard = Guard(f"the model {model}")
        self._open: dict[int, Generation] = {}

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives memory, files and threads back; later calls are refused. No effect the second time, or in a fork."""
        if self.guard.is_usable_here:
            with self.guard:
                self.guard.close()
                self.engine.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answers every prompt (text, token ids, or a dict of one of them); results in the order of the prompts.

        use_tqdm: whether to show progress; None: on a terminal. What goes wrong with one prompt after it was accepted
        ends its answer with finish_reason "error", and the others are served.
        """
        porting.check_options("generate", options)
        listed = as_prompts(prompts)
        each = self._params_of_each(sampling_params, len(listed))
        tokens = [self.encode(prompt) for prompt in listed]
        return self._answer([_Answer(*one) for one in zip(listed, tokens, each)], use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, written out by the model's own chat template."""
        porting.check_options("chat", options)
        written = {
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            **(chat_template_kwargs or {}),
        }
        prompts = [self.encoder.encode_chat(conversation, written) for conversation in as_conversations(messages)]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """The answer's text, piece by piece, as it is certain (a possible beginning of a stop string is held back)."""
        opened: list[Generation] = []
        tokens, params = self.encode(prompt), sampling_params or self.default_params()
        try:
            self._add(tokens, params, opened)
            (generation,) = opened
            is_finished, said = False, 0
            while not is_finished:
                if generation.request.finish_reason is None:  # another call may have moved it on meanwhile
                    self.step()
                is_finished = generation.request.finish_reason is not None
                text = generation.text.settled(is_finished)
                if len(text) > said:
                    yield text[said:]
                    said = len(text)
            if generation.request.error is not None:
                raise ValueError(f"the answer ended with an error: {generation.request.error}")
        finally:
            self.abort(opened)

    def default_params(self) -> SamplingParams:
        """What `generate` uses without parameters: the sampling that generation_config.json recommends, else greedy."""
        return SamplingParams(**self.recommended)

    get_default_sampling_params = default_params  # as vLLM calls it

    @property
    def recommended(self) -> dict[str, Any]:
        """The sampling that the model's generation_config.json recommends, by the names of SamplingParams."""
        return self.engine.blueprint.generation.recommended

    @cached_property
    def system_fingerprint(self) -> str:
        """Of the model and of the settings that answers depend on (`moe/system_fingerprint.py`). Raises OSError."""
        from moe.system_fingerprint import system_fingerprint  # torch

        return system_fingerprint(self.engine.blueprint.checkpoint, self._config)

    @property
    def tool_format(self) -> ToolFormat | None:
        """How the model writes calls of tools, by its chat template."""
        return format_of(getattr(self.tokenizer, "chat_template", None))

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises ValueError if it is empty, or text and the model has no tokenizer."""
        return self.encoder.encode(prompt)

    def tokens_of(self, ask: Ask) -> list[list[int]]:
        """The token ids of each prompt of a request in OpenAI's form. Raises ValueError, also for answers' form."""
        self._grammars.check(ask.params.structured_outputs)
        if ask.is_chat:
            return [self.encoder.encode_chat(ask.messages, ask.template)]
        return [self.encode(prompt) for prompt in ask.prompts]

    def check_request(self, tokens: Sequence[int], params: SamplingParams) -> None:
        """Raises ValueError for a prompt that cannot ever run, or an answer of a form that cannot be asked for."""
        self.engine.check_request(tokens, params)
        self._grammars.check(params.structured_outputs)

    def add(
        self, tokens: Sequence[int], params: SamplingParams, index: int = 0, *, is_awaited: bool = True
    ) -> Generation:
        """Queues one sample (of n, sample `index`); `step` moves it on. For callers that run their own loop.

        is_awaited: False where nobody reads its tokens before the last: hosts then say several at a time.
        """
        opened: list[Generation] = []
        self._add(tokens, params, opened, index, is_awaited)
        return opened[0]

    def step(self) -> list[Event]:
        """One engine step. Returns what it did for each sample that moved."""
        with self.guard, self._whole_after_errors():
            return [self._event(request) for request in self.engine.step()]

    def abort(self, generations: Iterable[Generation]) -> None:
        """Drops what is not finished yet."""
        if not self.guard.is_usable_here:
            return
        with self.guard:
            for generation in generations:
                if generation.request.finish_reason is None:
                    self.engine.finish(generation.request, "abort")
                    self._open.pop(generation.request.id, None)

    def completion(self, generation: Generation) -> Completion:
        """The finished sample as it is handed out."""
        request, params = generation.request, generation.request.params
        assert request.finish_reason is not None
        chosen = request.logprobs if params.logprobs is not None else None
        reason: str | int | None = generation.text.stopped_by
        if reason is None and request.finish_reason == "stop" and request.tokens[-1] in params.stop_token_ids:
            reason = request.tokens[-1]
        return Completion(
            index=generation.index,
            text=generation.text.text,
            token_ids=generation.token_ids,
            finish_reason=request.finish_reason,
            logprobs=None if chosen is None else self._decoded(generation.token_ids, chosen),
            cumulative_logprob=None if chosen is None else sum(one.chosen for one in chosen),
            stop_reason=reason,
            error=request.error,
        )

    def prompt_logprobs(self, generation: Generation) -> list[dict[int, Logprob] | None] | None:
        """One entry per prompt token, None for the first; None if they were not asked for, or it ended before them."""
        request = generation.request
        if request.params.prompt_logprobs is None or len(request.prompt_logprobs) < request.num_prompt - 1:
            return None
        return [None, *self._decoded(request.tokens[1 : request.num_prompt], request.prompt_logprobs)]

    def last_logprobs(self, generation: Generation) -> list[dict[int, Logprob]] | None:
        """Of the newest token, if they were asked for."""
        request = generation.request
        if request.params.logprobs is None or not request.logprobs:
            return None
        return self._decoded(request.tokens[-1:], request.logprobs[-1:])

    def _add(
        self,
        tokens: Sequence[int],
        params: SamplingParams,
        opened: list[Generation],
        index: int = 0,
        is_awaited: bool = True,
    ) -> None:
        """As `add`; the sample is in `opened` as soon as it is queued, whatever interrupts the caller."""
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer; use stop_token_ids")
        params = self.encoder.with_bad_words(params)
        with self.guard:
            request = self.engine.add_request(tokens, params)
            request.is_awaited = is_awaited or bool(params.stop)  # only here is seen where a stop string ends it
            text = TextStream(
                self.tokenizer if params.detokenize else None,
                params.stop,
                keeps_stop=params.include_stop_str_in_output,
                skips_special=params.skip_special_tokens,
            )
            generation = self._open[request.id] = Generation(request, text, index)
            opened.append(generation)

    def _answer(self, answers: list[_Answer], use_tqdm: bool | None) -> list[RequestOutput]:
        """All or nothing of this call: an error or Ctrl-C drops whatever is not finished."""
        opened: list[Generation] = []
        total = sum(answer.params.n for answer in answers)
        with self.guard, porting.progress(total, use_tqdm) as advance:
            for answer in answers:
                self.check_request(answer.tokens, answer.params)
            todo = deque((answer, index) for answer in answers for index in range(answer.params.n))
            window = 4 * self.engine.config.batch.num_running
            try:
                self.engine.start()
                while todo or self.engine.has_work:
                    while todo and len(self._open) < window:
                        answer, index = todo.popleft()
                        self._add(answer.tokens, answer.params.sample(index), opened, index, is_awaited=False)
                        answer.samples.append(opened[-1])
                    advance(sum(event.finish is not None for event in self.step()), self.engine.stats.rate_text())
                    self.guard.check()
            except BaseException:
                self.abort(opened)
                raise
            return [self._output(answer) for answer in answers]

    def _output(self, answer: _Answer) -> RequestOutput:
        first = answer.samples[0]
        ends = [g.finished for g in answer.samples if g.finished is not None]
        starts = [g.first_token for g in answer.samples if g.first_token is not None]
        now = time.monotonic()
        epoch = time.time() - now
        began = epoch + min(starts) if starts else None
        times = RequestTimes(epoch + first.arrival, began, epoch + max(ends, default=now))
        return RequestOutput(
            request_id=str(first.request.id),
            prompt=text_of(answer.prompt),
            prompt_token_ids=answer.tokens,
            outputs=[self.completion(sample) for sample in answer.samples],
            prompt_logprobs=self.prompt_logprobs(first),
            metrics=times,
        )

    def _event(self, request: "Request") -> Event:
        """Moves the text of the request on. An error there is this request's alone."""
        generation = self._open[request.id]
        tokens = request.tokens[generation.read :]
        generation.read += len(tokens)
        try:
            if tokens:
                generation.first_token = generation.first_token or time.monotonic()
            params, said = request.params, tokens if request.is_awaited else request.tokens[request.num_prompt :]
            if request.finish_reason == "stop" and said and said[-1] in params.end_token_ids:
                said = said[:-1]  # it ends the text, and is no part of it
            if request.is_awaited:
                for number, token in enumerate(said, generation.read - len(tokens) - request.num_prompt + 1):
                    generation.text.add(token, may_stop=number > params.min_tokens)
            elif request.finish_reason is not None:  # nobody has read any of it
                generation.text.add_all(said)
            if generation.text.is_stopped:
                self.engine.finish(request, "stop")
            if request.finish_reason is not None:
                generation.text.finish()
        except Exception as error:  # of any kind: a tokenizer's own code runs here
            request.error = f"its tokens cannot become text: {error}"
            self.engine.finish(request, "error")
            request.finish_reason = "error"
        if request.finish_reason is not None:
            generation.finished = time.monotonic()
            self._open.pop(request.id)
        return Event(
            generation, generation.text.delta(request.finish_reason is not None), tokens, request.finish_reason
        )

    def _decoded(self, tokens: Sequence[int], logprobs: "Sequence[Logprobs]") -> list[dict[int, Logprob]]:
        def told(token: int, logprob: float, rank: int) -> Logprob:
            return Logprob(logprob, rank, self.encoder.token_text(token), self.encoder.token_bytes(token))

        return [
            {token: told(token, one.chosen, one.rank)}
            | {t: told(t, p, rank) for rank, (t, p) in enumerate(one.top.items(), 1)}
            for token, one in zip(tokens, logprobs)
        ]

    def _params_of_each(
        self, given: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> list[SamplingParams]:
        each = [given or self.default_params()] * num_prompts if not isinstance(given, Sequence) else list(given)
        if not all(isinstance(one, SamplingParams) for one in each):
            raise ValueError("sampling_params must be SamplingParams(…), or a list of one for each prompt")
        if len(each) != num_prompts:
            raise ValueError(f"{len(each)} sampling parameters for {num_prompts} prompts; give one, or one for each")
        return each

    @contextmanager
    def _whole_after_errors(self) -> Iterator[None]:
        """After an exception in a step, either everything can go on or nothing is served any more."""
        try:
            yield
        except BaseException:
            self.guard.check()  # a peer that Ctrl-C ended first is no fault of the run
            if (broken := self.engine.why_not_whole()) is not None:
                self.guard.close(f"is broken after an error in a step ({broken}); load it again")
            raise
