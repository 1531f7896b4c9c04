"""Exported files that run: what they take, what they say of themselves, and which files are refused."""

import subprocess
import sys

import numpy as np
import pytest
from exported_files import metadata, write_file, write_onnx, write_openvino

from qdetr_cli import sessions
from qdetr_cli.errors import ExportError
from qdetr_cli.export.metadata import Metadata
from qdetr_cli.sessions import open_session

SUFFIXES = pytest.mark.parametrize("suffix", [".onnx", ".xml"])


def pixels(batch: int, height: int = 64, width: int = 96) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 3, height, width), dtype=np.float32)


@SUFFIXES
def test_a_file_gives_what_it_computes(tmp_path, suffix):
    session = open_session(write_file(tmp_path / f"m{suffix}"), threads=1)
    given = pixels(2)
    mask = np.zeros((2, 64, 96), dtype=np.int64)
    mask[1, :3] = 1
    found = session.run(given, mask)
    assert found.logits.shape == (2, 2, 11)
    assert found.pred_boxes.shape == (2, 2, 4)
    np.testing.assert_allclose(found.logits[:, 0, 0], given.sum((1, 2, 3)), rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(found.logits[:, 0, 1], [0, 3 * 96])


@SUFFIXES
def test_without_a_mask_the_whole_image_is_seen(tmp_path, suffix):
    found = open_session(write_file(tmp_path / f"m{suffix}"), threads=1).run(pixels(1))
    assert found.logits[0, 0, 1] == 64 * 96


@SUFFIXES
def test_outputs_are_not_overwritten_by_the_next_run(tmp_path, suffix):
    session = open_session(write_file(tmp_path / f"m{suffix}"), threads=1)
    found = session.run(pixels(1))
    before = found.logits.copy()
    session.run(10 * pixels(1))
    np.testing.assert_array_equal(found.logits, before)


@SUFFIXES
@pytest.mark.parametrize(
    ("shape", "batch", "size"),
    [
        ({"batch": 3}, 3, (64, 96)),
        ({}, None, (64, 96)),
        ({"size": ("height", "width")}, None, None),
        ({"size": (64, "width")}, None, None),
    ],
    ids=["fixed", "any batch", "any size", "any width"],
)
def test_inputs_are_known(tmp_path, suffix, shape, batch, size):
    inputs = open_session(write_file(tmp_path / f"m{suffix}", **shape), threads=1).inputs
    assert (inputs.batch, inputs.size, inputs.mask) == (batch, size, np.dtype(np.int64))


@SUFFIXES
def test_a_file_without_a_mask_is_fed_none(tmp_path, suffix):
    session = open_session(write_file(tmp_path / f"m{suffix}", mask=False), threads=1)
    assert session.inputs.mask is None
    assert session.run(pixels(1), np.ones((1, 64, 96))).logits[0, 0, 1] == 0


@SUFFIXES
def test_metadata_comes_back(tmp_path, suffix):
    told = metadata(class_names={0: 'a "b" <c>', 1: "ü"})
    session = open_session(write_file(tmp_path / f"m{suffix}", told=told), threads=1)
    assert Metadata.from_json(session.metadata) == told
    assert open_session(write_file(tmp_path / f"other{suffix}"), threads=1).metadata is None


@SUFFIXES
def test_the_threads_are_set(tmp_path, suffix):
    session = open_session(write_file(tmp_path / f"m{suffix}"), threads=1)
    if suffix == ".onnx":
        options = session._session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    else:
        compiled = session._request.get_compiled_model()
        assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
        assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"


def test_a_runtime_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"no runtime is known for \.engine; \.onnx runs in ONNX Runtime"):
        open_session(tmp_path / "m.engine")


@SUFFIXES
def test_what_is_not_there_is_said(tmp_path, suffix):
    with pytest.raises(ExportError, match="there is no such file"):
        open_session(tmp_path / f"m{suffix}")


def test_openvino_needs_the_weights_beside(tmp_path):
    path = write_openvino(tmp_path / "m.xml")
    path.with_suffix(".bin").unlink()
    with pytest.raises(ExportError, match=r"m\.bin: there is no such file; m\.xml needs it beside it"):
        open_session(path)


@SUFFIXES
@pytest.mark.parametrize(
    "content", [b"", b"hello", b"<net>", b"\x08\x07"], ids=["empty", "text", "xml", "half"]
)
def test_what_is_no_model_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"m{suffix}"
    path.write_bytes(content)
    (tmp_path / "m.bin").write_bytes(b"")
    with pytest.raises(ExportError, match=r"cannot load it|is no detector") as caught:
        open_session(path)
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_refused(tmp_path):
    path = write_openvino(tmp_path / "m.xml")
    weights = path.with_suffix(".bin")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ExportError, match="OpenVINO cannot load it"):
        open_session(path)


@SUFFIXES
def test_another_network_is_refused(tmp_path, suffix):
    path = write_file(tmp_path / f"m{suffix}", outputs=("scores", "pred_boxes"))
    with pytest.raises(ExportError, match=r"is no detector that qdetr exported: .* scores"):
        open_session(path)


@pytest.mark.parametrize(("suffix", "name"), [(".onnx", "ONNX Runtime"), (".xml", "OpenVINO")])
def test_a_missing_extra_is_one_line(tmp_path, monkeypatch, suffix, name):
    path = write_file(tmp_path / f"m{suffix}")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ExportError, match=rf'needs {name}: pip install "qdetr\[export\]"'):
        open_session(path)


def test_sessions_import_no_torch(tmp_path):
    path = write_onnx(tmp_path / "m.onnx")
    code = (
        "import sys\nfrom pathlib import Path\nfrom qdetr_cli.sessions import open_session\n"
        f"open_session(Path({str(path)!r}), 1)\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_cores_are_those_of_the_process():
    assert sessions.cores() >= 1
