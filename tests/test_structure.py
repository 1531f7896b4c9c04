"""Modules are taken for alike only where their code does the same; what is remembered of them is the same."""

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantized_detectors import all_slots, calibrated, float_model, inputs, run
from tiny_runs import write_model
from torch import nn
from transformers import DetrConfig

from qdetr_cli import capture
from qdetr_cli import trace as tracing
from qdetr_cli.checkpoint import load_float
from qdetr_cli.errors import RunError
from qdetr_cli.families import family_of
from qdetr_cli.plan import make_plan
from qdetr_cli.recipe import recipe_from_dict
from qdetr_cli.rewrite import rewrite, set_enabled
from qdetr_cli.structure import Remembered, structure
from qdetr_cli.trace import trace

SIZE = (64, 96)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width, self.scales, self.config = 3, [1, (2, 3)], DetrConfig(d_model=32)
        self.first, self.second, self.drop = nn.Linear(3, 3), nn.Linear(3, 3), nn.Dropout(0.1)
        self.register_buffer("table", torch.zeros(4))
        self.act: Callable = torch.relu
        self.plain, self.kind = torch.zeros(2), torch.float32


def attribute(name: str, value: object) -> Callable[[Part], None]:
    return lambda part: setattr(part, name, value)


CHANGES: dict[str, Callable[[Part], object]] = {
    "number": attribute("width", 4),
    "kind of a number": attribute("width", 3.0),
    "nested number": attribute("scales", [1, (2, 4)]),
    "plain tensor": attribute("plain", torch.zeros(3)),
    "kind of numbers to compute with": attribute("kind", torch.float16),
    "function": attribute("act", structure),
    "one attribute more": attribute("new", None),
    "config": lambda part: setattr(part.config, "d_model", 64),
    "attention of the config": lambda part: setattr(part.config, "_attn_implementation", "sdpa"),
    "a child's probability": lambda part: setattr(part.drop, "p", 0.2),
    "a child's class": attribute("drop", nn.Dropout1d(0.1)),
    "order of children": lambda part: setattr(part, "first", part._modules.pop("first")),
    "shape of a weight": attribute("first", nn.Linear(3, 3, bias=False)),
    "shape of a buffer": attribute("table", torch.zeros(5)),
    "kind of a weight": lambda part: part.second.half(),
    "shared weight": lambda part: setattr(part.second, "weight", part.first.weight),
    "one child twice": lambda part: setattr(part, "second", part.first),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_code_may_read_makes_another_structure(name: str) -> None:
    changed = Part()
    CHANGES[name](changed)
    assert structure(changed) != structure(Part())


def test_values_and_modes_do_not() -> None:
    one, other = Part(), Part().eval()
    nn.init.zeros_(one.first.weight)
    one.first.weight.requires_grad_(False)
    other.register_forward_hook(lambda *_: None)
    assert structure(one) == structure(other) == structure(copy.deepcopy(one))
    assert hash(structure(one)) == hash(structure(other))


def test_where_a_model_comes_from_does_not(tmp_path: Path) -> None:
    one, other = (load_float(str(write_model(tmp_path / name))).model for name in ("here", "there"))
    assert structure(one) == structure(other)


def test_the_oldest_is_forgotten() -> None:
    remembered, asked = Remembered[int](most=2), []
    for key in ("a", "b", "a", "c", "b", "a"):
        assert remembered.get(key, lambda key=key: asked.append(key) or ord(key)) == ord(key)
    assert asked == ["a", "b", "c", "a"]


def fake_quant(model: nn.Module) -> nn.Module:
    facts = trace(model, family_of(model), SIZE)
    rewrite(model, make_plan(recipe_from_dict(all_slots(facts), source="test"), facts), facts)
    return calibrated(model, inputs("pixels"))


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, remembered in ((tracing, "_facts"), (capture, "_graphs")):
        monkeypatch.setattr(module, remembered, Remembered(most=64))


def unasked(*_: object, **__: object) -> None:
    raise AssertionError("exported again")


def test_a_second_model_is_rewritten_without_an_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its own weights, and is what it would have been as the first: to the last bit, in both modes."""

    def another() -> nn.Module:
        model = float_model("detr")
        for value in model.parameters():
            value.data.mul_(1.1)
        return model

    forget(monkeypatch)
    alone = fake_quant(another())
    forget(monkeypatch)
    fake_quant(float_model("detr"))
    monkeypatch.setattr(torch.export, "export", unasked)
    second = fake_quant(another())
    for enabled in (True, False):
        for training in (False, True):
            found = []
            for model in (alone, second):
                set_enabled(model, None, enabled)
                found.append(run(model, inputs("labels"), training))
            assert found[0].keys() == found[1].keys()
            assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_another_number_of_heads_is_exported_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_quant(float_model("detr"))
    monkeypatch.setattr(torch.export, "export", unasked)
    model = float_model("detr")
    model.config.encoder_attention_heads = 4
    with pytest.raises(RunError, match="exported again"):
        trace(model, family_of(model), SIZE)


def test_what_is_remembered_keeps_no_model_alive() -> None:
    model = float_model("detr")
    fake_quant(model)
    weights = [weakref.ref(value) for value in model.parameters()]
    assert weights
    del model
    gc.collect()
    assert [each for each in weights if each() is not None] == []
