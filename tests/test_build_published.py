"""Fetching the published sets, from a stand-in for their addresses."""

from pathlib import Path

import pytest

from models.build.datasets import load
from models.build.published import BANKING, CLINC, SNIPS, fetch
from models.errors import DataError

FILES = {
    CLINC: b'{"train": [["wake me", "alarm"]], "oos_train": [["why", "oos"]]}',
    f"{BANKING}/train.csv": b"text,category\nwhere is my card,card_arrival\n",
    f"{BANKING}/test.csv": b"text,category\n",
    **{
        f"{SNIPS}/{split}/{part}": text
        for split in ("train", "valid", "test")
        for part, text in {"seq.in": b"play jazz\n", "seq.out": b"O B-genre\n", "label": b"PlayMusic\n"}.items()
    },
}


def quiet(_done: int, _total: int, _text: str) -> None:
    """Take no notice of progress."""


def test_fetched_sets_are_what_the_loaders_read(tmp_path: Path) -> None:
    fetch(tmp_path, quiet, FILES.__getitem__)
    found = load(tmp_path, "train", ["assistant", "home"])
    assert [(e.text, e.intent) for e in found] == [
        ("wake me", "alarm"),
        ("why", "out_of_scope"),
        ("play jazz", "PlayMusic"),
    ]
    assert found[2].frame.slots == {"genre": "jazz"}


def test_a_set_that_is_there_already_is_not_fetched_again(tmp_path: Path) -> None:
    fetch(tmp_path, quiet, FILES.__getitem__)
    fetch(tmp_path, quiet, {}.__getitem__)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["banking77", "clinc150", "snips"]


def test_files_that_do_not_fit_together_leave_nothing_behind(tmp_path: Path) -> None:
    broken = {**FILES, f"{SNIPS}/valid/label": b""}
    with pytest.raises(DataError, match="SNIPS valid differ in length"):
        fetch(tmp_path, quiet, broken.__getitem__)
    assert [p.name for p in tmp_path.iterdir()] == ["clinc150"]
