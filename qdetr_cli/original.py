"""facebookresearch/detr `.pth` files (release and training files) -> config and state dict of transformers.

Everything is read from names and shapes but the number of heads and the dilation of the last stage (DC5),
which training files say in `args`. Pre-norm models become Table Transformers, transformers' pre-norm DETR.
"""

import argparse
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdetr_cli.coco_names import COCO_91
from qdetr_cli.configs import timm_backbone
from qdetr_cli.errors import CheckpointError

# (blocks of layer1..4, bottleneck) -> network, for timm and torchvision, which name and build them alike
RESNETS: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
DEFAULTS: dict[str, Any] = {"heads": 8, "dilation": False, "pre_norm": False}  # DETR, arXiv 2005.12872, A.4
SUPPORTED = "supported are facebookresearch/detr files; load other detectors from a Hugging Face folder"
BODY = "backbone.0.body."
NEEDED = ("class_embed.weight", "query_embed.weight", "input_proj.weight", f"{BODY}conv1.weight")

Renames = tuple[tuple[str, str], ...]
COMMON: Renames = (
    (r"^input_proj\.", "model.input_projection."),
    (r"^query_embed\.", "model.query_position_embeddings."),
    (r"^class_embed\.", "class_labels_classifier."),
    (r"^bbox_embed\.", "bbox_predictor."),
    (r"^transformer\.decoder\.norm\.", "model.decoder.layernorm."),
    (r"^transformer\.encoder\.norm\.", "model.encoder.layernorm."),
    (r"^transformer\.", "model."),
    (r"^(model\.decoder\.layers\.\d+\.)norm2\.", r"\1encoder_attn_layer_norm."),
    (r"^(model\.decoder\.layers\.\d+\.)norm3\.", r"\1final_layer_norm."),
    (r"^(model\.encoder\.layers\.\d+\.)norm2\.", r"\1final_layer_norm."),
    (r"\.norm1\.", ".self_attn_layer_norm."),
    (r"\.multihead_attn\.", ".encoder_attn."),
)
DETR: Renames = (
    (r"^backbone\.0\.body\.", "model.backbone.model."),
    (r"^backbone\.1\.row_embed\.", "model.position_embedding.row_embeddings."),
    (r"^backbone\.1\.col_embed\.", "model.position_embedding.column_embeddings."),
    *COMMON,
    (r"\.out_proj\.", ".o_proj."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
)
PRE_NORM: Renames = (
    (r"^backbone\.0\.body\.", "model.backbone.conv_encoder.model."),
    *COMMON,
    (r"\.linear([12])\.", r".fc\1."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """What an original file holds, in the words of transformers."""

    config: dict[str, Any]
    state: dict[str, Tensor]  # in-memory names
    notes: tuple[str, ...]  # what was assumed


def read_original(
    path: Path, *, heads: int | None = None, dilation: bool | None = None, pre_norm: bool | None = None
) -> Original:
    """A facebookresearch/detr file. Raises CheckpointError for other layouts and for pickles that run code.

    The options stand in for what the file does not say; one that contradicts the file is an error.
    """
    content = read_pickle(path)
    state = _state(path, content)
    args = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
    has_encoder_norm = "transformer.encoder.norm.weight" in state  # the original builds it for pre-norm only
    settled = {
        "heads": _settle(path, "heads", args.get("nheads"), heads),
        "dilation": _settle(path, "dilation", args.get("dilation"), dilation),
        "pre_norm": _settle(path, "pre_norm", has_encoder_norm, pre_norm),
    }
    assumed = [f"{name} {DEFAULTS[name]}" for name, value in settled.items() if value is None]
    chosen = DEFAULTS | {name: value for name, value in settled.items() if value is not None}
    return Original(
        config=_config(path, state, **chosen),
        state=rename(state, PRE_NORM if chosen["pre_norm"] else DETR),
        notes=(f"the file does not say {' and '.join(assumed)}: assumed, as in DETR",) if assumed else (),
    )


def read_pickle(path: Path) -> dict[str, Any]:
    """The dict in a torch file, read without running any code of the file.

    Only tensors, plain containers and `argparse.Namespace` are allowed; all else raises CheckpointError.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from error
    except Exception as error:  # a damaged file makes torch, zipfile and struct raise nearly anything
        raise CheckpointError(
            f"{path}: is not a file that torch.save wrote, or it is damaged ({error})"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dict of tensors; {SUPPORTED}")
    return content


def rename(state: Mapping[str, Tensor], renames: Renames) -> dict[str, Tensor]:
    """The state under the names of transformers; packed attention projections come out as q, k and v."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if ".in_proj_" in name:  # rows q, k, v: (3D, D) or (3D,)
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".in_proj_", f".{letter}_proj.")] = third.clone()
        else:
            renamed[name] = tensor
    return renamed


def _refusal(path: Path, message: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", message)
    what = f"names {found[1]}" if found else "does more than hold tensors"
    return (
        f"{path}: refused, because its pickle {what}; qdetr runs no code from a checkpoint and reads only "
        "tensors, plain containers and argparse.Namespace. If you trust the file, load it elsewhere and save "
        'torch.save({"model": state_dict}, path)'
    )


def _state(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's state dict without the prefix of distributed training. Other layouts are refused."""
    found = content.get("model", content)
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path}: 'model' is a {type(found).__name__}, not a state dict; {SUPPORTED}")
    state = {str(name).removeprefix("module."): value for name, value in found.items()}
    lacking = [name for name in NEEDED if not isinstance(state.get(name), Tensor)]
    if lacking:
        raise CheckpointError(
            f"{path}: is not a facebookresearch/detr checkpoint: it lacks {', '.join(lacking)}; its keys: "
            f"{', '.join(sorted(map(str, content))[:6])}; first tensors: {', '.join(sorted(state)[:4])}; "
            + SUPPORTED
        )
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _settle(path: Path, name: str, said: Any, option: Any) -> Any:
    """What the file says, else the option, else None. Raises CheckpointError where they differ."""
    if said is not None and option is not None and said != option:
        raise CheckpointError(f"{path}: was trained with {name} {said}; {name} {option} contradicts it")
    return option if said is None else said


def _config(
    path: Path, state: Mapping[str, Tensor], *, heads: int, dilation: bool, pre_norm: bool
) -> dict[str, Any]:
    """The transformers config, from the shapes. The head has one row more than classes, "no object"."""
    width = state["input_proj.weight"].shape[0]
    if width % heads:
        raise CheckpointError(f"{path}: {heads} heads do not divide the width {width}; give the right heads")
    classes = state["class_embed.weight"].shape[0] - 1
    learned = "backbone.1.row_embed.weight" in state
    if learned and pre_norm:
        raise CheckpointError(f"{path}: is pre-norm with learned positions, which transformers cannot run")
    names = COCO_91 if classes == len(COCO_91) else {index: f"class {index}" for index in range(classes)}
    return {
        "model_type": "table-transformer" if pre_norm else "detr",
        "d_model": width,
        "num_queries": state["query_embed.weight"].shape[0],
        "encoder_layers": _count(state, r"^transformer\.encoder\.layers\.(\d+)\."),
        "decoder_layers": _count(state, r"^transformer\.decoder\.layers\.(\d+)\."),
        "encoder_ffn_dim": state["transformer.encoder.layers.0.linear1.weight"].shape[0],
        "decoder_ffn_dim": state["transformer.decoder.layers.0.linear1.weight"].shape[0],
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "position_embedding_type": "learned" if learned else "sine",
        "auxiliary_loss": False,  # on, transformers computes other predictions than the original
        "dilation": dilation,
        "backbone_config": timm_backbone(
            _backbone(path, state), out_indices=[1, 2, 3, 4], output_stride=16 if dilation else None
        ),
        "id2label": names,
        "label2id": {name: index for index, name in names.items()},
    }


def _backbone(path: Path, state: Mapping[str, Tensor]) -> str:
    """The network's name in timm, from its blocks in each stage."""
    depths = tuple(_count(state, rf"^backbone\.0\.body\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    bottleneck = f"{BODY}layer1.0.conv3.weight" in state
    name = RESNETS.get((depths, bottleneck))
    if name is None:
        raise CheckpointError(
            f"{path}: the backbone has {depths} {'bottleneck' if bottleneck else 'basic'} blocks; known are "
            f"{', '.join(RESNETS.values())}"
        )
    return name


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({found[1] for name in state if (found := re.match(pattern, name))})
