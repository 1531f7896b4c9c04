"""A torch file, read without running any code that it holds."""

import argparse
import mmap
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from qdetr_cli.errors import CheckpointError
from qdetr_cli.reading import check_regular

_GROWS = b"bytearray"  # torch lets a pickle call it with any size


def read_pickle(path: Path) -> Any:
    """What the torch file holds: tensors, plain containers and `argparse.Namespace`.

    All else raises CheckpointError, and nothing of it is run.
    """
    try:
        check_regular(path)
        _check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file makes torch, zipfile and struct raise nearly anything
        raise CheckpointError(
            f"{path}: is not a file that torch.save wrote, or it is damaged ({error})"
        ) from error


def _check_archive(path: Path) -> None:
    """Raise CheckpointError for a zip or a pickle that would grow in memory: torch.save writes none."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            grows = content.find(_GROWS) >= 0
    else:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if not stored or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise CheckpointError(
                    f"{path}: refused, because it is compressed, which torch.save never does"
                )
            grows = any(_GROWS in archive.read(each) for each in entries if each.filename.endswith(".pkl"))
    if grows:
        raise CheckpointError(_refusal(path, "GLOBAL builtins.bytearray"))


def _refusal(path: Path, message: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", message)
    what = f"names {found[1]}" if found else "does more than hold tensors"
    return (
        f"{path}: refused, because its pickle {what}; qdetr runs no code from a checkpoint and reads only "
        "tensors, plain containers and argparse.Namespace. If you trust the file, load it elsewhere and save "
        'torch.save({"model": state_dict}, path)'
    )
