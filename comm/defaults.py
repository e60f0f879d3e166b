"""Numbers that settings and groups share; loads no torch."""

EAGER_BYTES = 1 << 16  # the longest message that needs no handshake, on the CPU
