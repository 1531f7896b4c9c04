"""AdamW's groups: which rate and which decay a parameter gets."""

import pytest
import torch
from tiny_detectors import CONFIGS, tiny_config
from torch import nn

from qdetr_cli.alignment import DistributionAlignment
from qdetr_cli.checkpoint import load_config_model
from qdetr_cli.families import FAMILIES
from qdetr_cli.layers import QuantLinear
from qdetr_cli.rates import parameter_groups
from qdetr_cli.recipe import QuantFormat, Train

DETR = FAMILIES["detr"]
WEIGHT = QuantFormat(bits=4, symmetric=True, unsigned=False, per="channel", quantizer="lsq", init="mse")
INPUT = QuantFormat(bits=4, symmetric=False, unsigned=False, per="tensor", quantizer="lsq", init="mse")
TRAIN = Train(lr=1e-3, backbone_lr=1e-4, quantizer_lr=1e-2, weight_decay=0.1)


class Net(nn.Module):
    """Paths are those of a DETR, so that roles are found."""

    def __init__(self) -> None:
        super().__init__()
        quantized = QuantLinear.from_float(nn.Linear(3, 2), weight=WEIGHT, input=INPUT)
        self.model = nn.ModuleDict({"backbone": nn.ModuleDict({"conv": nn.Linear(2, 3), "quant": quantized})})
        self.class_labels_classifier = nn.Linear(3, 1)
        self.q_alignment = DistributionAlignment(2, 4, axis=-1)
        self.q_alignment.path = "q_alignment"


def found(net: nn.Module, train: Train = TRAIN) -> dict[str, tuple[float, float]]:
    """Learning rate and decay of every parameter that is in a group, by its name."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = parameter_groups(net, DETR, train)
    assert all(group["lr"] == group["base_lr"] for group in groups)
    entries = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(entries) == len(dict(entries)), "each is in one group"
    return dict(entries)


def test_backbone_and_rest_have_their_rates_and_vectors_do_not_decay():
    rates = found(Net())
    assert rates["model.backbone.conv.weight"] == (1e-4, 0.1)
    assert rates["model.backbone.conv.bias"] == (1e-4, 0.0)
    assert rates["class_labels_classifier.weight"] == (1e-3, 0.1)
    assert rates["class_labels_classifier.bias"] == (1e-3, 0.0)
    assert set(rates) == {name for name, _ in Net().named_parameters()}


def test_an_alignment_does_not_decay_though_it_is_a_matrix():
    net = nn.ModuleDict({"attention": Net()})
    rates = found(net)
    assert rates["attention.q_alignment.gamma"] == (1e-3, 0.0)
    assert rates["attention.q_alignment.beta"] == (1e-3, 0.0)


@pytest.mark.parametrize(
    ("steps", "size"),
    [([0.5, 0.5], 0.5), ([0.25, 0.75], 0.5), ([0.002, 0.002], 2.0**-9), ([3.0, 3.0], 4.0)],
    ids=["a power of two", "the mean", "to the nearest below", "to the nearest above"],
)
def test_a_steps_rate_is_relative_to_its_size(steps, size):
    """Also in the backbone; log2(0.002) = -8.97, log2(3) = 1.58."""
    net = Net()
    quantized = net.model["backbone"]["quant"]
    with torch.no_grad():
        quantized.weight_quantizer.step.copy_(torch.tensor(steps))
        quantized.input_quantizer.step.fill_(0.125)
    rates = found(net)
    assert rates["model.backbone.quant.weight_quantizer.step"] == (pytest.approx(1e-2 * size), 0.0)
    assert rates["model.backbone.quant.input_quantizer.step"] == (pytest.approx(1e-2 * 0.125), 0.0)
    assert rates["model.backbone.quant.input_quantizer.offset"] == (pytest.approx(1e-2 * 7), 0.0)


def test_a_frozen_parameter_is_in_no_group():
    net = Net()
    net.class_labels_classifier.weight.requires_grad_(False)
    assert "class_labels_classifier.weight" not in found(net)


# where transformers keeps the backbone of each family, with what is no backbone in there
PROJECTIONS = ("model.conv_encoder.encoder_input_proj.", "model.conv_encoder.fusion_proj.")
PLACES = {"deimv2": ("model.conv_encoder.", PROJECTIONS)}
VIT = {"lw_detr": ("model.backbone.backbone.", "-"), "rf_detr": ("model.backbone.backbone.", "-")}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "yolos"], ids=str)
def test_the_backbone_of_each_family_has_its_rate(name):
    detector = load_config_model(tiny_config(name), None)
    start, but = (PLACES | VIT).get(detector.family.name, ("model.backbone.", "-"))
    groups = parameter_groups(detector.model, detector.family, Train(lr=1e-3, backbone_lr=1e-4))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    slow = {n for n, p in detector.model.named_parameters() if rates.get(id(p)) == 1e-4}
    assert slow
    assert slow == {
        n
        for n, p in detector.model.named_parameters()
        if p.requires_grad and n.startswith(start) and not n.startswith(but)
    }
