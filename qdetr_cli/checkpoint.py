"""A trained detector on disk or on the hub -> a float model that is ready to be quantized."""

import copy
import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from transformers import PreTrainedConfig

from qdetr_cli.backbones import lost_activations, open_attention, refuse_channels_last
from qdetr_cli.budget import Budget, budget_of
from qdetr_cli.configs import build_config
from qdetr_cli.errors import CheckpointError
from qdetr_cli.families import Family, family_of, role_of
from qdetr_cli.folders import (
    PROCESSOR_FILE,
    first_line,
    quiet,
    read_hub,
    read_json_file,
    read_local,
    snapshot,
)
from qdetr_cli.manifest import (
    HARMLESS,
    MANIFEST,
    WEIGHTS,
    Manifest,
    differences,
    is_qdetr_folder,
    listed,
    load_weights,
    read_manifest,
    save_checkpoint,
)
from qdetr_cli.original import Settings, read_original
from qdetr_cli.processors import Processor
from qdetr_cli.tied import restore_tied

__all__ = [
    "MANIFEST",
    "Detector",
    "Manifest",
    "is_qdetr_folder",
    "load_config_model",
    "load_float",
    "load_weights",
    "model_config",
    "read_manifest",
    "save_checkpoint",
    "with_classes",
]
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".onnx")  # of files, so never of a hub id


@dataclass(slots=True, kw_only=True)
class Detector:
    """A float detector with all that is needed to run it on images."""

    model: Any  # the torch module of transformers: eval mode, float32, eager attention
    family: Family
    processor: Processor
    class_names: dict[int, str]  # model class index -> name
    source: str
    notes: tuple[str, ...] = ()  # what the user should be told


def load_float(source: str | Path, **settings: Unpack[Settings]) -> Detector:
    """The float detector of a Hugging Face folder, a hub id, a qdetr float folder or an original `.pth`.

    `settings` are for a `.pth` that does not say them. Only a hub id uses the net.
    Weights are loaded strictly: CheckpointError lists what is missing and unexpected.
    """
    path = Path(source)
    if path.is_file():
        return _load_original(path, settings)
    if given := [name for name, value in settings.items() if value is not None]:
        raise CheckpointError(f"{source}: {', '.join(given)} can only be set for an original .pth")
    if is_qdetr_folder(path):
        return _load_qdetr(path)
    if path.is_dir() or _may_be_hub_id(str(source)):
        return _load_pretrained(str(source), local=path.is_dir())
    raise CheckpointError(
        f"{source}: no such file or folder, and not a hub id (owner/name); give a Hugging Face folder, a hub "
        "id, an original .pth, or a folder that qdetr wrote"
    )


def load_config_model(
    config: Mapping[str, Any], processor: Mapping[str, Any] | None, budget: Budget | None = None
) -> Detector:
    """A detector of this structure with random weights: `config` and `processor` as in a Manifest.

    Raises CheckpointError for a config of which nothing can be built, or more than the budget allows.
    """
    built = build_config(config)
    try:
        with nullcontext() if budget is None else budget.kept():
            model = _build(built)
    except CheckpointError:
        raise
    except Exception as error:  # with values that make no sense torch and transformers raise many types
        raise CheckpointError(
            f"config.json: no {built.model_type} can be built from it: {first_line(error)}"
        ) from error
    return _detector(model, processor, source="config")


def model_config(detector: Detector) -> dict[str, Any]:
    """The model's transformers config as JSON has it, complete, for a Manifest."""
    content: dict[str, Any] = json.loads(detector.model.config.to_json_string(use_diff=False))
    content.pop("_name_or_path", None)  # a path of the machine that it was loaded on
    return content


def with_classes(detector: Detector, class_names: Sequence[str]) -> Detector:
    """The detector with new class heads for `class_names`, initialised as its family does; the rest is kept.

    Softmax families get their extra "no object" row. In sigmoid families the bias starts at the prior
    probability p, -log((1 - p) / p) (RetinaNet, arXiv 1708.02002, section 4.1). The denoising label embedding
    goes with the head.
    """
    names = dict(enumerate(class_names))
    if names == detector.class_names:
        return detector
    config = copy.deepcopy(detector.model.config)
    config.id2label = names  # sets num_labels
    config.label2id = {name: index for index, name in names.items()}
    model = _build(config, seed=0)
    _prepare_backbone(model, detector.family)
    replaced = _copy_unclassed(detector.model, model)
    _start_at_prior(model, detector.family)
    note = (
        f"new class head: {len(names)} classes in place of {len(detector.class_names)} ({listed(replaced)})"
    )
    return replace(detector, model=model, class_names=names, notes=(*detector.notes, note))


def _load_pretrained(source: str, *, local: bool) -> Detector:
    content, processor = read_local(Path(source)) if local else read_hub(source)
    config = build_config(content)
    budget = _check_files(Path(source)) if local else None
    try:
        with quiet(), nullcontext() if budget is None else budget.kept():
            model, info = family_of(config).kind.from_pretrained(
                source,
                config=config,
                attn_implementation="eager",
                dtype=torch.float32,
                local_files_only=local,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # listed below, and refused
            )
            restore_tied(model, Path(source) if local else snapshot(source))
    except CheckpointError:
        raise
    except Exception as error:  # transformers, safetensors, torch and pickle raise many types here
        raise CheckpointError(f"{source}: the weights cannot be read: {first_line(error)}") from error
    _refuse_differences(source, info)
    return _detector(model, processor, source=source)


def _check_files(folder: Path) -> Budget:
    """What the weights of a Hugging Face folder can fill. CheckpointError for files that lie elsewhere."""
    for index in folder.glob("*.index.json"):
        content = read_json_file(index) or {}
        names = content.get("weight_map", {})
        if not isinstance(names, dict) or not all(_plain(name) for name in names.values()):
            raise CheckpointError(f"{index}: weight_map names what is no file of this folder")
    files = [path for suffix in ("safetensors", "bin") for path in sorted(folder.glob(f"*.{suffix}"))]
    return budget_of(files, str(folder))


def _plain(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*", name) is not None


def _load_qdetr(folder: Path) -> Detector:
    manifest = read_manifest(folder)
    if manifest.kind != "float":
        raise CheckpointError(f"{folder}: is a {manifest.kind} checkpoint; a float model is wanted here")
    budget = budget_of([folder / WEIGHTS], str(folder))
    detector = load_config_model(manifest.config, manifest.processor, budget)
    load_weights(folder, detector.model)
    return replace(detector, class_names=manifest.class_names, source=str(folder))


def _load_original(path: Path, settings: Settings) -> Detector:
    found = read_original(path, **settings)
    budget = Budget(values=path.stat().st_size, tensors=len(found.state), where=str(path))
    built = load_config_model(found.config, found.processor, budget)
    faults = differences(found.state, built.model.state_dict())
    if faults:
        raise CheckpointError(
            f"{path}: the weights do not fit a {built.family.name} model: {'; '.join(faults)}"
        )
    built.model.load_state_dict(found.state, strict=False)  # the counters of live batch norms may be there
    return replace(built, source=str(path), notes=found.notes)


def _detector(model: Any, processor: Mapping[str, Any] | None, source: str) -> Detector:
    family = family_of(model)
    _prepare_backbone(model, family)
    fallback = f"no {PROCESSOR_FILE}: images are prepared as {family.name} does by default"
    return Detector(
        model=model.eval(),
        family=family,
        processor=Processor.from_config(processor or {}, _pixels(family, model.config)),
        class_names={int(index): str(name) for index, name in model.config.id2label.items()},
        source=source,
        notes=(*(() if processor else (fallback,)), *lost_activations(model)),
    )


def _pixels(family: Family, config: Any) -> Processor:
    """How images are prepared for a checkpoint that does not say it: sides are what the model can divide."""
    try:
        step, side = int(family.divisible(config)), family.square(config)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"config.json: says no sides of images that can be divided ({error})"
        ) from error
    pixels = replace(family.processor, divisor=math.lcm(family.processor.divisor, step))
    if side is None:
        return pixels
    side = step * math.ceil(side / step)
    return replace(pixels, size=(side, side), shortest=None, longest=None, pad=False)


def _build(config: PreTrainedConfig, seed: int | None = None) -> Any:
    """A model of the config with random weights; with a `seed` the global generator is left alone."""
    kind = family_of(config).kind
    with torch.random.fork_rng(devices=[], enabled=seed is not None), quiet():
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def _prepare_backbone(model: nn.Module, family: Family) -> None:
    """Let the backbone learn, and its attention be seen.

    transformers freezes some or all of a backbone by its name; here recipes say what is frozen.
    """
    refuse_channels_last(model)
    open_attention(model)
    for name, parameter in model.named_parameters():
        if role_of(family, name).startswith("backbone"):
            parameter.requires_grad_(True)


@torch.no_grad()
def _copy_unclassed(source: nn.Module, target: nn.Module) -> list[str]:
    """Copy all but what the number of classes shapes; the names of the tensors that keep their new values."""
    own, other = target.state_dict(), source.state_dict()
    fresh = _shaped_by_classes(target)
    for name, tensor in own.items():
        if name not in fresh:
            tensor.copy_(other[name])
    return fresh


def _shaped_by_classes(model: Any) -> list[str]:
    """The names of the tensors that would have another shape with one class more."""
    config = copy.deepcopy(model.config)
    config.id2label = {index: str(index) for index in range(config.num_labels + 1)}
    larger = _build(config, seed=0).state_dict()
    return [name for name, tensor in model.state_dict().items() if larger[name].shape != tensor.shape]


@torch.no_grad()
def _start_at_prior(model: nn.Module, family: Family) -> None:
    if family.class_prior is None:
        return
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and role_of(family, path) == "class_head":
            nn.init.constant_(module.bias, -math.log((1 - family.class_prior) / family.class_prior))


def _refuse_differences(source: str, info: Mapping[str, Any]) -> None:
    faults = [
        f"{len(names)} {kind}: {listed(names)}"
        for kind in ("missing", "unexpected", "mismatched")
        if (names := [_name(key) for key in info[f"{kind}_keys"] if not _name(key).endswith(HARMLESS)])
    ]
    if faults:
        raise CheckpointError(f"{source}: the weights do not fit config.json: {'; '.join(faults)}")


def _name(key: str | tuple[Any, ...]) -> str:
    return key if isinstance(key, str) else f"{key[0]} {tuple(key[1])} for {tuple(key[2])}"


def _may_be_hub_id(source: str) -> bool:
    """False for what is written as a path or points into a folder that is here: then a file is missing."""
    if Path(source).suffix in SUFFIXES or ("/" in source and Path(source).parent.is_dir()):
        return False
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) is not None
