"""Folders and files are whole or not there."""

import json

import pytest

from qdetr_cli.errors import RunError
from qdetr_cli.runs import Journal, atomic_folder, atomic_write, new_folder, write_json


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    with pytest.raises(ValueError, match="stop"), atomic_folder(tmp_path / "a") as draft:
        (draft / "x").write_text("1")
        raise ValueError("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "a") as draft:
            (draft / content).write_text(content)
    assert [each.name for each in (tmp_path / "a").iterdir()] == ["new"]
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_a_failed_replacement_keeps_the_old_folder(tmp_path):
    with atomic_folder(tmp_path / "a") as draft:
        (draft / "old").write_text("1")
    with pytest.raises(ValueError, match="stop"), atomic_folder(tmp_path / "a"):
        raise ValueError("stop")
    assert (tmp_path / "a" / "old").read_text() == "1"


def test_atomic_write_replaces_and_leaves_no_draft(tmp_path):
    atomic_write(tmp_path / "f", "one")
    atomic_write(tmp_path / "f", b"two")
    assert (tmp_path / "f").read_text() == "two"
    assert len(list(tmp_path.iterdir())) == 1


def test_json_without_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "f", {"ap": float("nan")})
    assert not (tmp_path / "f").exists()


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "x").write_text("1")
    with pytest.raises(RunError, match="already holds something"):
        new_folder(tmp_path)
    with pytest.raises(RunError, match="already holds something"):
        new_folder(tmp_path / "x")


def test_journal_forgets_what_comes_after_a_step_and_torn_lines(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        journal.append({"step": step})
    with journal.path.open("a") as file:
        file.write('{"step": 4')
    assert [entry["step"] for entry in journal.entries()] == [1, 2, 3]
    journal.rewind(2, 0)
    assert journal.path.read_text().splitlines() == [json.dumps({"step": step}) for step in (1, 2)]


def test_journal_forgets_an_evaluation_that_will_be_made_again(tmp_path):
    """Killed between the evaluation of a step and the checkpoint that knows of it."""
    journal = Journal(tmp_path / "metrics.jsonl")
    for entry in ({"step": 2, "metrics": 1}, {"step": 4}, {"step": 4, "metrics": 2}):
        journal.append(entry)
    journal.rewind(4, 2)
    assert journal.entries() == [{"step": 2, "metrics": 1}, {"step": 4}]


def test_a_journal_that_is_no_text_is_refused(tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(RunError, match="is damaged"):
        journal.entries()
