"""What a layer asked of the cache, and what it cost."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class LayerStats:
    """What one layer's acquires cost since the start or the last `reset_stats`.

    Of what was read ahead: prefetch_bytes = useful + late + wasted + what is in a slot and was never asked for yet.
    """

    hits: int = field(default=0, metadata={"help": "Experts that were in a slot when a layer asked for them"})
    misses: int = field(
        default=0,
        metadata={"help": "Experts that were not, those whose read ahead had begun and was waited for included"},
    )
    bytes_read: int = field(default=0, metadata={"help": "Read from the store, ahead or on demand", "unit": "bytes"})
    stall_seconds: float = field(
        default=0.0, metadata={"help": "The caller waited for reads and could not compute", "unit": "seconds"}
    )
    waves: int = field(default=0, metadata={"help": "Parts that layers ran in, one each if all their experts fit"})
    prefetch_bytes: int = field(default=0, metadata={"help": "Read ahead", "unit": "bytes"})
    useful_bytes: int = field(
        default=0, metadata={"help": "Read ahead and there when first asked for", "unit": "bytes"}
    )
    late_bytes: int = field(
        default=0, metadata={"help": "Read ahead and asked for while it was being read", "unit": "bytes"}
    )
    wasted_bytes: int = field(
        default=0, metadata={"help": "Read ahead and evicted before anyone asked for it", "unit": "bytes"}
    )
