"""A model in memory: opened from anywhere, rewritten under a recipe, fitted to the classes of data, saved."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack, get_args, get_type_hints

import torch
import torchvision
import transformers
from torch import nn

from qdetr_cli import __version__, plugins
from qdetr_cli.budget import budget_of
from qdetr_cli.checkpoint import Detector, load_config_model, load_float, model_config, with_classes
from qdetr_cli.classes import class_index, missing_classes
from qdetr_cli.data import DetectionData
from qdetr_cli.errors import CheckpointError, DataError, PluginError, QDetrError, RecipeError, RunError
from qdetr_cli.families import Family
from qdetr_cli.folders import first_line
from qdetr_cli.manifest import (
    MANIFEST,
    WEIGHTS,
    Kind,
    Manifest,
    is_qdetr_folder,
    load_weights,
    read_manifest,
    save_checkpoint,
)
from qdetr_cli.metrics import Metrics
from qdetr_cli.original import Settings
from qdetr_cli.packed import load_packed, write_packed
from qdetr_cli.plan import Plan, make_plan
from qdetr_cli.recipe import Recipe, recipe_from_dict
from qdetr_cli.rewrite import rewrite
from qdetr_cli.runs import PARTS
from qdetr_cli.sessions import is_exported
from qdetr_cli.trace import GraphFacts, trace

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from, with what an original `.pth` may not say of itself."""

    model: str
    original: Settings = field(default_factory=Settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A detector in memory. `plan`, `facts` and `recipe` are there when it is a fake-quant model."""

    detector: Detector
    facts: GraphFacts | None = None
    plan: Plan | None = None
    recipe: Recipe | None = None
    metrics: dict[str, Any] | None = None  # what its folder says that was measured on it
    packed: bool = False  # its weights are integers on disk: it runs, and learns no more

    @property
    def module(self) -> nn.Module:
        """The torch module."""
        module: nn.Module = self.detector.model
        return module

    @property
    def family(self) -> Family:
        """Its row of the table of families."""
        return self.detector.family


def source_of(model: str, given: Sequence[str] = (), **settings: Unpack[Settings]) -> Source:
    """The source with what a user says of it, in `settings` and as `name=value`; None says nothing.

    Raises RunError for a name that no original file has or that is said twice, and for other types of values.
    """
    said: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    for name, value in map(_original_setting, given):
        if name in said:
            raise RunError(f"--original {name}: is said twice, {said[name]} and {value}")
        said[name] = value
    return Source(model, Settings(**said))  # type: ignore[typeddict-item]


def _original_setting(text: str) -> tuple[str, Any]:
    """(name, value) of `name=value`, the value as `Settings` has it."""
    kinds = {name: get_args(kind)[0] for name, kind in get_type_hints(Settings).items()}
    name, _, value = text.partition("=")
    if name not in kinds:
        raise RunError(f"--original {text}: is not NAME=VALUE with one of {', '.join(kinds)}")
    try:
        return name, {"true": True, "false": False}[value] if kinds[name] is bool else kinds[name](value)
    except (KeyError, ValueError) as error:
        kind = "true or false" if kinds[name] is bool else "a whole number"
        raise RunError(f"--original {text}: {name} is {kind}") from error


def open_model(source: Source, say: Say) -> Model:
    """The model of `source`: float, or fake-quant if it is a folder that qdetr wrote under rules.

    That of a packed folder computes what the checkpoint did that it was packed from, to the last bit.
    """
    if is_exported(source.model) and not Path(source.model).is_dir():
        raise CheckpointError(
            f"{source.model}: is an exported file: `qdetr eval`, `predict` and `benchmark` run it; name "
            "the folder that it was exported from here"
        )
    folder = checkpoint_folder(Path(source.model))
    if folder is None:
        detector = load_float(source.model, **source.original)
        for note in detector.notes:
            say(note)
        return Model(detector=detector)
    if source.original:
        raise CheckpointError(
            f"{source.model}: {', '.join(source.original)} can only be set for an original .pth"
        )
    if folder != Path(source.model):
        say(f"{source.model}: reading {folder.name}/")
    manifest = read_manifest(folder)
    if manifest.plan or manifest.kind != "float":
        _planned(folder, manifest)
    _check_plugins(manifest, source)
    if manifest.kind == "float":
        return Model(detector=replace(load_float(folder), source=source.model))
    return _fake_quant(folder, manifest, source)


def checkpoint_folder(path: Path) -> Path | None:
    """The qdetr checkpoint at `path`: itself, or the best (else last) of a fine-tuning; None if none."""
    return next((each for each in (path, *(path / part for part in PARTS)) if is_qdetr_folder(each)), None)


def quantized(model: Model, recipe: Recipe, size: tuple[int, int], say: Say) -> Model:
    """The fake-quant model of a float one, not calibrated yet; the float module is rewritten in place."""
    facts = trace(model.module, model.family, size)
    plan = make_plan(recipe, facts)
    for line in (*facts.notes, *plan.skipped):
        say(line)
    rewrite(model.module, plan, facts)
    return replace(model, facts=facts, plan=plan, recipe=recipe)


def must_be_float(model: Model, source: Source) -> None:
    """Raise RunError if `model` is a fake-quant model already."""
    if model.plan is not None:
        kind = "packed" if model.packed else "fake-quant"
        raise RunError(
            f"{source.model}: is a {kind} checkpoint; put the recipe on the float checkpoint it came from"
        )


def must_learn(model: Model, source: Source) -> None:
    """Raise RunError if `model` was packed: between the integers there is nothing left to learn from."""
    if model.packed:
        raise RunError(
            f"{source.model}: is a packed checkpoint, whose weights are integers; fine-tune the fake-quant "
            "checkpoint that it was packed from, and pack the result"
        )


def fitted_to(model: Model, data: DetectionData, say: Say) -> Model:
    """The model with a class for every class of `data`: as it is, or a float model with a new class head."""
    index = class_index(model.detector, data)
    if index is not None:
        if missing_classes(model.detector, data.class_names):
            say(
                "the checkpoint's classes have no names that the data has: they are taken by position, "
                f"{_some(_places(index, data))}"
            )
        return model
    missing = missing_classes(model.detector, data.class_names)
    if model.plan is not None:
        raise _unknown_classes(model, data, "put the recipe on the float checkpoint with this data")
    if not model.family.trainable:
        raise _unknown_classes(model, data, "it cannot be trained, so give it data of its own classes")
    say(
        f"the checkpoint has no class for {_some(missing)}: it gets a new class head of "
        f"{len(data.class_names)} classes, which knows nothing before fine-tuning"
    )
    return replace(model, detector=with_classes(model.detector, data.class_names))


def known_classes(model: Model, data: DetectionData) -> tuple[int, ...]:
    """For each data-set label the model's class index. Raises DataError where the model lacks a class."""
    index = class_index(model.detector, data)
    if index is None:
        raise _unknown_classes(model, data, "fine-tune it on this data first (`qdetr finetune`)")
    return index


def trace_size(model: Model, given: tuple[int, int] | None = None) -> tuple[int, int]:
    """The (H, W) at which facts are found: as given, or what the processor makes of a square image."""
    return given or model.detector.processor.output_size(640, 640)


def check_scales(model: Model, scales: Sequence[int]) -> None:
    """Raise RecipeError for squares that the model cannot divide, such as a pyramid to its last stride."""
    processor = model.detector.processor
    stride = math.lcm(processor.divisor, max(getattr(model.detector.model.config, "feat_strides", (1,))))
    odd = [str(scale) for scale in scales if scale % stride]
    if processor.size is not None and odd:
        raise RecipeError(
            f"train.augment.scales: {', '.join(odd)}: {model.family.name} needs multiples of {stride}"
        )


def parse_size(text: str | None, other: str | None = None) -> tuple[int, int] | None:
    """(H, W) of `HxW`. Raises RunError for anything else; it names what `other` may be given."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) >= 32 for part in parts):
        also = "" if other is None else f", nor {other}"
        raise RunError(f"--size {text}: is not HxW with at least 32 pixels each{also}; for example 640x640")
    return int(parts[0]), int(parts[1])


def save_model(
    module: nn.Module, model: Model, folder: Path, recipe: Recipe, metrics: Metrics | None
) -> None:
    """Write `module`, which has the structure of `model`, as a qdetr checkpoint."""
    assert not model.packed, "a packed model is saved by save_packed"
    kind: Kind = "float" if model.plan is None else "fake-quant"
    measured = None if metrics is None else metrics.to_dict()
    save_checkpoint(folder, module, _manifest(model, kind, recipe, measured))


def save_packed(model: Model, folder: Path) -> None:
    """Write a fake-quant model with its weights as integers at their width: `qdetr_cli.packed`.

    Raises RunError for a float model, CheckpointError for a quantizer that does not round to its grid.
    """
    if model.plan is None or model.recipe is None:
        raise RunError(
            f"{model.detector.source}: is a float model, so there are no integers to pack; "
            "run `qdetr quantize` or `qdetr finetune` on it first"
        )
    write_packed(folder, model.module, _manifest(model, "packed", model.recipe, model.metrics))


def _manifest(model: Model, kind: Kind, recipe: Recipe, metrics: dict[str, Any] | None) -> Manifest:
    detector = model.detector
    return Manifest(
        kind=kind,
        family=model.family.name,
        recipe=recipe.to_dict(),
        plan={} if model.plan is None else model.plan.to_dict(),
        facts={} if model.facts is None else model.facts.to_dict(),
        class_names=detector.class_names,
        processor=detector.processor.to_config(),
        config=model_config(detector),
        source=Path(detector.source).name,
        versions=versions(),
        metrics=metrics,
    )


def versions() -> dict[str, str]:
    """What a result depends on."""
    return {
        "qdetr": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "transformers": transformers.__version__,
    }


def _fake_quant(folder: Path, manifest: Manifest, source: Source) -> Model:
    recipe = recipe_from_dict(manifest.recipe, source=str(folder))
    budget = budget_of([folder / WEIGHTS], str(folder))
    built = load_config_model(manifest.config, manifest.processor, budget)
    detector: Detector = replace(built, source=source.model)
    facts, plan = _planned(folder, manifest)
    try:
        rewrite(detector.model, plan, facts)
    except QDetrError:
        raise
    except Exception as error:  # a plan of another model makes torch raise nearly anything
        raise CheckpointError(
            f"{folder / MANIFEST}: its plan does not belong to its config ({first_line(error)})"
        ) from error
    packed = manifest.kind == "packed"
    (load_packed if packed else load_weights)(folder, detector.model)
    return Model(
        detector=detector, facts=facts, plan=plan, recipe=recipe, metrics=manifest.metrics, packed=packed
    )


def _planned(folder: Path, manifest: Manifest) -> tuple[GraphFacts, Plan]:
    try:
        return GraphFacts.from_dict(manifest.facts), Plan.from_dict(manifest.plan)
    except ValueError as error:
        raise CheckpointError(f"{folder / MANIFEST}: {first_line(error)}") from error


def _check_plugins(manifest: Manifest, source: Source) -> None:
    """Raise PluginError for a family or quantizers that nobody registered: a checkpoint imports nothing."""
    modules = Plan.from_dict(manifest.plan).modules if manifest.plan else ()
    used = {slot.format.quantizer for module in modules for slot in module.slots if slot.format}
    missing = [f"the quantizer {name}" for name in sorted(used - set(plugins.names("quantizer")))]
    if manifest.family not in plugins.names("family"):
        missing.insert(0, f"the family {manifest.family}")
    if missing:
        folders = recipe_from_dict(manifest.recipe, source=source.model).plugins or ("FOLDER",)
        raise PluginError(
            f"{source.model}: needs {' and '.join(missing)} of a plugin; a checkpoint imports nothing by "
            f"itself, so name where it lies: {' '.join(f'--plugins {folder}' for folder in folders)}"
        )


def _places(index: Sequence[int], data: DetectionData) -> list[str]:
    return [f"{name} is {place}" for name, place in zip(data.class_names, index, strict=True)]


def _unknown_classes(model: Model, data: DetectionData, way_out: str) -> DataError:
    missing = missing_classes(model.detector, data.class_names)
    known = _some(list(model.detector.class_names.values()))
    return DataError(f"{data.root}: the model has no class for {_some(missing)}; it knows {known}; {way_out}")


def _some(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
