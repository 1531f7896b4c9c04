"""Graph facts, against forward hooks on the running model and against hand counts."""

import json
from functools import cache

import pytest
import torch
from quantized_detectors import float_model
from torch import nn

from qdetr_cli.errors import RunError
from qdetr_cli.families import family_of
from qdetr_cli.trace import GraphFacts, trace

NAMES = ["detr", "conditional_detr", "rt_detr", "d_fine", "table-transformer"]
SIZE = (64, 96)


@cache
def traced(name: str) -> tuple[nn.Module, GraphFacts]:
    model = float_model(name)
    return model, trace(model, family_of(model), SIZE)


def watched(model: nn.Module) -> dict[str, list[tuple]]:
    """Path -> (input, output) shapes of each call, in a real run on one image."""
    calls: dict[str, list[tuple]] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, args, out, path=path: calls.setdefault(path, []).append((args[0].shape, out.shape))
        )
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    with torch.no_grad():
        model.eval()(pixel_values=torch.zeros(1, 3, *SIZE))
    for hook in hooks:
        hook.remove()
    return calls


def multiplications(module: nn.Module, output: torch.Size) -> int:
    if isinstance(module, nn.Conv2d):
        return (
            output.numel()
            * module.in_channels
            // module.groups
            * module.kernel_size[0]
            * module.kernel_size[1]
        )
    return output.numel() * module.in_features


@pytest.mark.parametrize("name", NAMES)
def test_layers_equal_what_hooks_see(name: str) -> None:
    model, facts = traced(name)
    calls = watched(model)
    assert {layer.path for layer in facts.layers if layer.calls} == set(calls)
    assert {layer.path for layer in facts.layers if not layer.calls} == set(facts.uncalled)
    for layer in facts.layers:
        module, seen = model.get_submodule(layer.path), calls.get(layer.path, [])
        assert layer.calls == len(seen)
        assert layer.macs == sum(multiplications(module, output) for _, output in seen)
        assert (layer.weights, layer.weight_shape) == (module.weight.numel(), tuple(module.weight.shape))
        assert (layer.input_shape, layer.output_shape) == tuple(map(tuple, seen[0])) if seen else ((), ())
        assert layer.op == ("conv" if isinstance(module, nn.Conv2d) else "linear")
        assert layer.role


def test_query_pos_head_is_called_in_every_decoder_layer() -> None:
    _, facts = traced("rt_detr")
    assert {layer.calls for layer in facts.layers if "query_pos_head" in layer.path} == {2}


def test_heads_that_are_shown_twice_are_one() -> None:
    """D-FINE's outer heads are copies whose parameters are those of the decoder's; the last one is called."""
    _, facts = traced("d_fine")
    heads = {layer.path: layer for layer in facts.layers if "class_embed" in layer.path}
    assert {path: layer.aliases for path, layer in heads.items()} == {
        "model.decoder.class_embed.0": ("class_embed.0",),
        "model.decoder.class_embed.1": ("class_embed.1",),
    }
    assert [layer.calls for layer in heads.values()] == [0, 1]
    assert "model.decoder.class_embed.0" in facts.uncalled
    assert not any(layer.weight_bypassed for layer in heads.values())


def test_heads_that_all_decoder_layers_share_are_one() -> None:
    """In single-stage Deformable-DETR each level has a module of its own, on the same parameters."""
    _, facts = traced("deformable_detr")
    (head,) = [layer for layer in facts.layers if "class_embed" in layer.path]
    assert (head.path, head.aliases, head.calls) == ("class_embed.0", ("class_embed.1",), 2)
    assert not head.weight_bypassed


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("detr", {"encoder.attention": 2, "decoder.self_attention": 2, "decoder.cross_attention": 2}),
        (
            "conditional_detr",
            {"encoder.attention": 2, "decoder.self_attention": 2, "decoder.cross_attention": 2},
        ),
        ("rt_detr", {"encoder.attention": 1, "decoder.self_attention": 2, "decoder.cross_attention": 2}),
        ("d_fine", {"encoder.attention": 1, "decoder.self_attention": 2, "decoder.cross_attention": 2}),
    ],
)
def test_attention_roles(name: str, expected: dict[str, int]) -> None:
    _, facts = traced(name)
    roles = [each.role for each in facts.attentions]
    assert {role: roles.count(role) for role in roles} == expected
    deformable = [each.role for each in facts.attentions if each.op == "deformable"]
    assert set(deformable) == ({"decoder.cross_attention"} if name in ("rt_detr", "d_fine") else set())


@pytest.mark.parametrize(
    ("name", "path", "heads", "head_dim", "macs"),
    [
        # 64x96 at stride 32: L = 6; Q = 7; N = 2; D = 16
        pytest.param("detr", "model.encoder.layers.0.self_attn", 2, 8, 2 * 6 * 6 * 16, id="encoder"),
        pytest.param("detr", "model.decoder.layers.1.encoder_attn", 2, 8, 2 * 7 * 6 * 16, id="cross"),
        pytest.param("table-transformer", "model.encoder.layers.0.self_attn", 2, 8, 2 * 6 * 6 * 16, id="bmm"),
        # q and k are content and position, 2 D wide
        pytest.param(
            "conditional_detr", "model.decoder.layers.1.encoder_attn", 2, 16, 3 * 7 * 6 * 16, id="wide"
        ),
        # 3 levels of 4 points
        pytest.param("rt_detr", "model.decoder.layers.0.encoder_attn", 2, 8, 7 * 12 * 16, id="deformable"),
    ],
)
def test_attention_counts(name: str, path: str, heads: int, head_dim: int, macs: int) -> None:
    _, facts = traced(name)
    found = next(each for each in facts.attentions if each.path == path)
    assert (found.heads, found.head_dim, found.macs) == (heads, head_dim, macs)


@pytest.mark.parametrize("name", NAMES)
def test_every_batch_norm_has_its_convolution(name: str) -> None:
    model, facts = traced(name)
    norms = [path for path, module in model.named_modules() if "BatchNorm" in type(module).__name__]
    assert sorted(norm for _, norm in facts.batch_norms) == sorted(norms)
    for conv, norm in facts.batch_norms:
        assert isinstance(model.get_submodule(conv), nn.Conv2d)
        assert conv.rpartition(".")[0] == norm.rpartition(".")[0]  # written side by side


@pytest.mark.parametrize("name", NAMES)
def test_facts_survive_json(name: str) -> None:
    _, facts = traced(name)
    assert GraphFacts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts


def test_the_model_is_left_as_it_was() -> None:
    model = float_model("detr")
    model.train()
    model.model.backbone.eval()
    before = {path: module.training for path, module in model.named_modules()}
    trace(model, family_of(model), SIZE)
    assert {path: module.training for path, module in model.named_modules()} == before


def test_a_size_that_the_model_cannot_take_is_a_users_mistake() -> None:
    model, _ = traced("rt_detr")
    with pytest.raises(RunError, match=r"cannot follow the model at 40x40 pixels.*try another --size"):
        trace(model, family_of(model), (40, 40))


class Oddities(nn.Module):
    """What must not be folded, quantized or overlooked."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.read, self.read_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.packed = nn.MultiheadAttention(4, 2, batch_first=True)
        self.attention = Products()
        self.idle = nn.Linear(2, 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.twice(self.twice(pixel_values)))
        y = self.read(x)
        x = self.read_norm(y) + y
        x = x.flatten(2)  # (B, 3, 4)
        return self.attention(self.packed(x, x, x)[0])


class Products(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.matmul(torch.matmul(x, x.mT).softmax(-1), x)


@pytest.fixture(scope="module")
def odd() -> GraphFacts:
    return trace(Oddities(), family_of("detr"), (2, 2))


def test_only_exclusive_pairs_fold(odd: GraphFacts) -> None:
    """Not a convolution that is called twice, nor one whose output is read elsewhere."""
    assert odd.batch_norms == ()
    assert odd.uncalled == ("packed.out_proj", "idle")


def test_a_weight_that_is_read_past_its_module_is_told(odd: GraphFacts) -> None:
    """METHOD 5.2: nn.MultiheadAttention never calls its out_proj."""
    assert [layer.path for layer in odd.layers if layer.weight_bypassed] == ["packed.out_proj"]


def test_attention_outside_the_table_is_noted(odd: GraphFacts) -> None:
    assert [note.split()[0] for note in odd.notes] == ["packed", "attention"]
    assert odd.notes[0].endswith("looks like attention that qdetr does not know: its products stay float")
