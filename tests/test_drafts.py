"""Files that belong together take their place all at once, or none of them does."""

import os

import pytest

from qdetr_cli.errors import RunError
from qdetr_cli.runs import check_file, draft_files


def write(draft, content="new"):
    draft.write_text(content)
    draft.with_suffix(".bin").write_text(content)


def test_both_files_take_their_place(tmp_path):
    path = tmp_path / "folder" / "m.xml"
    with draft_files(path, [".bin"]) as draft:
        assert draft.name == "m.xml"
        assert not path.exists()
        write(draft)
    assert sorted(os.listdir(path.parent)) == ["m.bin", "m.xml"]
    assert path.read_text() == path.with_suffix(".bin").read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()], ids=["error", "interrupted"])
def test_nothing_stays_of_a_block_that_fails(tmp_path, error):
    with pytest.raises(type(error)), draft_files(tmp_path / "m.xml", [".bin"]) as draft:
        write(draft)
        raise error
    assert not os.listdir(tmp_path)


def test_the_first_file_goes_again_where_the_second_cannot_come(tmp_path):
    with (
        pytest.raises(RunError, match="cannot be written"),
        draft_files(tmp_path / "m.xml", [".bin"]) as draft,
    ):
        draft.with_suffix(".bin").write_text("new")  # and no .xml
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("there", ["m.xml", "m.bin", "link.xml"])
def test_what_is_there_is_refused_and_stays(tmp_path, there):
    if there == "link.xml":
        (tmp_path / there).symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / there).write_text("mine")
    name = there.replace("bin", "xml")
    with pytest.raises(RunError, match=f"{there}: is there already"):
        check_file(tmp_path / name, [".bin"])
    assert os.listdir(tmp_path) == [there]


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file: is a file, so .* cannot be created"):
        check_file(tmp_path / "file" / "m.onnx")
