"""Tiny detectors with every slot quantized, their inputs and all their outputs, for tests."""

import copy
from functools import cache, partial

import torch
from tiny_detectors import tiny_config
from torch import nn
from watched_products import seen, watched

from qdetr_cli.attention import QuantAttention
from qdetr_cli.calibrate import set_ranges
from qdetr_cli.checkpoint import load_config_model
from qdetr_cli.families import family_of
from qdetr_cli.fold import fold_batch_norms
from qdetr_cli.layers import Quantized
from qdetr_cli.plan import make_plan
from qdetr_cli.quantizers import FakeQuantizer
from qdetr_cli.recipe import OP_SLOTS, ROLES, recipe_from_dict
from qdetr_cli.rewrite import quantizers, rewrite, set_enabled
from qdetr_cli.trace import PRODUCTS, GraphFacts, trace

FLOAT_PRODUCTS = {  # D-FINE's expected distance over its bins; PP-DocLayout's order of pairs, and its masks
    "model.decoder.integral",
    "reading_order.relative_head",
    "model.decoder_global_pointer",
    "model.decoder",
    "model",
}
BITS = {slot: {"bits": 4} for slots in OP_SLOTS.values() for slot in slots}


def float_model(name: str, dropout: float = 0.2, gain: float = 1.0) -> nn.Module:
    """A tiny detector whose weights, biases and statistics are far from their initial zeros and ones."""
    config = tiny_config(name.removesuffix(", no denoising"))
    config |= {"dropout": dropout, "attention_dropout": dropout}
    if name.endswith("no denoising"):
        config["num_denoising"] = 0
    torch.manual_seed(0)
    model = load_config_model(config, None).model
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        elif key.endswith(("running_mean", "bias")):
            value.normal_(std=0.3)
        elif value.dim() > 1:
            value.normal_(std=gain * value[0].numel() ** -0.5)
    return model.eval()


def all_slots(facts: GraphFacts) -> dict:
    ops = {each.op for each in (*facts.layers, *facts.attentions)}
    rules = [{"op": op, **{slot: BITS[slot] for slot in OP_SLOTS[op]}} for op in sorted(ops)]
    return {"schema": 1, "rules": rules}


@cache
def rewritten(name: str) -> tuple:
    """The float model, the fake-quant model with every slot at 4 bits, its plan and its facts."""
    reference = float_model(name)
    model = copy.deepcopy(reference)
    family = family_of(model)
    facts = trace(model, family, (64, 96))
    plan = make_plan(recipe_from_dict(all_slots(facts), source="test"), facts)
    rewrite(model, plan, facts)
    return reference, model, plan, facts


def inputs(kind: str, batch: int = 3, size: tuple[int, int] = (96, 64), seed: int = 1) -> dict:
    """Pixels alone, with padding, or with padding and labels; sizes differ from the captured ones."""
    generator = torch.Generator().manual_seed(seed)
    given = {"pixel_values": torch.randn(batch, 3, *size, generator=generator)}
    if kind != "pixels":
        given["pixel_mask"] = torch.ones(batch, *size, dtype=torch.int64)
        given["pixel_mask"][0, :, size[1] // 2 :] = 0
        given["pixel_mask"][-1, size[0] // 2 :] = 0
    if kind == "labels":
        boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.3, 0.1, 0.2]])
        objects = {"class_labels": torch.tensor([0, 2]), "boxes": boxes}
        nothing = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
        given["labels"] = [objects] * (batch - 1) + [nothing]
    return given


def run(model: nn.Module, given: dict, training: bool) -> dict[str, torch.Tensor]:
    """Every tensor that the model gives, at any depth; statistics fixed, dropout and noise seeded."""
    for module in model.modules():
        module.training = training and not isinstance(module, nn.BatchNorm2d)
    torch.manual_seed(7)
    return dict(tensors("", dict(model(**given))))


def tensors(name: str, value):
    if isinstance(value, torch.Tensor):
        yield name, value.detach()
    elif isinstance(value, dict | list | tuple):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(f"{name}.{key}", each)


def calibrated(model: nn.Module, given: dict) -> nn.Module:
    set_ranges(model, lambda: model(**given))
    return model


@cache
def ready(name: str) -> nn.Module:
    """The same fake-quant model, calibrated, with every quantizer on. Not to be changed."""
    model = copy.deepcopy(rewritten(name)[1])
    set_enabled(model, None, True)
    return calibrated(model, inputs("pixels"))


def check_family(name: str) -> None:
    """All that holds for every family: exact while off, in each mode and at other sizes, quantized on."""
    check_equal_while_off(name, "pixels", False, batch=1, size=(128, 96))
    check_equal_while_off(name, "mask", False)
    check_equal_while_off(name, "mask" if untrainable(name) else "labels", True)
    check_products_are_quantized(name)
    check_all_take_part(name)
    check_the_plan_says_it_all(name)
    check_every_product_is_on_its_grids(name)


def untrainable(name: str) -> bool:
    return not family_of(rewritten(name)[0]).trainable


def check_equal_while_off(
    name: str, kind: str, training: bool, batch: int = 3, size: tuple[int, int] = (96, 64)
) -> None:
    """Every output and the loss: to the last bit once its batch norms are folded too, else up to rounding.

    Rounding may reorder what PP-DocLayout sorts, and choose among queries that score alike: then only what
    comes before is compared with the model whose batch norms are not folded.
    """
    reference, model, _, facts = rewritten(name)
    folded = copy.deepcopy(reference)
    fold_batch_norms(folded, facts.batch_norms)
    set_enabled(model, None, False)
    given = inputs(kind, batch, size)
    expected, exact, got = (run(each, given, training) for each in (reference, folded, model))
    assert got.keys() == exact.keys() == expected.keys()
    assert (".loss" in got) == (kind == "labels")
    reordered = untrainable(name) or chosen(exact) != chosen(expected)
    for key, value in got.items():
        assert torch.equal(value, exact[key]), key
        if reordered and not key.startswith((".encoder_last_hidden_state", ".enc_outputs_class")):
            continue
        torch.testing.assert_close(
            value, expected[key], rtol=1e-4, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}"
        )


def chosen(outputs: dict[str, torch.Tensor]) -> list:
    """Which tokens of each image a two-stage model makes its queries, the best first; else nothing."""
    if ".enc_outputs_class" not in outputs:
        return []
    queries = outputs[".logits"].shape[1]
    return outputs[".enc_outputs_class"].amax(-1).topk(queries).indices.tolist()


def check_products_are_quantized(name: str) -> None:
    """In the graphs: both operands of both products come from their quantizers, and no Linear is bypassed."""
    _, model, _, facts = rewritten(name)
    dense = [each.path for each in facts.attentions if each.op == "attention"]
    assert dense
    for path in dense:
        attention = model.get_submodule(path)
        assert isinstance(attention, QuantAttention)
        for captured in attention.captured.values():
            scores, mixed = [node for node in captured.graph.nodes if node.target in PRODUCTS]
            made_by = [source(node) for node in (*scores.args, *mixed.args)]
            assert made_by == ["q_quantizer", "k_quantizer", "probs_quantizer", "v_quantizer"]
            assert not any("linear" in str(node.target) for node in captured.graph.nodes)


def source(node) -> str:
    """The child that made a value, past dropout and reshapes."""
    while node.op != "call_module":
        node = node.args[0]
    return node.target


def check_all_take_part(name: str) -> None:
    """In a run: every quantizer is called, and in training, with padding and denoising, none meets -inf."""
    model = copy.deepcopy(rewritten(name)[1])
    set_enabled(model, None, False)
    largest: dict[str, float] = {}

    def watch(quantizer: FakeQuantizer, args: tuple) -> None:
        largest[quantizer.path] = max(largest.get(quantizer.path, 0.0), float(args[0].detach().abs().max()))

    for quantizer in quantizers(model).values():
        quantizer.register_forward_pre_hook(watch)
    run(model, inputs("pixels"), False)
    assert largest.keys() == quantizers(model).keys()
    run(model, inputs("mask" if untrainable(name) else "labels"), True)
    assert all(value < 1e6 for value in largest.values())


LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
TRAINING = "called in training alone: no prediction depends on it"


def check_the_plan_says_it_all(name: str) -> None:
    """No layer is left out: it is quantized, or the plan says why not; what is planned is in the model."""
    _, model, plan, _ = rewritten(name)
    planned = {path: module for module in plan.modules for path in (module.path, *module.aliases)}
    for path, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, LAYERS):
            assert isinstance(layer, Quantized) != bool(planned[path].reason), path
            assert layer.weight is model.get_submodule(planned[path].path).weight, path
    assert {module.role for module in plan.modules} <= set(ROLES)
    reasons = {module.path: module.reason for module in plan.modules if module.reason}
    assert {path for path, reason in reasons.items() if reason == TRAINING} == trained_alone(name)


def trained_alone(name: str) -> set[str]:
    """The layers that the float model calls in training and not in eval mode."""
    model = copy.deepcopy(rewritten(name)[0])
    called: dict[bool, set[str]] = {False: set(), True: set()}

    def note(module: nn.Module, _: tuple, path: str) -> None:
        called[module.training].add(path)

    for path, layer in model.named_modules():
        if isinstance(layer, LAYERS):
            layer.register_forward_pre_hook(partial(note, path=path))
    for training in (False, True):
        run(model, inputs("pixels"), training)
    return called[True] - called[False]


def check_every_product_is_on_its_grids(name: str) -> None:
    """In a run with all quantizers on, watched below PyTorch's functions: both operands of every product.

    What the plan does not know must be one of the few products that are no layer and no attention.
    """
    _, _, plan, facts = rewritten(name)
    model = ready(name).eval()
    samplers = tuple(each.path for each in facts.attentions if each.op == "deformable")
    with watched(model, samplers) as watch:
        model(**inputs("mask", 2, (64, 96)))
    found, strange = seen(model, plan, watch.products)
    assert all(operand.quantized and operand.on_grid for operand in found)
    slots = {(module.path, slot.slot) for module in plan.modules for slot in module.slots if slot.format}
    assert {(operand.path, operand.slot) for operand in found} == slots
    assert {product.path for product in strange} <= FLOAT_PRODUCTS
