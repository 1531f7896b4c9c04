"""Data sets and images of strangers: one message, or a right answer; nothing outside is read or run."""

import io
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hostile import FUZZ, changed, damaged, outcome, pipe
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_runs import write_coco, write_voc

from qdetr_cli.data import check_images, open_data
from qdetr_cli.data.images import FORMATS, image_size, read_image

SIZES = ((80, 60), (60, 90))


def used(root: Path, split: str = "val") -> None:
    """Everything of a data set that a command reads before it reads images."""
    data = open_data(root, split=split)
    check_images(data)
    for record in data.records:
        assert np.isfinite(record.boxes).all()
        assert (record.boxes[:, 2:] > record.boxes[:, :2]).all()
        assert root.resolve() in record.image.resolve().parents


# --- COCO and VOC ---


def test_changed_coco_files(tmp_path):
    root = write_coco(tmp_path / "coco", SIZES)
    path = root / "annotations" / "instances_val.json"
    whole, seen = json.loads(path.read_text()), set()

    @FUZZ
    @given(changed(whole) | changed(whole["images"]).map(lambda part: whole | {"images": part})
           | changed(whole["annotations"]).map(lambda part: whole | {"annotations": part}))  # fmt: skip
    def check(content: object) -> None:
        path.write_text(json.dumps(content))
        seen.add(outcome(lambda: used(root)) == "right")

    check()
    assert seen == {True, False}


@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"images": ' + "9" * 10**5 + "}", "\x00", "", "nul", '{"images": NaN}'],
    ids=["deep", "digits", "zero", "empty", "torn", "nan"],
)  # fmt: skip
def test_what_is_no_coco_file(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert "a.json" in outcome(lambda: open_data(tmp_path / "a.json"))


def test_changed_voc_files(tmp_path):
    """As text: tags, numbers and names at random."""
    root = write_voc(tmp_path / "voc", ("cat", "dog"), SIZES)
    path = root / "Annotations" / "val1.xml"
    whole, seen = path.read_bytes(), set()
    names = st.sampled_from(
        [b"../../x", b"/etc/passwd", b"1e999", b"-5", b"nan", b"\xff", b"&x;", b"<a>", b"9" * 500]
    )
    words = st.sampled_from([b"cat", b"dog", b"60", b"80", b"5", b"24", b"name", b"size"])

    @FUZZ
    @given(damaged(whole) | st.tuples(words, names).map(lambda pair: whole.replace(*pair)))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        seen.add(outcome(lambda: used(root)) == "right")

    check()
    assert seen == {True, False}


LAUGHS = (
    b'<!DOCTYPE a [<!ENTITY a "ha"><!ENTITY b "&a;&a;"><!ENTITY c "&b;&b;">]><annotation>&c;</annotation>'
)


@pytest.mark.parametrize(
    "content",
    [
        LAUGHS,
        b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation>&x;</annotation>',
        b'<!DOCTYPE a SYSTEM "http://127.0.0.1:9/x.dtd"><annotation/>',
        b'<!DOCTYPE a [<!ENTITY % x SYSTEM "file:///etc/passwd"> %x;]><annotation/>',
        b"<a>" * 200_000,
        b"<annotation>" + b"<a>" * 100_000 + b"</a>" * 100_000 + b"</annotation>",
        b'<?xml version="1.0" encoding="nothing"?><annotation/>',
        b"<annotation " + b"".join(b'a%d="" ' % index for index in range(20_000)) + b">",
    ],
    ids=["laughs", "file", "net", "parameter", "open", "deep", "encoding", "attributes"],
)
def test_xml_attacks(tmp_path, content):
    root = write_voc(tmp_path / "voc", ("cat", "dog"), SIZES)
    (root / "Annotations" / "val1.xml").write_bytes(content)
    said = outcome(lambda: used(root))
    assert said == "right" or "val1.xml" in said
    assert "root:" not in said


@pytest.mark.parametrize(
    "line", ["../../../etc/passwd", "/etc/passwd", "..", "val1\0", "~root/x", "C:\\x", "./val1/.."]
)
def test_image_sets_stay_in_their_root(tmp_path, line):
    root = write_voc(tmp_path / "voc", ("cat", "dog"), SIZES)
    (root / "ImageSets" / "Main" / "val.txt").write_text(line + "\n")
    assert outcome(lambda: used(root)) != "right"


@pytest.mark.parametrize("split", ["../train", "/etc/passwd", "..", "", "a\0b", "*", "val/../val"])
def test_splits_stay_in_their_root(tmp_path, split):
    for root in (write_voc(tmp_path / "voc", ("cat",), SIZES), write_coco(tmp_path / "coco", SIZES)):
        assert outcome(lambda root=root: open_data(root, split=split)) != "right"


def test_links_in_a_circle_are_no_files(tmp_path):
    root = write_voc(tmp_path / "voc", ("cat", "dog"), SIZES)
    for name in ("Annotations/val1.xml", "JPEGImages/val1.jpg"):
        kept = (root / name).read_bytes()
        (root / name).unlink()
        os.symlink(root / name, root / name)
        assert "val1" in outcome(lambda: used(root))
        (root / name).unlink()
        (root / name).write_bytes(kept)
    os.symlink(root, root / "Annotations" / "again")
    assert outcome(lambda: used(root)) == "right"


@pytest.mark.parametrize("name", ["Annotations/val1.xml", "JPEGImages/val1.jpg", "ImageSets/Main/val.txt"])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    root = write_voc(tmp_path / "voc", ("cat", "dog"), SIZES)
    with pipe(root / name):
        assert "val" in outcome(lambda: used(root))


# --- images ---


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> bytes:
    saved = io.BytesIO()
    image = Image.effect_noise(size, 50).convert("RGB").convert(mode)
    image.save(saved, kind)
    return saved.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM"])
def test_damaged_images(tmp_path, kind):
    """Any byte changed, cut or doubled: an RGB image of the size in its header, or a message."""
    path, whole = tmp_path / "a.jpg", encoded(kind, "P" if kind == "GIF" else "RGB")

    @FUZZ
    @given(damaged(whole) | damaged(whole[:64]).map(lambda head: head + whole[64:]))
    def check(content: bytes) -> None:
        path.write_bytes(content)

        def read() -> None:
            image = read_image(path)
            assert image.mode == "RGB"
            assert sorted(image.size) == sorted(image_size(path))

        outcome(read)

    check()


POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 40 30
%%EndComments
(FLAG) (w) file closefile
showpage
%%EOF
"""


def test_no_other_program_is_run_for_an_image(tmp_path, monkeypatch):
    """PostScript under the name of a JPEG: Pillow would give it to Ghostscript."""
    script = tmp_path / "bin" / "gs"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    assert shutil.which("gs") == str(script)
    (tmp_path / "a.jpg").write_bytes(POSTSCRIPT)
    assert "cannot be read as an image" in outcome(lambda: read_image(tmp_path / "a.jpg"))
    assert not (tmp_path / "ran").exists()
    assert not {"EPS", "WMF", "HDF5", "GRIB"} & set(FORMATS)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, bits: int = 8) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more)


@pytest.mark.parametrize(
    "content",
    [
        png(50_000, 50_000, chunk(b"IDAT", zlib.compress(bytes(10**6))), chunk(b"IEND", b"")),
        png(2**31 - 1, 2**31 - 1),
        png(0, 0, chunk(b"IEND", b"")),
        png(5, 0, chunk(b"IEND", b"")),
        png(9, 9, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20))), chunk(b"IEND", b"")),
        png(9, 9, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200 << 20))), chunk(b"IEND", b"")),
        png(9, 9, chunk(b"IDAT", zlib.compress(bytes(200 << 20))), chunk(b"IEND", b"")),
        b"P6 99999999 99999999 255\n",
        b"P6 " + b"9" * 10**6,
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0),
        b"",
    ],
    ids=["bomb", "widest", "empty", "flat", "text", "profile", "data", "ppm", "digits", "gif", "nothing"],
)
def test_image_bombs(tmp_path, content):
    """Sizes and lengths that lie: a message, or the few pixels that there are, within 400 MB."""
    (tmp_path / "a.png").write_bytes(content)
    said = outcome(lambda: read_image(tmp_path / "a.png"))
    assert said == "right" or "a.png" in said


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"])
def test_every_mode_is_rgb_or_refused(tmp_path, mode):
    values = np.arange(1200, dtype=np.uint16).reshape(30, 40)
    grey = Image.fromarray(values.astype({"I": np.int32, "F": np.float32}.get(mode, np.uint16)))
    image = grey if mode in ("I;16", "I", "F") else Image.effect_noise((40, 30), 50).convert("RGB")
    if mode == "LAB":
        image = Image.merge("LAB", image.split())
    elif mode not in ("I;16", "I", "F"):
        image = image.convert(mode)
    image.save(tmp_path / "a.tif")
    said = outcome(lambda: read_image(tmp_path / "a.tif"))
    assert said == "right" or mode in ("F", "LAB")
    if said == "right":
        read = read_image(tmp_path / "a.tif")
        assert (read.mode, read.size) == ("RGB", (40, 30))


@pytest.mark.parametrize("orientation", [*range(10), 65535])
def test_every_orientation_is_upright_or_ignored(tmp_path, orientation):
    image = Image.effect_noise((40, 30), 50)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif)
    size = read_image(tmp_path / "a.jpg").size
    assert size == ((30, 40) if orientation in (5, 6, 7, 8) else (40, 30))
