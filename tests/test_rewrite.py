"""The fake-quant model: the float model while its quantizers are off, quantized everywhere while on."""

import copy

import pytest
import torch
from quantized_detectors import (
    all_slots,
    check_all_take_part,
    check_equal_while_off,
    check_products_are_quantized,
    inputs,
    ready,
    rewritten,
    run,
)
from torch import nn
from torch.nn import functional as F

from qdetr_cli.attention import QuantAttention, QuantDeformable
from qdetr_cli.errors import RunError
from qdetr_cli.families import family_of
from qdetr_cli.layers import QuantLinear
from qdetr_cli.plan import make_plan
from qdetr_cli.recipe import recipe_from_dict
from qdetr_cli.recording import describe
from qdetr_cli.rewrite import quantizers, rewrite, set_enabled
from qdetr_cli.trace import trace

NAMES = ["detr", "detr, timm", "conditional_detr", "rt_detr", "d_fine"]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", ["pixels", "mask", "labels"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_float_model_while_off(name: str, kind: str, training: bool) -> None:
    check_equal_while_off(name, kind, training)


@pytest.mark.parametrize("name", NAMES)
def test_every_product_has_quantized_operands(name: str) -> None:
    check_products_are_quantized(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_quantizer_takes_part_and_none_sees_a_mask(name: str) -> None:
    check_all_take_part(name)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("size", [(64, 64), (96, 224)], ids=str)
@pytest.mark.parametrize("name", ["detr", "conditional_detr", "d_fine"])
def test_equals_at_any_size_and_batch(name: str, size: tuple[int, int], batch: int) -> None:
    reference, model, _, _ = rewritten(name)
    set_enabled(model, None, False)
    given = inputs("mask", batch, size)
    expected, got = run(reference, given, False), run(model, given, False)
    assert expected[".logits"].std() > 0.01
    for key in (".logits", ".pred_boxes"):
        torch.testing.assert_close(got[key], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_trains(name: str) -> None:
    """Every step and offset gets a finite gradient from the family's own loss, most of them not 0."""
    model = copy.deepcopy(ready(name)).train()
    loss = model(**inputs("labels")).loss
    loss.backward()
    gradients = [p.grad for q in quantizers(model).values() for p in q.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert sum(bool(gradient.any()) for gradient in gradients) > 0.6 * len(gradients)


def test_exports_as_a_whole_when_calibrated() -> None:
    """Without a mask: transformers drops its mask of ones in eager mode, but keeps it while tracing."""
    model, given = ready("conditional_detr").eval(), inputs("pixels", 2, (64, 64))
    with torch.no_grad():
        expected = model(**given)
        program = torch.export.export(model, (), given, strict=False)
        got = program.module()(**given)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.pred_boxes, expected.pred_boxes, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_the_float_models_and_the_quantizers(name: str) -> None:
    reference, model, _, facts = rewritten(name)
    folded = {f"{conv}.bias" for conv, _ in facts.batch_norms}
    gone = tuple(f"{norm}." for _, norm in facts.batch_norms)
    kept = {key for key in reference.state_dict() if not key.startswith(gone)}
    added = set(model.state_dict()) - kept
    assert kept <= set(model.state_dict())
    assert folded <= added
    assert all(key.split(".")[-2].endswith("_quantizer") for key in added - folded)
    assert all(quantizer.path == path for path, quantizer in quantizers(model).items())


def test_two_rewrites_have_the_same_names_and_load_each_other() -> None:
    reference, model, plan, facts = rewritten("detr")
    again = copy.deepcopy(reference)
    rewrite(again, plan, facts)
    again.load_state_dict(ready("detr").state_dict())
    given = inputs("mask")
    assert list(again.state_dict()) == list(model.state_dict())
    assert torch.equal(again(**given).logits, ready("detr").eval()(**given).logits)


def test_a_copy_is_independent() -> None:
    model = ready("detr")
    twin = copy.deepcopy(model)
    before = model(**inputs("mask")).logits
    assert torch.equal(twin(**inputs("mask")).logits, before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(**inputs("mask")).logits, before)
    assert not torch.equal(twin(**inputs("mask")).logits, before)


def test_attention_stays_an_instance_of_its_class() -> None:
    reference, model, _, facts = rewritten("rt_detr")
    for each in facts.attentions:
        mixin = QuantAttention if each.op == "attention" else QuantDeformable
        attention = model.get_submodule(each.path)
        assert isinstance(attention, type(reference.get_submodule(each.path)))
        assert isinstance(attention, mixin)


@pytest.mark.parametrize("name", ["conditional_detr", "d_fine"])
def test_switches_go_by_module_path(name: str) -> None:
    _, model, plan, _ = rewritten(name)
    model = copy.deepcopy(model)
    assert {path.rpartition(".")[0] for path in quantizers(model)} == {
        m.path for m in plan.modules if not m.is_float
    }
    chosen = [module.path for module in plan.modules if module.role.startswith("decoder")]
    set_enabled(model, None, False)
    set_enabled(model, chosen, True)
    on = {path for path, quantizer in quantizers(model).items() if quantizer.enabled}
    assert on == {f"{path}.{slot.slot}_quantizer" for path in chosen for slot in plan_slots(plan, path)}


def plan_slots(plan, path: str):
    return [slot for module in plan.modules if module.path == path for slot in module.slots if slot.format]


def test_denoising_adds_a_signature() -> None:
    attention = rewritten("d_fine")[1].get_submodule("model.decoder.layers.0.self_attn")
    assert [describe(signature) for signature in attention.captured] == [
        "hidden_states (3-d), position_embeddings (3-d)",
        "hidden_states (3-d), attention_mask (2-d), position_embeddings (3-d)",
    ]


def test_a_call_that_was_never_captured_is_refused() -> None:
    attention = rewritten("detr")[1].get_submodule("model.encoder.layers.0.self_attn")
    with pytest.raises(
        RunError, match=r"encoder\.layers\.0\.self_attn: called with hidden_states \(3-d\), but"
    ):
        attention(hidden_states=torch.zeros(2, 4, 16))


def test_quantized_attention_computes_what_its_equation_says() -> None:
    """METHOD 2: A = softmax(Q(q) Q(k)^T / sqrt(d)), D = Q(A) Q(v), each head with its own step, by slices."""
    attention = ready("detr").get_submodule("model.encoder.layers.0.self_attn").eval()
    x, position = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    got, probs = attention(hidden_states=x, position_embeddings=position)
    heads = []
    for head in range(2):
        part = slice(8 * head, 8 * (head + 1))
        q, k = (
            rounded(attention, s, getattr(attention, f"{s}_proj")(x + position)[..., part], head)
            for s in "qk"
        )
        v = rounded(attention, "v", attention.v_proj(x)[..., part], head)
        weights = rounded(attention, "probs", F.softmax(q @ k.mT / 8**0.5, dim=-1), head)
        torch.testing.assert_close(probs[:, head], weights)
        heads.append(weights @ v)
    torch.testing.assert_close(got, attention.o_proj(torch.cat(heads, dim=-1)))


def rounded(attention: nn.Module, slot: str, x: torch.Tensor, head: int) -> torch.Tensor:
    """x on the grid of one head, from the numbers of the quantizer alone."""
    quantizer = getattr(attention, f"{slot}_quantizer")
    step, zero = quantizer.step[head], quantizer.zero_point()[head]
    low, high = quantizer.format.qmin, quantizer.format.qmax
    return ((x / step).round() + zero).clamp(low, high).sub(zero) * step


def test_capture_leaves_mode_and_random_state_alone() -> None:
    reference, _, plan, facts = rewritten("detr")
    model = copy.deepcopy(reference).eval()
    model.model.decoder.train()
    before, modes = torch.random.get_rng_state(), {k: m.training for k, m in model.named_modules()}
    rewrite(model, plan, facts)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(module.training == modes[path] for path, module in model.named_modules() if path in modes)


def test_modules_without_a_rule_stay_as_they_were() -> None:
    reference, _, _, facts = rewritten("detr")
    model = copy.deepcopy(reference)
    recipe = {"schema": 1, "rules": [{"role": "decoder.ffn", "weight": {"bits": 4}}]}
    rewrite(model, make_plan(recipe_from_dict(recipe, source="test"), facts), facts)
    assert {path.rpartition(".")[0].rpartition(".")[2] for path in quantizers(model)} == {"fc1", "fc2"}
    assert type(model.model.encoder.layers[0].self_attn) is type(reference.model.encoder.layers[0].self_attn)


class Shared(nn.Module):
    """A layer with two names, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = nn.ModuleList([self.first])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.again[0](self.first(pixel_values))


def test_a_shared_layer_is_swapped_once_under_all_its_names() -> None:
    model, family = Shared(), family_of("detr")
    facts = trace(model, family, (8, 8))
    assert [(layer.path, layer.aliases, layer.calls) for layer in facts.layers] == [
        ("first", ("again.0",), 2)
    ]
    plan = make_plan(recipe_from_dict(all_slots(facts), source="test"), facts)
    rewrite(model, plan, facts)
    assert isinstance(model.first, QuantLinear)
    assert model.again[0] is model.first
    assert list(quantizers(model)) == ["first.weight_quantizer", "first.input_quantizer"]
