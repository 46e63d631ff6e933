"""Run folders of processes that were killed before they began to train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from subspan.train import job, runfolder
from subspan.train.config import TrainConfig
from subspan.train.errors import JobError
from subspan.train.job import run_job

Settings = Callable[..., TrainConfig]


class Killed(BaseException):
    """Not an Exception, so that nothing handles it."""


def test_what_a_killed_process_leaves_is_no_obstacle(settings: Settings) -> None:
    config = settings()
    folder = Path(config.output)
    folder.mkdir()
    for name in (".lock", ".config.yaml.a8x_1"):
        (folder / name).touch()
    assert runfolder.check_output(folder, config) is False
    (folder / "notes.txt").touch()
    with pytest.raises(JobError, match="holds other files"):
        runfolder.check_output(folder, config)


def test_run_killed_between_its_first_two_files_begins_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(steps=4, eval_every=2)

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(job, "write_json", killed)
        patch.setattr(job.shutil, "rmtree", lambda *_, **__: None)  # SIGKILL tidies nothing up
        with pytest.raises(Killed):
            run_job(config)
    assert (Path(config.output) / "config.yaml").is_file()
    assert not (Path(config.output) / "inputs.json").exists()
    result = run_job(config)
    assert result is not None
    assert result["steps"] == 4
