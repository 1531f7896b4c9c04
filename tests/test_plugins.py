"""The plugin table, its errors, what may be loaded from where, and the samples in plugins/."""

import pickle
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qdetr_cli import plugins
from qdetr_cli.errors import PluginError
from qdetr_cli.quantizers import make_quantizer
from qdetr_cli.ranges import grid_from_range
from qdetr_cli.recipe import QuantFormat

SAMPLES = Path(__file__).parent.parent / "plugins"
WEIGHT = QuantFormat(bits=4, symmetric=True, unsigned=False, per="tensor", quantizer="lsq", init="mse")


@pytest.fixture(autouse=True)
def _table(monkeypatch):
    """Let every test begin with the built-ins, and leave nothing behind."""
    monkeypatch.setattr(
        plugins, "_TABLE", {k: e for k, e in plugins._TABLE.items() if e.origin == "built-in"}
    )
    monkeypatch.setattr(plugins, "_LOADED", set())
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith("qdetr_plugin_"):
            del sys.modules[name]


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("from qdetr_cli.plugins import register\n" + text)
    return folder


def test_register_and_get():
    @plugins.register("loss", "mine")
    def mine() -> None: ...

    assert plugins.get("loss", "mine") is mine
    assert "mine" in plugins.names("loss")
    (entry,) = [e for e in plugins.entries() if e.name == "mine"]
    assert (entry.kind, entry.origin, entry.object) == ("loss", __file__, mine)


def test_a_taken_name_names_both_files(tmp_path):
    folder = write(tmp_path / "a", "again.py", "@register('range', 'mse')\ndef f(): ...\n")
    with pytest.raises(PluginError, match=r"again\.py: range 'mse' is already registered by .*ranges\.py"):
        plugins.load([folder])
    assert plugins.get("range", "mse").__module__ == "qdetr_cli.ranges"


def test_an_unknown_name_lists_the_valid_ones():
    with pytest.raises(PluginError, match=r"range 'msee' is unknown\. Valid names: minmax, mse, percentile"):
        plugins.get("range", "msee")
    with pytest.raises(PluginError, match=r"exporter 'x' is unknown\. Valid names: none is registered"):
        plugins.get("exporter", "x")


@pytest.mark.parametrize("call", [plugins.get, plugins.register], ids=["get", "register"])
def test_an_unknown_kind_lists_the_kinds(call):
    with pytest.raises(
        PluginError, match="'quantiser' is not a kind of plugin; valid kinds: quantizer, range, loss"
    ):
        call("quantiser", "lsq")


def test_an_empty_name_is_refused():
    with pytest.raises(PluginError, match="needs a name"):
        plugins.register("loss", "")


def test_a_folder_is_loaded_in_name_order_and_once(tmp_path):
    folder = write(tmp_path / "p", "b.py", "register('loss', 'b')(object())\n")
    write(folder, "a.py", "register('loss', 'a')(object())\n")
    write(folder, "_hidden.py", "raise RuntimeError\n")
    plugins.load([folder])
    plugins.load([folder, folder])
    found = {e.name: e.origin for e in plugins.entries() if e.kind == "loss" and e.origin != "built-in"}
    assert found == {"a": str(folder / "a.py"), "b": str(folder / "b.py")}


def test_two_folders_may_hold_files_of_one_name(tmp_path):
    plugins.load([write(tmp_path / x, "same.py", f"register('loss', {x!r})({x!r})\n") for x in ("x", "y")])
    assert (plugins.get("loss", "x"), plugins.get("loss", "y")) == ("x", "y")


def test_the_current_directory_is_never_loaded_by_itself(tmp_path, monkeypatch):
    write(tmp_path, "evil.py", "raise RuntimeError\n")
    monkeypatch.chdir(tmp_path)
    plugins.load()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
        ("import not_there\n", "ModuleNotFoundError: No module named 'not_there'"),
        ("def f(:\n", "SyntaxError"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
    ],
    ids=["raises", "import", "syntax", "exit"],
)
def test_a_failed_import_names_the_file_and_leaves_nothing(tmp_path, text, message):
    folder = write(tmp_path / "p", "bad.py", "register('loss', 'half')(object())\n" + text)
    for _ in range(2):
        with pytest.raises(PluginError, match=rf"bad\.py: import failed: {message}"):
            plugins.load([folder])
    assert "half" not in plugins.names("loss")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(PluginError, match="nowhere: no such plugin folder"):
        plugins.load([tmp_path / "nowhere"])


def entry_point(monkeypatch, value: str) -> None:
    point = EntryPoint(name="extra", value=value, group=plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda *, group: [point] if group == "qdetr.plugins" else [])


def test_entry_points_are_loaded_and_named(tmp_path, monkeypatch):
    write(tmp_path, "qdetr_extra_package.py", "register('metric', 'extra')(object())\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry_point(monkeypatch, "qdetr_extra_package")
    plugins.load()
    assert [e.origin for e in plugins.entries() if e.name == "extra"] == ["entry point extra"]
    del sys.modules["qdetr_extra_package"]


def test_a_broken_entry_point_is_named(monkeypatch):
    entry_point(monkeypatch, "qdetr_not_installed")
    with pytest.raises(PluginError, match="entry point extra: import failed: ModuleNotFoundError"):
        plugins.load()


def test_every_sample_loads():
    plugins.load([SAMPLES])
    files = {e.origin for e in plugins.entries() if e.origin != "built-in"}
    assert files == {str(file) for file in SAMPLES.resolve().glob("*.py")}


def test_sample_quantizer_uses_powers_of_two():
    plugins.load([SAMPLES])
    format = replace(WEIGHT, quantizer="power_of_two", per="channel")
    weight = torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    quantizer = make_quantizer(format, axis=0, channels=6, batched=False)
    quantizer.start_observing()
    quantizer.observe(weight)
    quantizer.finish_observing()
    step = quantizer.grid().step
    assert torch.equal(step.log2(), step.log2().round())
    assert (step / quantizer.step).log2().abs().max() <= 0.5
    assert torch.equal(quantizer(weight), quantizer.dequantize(quantizer.integers(weight)))
    quantizer(weight).square().sum().backward()
    assert (quantizer.step.grad != 0).all()
    assert pickle.loads(pickle.dumps(quantizer)).channels == 6


def test_sample_range_clips_outliers_and_keeps_the_rest():
    plugins.load([SAMPLES])
    values = torch.randn(2, 20000, generator=torch.Generator().manual_seed(0))
    values[0, 7] = 60.0
    format = replace(WEIGHT, bits=8, init="entropy")
    low, high = plugins.get("range", "entropy")(values, format)
    step, _ = grid_from_range(low, high, format)
    assert 2.0 < high[0] < 30.0
    assert 2.0 < high[1] < 5.0
    assert (step > 0).all()
    assert plugins.get("range", "entropy")(torch.zeros(1, 9), format)[1].item() == 0.0


def test_sample_metric_counts_sure_detections():
    plugins.load([SAMPLES])
    data = SimpleNamespace(records=(1, 2))
    scores = [torch.tensor([0.9, 0.6, 0.1]).numpy(), torch.tensor([0.3]).numpy()]
    found = plugins.get("metric", "confidence")(data, [SimpleNamespace(scores=s) for s in scores])
    assert found == pytest.approx({"best_score": 0.6, "sure_per_image": 1.0})


def test_the_plugins_of_the_readme_work(tmp_path):
    """The two examples of the README's section on plugins."""
    text = """
from qdetr_cli.quantizers import LSQ

@register("quantizer", "fixed_step")
class FixedStep(LSQ):
    OPTIONS = LSQ.OPTIONS | {"scale"}

    def live_step(self):
        return self.step.detach() * float(self.format.quantizer_options.get("scale", 1.0))

@register("range", "sigma")
def sigma(values, format, *, times=3.0):
    sample = values[:, :-2]
    return sample.mean(1) - times * sample.std(1), sample.mean(1) + times * sample.std(1)
"""
    plugins.load([write(tmp_path / "p", "mine.py", text)])
    format = replace(WEIGHT, quantizer="fixed_step", quantizer_options={"scale": 0.5}, init="sigma")
    quantizer = make_quantizer(replace(format, init_options={"times": 2.0}), axis=None, channels=1)
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantizer.start_observing()
    quantizer(x)
    quantizer.finish_observing()
    assert quantizer.step.item() == pytest.approx(2 / 7, rel=0.1)
    assert torch.equal(quantizer(x), quantizer.dequantize(quantizer.integers(x)))
    assert quantizer(x).abs().max().item() == pytest.approx(8 / 2 * quantizer.step.item())
    quantizer(x).sum().backward()
    assert quantizer.step.grad is None
    assert x.grad.sum() > 0
