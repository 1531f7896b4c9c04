"""Checkpoints of strangers: one message, or a right answer; no code, no hang, no gigabytes."""

import copy
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hostile import FUZZ, ODD, changed, damaged, outcome, pipe
from hypothesis import given
from hypothesis import strategies as st
from packed_models import fake_quant, opened
from tiny_detectors import CONFIGS, tiny_config
from tiny_runs import refused, write_model

from qdetr_cli.budget import Budget
from qdetr_cli.checkpoint import load_config_model, load_float
from qdetr_cli.configs import build_config
from qdetr_cli.errors import CheckpointError
from qdetr_cli.manifest import Manifest, read_file, read_manifest
from qdetr_cli.models import Source, open_model, save_model, save_packed
from qdetr_cli.original.pickles import read_pickle
from qdetr_cli.packed import load_packed
from qdetr_cli.plan import Plan
from qdetr_cli.processors import Processor
from qdetr_cli.reading import parse_json
from qdetr_cli.storage import storage_of
from qdetr_cli.trace import GraphFacts

NAME = "detr"
WEIGHTS, MANIFEST = "model.safetensors", "qdetr.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """packed/, fake-quant/ and hub/ (Hugging Face) of a tiny DETR."""
    path, model = tmp_path_factory.mktemp("hostile"), fake_quant(NAME)
    save_packed(model, path / "packed")
    save_model(model.module, model, path / "fake-quant", model.recipe, None)
    write_model(path / "hub")
    return path


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


# --- safetensors ---


def test_damaged_packed_files(folders, tmp_path):
    """Header, metadata and data, at random: what is still read is a model of the same shapes."""
    folder = copied(folders / "packed", tmp_path / "damaged")
    whole = (folder / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    module = opened(folders / "packed").module
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    seen = set()

    told = json.loads(whole[8:header])
    packed = json.loads(told["__metadata__"]["packed"])
    data = whole[header:]

    def with_packed(content: object) -> bytes:
        return json.dumps(
            told | {"__metadata__": told["__metadata__"] | {"packed": json.dumps(content)}}
        ).encode()

    @FUZZ
    @given(
        damaged(whole)
        | changed(told).map(lambda content: file_of(json.dumps(content).encode(), data))
        | changed(packed).map(lambda content: file_of(with_packed(content), data))
        | damaged(data).map(lambda content: whole[:header] + content)
    )
    def check(content: bytes) -> None:
        (folder / WEIGHTS).write_bytes(content)
        seen.add(outcome(lambda: load_packed(folder, module)) == "right")
        outcome(lambda: storage_of(folder))
        assert {name: value.shape for name, value in module.state_dict().items()} == shapes

    check()
    assert seen == {True, False}


FOUR = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def file_of(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        file_of(b"{}", length=2**63),
        file_of(b"{}", length=99 * 2**20),
        file_of(b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}', b"1234"),
        file_of(b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
        file_of(b'{"a":' + FOUR + b',"b":' + FOUR + b"}", b"1234"),
        file_of(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', b"1234"),
        file_of(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"1234"),
        file_of(b'{"a":{"dtype":"X99","shape":[1],"data_offsets":[0,4]}}', b"1234"),
        file_of(b"[" * 100_000),
        file_of(b'{"__metadata__":{"aliases":"' + b"[" * 100_000 + b'"}}'),
        file_of(b'{"__metadata__":{"aliases":"{\\"x\\":\\"nowhere\\"}"}}'),
        file_of(b'{"__metadata__":{"aliases":"[]"}}'),
        file_of(b'{"__metadata__":{"aliases":"{\\"x\\":[]}"}}'),
    ],
    ids=["empty", "length", "long", "lie", "overflow", "overlap", "backwards", "negative", "type", "deep",
         "aliases deep", "nowhere", "list", "unhashable"],
)  # fmt: skip
def test_headers_that_lie(tmp_path, content):
    (tmp_path / WEIGHTS).write_bytes(content)
    assert "cannot be read" in outcome(lambda: read_file(tmp_path / WEIGHTS))


# --- manifests ---


@pytest.mark.parametrize("kind", ["packed", "fake-quant"])
def test_changed_manifests(folders, kind):
    """What is still a manifest has a plan and facts of the right types, and goes round."""
    whole = json.loads((folders / kind / MANIFEST).read_text())

    def read(content: object) -> None:
        try:
            manifest = Manifest.from_dict(parse_json(json.dumps(content)))
            plan, facts = Plan.from_dict(manifest.plan), GraphFacts.from_dict(manifest.facts)
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(str(error)) from error  # as read_manifest and open_model do
        assert Plan.from_dict(plan.to_dict()) == plan
        plan.costs(1000)
        assert GraphFacts.from_dict(facts.to_dict()) == facts

    @FUZZ
    @given(changed(whole) | changed({"plan": whole["plan"]}).map(lambda part: whole | part)
           | changed({"facts": whole["facts"]}).map(lambda part: whole | part))  # fmt: skip
    def check(content: object) -> None:
        outcome(lambda: read(content))

    check()


def put(content: dict, path: tuple, value: object) -> dict:
    content = copy.deepcopy(content)
    owner = content
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("config", "d_model"), 10**6),
        (("config", "encoder_layers"), 10**9),
        (("config", "num_queries"), 10**12),
        (("config", "backbone_config", "model_type"), "nothing"),
        (("config",), {}),
        (("facts", "attentions", 0, "heads"), 10**9),
        (("facts", "attentions"), []),
        (("facts", "batch_norms"), [["x", "y"]]),
        (("plan", "modules", 0, "path"), "no.such.module"),
        (("plan", "modules", 0, "op"), "attention"),
        (("plan", "modules", 0, "slots", 0, "format", "bits"), 10**9),
        (("plan", "modules", 0, "slots", 0, "format", "quantizer"), "nobody's"),
        (("processor", "size"), {"height": 10**9, "width": 10**9}),
        (("processor", "image_std"), [0, 0, 0]),
        (("recipe", "schema"), 99),
        (("family",), "nobody's"),
        (("class_names",), {"x": "y"}),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_manifests_that_do_not_belong_to_their_weights(folders, tmp_path, path, value):
    folder = copied(folders / "packed", tmp_path / "changed")
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(put(content, path, value)))
    assert outcome(lambda: opened(folder)) != "right"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10**6, "nested too deep"),
        ("[" * 100 + "]" * 100, "nested too deep"),
        ('{"format": 1, "format": 1}', "'format' stands there twice"),
        ('{"format": ' + "9" * 100_000 + "}", "too large"),
        (" " * (1 << 24) + " {}", "is the most"),
        ("\ud800".encode("utf-8", "surrogatepass"), "not a manifest"),
    ],
    ids=["endless", "deep", "twice", "digits", "long", "utf-8"],
)
def test_json_has_bounds(tmp_path, text, message):
    (tmp_path / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in outcome(lambda: read_manifest(tmp_path))


@pytest.mark.parametrize(
    ("kind", "name"),
    [("packed", WEIGHTS), ("packed", MANIFEST), ("hub", WEIGHTS), ("hub", "config.json"),
     ("hub", "preprocessor_config.json")],
    ids=str,
)  # fmt: skip
def test_a_pipe_is_not_waited_for(folders, tmp_path, kind, name):
    folder = copied(folders / kind, tmp_path / "pipe")
    with pipe(folder / name):
        assert outcome(lambda: open_model(Source(str(folder)), lambda line: None)) != "right"


# --- Hugging Face folders ---


@pytest.mark.parametrize("family", ["detr", "d_fine", "yolos"])
def test_changed_configs_of_transformers(family):
    """A model is built within the budget, or the config is refused."""
    budget = Budget(values=100_000, tensors=500, where="it")
    config = load_config_model(tiny_config(family), None).model.config.to_dict()
    keys = sorted(set(config) - {"id2label", "label2id"})

    @FUZZ
    @given(st.sampled_from(keys), st.sampled_from(ODD))
    def check(key: str, value: object) -> None:
        outcome(lambda: load_config_model({**config, key: value}, None, budget))

    check()


@pytest.mark.parametrize("name", CONFIGS, ids=str)
def test_the_budget_is_enough_for_every_family(name):
    """Counted from the tensors alone, as a folder has them."""
    state = load_config_model(tiny_config(name), None).model.state_dict()
    budget = Budget(values=sum(x.numel() for x in state.values()), tensors=len(state), where="it")
    load_config_model(tiny_config(name), None, budget)


def test_the_budget_has_an_end_before_the_memory_has():
    config = tiny_config(NAME) | {"encoder_ffn_dim": 10**7}
    said = outcome(lambda: load_config_model(config, None, Budget(values=10**6, tensors=10**3, where="it")))
    assert "describes a model with many times as much" in said


def test_a_pyramid_without_strides_is_refused():
    config = tiny_config("rt_detr") | {"feat_strides": []}
    assert "says no sides of images" in outcome(lambda: load_config_model(config, None))


def test_a_config_names_no_code():
    """transformers fetches and runs attention kernels that a config names under private keys."""
    backbone = {**tiny_config(NAME)["backbone_config"], "_attn_implementation": "owner/kernel"}
    strange = {
        "_attn_implementation": "owner/kernel",
        "auto_map": {"AutoModel": "evil.Model"},
        "backbone_config": backbone,
    }
    built = build_config(tiny_config(NAME) | strange)
    assert "owner/kernel" not in (built._attn_implementation, built.backbone_config._attn_implementation)
    assert not hasattr(built, "auto_map")


@pytest.mark.parametrize("name", ["hf-hub:owner/name", "local-dir:/tmp", "../x", 5, None], ids=str)
def test_a_backbone_is_not_fetched(name):
    timm = {"model_type": "timm_backbone", "backbone": name, "out_indices": [1]}
    said = outcome(lambda: build_config(tiny_config(NAME) | {"backbone_config": timm}))
    assert "is no name of a timm network" in said


def test_shards_lie_in_the_folder(folders, tmp_path):
    folder = copied(folders / "hub", tmp_path / "sharded")
    index = {"metadata": {}, "weight_map": {"class_labels_classifier.bias": f"../hub/{WEIGHTS}"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert "names what is no file of this folder" in refused("inspect", folder)


def test_changed_processors():
    whole = Processor(shortest=800, longest=1333, pad=True).to_config() | {
        "pad_size": {"height": 64, "width": 64}
    }

    @FUZZ
    @given(changed(whole, times=3))
    def check(content: dict) -> None:
        def read() -> None:
            made = Processor.from_config(content)
            assert Processor.from_config(made.to_config()) == made
            assert all(side > 0 for side in made.output_size(480, 640))

        outcome(read)

    check()


# --- pickles ---


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.flag}",)


class Grows:
    """Takes a terabyte when it is unpickled."""

    def __reduce__(self) -> tuple:
        return bytearray, (10**12,)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["value", "key", "inside"])
def test_code_in_a_pth_does_not_run(tmp_path, where, new):
    evil, flag = Evil(tmp_path / "ran"), tmp_path / "ran"
    content = {"value": evil, "key": {("a", evil): 1}, "inside": {"model": {"w": [torch.zeros(1), evil]}}}[
        where
    ]
    torch.save(content, tmp_path / "m.pth", _use_new_zipfile_serialization=new)
    assert "refused, because its pickle names" in refused("inspect", tmp_path / "m.pth")
    assert not flag.exists()


def test_code_in_a_plain_pickle_or_a_bin_does_not_run(folders, tmp_path):
    folder = copied(folders / "hub", tmp_path / "bin")
    (folder / WEIGHTS).unlink()
    flag = tmp_path / "ran"
    for path in (folder / "pytorch_model.bin", tmp_path / "plain.pth"):
        path.write_bytes(pickle.dumps({"w": Evil(flag)}))
        assert refused("inspect", folder if path.suffix == ".bin" else path)
    assert not flag.exists()


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_grows_is_refused(tmp_path, new):
    torch.save({"model": Grows()}, tmp_path / "m.pth", _use_new_zipfile_serialization=new)
    assert "bytearray" in outcome(lambda: read_pickle(tmp_path / "m.pth"))


def test_a_zip_bomb_is_refused(tmp_path):
    """300 MB of zeros in 300 kB."""
    saved = io.BytesIO()
    torch.save({"model": {"w": torch.zeros(1)}}, saved)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(tmp_path / "m.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, bytes(300 << 20) if "/data/" in entry.filename else old.read(entry))
    assert "is compressed" in outcome(lambda: read_pickle(tmp_path / "m.pth"))


def test_a_tensor_that_is_larger_than_its_file_builds_no_model(tmp_path):
    from original_detr import random_detr

    state = random_detr(classes=3, layers=(1, 1)).state_dict()
    state["query_embed.weight"] = torch.zeros(1, 1).expand(10**9, 256)
    torch.save({"model": state}, tmp_path / "m.pth")
    assert outcome(lambda: load_float(tmp_path / "m.pth", heads=4)) != "right"


def test_damaged_torch_files(tmp_path):
    path = tmp_path / "m.pth"
    torch.save({"model": {"w": torch.arange(30.0)}, "args": {"x": 1}}, path)
    whole = path.read_bytes()

    @FUZZ
    @given(damaged(whole))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        outcome(lambda: read_pickle(path))

    check()


def test_a_pipe_for_a_pth_is_not_waited_for(tmp_path):
    with pipe(tmp_path / "m.pth") as path:
        assert "no such file" in refused("inspect", path)
