"""Corpora: what is read, in which order, and clear errors for what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from subspan.train.corpora import BUILTIN, read_corpus, source_key
from subspan.train.docstrings import collect, file_docstrings
from subspan.train.errors import JobError
from subspan.train.textfiles import SECTION_CHARACTERS, sections

MODULE = '''"""Documentation of a module that is long enough."""
class Thing:
    """Documentation of a class that is long enough."""
    def method(self):
        """Documentation of a method
            with an indented line."""
        if True:
            def inner():
                """Documentation of a function in a block."""
        """A string that documents nothing at all."""
'''


def test_docstrings_of_a_file_come_in_source_order(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(MODULE)
    found = file_docstrings(tmp_path / "m.py")
    assert found is not None
    assert [part.split("\n")[0] for part in found.split("\n\n")] == [
        "Documentation of a module that is long enough.",
        "Documentation of a class that is long enough.",
        "Documentation of a method",
        "Documentation of a function in a block.",
    ]


def test_file_of_another_language_version_has_no_docstrings(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text('"""A docstring of a broken module."""\nprint "x"\n')
    assert file_docstrings(tmp_path / "m.py") is None


def test_several_processes_read_the_same_as_one(tmp_path: Path) -> None:
    files = []
    for number in range(120):
        files.append(tmp_path / f"m{number:03d}.py")
        files[-1].write_text(f'"""Module number {number} of this test."""\n' if number % 3 else "")
    one = [text for text in map(file_docstrings, files) if text]
    assert len(one) == 80
    assert collect(files) == one


def test_built_in_prose_is_deterministic_and_without_duplicates() -> None:
    first = read_corpus("pydoc-topics")
    assert first == read_corpus("pydoc-topics")
    assert len(set(first)) == len(first) > 50
    assert all(text.strip() for text in first)


def test_built_in_corpora_are_known_by_their_source_files() -> None:
    keys = [source_key(name, [], "text") for name in BUILTIN]
    assert all(keys)
    assert len(set(keys)) == len(keys)
    assert source_key("text.txt", [], "text") is None


def test_sections_lose_no_character_and_are_not_too_long() -> None:
    with_blanks = "\n\n".join("word " * 100 for _ in range(100))
    without = "\n".join("word " * 20 for _ in range(1000))
    for text in (with_blanks, without, "short", "one line " * 10_000):
        parts = list(sections(text))
        assert "".join(parts) == text
    assert all(len(p) <= 2 * SECTION_CHARACTERS + 100 for p in sections(without))
    assert len(list(sections(with_blanks))) > 3


def test_files_of_a_folder_are_read_in_sorted_order(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "first again"}\n')
    (tmp_path / "ignored.md").write_text("not read")
    table = pyarrow.table({"text": ["third", None, "second"]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    assert read_corpus(str(tmp_path)) == ["first", "first again", "second", "third"]


def test_other_text_field_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "no", "body": "yes"}))
    assert read_corpus(str(tmp_path / "a.jsonl"), text_field="body") == ["yes"]


def test_data_set_name_is_loaded_by_the_datasets_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "a row"}\n{"text": "another"}\n')
    assert read_corpus(f"datasets:{tmp_path / 'set'}") == ["a row", "another"]
    with pytest.raises(JobError, match="has no field"):
        read_corpus(f"datasets:{tmp_path / 'set'}", text_field="body")


def test_data_set_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot load data set") as error:
        read_corpus(f"datasets:{tmp_path / 'missing' / 'set'}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("docstring", "unknown corpus 'docstring': not one of docstrings, pydoc-topics"),
        ("missing.txt", "text file missing.txt does not exist"),
        ("some/folder", "text file some/folder does not exist"),
        ([], "data.corpus is an empty list"),
    ],
)
def test_unknown_corpus_names_itself_and_the_remedy(corpus: str, message: str) -> None:
    with pytest.raises(JobError) as error:
        read_corpus(corpus)
    assert message in str(error.value)


def test_unreadable_files_are_one_line(tmp_path: Path) -> None:
    cases = {
        "binary.txt": (b"\xff\xfe\x00", "not UTF-8"),
        "empty.txt": (b" \n", "holds no text"),
        "broken.jsonl": (b'{"text": ', "line 1"),
        "number.jsonl": (b'{"text": 3}', "has no text field 'text'"),
        "list.jsonl": (b"[1]", "has no text field 'text'"),
        "broken.parquet": (b"PAR1", "cannot read"),
        "table.csv": (b"a,b", "text files end in .txt, .jsonl, .parquet"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(JobError) as error:
            read_corpus(str(tmp_path / name))
        assert message in str(error.value), name
        assert name in str(error.value)
        assert "\n" not in str(error.value)


def test_folder_without_text_and_missing_package_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"holds no \.txt, \.jsonl, \.parquet file"):
        read_corpus(str(tmp_path))
    with pytest.raises(JobError, match="'no_such_package' is not an installed package"):
        read_corpus("docstrings", packages=["no_such_package"])
