"""Reading what strangers wrote, within bounds: no file may hang the tool or fill the memory."""

import json
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MOST = 1 << 24  # bytes of JSON; a manifest of a large detector has 2 MB
_DEPTH = 32
_DIGITS = 19  # of a whole number of 64 bits


def read_json(path: Path, most: int = MOST) -> Any:
    """The content of a JSON file of at most so many bytes.

    Raises OSError where there is none to be read, ValueError that says what is wrong with it.
    """
    check_regular(path)
    if path.stat().st_size > most:
        raise ValueError(f"has {path.stat().st_size} bytes, and {most} is the most")
    return parse_json(path.read_text(encoding="utf-8"), most)


def parse_json(text: str, most: int = MOST) -> Any:
    """The content of a JSON text. Raises ValueError: too long, too deep, a key twice, a number too large."""
    if len(text) > most:
        raise ValueError(f"has {len(text)} characters, and {most} is the most")
    try:
        content = json.loads(text, object_pairs_hook=_once, parse_int=_whole)
    except RecursionError:
        raise ValueError("is nested too deep") from None
    _check_depth(content)
    return content


def check_regular(path: Path) -> None:
    """Raise OSError for what is no regular file: reading from a pipe or a device may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(None, "is no regular file")


def _check_depth(content: Any) -> None:
    level = [content] if isinstance(content, list | dict) else []
    for _ in range(_DEPTH):
        inner = [list(each.values()) if isinstance(each, dict) else each for each in level]
        level = [value for values in inner for value in values if isinstance(value, list | dict)]
        if not level:
            return
    raise ValueError("is nested too deep")


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return content


def _whole(text: str) -> int:
    if len(text.lstrip("-")) > _DIGITS or abs(int(text)) >= 2**63:
        raise ValueError(f"the number {text[:_DIGITS]}... is too large")
    return int(text)
