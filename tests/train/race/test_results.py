"""results.json: what is refused when it is read, and what makes runs comparable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from subspan.train.errors import JobError
from subspan.train.race.results import RESULTS, VERSION, read_results, same_inputs, write_results


def content(**changes: Any) -> dict[str, Any]:
    empty = {"version": VERSION, "title": "T", "same_inputs": True, "tokens": 1, "search": None}
    return empty | {"seeds": [0], "runs": [], "arms": {}, "clock": None} | changes


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written: Any = content()
    write_results(tmp_path, written)
    assert read_results(tmp_path) == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"title": "T", "arms": {}}', "is of an earlier version (1, this is 2)"),
        (json.dumps(content(version=3)), "is of another version (3, this is 2)"),
        (json.dumps(content())[:40], "is damaged; delete it"),
        ("[]", "is damaged"),
        ("", "is damaged"),
        (json.dumps(content(runs=[{"arm": "a"}])), "is damaged"),
        (json.dumps(content(tokens=None)), "(at tokens)"),
    ],
)
def test_torn_and_foreign_files_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / RESULTS).write_text(text)
    with pytest.raises(JobError) as error:
        read_results(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_folder_without_results_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="holds no comparison"):
        read_results(tmp_path)


def run(corpus: str = "c", weights: str = "w", order: str = "o", seed: int = 0) -> dict[str, Any]:
    inputs = {"corpus_hash": corpus, "initial_weights_hash": weights, "data_order_hash": order}
    return {"inputs": inputs | {"seed": seed}}


def test_inputs_are_the_same_when_each_seed_has_one_start() -> None:
    assert same_inputs([])
    assert same_inputs([run(), run(), run(weights="v", order="p", seed=1)])
    assert not same_inputs([run(), run(corpus="d", seed=1)])
    assert not same_inputs([run(), run(weights="v")])
    assert not same_inputs([run(), run(order="p")])
    old = {"inputs": {"corpus_hash": "c", "initial_weights_hash": "w"}}
    assert same_inputs([old, old])
    assert not same_inputs([old, {"inputs": old["inputs"] | {"initial_weights_hash": "v"}}])
