"""The command line: instant help, one line for bad input, a whole run and a comparison."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from subspan import __version__, cli

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command line in this process; returns status, output and errors."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["subspan", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration file of a comparison's job that takes a second."""
    from transformers import LlamaConfig

    from subspan.train.yamlfile import dump_yaml

    folder = tmp_path_factory.mktemp("job")
    source = random.Random(0)
    words = ["".join(source.choices("etaoins", k=4)) for _ in range(200)]
    lines = (" ".join(source.choices(words, k=12)) + "\n\n" for _ in range(3000))
    (folder / "text.txt").write_text("".join(lines))
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    LlamaConfig(num_hidden_layers=2, tie_word_embeddings=False, **size).save_pretrained(folder)
    fields = {
        "model": str(folder),
        "data": {
            "corpus": str(folder / "text.txt"),
            "vocab_size": 300,
            "sequence_length": 32,
            "validation_tokens": 256,
            "cache": str(folder / "cache"),
        },
        "steps": 6,
        "batch_size": 4,
        "eval_every": 3,
        "device": "cpu",
        "threads": 1,
        "track": [],
    }
    (folder / "train.yaml").write_text(dump_yaml(fields))
    arms = {"adamw": {"lr": 0.003}, "galore": {"rank": 4}}
    (folder / "compare.yaml").write_text(dump_yaml({"job": fields, "arms": arms}))
    return folder


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_answer_in_under_a_second(flag: str) -> None:
    # CPU time, because the machine may be busy with other tests; the best of three.
    code = (
        "import sys, time; sys.argv = ['subspan', sys.argv[1]]\n"
        "import subspan.cli\n"
        "try:\n    subspan.cli.main()\n"
        "finally:\n    print('\\nCPU', time.process_time(), 'torch' in sys.modules)"
    )
    seconds = []
    for _ in range(3):
        command = [sys.executable, "-c", code, flag]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        *_, taken, torch_loaded = out.split()
        assert torch_loaded == "False"
        seconds.append(float(taken))
    assert min(seconds) < 1


def test_version_is_the_packages(run: Cli) -> None:
    assert run("--version") == (0, f"subspan {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--method", "galor"], "method='galor' is not known (did you mean 'galore'?)"),
        (["train", "--set", "method_options.rnk=8"], "GaLore has no option 'rnk'"),
        (["train", "--set", "lerning_rate=8"], "unknown key lerning_rate; known: output, model"),
        (["train", "--rank", "0"], "rank=0"),
        (["train", "--rank", "many"], "rank='many'"),
        (["train", "--lr", "fast"], "Invalid value for '--lr'"),
        (["train", "--corpus", "docstring"], "unknown corpus 'docstring': not one of docstrings"),
        (["train", "--corpus", "none.txt"], "text file none.txt does not exist"),
        (["train", "--model", "llama-2b"], "unknown model 'llama-2b'"),
        (["train", "--config", "none.yaml"], "cannot read configuration none.yaml"),
        (["train", "--resume", "none"], "folder none holds no run"),
        (["train", "--bogus"], "No such option: --bogus"),
        (["trian"], "trian"),
        (["compare"], "nothing to compare"),
        (["compare", "--methods", "galore,galor"], "arm galor: method='galor' is not known"),
        (["report", "none"], "folder none holds no run"),
        (["methods", "fir"], "did you mean 'fira'"),
        (["data", "stats", "wikitext"], "unknown corpus 'wikitext'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    run: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, errors = run(*arguments)
    assert status != 0
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_empty_and_too_little_text_are_one_line(run: Cli, job: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    base = ["train", "--config", job / "train.yaml", "--output", tmp_path / "run"]
    status, _, errors = run(*base, "--corpus", tmp_path / "empty.txt")
    assert (status, errors.count("\n")) == (2, 1)
    assert "holds no text" in errors
    status, _, errors = run(*base, "--batch-size", 100_000)
    assert (status, errors.count("\n")) == (2, 1)
    assert "too little text" in errors
    assert "training tokens, one batch needs 3,200,000" in errors
    assert not (tmp_path / "run").exists()


def test_run_prints_its_configuration_resumes_and_refuses_others(
    run: Cli, job: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    base = ["train", "--config", job / "train.yaml", "--output", folder]
    status, out, errors = run(*base, "--method", "GaLore", "--rank", 4, "--lr", 0.02)
    assert (status, errors) == (0, "")
    assert "lr: 0.02" in out
    assert "sequence_length: 32" in out
    assert "step 3/6: loss" in out
    assert "perplexity" in out.splitlines()[-1]
    assert json.loads((folder / "result.json").read_text())["method"] == "galore"
    assert "validation perplexity" in (folder / "report.html").read_text()

    status, out, _ = run("train", "--resume", folder)
    assert status == 0
    assert "is finished; nothing to do" in out

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    status, _, errors = run(*base, "--method", "galore", "--rank", 4, "--lr", 0.5)
    assert status == 2
    assert "holds another run (lr is 0.02 there, 0.5 here)" in errors
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_comparison_ends_with_a_table_and_a_report(run: Cli, job: Path, tmp_path: Path) -> None:
    folder = tmp_path / "compare"
    arguments = ["compare", "--config", job / "compare.yaml", "--output", folder]
    status, out, errors = run(*arguments)
    assert (status, errors) == (0, "")
    for text in ("adamw", "galore", "tokens/s", "peak", f"report: {folder / 'report.html'}"):
        assert text in out
    assert "the same initial weights" in (folder / "report.html").read_text()
    results = json.loads((folder / "results.json").read_text())
    assert list(results["arms"]) == ["adamw", "galore"]

    started = time.monotonic()
    assert run(*arguments)[0] == 0
    assert time.monotonic() - started < 10  # Nothing is trained again.

    file = tmp_path / "other.html"
    status, out, _ = run("report", folder / "galore", "--output", file, "--title", "One run")
    assert status == 0
    assert "<h1>One run</h1>" in file.read_text()


def test_interrupted_run_is_one_line(
    run: Cli, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from subspan.train import job as module

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_train", interrupted)
    folder = tmp_path / "run"
    status, _, errors = run(
        "train", "--config", job / "train.yaml", "--method", "adamw", "--output", folder
    )
    assert status == 130
    assert errors.strip() == "error: interrupted; the same command goes on from the last checkpoint"
    assert not folder.exists()


def test_failed_arm_ends_with_its_reason_and_a_non_zero_status(
    run: Cli, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from subspan.train.race import execute

    reason = "killed by signal SIGKILL, probably for want of memory"

    def killed(*_: object) -> SimpleNamespace:
        return SimpleNamespace(wait=lambda seconds: True, reason=lambda: reason)

    monkeypatch.setattr(execute, "Child", killed)
    folder = tmp_path / "compare"
    status, out, errors = run(
        "compare", "--config", job / "compare.yaml", "--output", folder, "--methods", "galore"
    )
    assert status == 1
    assert errors == f"error: galore: {reason}\n"
    assert "failed" in out
    assert "killed by signal SIGKILL" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_search_by_flags_ends_with_a_page_that_is_updated_in_place(
    run: Cli, job: Path, tmp_path: Path
) -> None:
    folder, page = tmp_path / "compare", tmp_path / "page.md"
    page.write_text("# Results\n\n## Comparison\n\nold\n\n## Other\n\nstays\n")
    search = ["--set", "search.fields.lr=[0.001, 0.01]", "--set", "halving.rungs=[0.5]"]
    status, out, errors = run(
        *("compare", "--config", job / "compare.yaml", "--output", folder, "--methods", "galore"),
        *(*search, "--workers", 2, "--markdown", page),
    )
    assert (status, errors) == (0, "")
    assert "pruned at rung 1" in out
    results = json.loads((folder / "results.json").read_text())
    assert results["search"]["trials"] == 2
    text = page.read_text()
    assert "old" not in text
    assert text.index("## Comparison") < text.index("| galore |") < text.index("## Other")
    assert text.endswith("stays\n")


def test_stopped_run_says_how_to_go_on(run: Cli, job: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    base = ["train", "--config", job / "train.yaml", "--method", "adamw", "--output", folder]
    status, out, errors = run(*base, "--until", 3)
    assert (status, errors) == (0, "")
    assert "stopped at step 3 of 6; the same command without --until goes on" in out
    assert not (folder / "result.json").exists()
    assert run(*base)[0] == 0
    assert (folder / "result.json").exists()


def test_methods_and_corpora_are_listed(run: Cli) -> None:
    from subspan.optim import methods

    status, out, _ = run("methods")
    assert status == 0
    assert all(name in out for name in methods())
    status, out, _ = run("methods", "Fira")
    assert status == 0
    for text in ("Fira (fira)", "arXiv", "update_proj_gap", "growth_limit", "finder"):
        assert text in out
    status, out, _ = run("data", "list")
    assert status == 0
    assert all(name in out for name in ("docstrings", "pydoc-topics", "stdlib-source"))


def test_statistics_of_a_corpus_are_shown(run: Cli, job: Path, tmp_path: Path) -> None:
    status, out, _ = run(
        "data", "stats", job / "text.txt", "--vocab-size", 300, "--set", f"data.cache={tmp_path}"
    )
    assert status == 0
    for text in ("training documents", "held-out tokens", "characters per token"):
        assert text in out
