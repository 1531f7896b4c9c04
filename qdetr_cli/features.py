"""What a detector computes on the way: recorded with hooks, so that float and fake-quant models give alike.

The co-attended feature D of a decoder layer is what its cross-attention gives before the output projection:
softmax(q k^T) v of all heads side by side (Q-DETR, eq. 2.26), or the sampled and weighted values where
attention is deformable.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qdetr_cli.families import Family, role_of

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "output_proj")  # as transformers names them
MEMORY = "encoder_hidden_states"  # the decoder's argument
MASKS = ("encoder_attention_mask", "memory_key_padding_mask")  # beside it: False for tokens of padding


class Features:
    """What was recorded in the last forward pass. Shape letters: B images, Q queries, L tokens, D width."""

    def __init__(self) -> None:
        self.layers: dict[str, Tensor] = {}  # cross-attention's path -> (B, Q, D)
        self.memory: Tensor | None = None  # (B, L, D), None where nothing like it exists
        self.memory_mask: Tensor | None = None  # bool (B, L), False for padding; None: there is none

    @property
    def co_attended(self) -> tuple[Tensor, ...]:
        """D of every decoder layer, first to last."""
        return tuple(self.layers.values())


@contextmanager
def recorded(model: nn.Module, family: Family) -> Iterator[Features]:
    """For the duration of the block, every forward pass of `model` leaves its features here."""
    features = Features()
    handles = [_watch_attention(path, module, features) for path, module in cross_attentions(model, family)]
    decoder = getattr(getattr(model, "base_model", model), "decoder", None)
    if isinstance(decoder, nn.Module):
        handles.append(decoder.register_forward_pre_hook(_keep_memory(features), with_kwargs=True))
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def cross_attentions(model: nn.Module, family: Family) -> list[tuple[str, nn.Module]]:
    """The cross-attention of each decoder layer with its path; none in a family without a decoder."""
    kinds = {*family.attention, *family.deformable}
    return [
        (path, module)
        for path, module in model.named_modules()
        if kinds & {kind.__name__ for kind in type(module).__mro__}
        and role_of(family, path) == "decoder.cross_attention"
    ]


def _watch_attention(path: str, attention: nn.Module, features: Features) -> Any:
    def before_projection(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        features.layers[path] = inputs[0]

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        features.layers[path] = output[0] if isinstance(output, tuple) else output

    projection = next((getattr(attention, n) for n in OUTPUT_PROJECTIONS if hasattr(attention, n)), None)
    if projection is None:  # D-FINE: the sampled values are the output
        return attention.register_forward_hook(after)
    return projection.register_forward_pre_hook(before_projection)


def _keep_memory(features: Features) -> Any:
    def keep(module: nn.Module, inputs: Any, given: dict[str, Any]) -> None:
        memory = given.get(MEMORY)
        features.memory = memory if isinstance(memory, torch.Tensor) else None
        masks = [given[name] for name in MASKS if isinstance(given.get(name), torch.Tensor)]
        features.memory_mask = masks[0].bool() if masks else None

    return keep
