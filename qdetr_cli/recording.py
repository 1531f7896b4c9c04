"""How a detector calls its modules: run on noise, in eval mode and in training, with padding and labels."""

import inspect
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from qdetr_cli.backbones import STRIDE, two_windows
from qdetr_cli.families import Family, family_of

Arguments = dict[str, Any]
Signature = tuple[tuple[str, Any], ...]
Calls = dict[tuple[Signature, bool], Arguments]  # by signature, and True for a call in training

_MASK = "attention_mask"
_SIZE = (128, 160)  # pixels: a few tokens at stride 32, none of the counts equal


@torch.no_grad()
def record_calls(model: nn.Module, paths: Collection[str]) -> dict[str, Calls]:
    """How the model calls each of these modules: in eval mode, with padding, and in training with labels.

    The model is left as it was, and so is the random state. Transformers drops a mask of ones (but keeps it
    while it is traced), so there must be real padding, and each call with a mask may also come without.
    """
    calls: dict[str, Calls] = {path: {} for path in paths}
    if paths:
        hooks = [
            model.get_submodule(path).register_forward_pre_hook(
                partial(_record, calls[path]), with_kwargs=True
            )
            for path in paths
        ]
        with undisturbed(model), torch.random.fork_rng():
            _run_all_ways(model)
        for hook in hooks:
            hook.remove()
    return {path: _unmasked(model.get_submodule(path), own) | own for path, own in calls.items()}


@torch.no_grad()
def called_in_training(
    model: nn.Module, family: Family, paths: Collection[str], largest: tuple[int, int]
) -> set[str]:
    """Those of the modules at `paths` that a forward pass in training calls, heads included.

    `largest` (H, W) is a size that the model takes; the image is smaller where it can be.
    """
    called: set[str] = set()
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: called.add(path))
        for path in paths
    ]
    if paths:
        with undisturbed(model), torch.random.fork_rng():
            train_with_fixed_statistics(model)
            size = recording_size(family, getattr(model, "config", None))
            model(pixel_values=_noise(model, min(size, largest, key=math.prod)))
    for hook in hooks:
        hook.remove()
    return called


def recording_size(family: Family, config: Any) -> tuple[int, int]:
    """(H, W) of a small image that the model takes: divisible as it must be, with a cell for every query."""
    fixed = getattr(config, "anchor_image_size", None)
    if fixed:
        return int(fixed[0]), int(fixed[1])
    step, least = family.divisible(config), two_windows(config)
    if not family.fixed_queries:
        least = max(least, math.ceil(math.sqrt(family.query_count(config))) * family.finest_stride(config))
    height, width = (step * math.ceil(max(side, least) / step) for side in _SIZE)
    return height, width if width > height else width + step * math.ceil(STRIDE / step)


def train_with_fixed_statistics(model: nn.Module) -> None:
    """Train mode for all but the batch norms, whose statistics stay."""
    for module in model.modules():
        module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Give every module its mode back at the end."""
    training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def bind(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments of a call by name, in the order of the signature, those that equal a default left out.

    So is what goes into `**kwargs`: transformers passes it through, and eager attention does not read it.
    """
    signature = inspect.signature(forward)
    bound = signature.bind(*args, **kwargs).arguments
    return {
        name: value
        for name, value in bound.items()
        if signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD
        and value is not None
        and value is not signature.parameters[name].default
    }


def leaves(arguments: Arguments) -> dict[str, Any]:
    """The arguments with each tuple taken apart: `position_0` and `position_1` for a pair `position`."""
    flat: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, tuple | list):
            flat |= leaves({f"{name}_{index}": each for index, each in enumerate(value)})
        else:
            flat[name] = value
    return flat


def signature_of(arguments: Arguments) -> Signature:
    """What decides which graph fits: which arguments there are, the ranks of tensors, other values.

    Never the Python type of a tensor: under a later export these are fake tensors.
    """
    flat = leaves(arguments)
    return tuple((name, f"{v.dim()}-d" if isinstance(v, Tensor) else v) for name, v in flat.items())


def describe(signature: Signature) -> str:
    """A signature in words."""
    return ", ".join(f"{name} ({value})" for name, value in signature)


def _record(calls: Calls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    arguments = bind(module.forward, args, kwargs)
    calls.setdefault((signature_of(arguments), module.training), arguments)


def _unmasked(module: nn.Module, calls: Calls) -> Calls:
    """The calls with a mask that may be left out, without it."""
    mask = inspect.signature(module.forward).parameters.get(_MASK)
    if mask is None or mask.default is not None:
        return {}
    bare = [
        ({name: value for name, value in arguments.items() if name != _MASK}, training)
        for (_, training), arguments in calls.items()
        if _MASK in arguments
    ]
    return {(signature_of(arguments), training): arguments for arguments, training in bare}


def _run_all_ways(model: nn.Module) -> None:
    base: Any = model.base_model  # in training heads and loss are left out: no attention there
    family = family_of(model)
    pixels = _noise(model, recording_size(family, model.config))
    mask = torch.ones_like(pixels[:, 0], dtype=torch.int64)  # (B, H, W), 1 = valid
    mask[1, pixels.shape[2] // 2 :] = 0
    target = {"class_labels": mask.new_zeros(1), "boxes": pixels.new_full((1, 4), 0.5)}
    denoised = {"labels": [target, target]} if "labels" in inspect.signature(base.forward).parameters else {}
    model.eval()
    model(pixel_values=pixels)
    model(pixel_values=pixels, pixel_mask=mask)
    with masks_kept():
        model(pixel_values=pixels)
    if family.trainable:
        train_with_fixed_statistics(base)
        base(pixel_values=pixels, pixel_mask=mask, **denoised)


@contextmanager
def masks_kept() -> Iterator[None]:
    """Let transformers keep the masks that happen to be all ones here: other images may mask something.

    PP-DocLayout masks what it finds too uncertain, and a mask that is kept while tracing is met by an export.
    """
    own = masking_utils.is_tracing
    masking_utils.is_tracing = lambda *_: True
    try:
        yield
    finally:
        masking_utils.is_tracing = own


def _noise(model: nn.Module, size: tuple[int, int]) -> Tensor:
    return next(model.parameters()).new_ones(2, 3, *size).uniform_()  # (B, 3, H, W)
