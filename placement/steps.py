"""The steps in which a run would compute a trace's tokens: prompts in chunks, answers as batches of many sequences."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moe.placement.trace import DECODE, PREFILL, RoutingTrace
from moe.placement.wire_format import StepKind

Ints = NDArray[np.int64]


def steps_of(trace: RoutingTrace, batch: int, kind: StepKind = "recorded") -> Iterator[tuple[int, Ints]]:
    """(phase, token indices) of every step, each token once: first the prompts, then the answers.

    prefill: `batch` consecutive tokens. decode: one token of each of up to `batch` sequences at once; where one ends
    the next begins. recorded: by the trace's own phases; decode if it has none, and then sequences are cut into pieces
    so that the first steps have `batch` tokens, since a step of a server holds more sequences than a short trace.
    """
    if kind == "recorded" and trace.phase is not None:
        is_decode = trace.phase == DECODE
    else:
        is_decode = np.full(trace.num_tokens, kind != "prefill")
    prompt = np.flatnonzero(~is_decode)
    for begin in range(0, len(prompt), batch):
        yield PREFILL, prompt[begin : begin + batch]
    starts = trace.sequence_starts
    streams = [s for s in (a + np.flatnonzero(is_decode[a:b]) for a, b in pairwise(starts)) if len(s)]
    if trace.phase is None and streams:
        longest = max(1, -(-int(is_decode.sum()) // batch))
        streams = [s[at : at + longest] for s in streams for at in range(0, len(s), longest)]
    running: list[Ints] = []
    waiting = iter(streams)
    while True:
        for stream in waiting if len(running) < batch else ():
            running.append(stream)
            if len(running) == batch:
                break
        if not running:
            return
        yield DECODE, np.array([stream[0] for stream in running], np.int64)
        running = [stream[1:] for stream in running if len(stream) > 1]
