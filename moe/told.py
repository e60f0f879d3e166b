"""Whose fault a ValueError is: a sentence that this program tells, or what an operation of its own ended in."""

import dis
from types import TracebackType

_RAISE = dis.opmap["RAISE_VARARGS"]


def is_told(error: BaseException) -> bool:
    """Whether it comes from a `raise` of this program, whose sentences are for who asked.

    `int("x")`, arrays that do not fit and a library's own are none: where one gets through, something was not checked.
    """
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return True  # it was never raised: made to be told
    is_ours = str(last.tb_frame.f_globals.get("__name__")).partition(".")[0] == "moe"
    return is_ours and last.tb_frame.f_code.co_code[last.tb_lasti] == _RAISE
