"""Graph facts: what a detector consists of and computes, read from one torch.export of the whole model.

torch.export follows the forward pass in eval mode on shapes alone, and names the module of each node. Nothing
is run but, where that leaves layers uncalled, one forward pass in training on a small image of noise.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import fx, nn
from torch.export import ExportedProgram

from qdetr_cli.backbones import DENSE_ATTENTION
from qdetr_cli.errors import RunError
from qdetr_cli.families import Family, role_of
from qdetr_cli.fold import BATCH_NORMS
from qdetr_cli.recipe import role_matches
from qdetr_cli.recording import called_in_training
from qdetr_cli.residuals import ResidualFacts, givers
from qdetr_cli.structure import Remembered, structure

Shape = tuple[int, ...]

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default)
SOFTMAX = aten.softmax.int
_FUSED = aten.scaled_dot_product_attention.default
WIDEST = 1 << 16  # of what an attention computes with, all heads together
_LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
_LAYER_CALLS = (aten.linear.default, aten.conv2d.default, aten.conv2d.padding, aten.conv_transpose2d.input)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """One Linear or Conv2d that the model owns; a shared one appears once, under its first name."""

    path: str
    aliases: tuple[str, ...]  # its other names, () for most
    op: Literal["linear", "conv"]
    role: str
    calls: int  # in one forward pass
    macs: int  # per image, all calls together
    weights: int  # elements of the weight, bias apart
    input_shape: Shape  # of the first call, for one image; () when it is never called
    output_shape: Shape
    weight_shape: Shape  # output channels first
    weight_bypassed: bool  # another module reads the weight without calling this one: not to be quantized
    only_in_training: bool = False  # called, but never in eval mode: no prediction depends on it


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionFacts:
    """One attention module: dense (softmax between two products) or deformable (sampled values)."""

    path: str
    aliases: tuple[str, ...]
    op: Literal["attention", "deformable"]
    role: str
    heads: int
    head_dim: int  # of q and k; of v where deformable
    macs: int  # per image: of both products; of the weighted sum alone where deformable


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphFacts:
    """What one forward pass on one image of a fixed size shows."""

    family: str
    size: tuple[int, int]  # H, W
    layers: tuple[LayerFacts, ...]
    attentions: tuple[AttentionFacts, ...]
    batch_norms: tuple[tuple[str, str], ...]  # (convolution path, batch-norm path) pairs that fold
    uncalled: tuple[str, ...]  # layers that the forward pass in eval mode does not call
    notes: tuple[str, ...] = ()  # what the user should hear
    residuals: tuple[ResidualFacts, ...] = ()  # of the backbone

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` gives the same facts back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "GraphFacts":
        """The facts that `to_dict` wrote, also after a trip through JSON (lists for tuples).

        Raises ValueError that says what are no facts.
        """
        try:
            facts = TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            raise ValueError(f"facts.{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from error
        if wide := [each.path for each in facts.attentions if not 0 < each.heads * each.head_dim <= WIDEST]:
            raise ValueError(f"facts: {wide[0]} has no number of heads and dimensions that a model has")
        return facts


_facts = Remembered[GraphFacts](most=64)  # an export takes seconds


@torch.no_grad()
def trace(model: nn.Module, family: Family, size: tuple[int, int]) -> GraphFacts:
    """The facts of a forward pass in eval mode on one image of `size` (H, W); the model is left as it was.

    Raises RunError where the model cannot take such an image.
    """
    return _facts.get((family.name, size, structure(model)), partial(_trace, model, family, size))


def _trace(model: nn.Module, family: Family, size: tuple[int, int]) -> GraphFacts:
    program = _export(model, size)
    graph = _Calls(program, model)
    found = [_layer_facts(path, graph, family) for path in graph.paths_of(*_LAYERS)]
    trained = called_in_training(model, family, [layer.path for layer in found if not layer.calls], size)
    layers = tuple(replace(layer, only_in_training=layer.path in trained) for layer in found)
    attentions = tuple(_attention_facts(graph, family))
    return GraphFacts(
        family=family.name,
        size=size,
        layers=layers,
        attentions=attentions,
        batch_norms=tuple(_batch_norm_pairs(graph, family)),
        uncalled=tuple(layer.path for layer in layers if not layer.calls),
        notes=tuple(_unknown_attention(graph, attentions)),
        residuals=tuple(_residual_facts(program, graph, family)),
    )


def _export(model: nn.Module, size: tuple[int, int]) -> ExportedProgram:
    training = [module for module in model.modules() if module.training]
    pixels = next(model.parameters()).new_zeros(1, 3, *size)
    model.eval()
    try:
        return torch.export.export(model, (), {"pixel_values": pixels}, strict=False)
    except Exception as error:
        raise RunError(
            f"torch.export cannot follow the model at {size[0]}x{size[1]} pixels: {error}; try another --size"
        ) from error
    finally:
        for module in training:
            module.training = True


class _Calls:
    """The nodes of an exported graph by the module that made them; a shared module goes by its first name."""

    def __init__(self, program: ExportedProgram, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.aliases = _aliases(model)
        self.first = {alias: path for path, aliases in self.aliases.items() for alias in aliases}
        self.nodes: dict[str, list[fx.Node]] = defaultdict(list)
        self.readers: dict[int, set[str]] = defaultdict(set)  # id of a parameter -> paths that read it
        parameters = dict(model.named_parameters(remove_duplicate=False))
        targets = program.graph_signature.inputs_to_parameters  # placeholder name -> parameter name
        for node in program.graph.nodes:
            if node.op == "call_function":
                self.nodes[self.owner(node)].append(node)
            elif node.name in targets:
                self.readers[id(parameters[targets[node.name]])] |= {self.owner(user) for user in node.users}

    def owner(self, node: fx.Node) -> str:
        """The first path of the innermost module that made the node, "" for the model itself."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        path = str(stack[-1][0]) if stack else ""
        return self.first.get(path, path)

    def paths_of(self, *kinds: type[nn.Module]) -> list[str]:
        """The first paths of the modules of these kinds."""
        return [path for path in self.aliases if isinstance(self.modules[path], kinds)]

    def named(self, names: Iterable[str]) -> list[str]:
        """The paths of the modules whose class has one of these names."""
        return [path for path, module in self.modules.items() if type(module).__name__ in names]

    def within(self, path: str, *targets: Any) -> list[fx.Node]:
        """The nodes with one of these targets that the module at `path` or a child of it made."""
        owners = [owner for owner in self.nodes if owner == path or owner.startswith(path + ".")]
        return [node for owner in owners for node in self.nodes[owner] if node.target in targets]


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First path -> the other paths, for each module; tied copies of a layer are one layer."""
    names: dict[Any, list[str]] = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        names[_identity(module)].append(path)
    return {first: tuple(others) for first, *others in names.values()}


def _identity(module: nn.Module) -> Any:
    """What two modules have in common that compute the same with the same parameters, now and after training.

    transformers ties heads by their parameters: the modules are copies, the tensors are not.
    """
    if not isinstance(module, _LAYERS):
        return id(module)
    return type(module), repr(module), id(module.weight), id(module.bias)


def _layer_facts(path: str, graph: _Calls, family: Family) -> LayerFacts:
    module, calls = graph.modules[path], graph.within(path, *_LAYER_CALLS)
    weight: torch.Tensor = module.get_parameter("weight")
    shaped = weight.transpose(0, 1) if isinstance(module, nn.ConvTranspose2d) else weight
    readers = graph.readers[id(weight)] - {path}
    return LayerFacts(
        path=path,
        aliases=graph.aliases[path],
        op="linear" if isinstance(module, nn.Linear) else "conv",
        role=role_of(family, path),
        calls=len(calls),
        macs=sum(_macs(module, call) for call in calls),
        weights=weight.numel(),
        input_shape=_shape(calls[0].args[0]) if calls else (),
        output_shape=_shape(calls[0]) if calls else (),
        weight_shape=tuple(shaped.shape),
        weight_bypassed=bool(readers),
    )


def _macs(layer: nn.Module, call: fx.Node) -> int:
    """Multiplications of one call: a row of the weight per output, per input where it is transposed."""
    weight = layer.get_parameter("weight")
    outer = call.args[0] if isinstance(layer, nn.ConvTranspose2d) else call
    return prod(_shape(outer)) * weight[0].numel()


def _attention_facts(graph: _Calls, family: Family) -> Iterator[AttentionFacts]:
    for path in graph.named((*family.attention, *DENSE_ATTENTION, *family.deformable)):
        softmaxes = graph.within(path, SOFTMAX)
        if not softmaxes:  # not called in eval mode
            continue
        deformable = type(graph.modules[path]).__name__ in family.deformable
        measure = _deformable_shape if deformable else _dense_shape
        heads, head_dim, macs = measure(path, graph, _shape(softmaxes[0]))
        yield AttentionFacts(
            path=path,
            aliases=graph.aliases[path],
            op="deformable" if deformable else "attention",
            role=role_of(family, path),
            heads=heads,
            head_dim=head_dim,
            macs=macs,
        )


def _dense_shape(path: str, graph: _Calls, probs: Shape) -> tuple[int, int, int]:
    """heads, head_dim, macs; `probs` is (1, N, Q, L), or (N, Q, L) where the batch holds the heads."""
    products = graph.within(path, *PRODUCTS)
    inner = [_shape(product.args[0])[-1] for product in products]  # d, L
    macs = sum(prod(_shape(product)) * terms for product, terms in zip(products, inner, strict=True))
    return probs[-3], inner[0], macs


def _deformable_shape(path: str, graph: _Calls, probs: Shape) -> tuple[int, int, int]:
    """heads, head_dim, macs of the weighted sum; `probs` is (1, Q, N, points)."""
    read = [_shape(node.args[0]) for node in graph.within(path, aten.grid_sampler.default, aten.index.Tensor)]
    maps = [shape for shape in read if len(shape) == 4]  # (N, d, h, w)
    if not maps:
        raise RunError(
            f"{path}: deformable attention that reads its values in a way that qdetr does not know"
        )
    head_dim = maps[0][1]
    return probs[2], head_dim, prod(probs) * head_dim


def _residual_facts(program: ExportedProgram, graph: _Calls, family: Family) -> Iterator[ResidualFacts]:
    for path in givers(program.graph.nodes, graph.owner):
        if role_matches("backbone", role_of(family, path)):
            yield ResidualFacts(path=path, aliases=graph.aliases[path], role="backbone.residual")


def _batch_norm_pairs(graph: _Calls, family: Family) -> Iterator[tuple[str, str]]:
    """The pairs where a convolution feeds one batch norm, and nothing else reads or feeds either."""
    for path in graph.paths_of(nn.Conv2d):
        calls = graph.within(path, *_LAYER_CALLS)
        readers = {graph.owner(user) for call in calls for user in call.users}
        if len(calls) == 1 and len(readers) == 1:
            norm = readers.pop()
            if _is_batch_norm(graph.modules[norm], family) and _feeds(graph, norm) == set(calls):
                yield path, norm


def _is_batch_norm(module: nn.Module, family: Family) -> bool:
    return type(module) in BATCH_NORMS or type(module).__name__ in family.frozen_batch_norm


def _feeds(graph: _Calls, path: str) -> set[fx.Node]:
    """The computed nodes outside a module that its own nodes read."""
    inside = graph.nodes[path]
    sources = {source for node in inside for source in node.all_input_nodes}
    return {source for source in sources if source.op == "call_function" and source not in inside}


def _unknown_attention(graph: _Calls, known: Iterable[AttentionFacts]) -> Iterator[str]:
    """A note for each module that multiplies a softmax but is no attention of the family's table."""
    paths = tuple(each.path for each in known)
    for path, nodes in graph.nodes.items():
        softmaxes = [node for node in nodes if node.target is SOFTMAX]
        products = [node for node in nodes if node.target in PRODUCTS]
        if any((path + ".").startswith(known_path + ".") for known_path in paths):
            continue
        if softmaxes and len(products) > 1:
            yield f"{path} looks like attention that qdetr does not know: its products stay float"
        if any(node.target is _FUSED for node in nodes):
            yield f"{path} computes attention in one fused call: its products stay float"


def _shape(node: Any) -> Shape:
    return tuple(int(side) for side in node.meta["val"].shape)
