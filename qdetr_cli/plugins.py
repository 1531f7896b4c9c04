"""One table for everything that can be added by name: `register` fills it, `get` reads it, `load` imports
more.

Built-ins register when their module is imported. `load` adds the installed entry points of group
"qdetr.plugins", then the files of the folders that a recipe or a flag names. Never the current directory.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from qdetr_cli.errors import PluginError

Kind = Literal["quantizer", "range", "loss", "family", "layout", "metric", "exporter"]
T = TypeVar("T")

GROUP = "qdetr.plugins"
_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One registered object: its kind and name, where it came from, and the file that registered it."""

    kind: Kind
    name: str
    origin: str  # "built-in", "entry point X" or a file path
    file: str
    object: Any


_TABLE: dict[tuple[Kind, str], Entry] = {}
_LOADED: set[str] = set()  # entry points by name and value, files by resolved path
_ORIGIN: list[str] = []  # of what `load` imports right now


def register(kind: Kind, name: str) -> Callable[[T], T]:
    """Return a decorator that puts its object into the table under (kind, name) and hands it back unchanged.

    Raises PluginError for an unknown kind, for an empty name, and for a name that is taken (names both
    places).
    """
    _check_kind(kind)
    if not name:
        raise PluginError(f"a {kind} plugin needs a name: write register({kind!r}, 'my_name')")

    def add(value: T) -> T:
        entry = _entry(kind, name, value)
        taken = _TABLE.get((kind, name))
        if taken is not None:
            raise PluginError(
                f"{entry.file}: {kind} {name!r} is already registered by {taken.file}; rename one of them"
            )
        _TABLE[kind, name] = entry
        return value

    return add


def get(kind: Kind, name: str) -> Any:
    """Return the object registered under (kind, name). PluginError lists the valid names of the kind."""
    _check_kind(kind)
    entry = _TABLE.get((kind, name))
    if entry is None:
        known = ", ".join(names(kind)) or "none is registered"
        raise PluginError(
            f"{kind} {name!r} is unknown. Valid names: {known}. "
            "A plugin file is found through `plugins: [FOLDER]` in the recipe"
        )
    return entry.object


def names(kind: Kind) -> tuple[str, ...]:
    """Return the registered names of one kind, sorted."""
    return tuple(sorted(entry.name for entry in _TABLE.values() if entry.kind == kind))


def entries() -> tuple[Entry, ...]:
    """Return everything registered, sorted by kind, then name."""
    return tuple(sorted(_TABLE.values(), key=lambda entry: (get_args(Kind).index(entry.kind), entry.name)))


def load(folders: Sequence[Path] = ()) -> None:
    """Import installed entry points, then every *.py of the folders in name order. A second call adds nothing
    twice.

    Files and folders that start with "_" or "." are left out. PluginError names a folder that is none, and
    the file or entry point whose import failed (what it had registered is taken back).
    """
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        _once(f"entry point {point.name}", f"{point.name} = {point.value}", point.load)
    for folder in folders:
        if not folder.is_dir():
            raise PluginError(
                f"{folder}: no such plugin folder; `plugins:` lists folders that hold *.py files"
            )
        for file in sorted(folder.resolve().glob("[!_.]*.py")):
            _once(str(file), str(file), partial(_import_file, file))


def _once(origin: str, key: str, run: Callable[[], object]) -> None:
    """Run one import unless it has been done; on failure undo its registrations and name it."""
    if key in _LOADED:
        return
    before = dict(_TABLE)
    _ORIGIN.append(origin)
    try:
        run()
    except PluginError:
        _restore(before)
        raise
    except (Exception, SystemExit) as error:  # a plugin may fail in any way; it must not end the run unnamed
        _restore(before)
        raise PluginError(f"{origin}: import failed: {type(error).__name__}: {error}") from error
    finally:
        _ORIGIN.pop()
    _LOADED.add(key)


def _restore(before: dict[tuple[Kind, str], Entry]) -> None:
    """Take back what a failed import registered. Built-ins stay: their modules are imported only once."""
    for key in [key for key, entry in _TABLE.items() if key not in before and entry.origin != "built-in"]:
        del _TABLE[key]


def _import_file(file: Path) -> None:
    """Import `file` under a name that no other module has (pickle finds its classes there)."""
    name = f"qdetr_plugin_{file.stem}_{sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _entry(kind: Kind, name: str, value: object) -> Entry:
    module, file = _registrar()
    origin = _ORIGIN[-1] if _ORIGIN else file
    if module.partition(".")[0] == _PACKAGE:
        origin = "built-in"
    return Entry(kind=kind, name=name, origin=origin, file=file, object=value)


def _registrar() -> tuple[str, str]:
    """Return module name and file of the code that calls `register`."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    assert frame is not None
    return str(frame.f_globals.get("__name__", "")), frame.f_code.co_filename


def _check_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise PluginError(f"{kind!r} is not a kind of plugin; valid kinds: {', '.join(get_args(Kind))}")
