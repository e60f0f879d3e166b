"""Files that are written whole or not at all: whoever reads sees the old one or the new, whenever the writer ends."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path


@contextmanager
def written_whole(path: str | PathLike[str]) -> Iterator[Path]:
    """A name beside `path`, with its ending, to write to; the file takes the place of `path` when the block ends.

    Where the block fails nothing is left and `path` is as it was; a device or a pipe is written itself. Raises OSError
    that names `path` and the remedy.
    """
    target = Path(path).resolve()
    is_kept = target.exists() and not target.is_file()
    part = target if is_kept else target.with_name(f".{target.stem[:100]}.{secrets.token_hex(4)}{target.suffix}")
    try:
        yield part
        if not is_kept:
            os.replace(part, target)
    except BaseException as error:
        if not is_kept:
            part.unlink(missing_ok=True)
        said = error.strerror if isinstance(error, OSError) else str(error) if "I/O error" in str(error) else None
        if said is None:  # safetensors has an error of its own for a disk's
            raise
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, f"{said}; nothing was written: make room, or give another name", str(path)) from None
