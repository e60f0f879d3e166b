"""What an engine counts, and what it has at the moment; plain records that `moe/metrics.py` reads."""

from dataclasses import dataclass, field

from moe.histogram import Histogram


@dataclass(slots=True)
class StepStats:
    """What steps cost. A step that computes any prompt tokens counts as prefill."""

    steps: int = field(default=0, metadata={"help": "Forwards of the engine"})
    prefill_tokens: int = field(default=0, metadata={"help": "Prompt tokens computed", "unit": "tokens"})
    prefill_seconds: float = field(default=0.0, metadata={"help": "Of steps with prompt tokens", "unit": "seconds"})
    decode_tokens: int = field(default=0, metadata={"help": "Tokens computed one at a time", "unit": "tokens"})
    pure_decode_tokens: int = field(
        default=0, metadata={"help": "Of the steps that decode_seconds counts", "unit": "tokens"}
    )
    pure_decode_steps: int = field(default=0, metadata={"help": "Steps that decode_seconds counts"})
    decode_seconds: float = field(default=0.0, metadata={"help": "Of steps without prompt tokens", "unit": "seconds"})
    shared_tokens: int = field(default=0, metadata={"help": "Prompt tokens saved by shared prefixes", "unit": "tokens"})
    preemptions: int = field(default=0, metadata={"help": "Requests put back to wait for blocks"})
    failed_requests: int = field(default=0, metadata={"help": "Requests that ended with an error of their own"})
    time_to_first_token: Histogram = field(
        default_factory=Histogram,
        metadata={"help": "From queueing a request to its first token", "unit": "seconds", "kind": "histogram"},
    )

    @property
    def prefill_rate(self) -> float:
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        return self.pure_decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def rate_text(self) -> str:
        """Tokens a second so far, for a progress line."""
        seconds = self.prefill_seconds + self.decode_seconds
        return f"{(self.prefill_tokens + self.decode_tokens) / seconds if seconds else 0:.0f} tokens/s"


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What an engine has now."""

    running: int = field(metadata={"help": "Requests that are being computed", "kind": "gauge"})
    waiting: int = field(metadata={"help": "Requests that wait for a place", "kind": "gauge"})
    blocks: int = field(metadata={"help": "KV blocks that there may be", "kind": "gauge"})
    free_blocks: int = field(metadata={"help": "KV blocks that a request could take", "kind": "gauge"})
    slots: int = field(metadata={"help": "Expert slots", "kind": "gauge"})
    experts: int = field(metadata={"help": "Experts of the model", "kind": "gauge"})
    slot_bytes: int = field(metadata={"help": "Memory of all slots", "unit": "bytes", "kind": "gauge"})
    dense_bytes: int = field(metadata={"help": "Weights outside of the slots", "unit": "bytes", "kind": "gauge"})
    peak_rss_bytes: int = field(
        metadata={"help": "Largest resident set of the process", "unit": "bytes", "kind": "gauge"}
    )
