"""Which repository a file comes from, told by its keys, and what to say of one that nobody here reads."""

import argparse
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qdetr_cli import plugins
from qdetr_cli.errors import CheckpointError
from qdetr_cli.original import d_fine, detr, rf_detr, rt_detr
from qdetr_cli.original.names import Original, OriginalFile, State


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The files of one repository."""

    repository: str
    families: tuple[str, ...]  # of the models that are read from them
    marks: tuple[str, ...]  # each of these patterns is found in a tensor name
    read: Callable[[OriginalFile], Original]
    settings: tuple[str, ...]  # what a user may say of a file that does not say it


LAYOUTS = (  # the first whose marks are all there
    Layout(
        repository="Peterande/D-FINE",
        families=("d_fine",),
        marks=d_fine.MARKS,
        read=d_fine.read_d_fine,
        settings=(*d_fine.SETTINGS, "decoder_layers"),
    ),
    Layout(
        repository="lyuwenyu/RT-DETR (RT-DETRv2)",
        families=("rt_detr_v2",),
        marks=rt_detr.V2_MARKS,
        read=rt_detr.read_rt_detr_v2,
        settings=(*rt_detr.V2_SETTINGS, "decoder_layers"),
    ),
    Layout(
        repository="lyuwenyu/RT-DETR",
        families=("rt_detr",),
        marks=rt_detr.MARKS,
        read=rt_detr.read_rt_detr,
        settings=(*rt_detr.SETTINGS, "decoder_layers"),
    ),
    Layout(
        repository="roboflow/rf-detr",
        families=("rf_detr",),
        marks=rf_detr.MARKS,
        read=rf_detr.read_rf_detr,
        settings=rf_detr.SETTINGS,
    ),
    Layout(
        repository="facebookresearch/detr",
        families=("detr", "table-transformer"),
        marks=detr.MARKS,
        read=detr.read_detr,
        settings=tuple(detr.SETTINGS),
    ),
)
for _each in LAYOUTS:
    plugins.register("layout", _each.repository)(_each)
RESEMBLES: tuple[tuple[str, tuple[str, ...]], ...] = (  # (what it looks like, marks); the first that fits
    ("Ultralytics (ultralytics/ultralytics)", (r"^model\.\d+\.",)),
    ("MMDetection (open-mmlab/mmdetection)", (r"^bbox_head\.",)),
    ("detrex (IDEA-Research/detrex)", (r"^transformer\.(?:en|de)coder\.layers\.\d+\.attentions\.\d+\.",)),
    ("a Hugging Face state dict without its config.json", (r"(?:encoder|self)_attn_layer_norm\.",)),
    ("a deployed D-FINE or RT-DETR, its batch norms folded", (r"\.conv_bn_fused\.",)),
    ("DEIMv2 (Intellindust-AI-Lab/DEIMv2)", (r"^decoder\.dec_score_head\.", r"\.swish_ffn\.")),
    ("Conditional-DETR (Atten4Vis/ConditionalDETR)", (r"\.ca_qcontent_proj\.", r"^query_embed\.weight$")),
    ("DAB-DETR (IDEA-Research/DAB-DETR)", (r"\.ca_qcontent_proj\.", r"^(?:transformer\.)?refpoint_embed\.")),
    ("DINO (IDEA-Research/DINO)", (r"\.sampling_offsets\.", r"^(?:label_enc|transformer\.tgt_embed)\.")),
    ("LW-DETR (Atten4Vis/LW-DETR)", (r"^transformer\.enc_out_class_embed\.",)),
    ("Deformable-DETR (fundamentalvision/Deformable-DETR)", (r"\.sampling_offsets\.", r"^transformer\.")),
    ("DETR for segmentation (facebookresearch/detr)", (r"^(?:detr\.|mask_head\.|bbox_attention\.)",)),
    ("YOLOS (hustvl/YOLOS)", (r"^backbone\.det_token$",)),
    ("a torchvision detector", (r"^backbone\.body\.|^rpn\.",)),
)
WEIGHTS = (
    ("ema", "module"),
    ("ema",),
    ("model",),
    ("ema_model",),
    ("state_dict",),
    (),
)  # as repositories prefer
PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+")  # of distributed training and of torch.compile
MANY = 4  # tensor names that an error lists


def read_content(path: Path, content: Any, settings: Mapping[str, Any]) -> Original:
    """The model in what `torch.load` gave. Raises CheckpointError for layouts that are not supported.

    Averaged weights come first, as RT-DETR and D-FINE load them; a note says so where there are others too.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not a dict of tensors; {_supported()}"
        )
    found = {".".join(place): _tensors(path, content, place) for place in WEIGHTS}
    places = {place: state for place, state in found.items() if state}
    wanted = settings.get("weights")
    if wanted is not None and wanted not in places:
        raise CheckpointError(f"{path}: has no weights under {wanted!r}; it has them under {_list(places)}")
    for place, state in places.items():
        layout = _layout(state)
        if layout and wanted in (None, place):
            _refuse_foreign(path, layout, settings)
            args = content.get("args")
            said = vars(args) if isinstance(args, argparse.Namespace) else {}
            original = layout.read(OriginalFile(state=state, args=said, settings=settings))
            return replace(original, notes=(*_choice(place, list(places)), *original.notes))
    raise CheckpointError(_unknown(path, content, next(iter(places.values()), State(path))))


def layouts() -> tuple[Layout, ...]:
    """All that are registered, in the order of trial: what a plugin brought, it knows best."""
    added = (entry for entry in plugins.entries() if entry.kind == "layout" and entry.origin != "built-in")
    return (*(entry.object for entry in added), *LAYOUTS)


def _tensors(path: Path, content: Mapping[str, Any], place: tuple[str, ...]) -> State:
    """The tensors at this place in float32, without the prefixes of wrappers; empty if there are none."""
    inner: Any = content
    for key in place:
        inner = inner.get(key) if isinstance(inner, Mapping) else None
    if not isinstance(inner, Mapping):
        return State(path)
    named = ((PREFIX.sub("", str(name)), value) for name, value in inner.items())
    return State(path, ((name, _float(value)) for name, value in named if isinstance(value, Tensor)))


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _layout(state: State) -> Layout | None:
    return next((layout for layout in layouts() if _fits(layout.marks, state)), None)


def _fits(marks: Iterable[str], names: Iterable[str]) -> bool:
    return all(any(re.search(mark, name) for name in names) for mark in marks)


def _choice(place: str, places: list[str]) -> tuple[str, ...]:
    if len(places) < 2:
        return ()
    averaged = ", the averaged ones," if place.startswith("ema") else ""
    return (f"the file holds weights under {_list(places)}: {place}{averaged} is used",)


def _refuse_foreign(path: Path, layout: Layout, settings: Mapping[str, Any]) -> None:
    own = (*layout.settings, "weights")
    if foreign := [name for name, value in settings.items() if value is not None and name not in own]:
        raise CheckpointError(
            f"{path}: {_list(foreign)} cannot be set for a file of {layout.repository}; its settings are "
            f"{_list(own)}"
        )


def _unknown(path: Path, content: Mapping[str, Any], state: State) -> str:
    like = next((f"it looks like {what}; " for what, marks in RESEMBLES if _fits(marks, state)), "")
    keys, first = _list(sorted(map(str, content))[:MANY]), _list(sorted(state)[:MANY])
    tensors = f"its {len(state)} tensors begin with {first}" if state else "it has no tensors"
    return (
        f"{path}: is of a layout that qdetr does not read; its keys: {keys}; {tensors}; {like}{_supported()}"
    )


def _list(names: Iterable[str]) -> str:
    return ", ".join(name or "the top level" for name in names)


def _supported() -> str:
    return (
        f"supported are files of {_list(layout.repository for layout in layouts())}; "
        "other detectors are loaded from a Hugging Face folder"
    )
