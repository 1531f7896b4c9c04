"""The backbones of the RT-DETR line: ResNet-vd and HGNetV2, from their shapes under in-memory names."""

from typing import Any

from qdetr_cli.original.names import OriginalFile, Renames, State

BODY = "model.backbone.model."
STAGES = rf"{BODY}encoder.stages."
INSIDE = r"^(model\.backbone\..*)"

RESNET: Renames = (  # conv1_1..3 count from one, modules from zero
    (r"^backbone\.conv1\.conv1_1\.", f"{BODY}embedder.embedder.0."),
    (r"^backbone\.conv1\.conv1_2\.", f"{BODY}embedder.embedder.1."),
    (r"^backbone\.conv1\.conv1_3\.", f"{BODY}embedder.embedder.2."),
    (r"^backbone\.res_layers\.(\d+)\.blocks\.", rf"{STAGES}\1.layers."),
    (INSIDE + r"\.branch2a\.", r"\1.layer.0."),
    (INSIDE + r"\.branch2b\.", r"\1.layer.1."),
    (INSIDE + r"\.branch2c\.", r"\1.layer.2."),
    (INSIDE + r"\.short\.conv\.(?=conv|norm)", r"\1.shortcut.1."),  # after a pooling
    (INSIDE + r"\.short\.", r"\1.shortcut."),
)
HGNET: Renames = (
    (r"^backbone\.stem\.", f"{BODY}embedder."),
    (r"^backbone\.stages\.", STAGES),
    (INSIDE + r"\.aggregation_squeeze_conv\.", r"\1.aggregation.0."),  # RT-DETRv2's names
    (INSIDE + r"\.aggregation_excitation_conv\.", r"\1.aggregation.1."),
    (INSIDE + r"\.conv\.1\.", r"\1.conv."),  # after a padding
)
BACKBONES: Renames = (
    *RESNET,
    *HGNET,
    (INSIDE + r"\.conv\.(?=weight)", r"\1.convolution."),
    (INSIDE + r"\.(?:norm|bn)\.", r"\1.normalization."),
)


def backbone_config(file: OriginalFile, state: State, levels: int) -> dict[str, Any]:
    """The `backbone_config` that gives the network's last `levels` stages.

    Raises CheckpointError for other networks.
    """
    if f"{BODY}embedder.embedder.2.convolution.weight" in state:
        config = _resnet(state)
    elif f"{BODY}embedder.stem1.convolution.weight" in state:
        config = _hgnet(state)
    else:
        names = sorted(name for name in file.state if name.startswith("backbone."))
        raise file.fail(
            f"the backbone (with {', '.join(names[:3])}) is not one that qdetr reads; it reads ResNet-vd "
            "(PResNet, variant d) and HGNetV2"
        )
    stages = len(config["depths"])
    return config | {"out_indices": list(range(stages + 1 - levels, stages + 1))}


def _stages(state: State) -> range:
    return range(state.count(rf"{STAGES}(\d+)\."))


def _resnet(state: State) -> dict[str, Any]:
    bottleneck = f"{STAGES}0.layers.0.layer.2.convolution.weight" in state
    last = f"layers.0.layer.{2 if bottleneck else 1}.convolution.weight"
    return {
        "model_type": "rt_detr_resnet",
        "embedding_size": state.rows(f"{BODY}embedder.embedder.2.convolution.weight"),
        "hidden_sizes": [state.rows(f"{STAGES}{stage}.{last}") for stage in _stages(state)],
        "depths": [state.count(rf"{STAGES}{stage}\.layers\.(\d+)\.") for stage in _stages(state)],
        "layer_type": "bottleneck" if bottleneck else "basic",
    }


def _hgnet(state: State) -> dict[str, Any]:
    stem = [state.rows(f"{BODY}embedder.{name}.convolution.weight") for name in ("stem1", "stem4")]
    first = [f"{STAGES}{stage}.blocks.0." for stage in _stages(state)]
    light = [f"{block}layers.0.conv1.convolution.weight" in state for block in first]
    inner = [
        state[f"{block}layers.0.{'conv2.' if is_light else ''}convolution.weight"]
        for block, is_light in zip(first, light, strict=True)
    ]  # (mid, in or 1, k, k)
    outputs = [state.rows(f"{block}aggregation.1.convolution.weight") for block in first]
    blocks = [state.count(rf"{STAGES}{stage}\.blocks\.(\d+)\.") for stage in _stages(state)]
    return {
        "model_type": "hgnet_v2",
        "embedding_size": stem[1],
        "hidden_sizes": outputs,
        "depths": blocks,
        "stem_channels": [3, *stem],
        "stage_in_channels": [stem[1], *outputs[:-1]],
        "stage_mid_channels": [tensor.shape[0] for tensor in inner],
        "stage_out_channels": outputs,
        "stage_num_blocks": blocks,
        "stage_downsample": [
            f"{STAGES}{stage}.downsample.convolution.weight" in state for stage in _stages(state)
        ],
        "stage_light_block": light,
        "stage_kernel_size": [tensor.shape[-1] for tensor in inner],
        "stage_numb_of_layers": [state.count(rf"{block}layers\.(\d+)\.") for block in first],
        "use_learnable_affine_block": any(name.endswith(".lab.scale") for name in state),
    }
