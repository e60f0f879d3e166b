"""Text that people write: UTF-8, with or without the mark that some editors begin it with. Loads nothing heavy."""

import codecs
from pathlib import Path


def utf8_of(content: bytes, name: str | Path) -> bytes:
    """Without a byte order mark. Raises ValueError for UTF-16 and UTF-32, which would be split within characters."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:4]:
        raise ValueError(f"{name} is UTF-16 or UTF-32; UTF-8 is wanted: `iconv -f UTF-16 -t UTF-8` makes it so")
    return content.removeprefix(codecs.BOM_UTF8)


def read_text(path: Path) -> str:
    """Raises ValueError for what is no UTF-8, OSError."""
    try:
        return utf8_of(path.read_bytes(), path).decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
