"""Detector configs on disk, repaired so that transformers 5 builds from them without asking any hub.

Configs of the transformers-4 era name a backbone (`backbone`, `use_timm_backbone`, `backbone_kwargs`) where
transformers 5 wants an explicit `backbone_config`; given the name, it looks the backbone up on the hub, or
crashes on `backbone_kwargs: null`.
"""

import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from qdetr_cli.errors import CheckpointError
from qdetr_cli.families import family_of

# transformers' own backbones that old configs name by hub id: microsoft/resnet-50 and its siblings
RESNETS: dict[str, dict[str, Any]] = {
    "18": {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
    "34": {"layer_type": "basic", "depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 256, 512]},
    "50": {"layer_type": "bottleneck", "depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]},
    "101": {"layer_type": "bottleneck", "depths": [3, 4, 23, 3], "hidden_sizes": [256, 512, 1024, 2048]},
    "152": {"layer_type": "bottleneck", "depths": [3, 8, 36, 3], "hidden_sizes": [256, 512, 1024, 2048]},
}
DROPPED = ("backbone", "use_timm_backbone", "use_pretrained_backbone", "backbone_kwargs")
NOT_STRUCTURE = (
    "dtype",
    "torch_dtype",
    "auto_map",
    "_name_or_path",
    "attn_implementation",
    "quantization_config",
)


def build_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """The transformers config of a supported family, from the dict that stands in `config.json`.

    Raises CheckpointError for an unknown `model_type` and for values that the family's config refuses.
    """
    family = family_of(str(config.get("model_type")))
    try:
        return family.kind.config_class.from_dict(repair(config))
    except CheckpointError:
        raise
    except Exception as error:  # the config classes raise many types; all mean that the file is not theirs
        raise CheckpointError(f"config.json: transformers refuses it for {family.name}: {error}") from error


def repair(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` with an explicit `backbone_config`, without dtype and remote code."""
    repaired = _structure(config)
    old = {key: repaired.pop(key) for key in DROPPED if key in repaired}
    explicit = repaired.get("backbone_config")
    if explicit:
        repaired["backbone_config"] = _without_download(explicit)
    elif old.get("backbone"):
        repaired["backbone_config"] = _named_backbone(old, repaired)
    elif old.get("use_timm_backbone") is not None:
        repaired["use_timm_backbone"] = bool(old["use_timm_backbone"])  # says which default backbone is meant
    return repaired


def _without_download(backbone: Mapping[str, Any]) -> dict[str, Any]:
    if backbone.get("model_type") not in CONFIG_MAPPING:
        raise CheckpointError(
            f"config.json: transformers has no backbone_config.model_type {backbone.get('model_type')!r}"
        )
    repaired = _structure(backbone)
    if repaired["model_type"] == "timm_backbone":
        _check_name(repaired.get("backbone"))
        repaired["use_pretrained_backbone"] = False
    return repaired


def _structure(config: Mapping[str, Any]) -> dict[str, Any]:
    """What describes the network. `_attn_implementation` and its like are left out: they may name code."""
    return {
        key: _structure(value) if key.endswith("_config") and isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in NOT_STRUCTURE and not key.startswith("_")
    }


def _check_name(name: object) -> None:
    """Raise CheckpointError for what is no name of a timm network: `hf-hub:owner/name` would be fetched."""
    if not isinstance(name, str) or re.fullmatch(r"[\w.-]+", name) is None:
        raise CheckpointError(f"config.json: backbone {name!r} is no name of a timm network")


def _named_backbone(old: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    name = str(old["backbone"])
    options = dict(old.get("backbone_kwargs") or {})
    if name.startswith("microsoft/resnet-") and name.rpartition("-")[2] in RESNETS:
        options.setdefault("out_features", ["stage4"])
        return {"model_type": "resnet", **RESNETS[name.rpartition("-")[2]], **options}
    if "/" in name:
        raise CheckpointError(
            f"config.json: backbone {name!r} is a hub id and its structure is not in the file; load it "
            "with transformers online and save_pretrained it, which writes an explicit backbone_config"
        )
    return timm_backbone(
        name,
        out_indices=options.get("out_indices") or _out_indices(config),
        output_stride=options.get("output_stride") or (16 if config.get("dilation") else None),
        num_channels=options.get("num_channels")
        or options.get("in_chans")
        or config.get("num_channels")
        or 3,
    )


def _out_indices(config: Mapping[str, Any]) -> list[int]:
    if config["model_type"] in ("rt_detr", "rt_detr_v2", "d_fine", "deimv2"):
        return [2, 3, 4]
    if config["model_type"] == "deformable_detr":
        return [2, 3, 4] if config.get("num_feature_levels", 4) > 1 else [4]
    return [1, 2, 3, 4]


def timm_backbone(
    name: str, *, out_indices: list[int], output_stride: int | None = None, num_channels: int = 3
) -> dict[str, Any]:
    """The `backbone_config` of a timm network that is built with random weights, nothing downloaded."""
    _check_name(name)
    config = {
        "model_type": "timm_backbone",
        "backbone": name,
        "num_channels": num_channels,
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": list(out_indices),
    }
    return config if output_stride is None else {**config, "output_stride": output_stride}
