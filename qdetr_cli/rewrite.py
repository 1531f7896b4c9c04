"""From float to fake-quant model, in place: batch norms folded, layers swapped, attention rewritten.

Names do not change: a quantizer is `<module path>.<slot>_quantizer`, all others are the float model's, less
the folded batch norms, plus the biases that they left. Equal plans on equal structures give equal names.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from qdetr_cli.alignment import DistributionAlignment
from qdetr_cli.attention import QuantAttention, QuantDeformable, subclass
from qdetr_cli.balance import Balance, Operand
from qdetr_cli.capture import Graphs, capture_all, compiled, with_calls
from qdetr_cli.fold import fold_batch_norms
from qdetr_cli.layers import quantized_layer
from qdetr_cli.plan import ModulePlan, Plan
from qdetr_cli.quantizers import FakeQuantizer, make_quantizer
from qdetr_cli.recipe import OP_SLOTS, QuantFormat
from qdetr_cli.sums import round_output
from qdetr_cli.trace import AttentionFacts, GraphFacts


def rewrite(model: nn.Module, plan: Plan, facts: GraphFacts) -> None:
    """Turn the float model into the fake-quant model of `plan`, in place; nothing is calibrated yet.

    `facts` are those of the float model. With every quantizer switched off, outputs are the float model's.
    """
    fold_batch_norms(model, facts.batch_norms)
    chosen = [module for module in plan.modules if _formats(module)]
    graphs = capture_all(model, [module.path for module in chosen if module.op == "attention"])
    attentions = {attention.path: attention for attention in facts.attentions}
    device = next(model.parameters()).device
    for module in chosen:
        if module.op in ("linear", "conv"):
            _swap_layer(model, module)
        elif module.op == "residual":
            round_output(model.get_submodule(module.path), _formats(module)["output"], device)
        else:
            _quantize_attention(model, module, attentions[module.path], graphs.get(module.path, {}))
    for path, module in model.named_modules():
        if isinstance(module, FakeQuantizer | DistributionAlignment | Operand):
            module.path = path


def quantizers(model: nn.Module) -> dict[str, FakeQuantizer]:
    """Every quantizer of the model by its path; one that is shared appears once."""
    return {path: module for path, module in model.named_modules() if isinstance(module, FakeQuantizer)}


def set_enabled(model: nn.Module, paths: Iterable[str] | None, enabled: bool) -> None:
    """Switch the quantizers of these modules (of all modules: None) on or off."""
    wanted = None if paths is None else set(paths)
    for path, quantizer in quantizers(model).items():
        if wanted is None or _owner(path) in wanted:
            quantizer.enabled = enabled


def _owner(path: str) -> str:
    """The module path of a quantizer's path."""
    return path.rpartition(".")[0]


def _formats(module: ModulePlan) -> dict[str, QuantFormat]:
    """The formats of the slots that are quantized."""
    return {each.slot: each.format for each in module.slots if each.format is not None}


def _swap_layer(model: nn.Module, module: ModulePlan) -> None:
    """Put the quantized layer in the place of the float one, under each of its names."""
    layer, formats = model.get_submodule(module.path), _formats(module)
    quantized = quantized_layer(layer, weight=formats.get("weight"), input=formats.get("input"))
    for path in (module.path, *module.aliases):
        model.set_submodule(path, quantized)


def _quantize_attention(model: nn.Module, module: ModulePlan, facts: AttentionFacts, graphs: Graphs) -> None:
    """Give the attention module its quantizers, and the forward that uses them."""
    attention: Any = model.get_submodule(module.path)
    formats = _formats(module)
    for slot in OP_SLOTS[module.op]:
        axis = 2 if (module.op, slot) == ("deformable", "probs") else 1  # (B, Q, N, points), else (B, N, ..)
        quantizer = _quantizer(formats[slot], axis, facts.heads) if slot in formats else None
        setattr(attention, f"{slot}_quantizer", quantizer)
    for name in [name for name, format in formats.items() if format.align]:
        axis = -1 if name == "q" else -2  # k is the right operand of its product: (B, N, d, L)
        setattr(attention, f"{name}_alignment", DistributionAlignment(facts.heads, facts.head_dim, axis=axis))
    if "q" in formats and formats["q"].balance:
        attention.balance = Balance(facts.heads, facts.head_dim)
    calls: dict[str, list[str]] = {slot: _calls(slot, formats) for slot in OP_SLOTS[module.op]}
    captured = {
        signature: compiled(with_calls(graph, calls, facts.heads), attention)
        for signature, graph in graphs.items()
    }
    mixin = QuantAttention if module.op == "attention" else QuantDeformable
    attention.__class__ = subclass(mixin, attention.__class__)
    vars(attention).update(path=module.path, heads=facts.heads, captured=captured)
    attention.to(next(attention.parameters()).device).train(attention.training)


def _calls(slot: str, formats: Mapping[str, QuantFormat]) -> list[str]:
    """The children that one operand of an attention goes through, in order."""
    calls = [f"{slot}_alignment"] if slot in formats and formats[slot].align else []
    if slot in ("q", "k") and "q" in formats and formats["q"].balance:
        calls.append(f"balance.{slot}")
    return calls + [f"{slot}_quantizer"] * (slot in formats)


def _quantizer(format: QuantFormat, axis: int, heads: int) -> FakeQuantizer:
    """A quantizer of activations, with one step per head or one in all."""
    if format.per == "head":
        return make_quantizer(format, axis=axis, channels=heads)
    return make_quantizer(format, axis=None, channels=1)
