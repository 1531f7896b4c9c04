"""Changed bytes and changed JSON, and what must come of them, for tests: one message, or a right answer."""

import copy
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from qdetr_cli.errors import QDetrError

FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
MEMORY = 400  # MB that reading something hostile may take
ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 10**6, 10**9, 10**18, 10**30, 1e300, float("nan"), float("inf"), "", "x",
    "../../etc", "a\0b", [], {}, [[]], [1, 2], {"x": 1}, [10**6] * 4,
)  # fmt: skip


def outcome(work: Callable[[], object]) -> str:
    """ "right", or the message. Anything but a QDetrError, and memory without need, is a failure."""
    before = _peak()
    try:
        work()
        said = "right"
    except QDetrError as error:
        said = str(error)
        assert said.strip()
        assert "Traceback" not in said
    assert _peak() - before < MEMORY, "memory"
    return said


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def pipe(path: Path) -> Iterator[Path]:
    """A pipe that nobody writes to: whoever opens it waits for ever."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    yield path
    path.unlink()


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, most: int = 8) -> bytes:
    """The bytes with some of them changed, a piece cut out or put in twice, or the end lost."""
    content = bytearray(whole)
    kind = draw(st.sampled_from(("change", "cut", "twice", "end")))
    at = draw(st.integers(0, len(whole) - 1))
    length = draw(st.integers(1, 64))
    if kind == "change":
        for _ in range(draw(st.integers(1, most))):
            content[draw(st.integers(0, len(whole) - 1))] = draw(st.integers(0, 255))
    elif kind == "cut":
        del content[at : at + length]
    elif kind == "twice":
        content[at:at] = content[at : at + length]
    else:
        del content[at:]
    return bytes(content)


def places(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values stand in plain JSON."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield (*at, key)
        if isinstance(value, dict | list):
            yield from places(value, (*at, key))


@st.composite
def changed(draw: st.DrawFn, whole: Any, times: int = 2) -> Any:
    """The JSON with one or some values replaced or left out, or a strange key put in."""
    content = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, times))):
        where = draw(st.sampled_from(list(places(content))))
        owner = content
        for key in where[:-1]:
            owner = owner[key]
        kind = draw(st.sampled_from(("put", "put", "put", "drop", "add")))
        if kind == "put":
            owner[where[-1]] = _odd(draw)
        elif kind == "drop":
            del owner[where[-1]]
        elif isinstance(owner, dict):
            owner["strange"] = _odd(draw)
        if not content:
            break
    return content


def _odd(draw: st.DrawFn) -> Any:
    """A copy: the next change may be made inside it, and examples must not depend on each other."""
    return copy.deepcopy(draw(st.sampled_from(ODD)))
