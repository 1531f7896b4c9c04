"""Run folders and atomic files: what is on disk is whole or is not there."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qdetr_cli.errors import RunError
from qdetr_cli.reading import parse_json, read_json

RUN_FILE, JOURNAL_FILE = "run.json", "metrics.jsonl"
PARTS = ("best", "last")  # the checkpoints of a training, in the order of preference
_BATCH = "images_per_step"
_SHARES = ("recipe.train.batch_size", "recipe.train.accumulate")  # free as long as their product stays
_RETIRED = ".old."  # in the name of a folder that waits for its successor


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` that takes its place if the block succeeds, and is removed if it fails.

    A folder that stood at `path` is replaced; until the very end it stays as it was. Should the process be
    killed in between, `recover` finds the one or the other.
    """
    parent = _writable_parent(path)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent))
    try:
        yield draft
        _flush(draft)
        _replace(draft, path)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror or error}); nothing was changed"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def recover(folder: Path) -> None:
    """Put a run folder in order after a process was killed in it.

    What was moved away for a successor that never came is put back, and drafts are removed.
    """
    for name in (*PARTS, RUN_FILE, JOURNAL_FILE):
        for retired in folder.glob(f".{name}{_RETIRED}*/{name}"):
            if not (folder / name).exists():
                retired.rename(folder / name)
        for left in (*folder.glob(f".{name}.*"), *folder.glob(f"..{name}.*")):  # and the drafts of drafts
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part."""
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=_writable_parent(path))
    draft = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.chmod(0o644)
        draft.replace(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that writes `path`: what the system refuses, such as a full disk, becomes a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error}); nothing was kept") from error


@contextmanager
def draft_files(path: Path, companions: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary path with the name of `path`; if the block succeeds what was written there takes its place.

    `companions` are the suffixes of files that belong to it, which come first. Nothing stays if it fails.
    """
    check_file(path, companions)
    parent = _writable_parent(path)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent))
    placed: list[Path] = []
    try:
        with writing(path):
            yield folder / path.name
            for name in (*(path.with_suffix(suffix).name for suffix in companions), path.name):
                (folder / name).chmod(0o644)
                placed.append((folder / name).replace(parent / name))
    except BaseException:
        for each in placed:
            each.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_file(path: Path, companions: Sequence[str] = ()) -> None:
    """Raise RunError unless `path`, and what belongs to it, can become new files; nothing is created."""
    for each in (path, *(path.with_suffix(suffix) for suffix in companions)):
        if each.exists() or each.is_symlink():
            raise RunError(f"{each}: is there already; choose another --out or remove it")
    _check_parent(path, path.resolve().parent)


def write_json(path: Path, content: object) -> None:
    """Write strict JSON (no NaN) atomically."""
    atomic_write(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def check_new(path: Path) -> None:
    """Raise RunError unless `path` can become a new folder; nothing is created.

    One that already holds something is refused, so that no run overwrites another.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunError(f"{path}: already holds something; choose another --out or remove it")
    _check_parent(path, path)


def _check_parent(path: Path, folder: Path) -> None:
    """Raise RunError unless `folder` is a folder, or can become one, in which something can be written."""
    existing = next(each for each in (folder, *folder.resolve().parents) if each.exists())
    if not existing.is_dir():
        raise RunError(f"{existing}: is a file, so {path} cannot be created; choose another --out")
    if not os.access(existing, os.W_OK):
        raise RunError(f"{existing}: is not writable; choose another folder")


def new_folder(path: Path) -> Path:
    """`path`, created. One that already holds something is refused, as `check_new` does."""
    check_new(path)
    _writable_parent(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_free(out: Path) -> None:
    """Raise RunError unless a training may begin in `out`: a new folder, or a run without a checkpoint."""
    recover(out)
    if not (out / RUN_FILE).exists() or (out / "last").exists():
        check_new(out)


def begin_run(out: Path, settings: Mapping[str, Any]) -> None:
    """Mark `out` as the folder of this training, once nothing cheap can go wrong any more."""
    (out / JOURNAL_FILE).unlink(missing_ok=True)
    write_json(out / RUN_FILE, settings)


def resumes(out: Path, settings: Mapping[str, Any]) -> bool:
    """True if the training in `out` goes on, False if it was stopped before its first checkpoint.

    Raises RunError if there is none, and if it began with other settings (their dotted paths are named).
    """
    path = out / RUN_FILE
    recover(out)
    if not path.exists():
        raise RunError(f"{out}: holds no run to resume (no {RUN_FILE}); run without --resume")
    try:
        began = read_json(path)
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: is damaged ({error}); start again in another --out") from error
    changed = _changes(began, settings)
    if _BATCH in changed and isinstance(began.get(_BATCH), int):
        raise RunError(
            f"{out}: --resume with {settings[_BATCH]} images in a step, and the run began with "
            f"{began[_BATCH]}: keep train.batch_size * train.accumulate * processes as it was, e.g. double "
            "train.batch_size or train.accumulate on half as many processes"
        )
    free = (_BATCH,) if _BATCH in changed else _SHARES
    if changed := [each for each in changed if each not in free]:
        raise RunError(f"{out}: --resume with other settings than the run began with: {', '.join(changed)}")
    return (out / "last").exists()


class Journal:
    """`metrics.jsonl`: one JSON object a line; `rewind` drops what a resumed run will write again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one line; values must be JSON without NaN."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        """All complete lines; a torn last line (the process was killed while writing) is left out."""
        if not self.path.exists():
            return []
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
            return [parse_json(line) for line in lines if line]
        except ValueError as error:
            raise RunError(f"{self.path}: is damaged ({error}); start again in another --out") from error

    def rewind(self, step: int, evaluated: int) -> None:
        """Keep only what was written up to and including `step`, and metrics up to those of `evaluated`.

        Raises RunError for lines of others.
        """
        try:
            kept = [
                entry
                for entry in self.entries()
                if int(entry["step"]) <= (evaluated if "metrics" in entry else step)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{self.path}: is damaged ({error}); start again in another --out") from error
        atomic_write(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))


def _changes(before: Any, after: Any, where: str = "") -> list[str]:
    """Dotted paths at which two JSON values differ."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        keys = sorted(set(before) | set(after))
        return [
            x for key in keys for x in _changes(before.get(key), after.get(key), f"{where}.{key}".strip("."))
        ]
    return [] if before == after else [where]


def _writable_parent(path: Path) -> Path:
    parent = path.resolve().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{parent}: cannot be created ({error.strerror}); choose another folder") from error
    if not os.access(parent, os.W_OK):
        raise RunError(f"{parent}: is not writable; choose another folder")
    return parent


def _flush(folder: Path) -> None:
    """Have the system write the files of a folder, so that a power cut after it is named finds them whole."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _replace(draft: Path, path: Path) -> None:
    draft.chmod(0o755)
    if not path.exists():
        draft.rename(path)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{path.name}{_RETIRED}", dir=path.resolve().parent))
    path.rename(retired / path.name)
    draft.rename(path)
    shutil.rmtree(retired, ignore_errors=True)
