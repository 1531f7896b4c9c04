"""A trained detector on disk or on the hub -> a float model that is ready to be quantized."""

import copy
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from qdetr_cli.configs import build_config
from qdetr_cli.errors import CheckpointError
from qdetr_cli.families import Family, family_of, role_of
from qdetr_cli.manifest import (
    HARMLESS,
    MANIFEST,
    Manifest,
    differences,
    is_qdetr_folder,
    listed,
    load_weights,
    read_manifest,
    save_checkpoint,
)
from qdetr_cli.original import read_original
from qdetr_cli.processors import Processor

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
PROCESSOR_FILE = "preprocessor_config.json"
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


def load_float(
    source: str | Path,
    *,
    heads: int | None = None,
    dilation: bool | None = None,
    pre_norm: bool | None = None,
) -> Detector:
    """The float detector of a Hugging Face folder, a hub id, a qdetr float folder or an original `.pth`.

    `heads`, `dilation` and `pre_norm` are for a `.pth` that does not say them. Only a hub id uses the net.
    Weights are loaded strictly: CheckpointError lists what is missing and unexpected.
    """
    path = Path(source)
    options = {"heads": heads, "dilation": dilation, "pre_norm": pre_norm}
    if path.is_file():
        return _load_original(path, options)
    if given := [name for name, value in options.items() if value is not None]:
        raise CheckpointError(f"{source}: {', '.join(given)} can only be set for an original .pth")
    if is_qdetr_folder(path):
        return _load_qdetr(path)
    if path.is_dir() or _may_be_hub_id(str(source)):
        return _load_pretrained(str(source), local=path.is_dir())
    raise CheckpointError(
        f"{source}: no such file or folder, and not a hub id (owner/name); give a Hugging Face folder, a hub "
        "id, an original DETR .pth, or a folder that qdetr wrote"
    )


def load_config_model(config: Mapping[str, Any], processor: Mapping[str, Any] | None) -> Detector:
    """A detector of this structure with random weights: `config` and `processor` as in a Manifest."""
    built = build_config(config)
    return _detector(_build(built), processor, source="config")


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
    _free_backbone(model, detector.family)
    replaced = _copy_unclassed(detector.model, model)
    _start_at_prior(model, detector.family)
    note = (
        f"new class head: {len(names)} classes in place of {len(detector.class_names)} ({listed(replaced)})"
    )
    return replace(detector, model=model, class_names=names, notes=(*detector.notes, note))


def _load_pretrained(source: str, *, local: bool) -> Detector:
    content, processor = _read_local(Path(source)) if local else _read_hub(source)
    config = build_config(content)
    kind = getattr(transformers, family_of(config).model_class)
    try:
        with _quiet():
            model, info = kind.from_pretrained(
                source,
                config=config,
                attn_implementation="eager",
                dtype=torch.float32,
                local_files_only=local,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # listed below, and refused
            )
    except Exception as error:  # transformers, safetensors, torch and pickle raise many types here
        raise CheckpointError(f"{source}: the weights cannot be read: {_first_line(error)}") from error
    _refuse_differences(source, info)
    return _detector(model, processor, source=source)


def _load_qdetr(folder: Path) -> Detector:
    manifest = read_manifest(folder)
    if manifest.kind != "float":
        raise CheckpointError(f"{folder}: is a {manifest.kind} checkpoint; a float model is wanted here")
    detector = load_config_model(manifest.config, manifest.processor)
    load_weights(folder, detector.model)
    return replace(detector, class_names=manifest.class_names, source=str(folder))


def _load_original(path: Path, options: Mapping[str, Any]) -> Detector:
    found = read_original(path, **options)
    built = load_config_model(found.config, None)
    faults = differences(found.state, built.model.state_dict())
    if faults:
        raise CheckpointError(
            f"{path}: the weights do not fit a {built.family.name} model: {'; '.join(faults)}"
        )
    built.model.load_state_dict(found.state, strict=False)  # the counters of live batch norms may be there
    return replace(built, source=str(path), notes=found.notes)


def _read_local(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(config.json, preprocessor_config.json or None) of a folder."""
    config = _read_json(folder / "config.json")
    if config is None:
        raise CheckpointError(f"{folder}: holds neither {MANIFEST} (qdetr) nor config.json (Hugging Face)")
    processor = _read_json(folder / PROCESSOR_FILE)
    if processor is None and (whole := _read_json(folder / "processor_config.json")):
        processor = whole.get("image_processor")
    return config, processor


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a JSON object")
    return content


def _read_hub(source: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    try:
        with _quiet():
            config, _ = PreTrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{source}: is no folder here, and the Hugging Face hub does not give it ({_first_line(error)}); "
            "download it where there is a network and name the folder"
        ) from error
    try:
        with _quiet():
            processor, _ = transformers.ImageProcessingMixin.get_image_processor_dict(source)
    except (OSError, ValueError):  # optional on the hub as it is in a folder; _detector adds a note
        return config, None
    return config, processor


def _detector(model: Any, processor: Mapping[str, Any] | None, source: str) -> Detector:
    family = family_of(model)
    _free_backbone(model, family)
    fallback = f"no {PROCESSOR_FILE}: images are prepared as {family.name} does by default"
    return Detector(
        model=model.eval(),
        family=family,
        processor=Processor.from_config(processor or {}, family.processor),
        class_names={int(index): str(name) for index, name in model.config.id2label.items()},
        source=source,
        notes=() if processor else (fallback,),
    )


def _build(config: PreTrainedConfig, seed: int | None = None) -> Any:
    """A model of the config with random weights; with a `seed` the global generator is left alone."""
    kind = getattr(transformers, family_of(config).model_class)
    with torch.random.fork_rng(devices=[], enabled=seed is not None), _quiet():
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32)
    return model.eval()


def _free_backbone(model: nn.Module, family: Family) -> None:
    """Let the backbone learn: transformers freezes some or all of it by name; recipes say what is frozen."""
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Progress bars and warnings of the libraries are left out; what matters is raised or noted by us."""
    log, hub = transformers.utils.logging, logging.getLogger("huggingface_hub")
    before = log.get_verbosity(), hub.level, log.is_progress_bar_enabled()
    log.set_verbosity_error()
    hub.setLevel(logging.ERROR)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before[0])
        hub.setLevel(before[1])
        if before[2]:
            log.enable_progress_bar()
