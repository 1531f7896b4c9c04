"""Shared tensors of a Hugging Face folder that transformers loses on the way from a file to a model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


@torch.no_grad()
def restore_tied(model: Any, folder: Path) -> None:
    """Put tensors into `model` that the folder's files hold under another name than transformers looks for.

    Of the names of a shared tensor `save_pretrained` may keep any one, while `from_pretrained` reads the one
    that the class calls the source, leaves it random where it is not there, and does not say so: DEIMv2's
    shared box heads.
    """
    sources: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    files = sorted(folder.glob("*.safetensors"))
    stored = {name for file in files for name in _names(file)}
    lost = {name: source for name, source in sources.items() if name in stored and source not in stored}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in lost.keys() & set(opened.keys()):
                model.get_parameter(lost[name]).copy_(opened.get_tensor(name))


def _names(file: Path) -> Iterator[str]:
    with safe_open(file, framework="pt") as opened:
        yield from opened.keys()
