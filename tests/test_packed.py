"""Packed folders: the layout by an independent reader, the last bit of the weights, and what is refused."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_models import assert_equal, fake_quant, opened, outputs
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_runs import DIGITS, as_json, ok, refused, write_model, write_voc
from torch import Tensor, nn

from qdetr_cli.errors import CheckpointError
from qdetr_cli.fake_quant import Grid
from qdetr_cli.layers import Quantized
from qdetr_cli.models import Model, save_model, save_packed
from qdetr_cli.packed import pack, unpack
from qdetr_cli.quantizers import LSQ
from qdetr_cli.storage import storage_of

README = Path(__file__).parents[1] / "README.md"
NAME = "detr"


def packed_layers(module: nn.Module) -> dict[str, Quantized]:
    return {
        f"{path}.weight": layer
        for path, layer in module.named_modules()
        if isinstance(layer, Quantized) and layer.weight_quantizer is not None
    }


def live(layer: Quantized) -> Tensor:
    """The weight as the layer computes with it."""
    with torch.no_grad():
        return layer.weight_quantizer(layer.weight)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "detr"
    save_packed(fake_quant(NAME), path)
    return path


# --- bits ---


@given(st.integers(2, 8).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, (1 << b) - 1)))))
def test_codes_come_back_and_stand_where_the_layout_says(drawn):
    bits, listed = drawn
    codes = np.array(listed, dtype=np.uint8)
    stream = pack(codes, bits)
    assert stream.size == -(-len(listed) * bits // 8)
    whole = sum(code << (bits * index) for index, code in enumerate(listed))
    assert int.from_bytes(stream.tobytes(), "little") == whole
    assert np.array_equal(unpack(stream, bits, len(listed)), codes)


@pytest.mark.parametrize("mid_rise", [False, True], ids=["plain", "mid-rise"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_numbers_of_a_grid_are_its_fixed_points(bits, mid_rise):
    """(n * step) / step rounds to n again, for steps of any size that a quantizer may have."""
    generator = torch.Generator().manual_seed(bits)
    steps = torch.cat([torch.rand(4000, generator=generator), 2.0 ** torch.linspace(-27, 60, 4000)])
    half = 1 << (bits - 1)
    zero = torch.full_like(steps, -0.5) if mid_rise else None
    grid = Grid(step=steps, zero=zero, qmin=-half, qmax=half - 1, shifted=mid_rise)
    integers = torch.arange(-half, half, dtype=torch.float32).expand(8000, -1)
    values = grid.dequantize(integers, 0)
    assert torch.equal(grid.integers(values, 0), integers)
    assert torch.equal(grid.round(values, 0), values)


# --- a model ---


def test_weights_and_outputs_are_those_of_the_checkpoint_to_the_last_bit(folder, tmp_path):
    """Of the checkpoint on disk: of `statistics`, both times the step follows from the weights there."""
    model = fake_quant(NAME)
    save_model(model.module, model, tmp_path / "fake-quant", model.recipe, None)
    first, second = opened(tmp_path / "fake-quant"), opened(folder)
    assert second.packed
    assert second.metrics == {"ap": 0.5}
    assert_equal(outputs(first.module), outputs(second.module))
    own, packed = packed_layers(first.module), packed_layers(second.module)
    assert own.keys() == packed.keys()
    widths = {(x.weight_quantizer.format.quantizer, x.weight_quantizer.format.bits) for x in own.values()}
    assert widths == {("statistics", 2), ("lsq", 2), ("statistics", 3), ("lsq", 3), ("lsq", 4), ("lsq", 5),
                      ("statistics", 8), ("lsq", 8)}  # fmt: skip
    for name, layer in own.items():
        assert torch.equal(live(layer), live(packed[name])), name
        assert torch.equal(live(layer), packed[name].weight), name
        assert packed[name].weight_quantizer.format.quantizer == "fixed"


def test_a_step_that_follows_the_weights_would_be_another():
    """Why steps are stored: the mean of |w| on the grid is not that of w."""
    moved = 0
    for layer in packed_layers(fake_quant(NAME).module).values():
        quantizer = layer.weight_quantizer
        if quantizer.format.quantizer == "statistics":
            rounded = live(layer)
            moved += not torch.equal(quantizer.grid_for(rounded).step, quantizer.grid_for(layer.weight).step)
    assert moved > 3


def test_packing_what_was_packed_changes_nothing(folder, tmp_path):
    save_packed(opened(folder), tmp_path / "again")
    one, other = (safe_open(each / "model.safetensors", "pt") for each in (folder, tmp_path / "again"))
    assert one.metadata() == other.metadata()
    assert_equal(*({name: file.get_tensor(name) for name in file.keys()} for file in (one, other)))  # noqa: SIM118


def test_the_readme_reads_it_with_numpy(folder):
    """The example as it stands in README.md, in at most 20 lines, gives the weights of the model."""
    text = README.read_text(encoding="utf-8")
    example = re.search(r"```python\n([^`]*def read_packed[^`]*)```", text)[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    scope: dict = {}
    exec(example, scope)
    tensors = scope["read_packed"](folder / "model.safetensors")
    layers = packed_layers(fake_quant(NAME).module)
    assert len(layers) > 20
    for name, layer in layers.items():
        assert np.array_equal(tensors[name], live(layer).numpy()), name
        assert tensors[name].dtype == np.float32


@pytest.mark.parametrize("after", ["", "_quantizer.step"], ids=["code", "step"])
def test_a_changed_bit_is_another_model(folder, tmp_path, after):
    """The comparison has teeth."""
    key = "class_labels_classifier.weight" + after

    def flip(tensors: dict[str, Tensor]) -> None:
        tensors[key].view(torch.uint8)[2:3].bitwise_xor_(64)

    target = altered(folder, tmp_path / "flipped", flip)
    with pytest.raises(AssertionError, match="logits"):
        assert_equal(outputs(opened(folder).module), outputs(opened(target).module))


def altered(folder: Path, target: Path, change, metadata=None) -> Path:
    """A copy of the folder with its tensors changed in place, or its metadata."""
    target.mkdir()
    (target / "qdetr.json").write_bytes((folder / "qdetr.json").read_bytes())
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        told = dict(file.metadata())
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata=told | (metadata or {}))
    return target


# --- what is stored ---


def test_every_bit_is_counted(folder):
    """Rows, file sizes and the plan agree; nothing but weights is stored as integers."""
    storage = storage_of(folder)
    assert storage.files == {path.name: path.stat().st_size for path in folder.iterdir()}
    integers = {row.bits: row for row in storage.rows if row.kind.endswith("-bit integers")}
    assert set(integers) == {2, 3, 4, 5, 8}
    layers = packed_layers(fake_quant(NAME).module).values()
    for bits, row in integers.items():
        sizes = [x.weight.numel() for x in layers if x.weight_quantizer.format.bits == bits]
        assert (row.tensors, row.values) == (len(sizes), sum(sizes))
        assert row.bytes == sum(-(-size * bits // 8) for size in sizes)
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert storage.files["model.safetensors"] == 8 + header + sum(row.bytes for row in storage.rows)
    own = [p.numel() for n, p in fake_quant(NAME).module.state_dict().items() if "_quantizer." not in n]
    assert storage.float_bytes == 4 * sum(own)


def test_a_fake_quant_folder_is_said_to_be_float(tmp_path):
    model = fake_quant(NAME)
    save_model(model.module, model, tmp_path / "fake-quant", model.recipe, None)
    kinds = {row.kind for row in storage_of(tmp_path / "fake-quant").rows}
    assert kinds == {"float32", "true or false"}


# --- quantizers of plugins, shared weights ---


class Doubled(LSQ):
    """A quantizer that does not compute with the grid that it states."""

    def fake_quantize(self, x: Tensor) -> Tensor:
        return 2 * super().fake_quantize(x)


class Halved(LSQ):
    """A quantizer with a state of its own, which derives the step in use from it."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("factor", torch.tensor(0.5))

    def live_step(self) -> Tensor:
        return self.step * self.factor


def with_quantizer(kind: type[LSQ], path: str = "model.encoder.layers.0.mlp.fc1") -> Model:
    """The fake-quant model with another quantizer for one weight."""
    model = copied(fake_quant(NAME))
    layer = model.module.get_submodule(path)
    before = layer.weight_quantizer
    made = kind(before.format, axis=before.axis, channels=before.channels)
    layer.weight_quantizer = made
    layer.calibrate_weight()
    return model


def copied(model: Model) -> Model:
    return replace(model, detector=replace(model.detector, model=copy.deepcopy(model.module)))


def test_a_quantizer_of_a_plugin_leaves_only_its_steps(tmp_path):
    """What it is made of is not needed any more: the folder opens without it."""
    model = with_quantizer(Halved)
    save_packed(model, tmp_path / "packed")
    other = opened(tmp_path / "packed")
    assert_equal(outputs(model.module), outputs(other.module))
    assert not any("factor" in key for key in other.module.state_dict())
    plan = json.loads((tmp_path / "packed" / "qdetr.json").read_text())["plan"]
    formats = [
        slot["format"] for each in plan["modules"] for slot in each["slots"] if slot["slot"] == "weight"
    ]
    assert {each["quantizer"] for each in formats if each} == {"fixed"}


def test_a_quantizer_that_leaves_its_grid_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.mlp\.fc1\.weight: the quantizer .* does not round"
    ):
        save_packed(with_quantizer(Doubled), tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_a_weight_that_something_else_reads_stays_float(tmp_path):
    """The same numbers cannot be the integers of two grids."""
    model = copied(fake_quant(NAME))
    attention = model.module.model.encoder.layers[0].self_attn
    attention.k_proj.weight = attention.q_proj.weight
    attention.k_proj.calibrate_weight()
    with torch.no_grad():
        attention.k_proj.weight_quantizer.step.mul_(0.5)
    save_packed(model, tmp_path / "packed")
    names = [f"model.encoder.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
    assert [name in told_of(tmp_path / "packed") for name in names] == [False, False, True]
    assert_equal(outputs(model.module), outputs(opened(tmp_path / "packed").module))


# --- commands ---


def test_commands_take_a_packed_folder(tmp_path):
    """Quantize, pack, measure, look: the AP is that of the checkpoint; what cannot be done is said."""
    model, data = write_model(tmp_path / "model"), write_voc(tmp_path / "voc", DIGITS, ((64, 64), (80, 60)))
    made, packed = tmp_path / "made", tmp_path / "packed"
    given = ("--data", data)
    ok("quantize", model, "--recipe", "w4a4", *given, "--out", made, "--set", "calibrate.images=2")
    ok("export", made, "--to", "packed", "--out", packed)
    assert as_json("eval", made, *given) == as_json("eval", packed, *given)
    found = as_json("inspect", packed)["storage"]
    assert {row["kind"] for row in found["stored"]} == {
        "4-bit integers",
        "8-bit integers",
        "float32",
        "true or false",
    }
    assert found["bytes"] == sum(path.stat().st_size for path in packed.iterdir())
    assert "4-bit integers" in ok("inspect", packed).stdout
    again = ("--recipe", "w4a4", *given, "--out", tmp_path / "again")
    assert "is a packed checkpoint, whose weights are integers; fine-tune" in refused(
        "finetune", packed, *again
    )
    assert "is a packed checkpoint; put the recipe on the float" in refused("quantize", packed, *again)
    assert "is packed, so its weights are integers" in refused("eval", packed, *given, "--ladder")
    assert "is a float model, so there are no integers" in refused(
        "export", model, "--to", "packed", "--out", packed.with_name("x")
    )
    assert "already holds something" in refused("export", made, "--to", "packed", "--out", packed)
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "x").exists()


def test_a_packed_model_is_saved_as_nothing_else(folder, tmp_path):
    model = opened(folder)
    with pytest.raises(AssertionError, match="save_packed"):
        save_model(model.module, model, tmp_path / "float", model.recipe, None)


# --- damage ---

WEIGHT = "model.decoder.layers.0.mlp.fc1.weight"


def told_of(folder: Path) -> dict:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return json.loads(file.metadata()["packed"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[WEIGHT].update(bits=9), "bits: 9 is not 2 to 8"),
        (lambda p: p[WEIGHT].update(bits=True), "bits: True is not 2 to 8"),
        (lambda p: p[WEIGHT].update(bits=4), "is 4 bits .* for 3 bits"),
        (lambda p: p[WEIGHT].update(shape=[10**9, 10**9]), "is 3 bits .* for 3 bits"),
        (lambda p: p[WEIGHT].update(shape=[-1, -1]), "is no list of whole numbers"),
        (lambda p: p[WEIGHT].update(axis=5), "axis: 5 is no dimension"),
        (lambda p: p[WEIGHT].update(axis=1), "with steps along 1 for"),
        (lambda p: p[WEIGHT].update(mid_rise=1), "mid_rise: 1 is not true or false"),
        (lambda p: p[WEIGHT].update(mid_rise=True), "is 3 mid-rise bits .* for 3 bits"),
        (lambda p: p[WEIGHT].update(extra=1), "is damaged"),
        (lambda p: p.update({"strange.weight": p[WEIGHT]}), "strange.weight is packed, but is no quant"),
        (lambda p: p.pop(WEIGHT), "of another shape or type: " + WEIGHT),
        (lambda p: p.clear(), "of another shape or type"),
    ],
    ids=["bits", "bool", "width", "shape", "negative", "axis", "channels", "kind", "grid", "key", "strange",
         "lost", "none"],
)  # fmt: skip
def test_metadata_that_lies_is_refused(folder, tmp_path, change, message):
    packed = told_of(folder)
    change(packed)
    target = altered(folder, tmp_path / "lies", lambda tensors: None, {"packed": json.dumps(packed)})
    with pytest.raises(CheckpointError, match=message):
        opened(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({WEIGHT: t[WEIGHT][:-1].clone()}), f"{WEIGHT} is not .* bytes"),
        (lambda t: t.update({WEIGHT: t[WEIGHT].float()}), f"{WEIGHT} is not .* bytes"),
        (lambda t: t.pop(WEIGHT), f"{WEIGHT} is not .* bytes"),
        (lambda t: t.pop(WEIGHT + "_quantizer.step"), "step is not 1 float32 numbers"),
        (lambda t: t.update({WEIGHT + "_quantizer.step": torch.ones(2)}), "step is not 1 float32 numbers"),
    ],
    ids=["short", "float", "lost", "no step", "steps"],
)
def test_tensors_that_do_not_fit_are_refused(folder, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        opened(altered(folder, tmp_path / "changed", change))
