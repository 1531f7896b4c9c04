"""A torch file, read without running any code that it holds."""

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from qdetr_cli.errors import CheckpointError


def read_pickle(path: Path) -> Any:
    """What the torch file holds: tensors, plain containers and `argparse.Namespace`.

    All else raises CheckpointError, and nothing of it is run.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from error
    except Exception as error:  # a damaged file makes torch, zipfile and struct raise nearly anything
        raise CheckpointError(
            f"{path}: is not a file that torch.save wrote, or it is damaged ({error})"
        ) from error


def _refusal(path: Path, message: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", message)
    what = f"names {found[1]}" if found else "does more than hold tensors"
    return (
        f"{path}: refused, because its pickle {what}; qdetr runs no code from a checkpoint and reads only "
        "tensors, plain containers and argparse.Namespace. If you trust the file, load it elsewhere and save "
        'torch.save({"model": state_dict}, path)'
    )
