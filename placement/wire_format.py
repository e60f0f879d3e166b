"""What travels between ranks: the one record of a dispatcher's rows, for engine, simulator, solver and settings.

Plain data without imports of ours, so that `comm` may read it.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

# Results go home again in one step ("all_to_all") or in two, over the same local rank of the other node
# ("hierarchical"), or the token stays where its heaviest expert is ("coherent").
DispatcherName = Literal["all_to_all", "hierarchical", "coherent"]
# One result per token and expert ("exact": the same bits whatever the plan), or one sum per token and rank ("partial").
CombineMode = Literal["exact", "partial"]
# How a replay's tokens come: as the trace recorded them, or all as prompts in chunks, or all as answers in batches.
StepKind = Literal["recorded", "prefill", "decode"]
PAYLOAD_BYTES = 4  # of what goes with a token to its new home in coherent decode: its place in the step
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """What makes bytes of rows and experts: hidden_size: H; dtype: of activations; expert_bytes: one expert as kept.

    Raises ValueError for sizes below 1 and for a dtype that no model computes in.
    """

    hidden_size: int
    dtype: str
    expert_bytes: int

    def __post_init__(self) -> None:
        if self.dtype not in ELEMENT_BYTES:
            raise ValueError(f"dtype is {self.dtype!r}; activations are {', '.join(ELEMENT_BYTES)}")
        if min(self.hidden_size, self.expert_bytes) < 1:
            raise ValueError(f"hidden_size ({self.hidden_size}) and expert_bytes ({self.expert_bytes}) must be >= 1")

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @staticmethod
    def parse(text: str) -> "ModelSizes":
        """From "2048,bfloat16,17301504": hidden size, dtype, bytes of an expert. Raises ValueError for other text."""
        parts = text.split(",")
        if len(parts) != 3 or not (parts[0].isdecimal() and parts[2].isdecimal()):
            raise ValueError(f"{text!r} must be hidden size, dtype and bytes per expert, as 2048,bfloat16,17301504")
        return ModelSizes(hidden_size=int(parts[0]), dtype=parts[1], expert_bytes=int(parts[2]))

    @staticmethod
    def of(where: str, fields: Any) -> "ModelSizes | None":
        """What a file says of them; None if it says nothing. Raises ValueError, naming the file, for anything else."""
        if fields is None:
            return None
        kinds = {"hidden_size": int, "dtype": str, "expert_bytes": int}
        if not isinstance(fields, dict) or {k: type(v) for k, v in fields.items()} != kinds:
            raise ValueError(f"{where}: sizes must be hidden_size, dtype and expert_bytes, they are {str(fields)[:80]}")
        try:
            return ModelSizes(**fields)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def stored(self) -> dict[str, Any]:
        """What `of` reads."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class WireFormat:
    """What one dispatcher sends. Raises ValueError for a mode that does not exist.

    Out: a row per token and destination, the token with its K ids, and its weights where the way back needs them.
    Back: a row per result in the dtype of the tokens; `results` says how many.
    """

    dispatcher: DispatcherName = "all_to_all"
    combine: CombineMode = "exact"

    def __post_init__(self) -> None:
        if self.combine not in ("exact", "partial"):
            raise ValueError(f"combine is {self.combine!r}; it must be 'exact' or 'partial'")
        if self.dispatcher not in ("all_to_all", "hierarchical", "coherent"):
            raise ValueError(f"dispatcher is {self.dispatcher!r}; it must be all_to_all, hierarchical or coherent")

    @property
    def is_exact(self) -> bool:
        """A result per token and expert, not per token and rank."""
        return self.combine == "exact"

    @property
    def sends_weights(self) -> bool:
        """Whether whoever computes, or the new home, needs the weights."""
        return not self.is_exact or self.dispatcher == "coherent"

    def row_bytes(self, hidden_size: int, element_bytes: int, top_k: int) -> int:
        """Of one row out: the token, int32 ids, and float32 weights where they go along."""
        return hidden_size * element_bytes + 4 * top_k * (1 + self.sends_weights)

    def result_bytes(self, hidden_size: int, element_bytes: int) -> int:
        """Of one row back: an expert's result, or a rank's sum, in the dtype of the tokens."""
        return hidden_size * element_bytes

    def results(self, pairs: Any) -> Any:
        """Rows back from each destination, from its number of experts per token: an array of any shape."""
        return pairs if self.is_exact else (pairs > 0).astype(pairs.dtype)

    @staticmethod
    def needs(sizes: ModelSizes | None, of: str) -> ModelSizes:
        """`sizes`, or one sentence that says what to do without them."""
        if sizes is None:
            raise ValueError(
                f"{of} does not say the model's sizes, so that its bytes are not known: record it again, or state them "
                "once with --sizes HIDDEN,DTYPE,EXPERT_BYTES, as 2048,bfloat16,17301504"
            )
        return sizes
