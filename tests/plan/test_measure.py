"""Plans against one real step in a clean process."""

from __future__ import annotations

import sys

import pytest

from subspan.plan import ModelSpec, Settings, measure
from subspan.train.errors import JobError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read in /proc")

PAIRS = [
    (ModelSpec("llama-60m", dtype="float32"), "adamw", {}, {}),
    (
        ModelSpec("llama-60m", sequence_length=128),
        "galore",
        {"rank": 128, "storage": "int8"},
        {"update_in_backward": True, "clipping": "each"},
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method", "options", "way"), PAIRS)
def test_a_real_step_holds_the_plan_and_peaks_within_five_percent(model, method, options, way):
    compared = measure(Settings(model, method, options, batch_size=2, device="cpu", **way))
    for name, planned, seen, exact in compared.rows():
        if exact:
            assert seen == planned, name
        else:
            assert seen == pytest.approx(planned, rel=0.05), name


def test_what_only_can_be_planned_is_not_measured():
    with pytest.raises(JobError, match="one process"):
        measure(Settings(ModelSpec("llama-60m"), "adamw", ranks=2))
    with pytest.raises(JobError, match="planned only"):
        measure(Settings(ModelSpec("llama-60m", adapter="x", base_weights="int4"), "adamw"))


@pytest.mark.slow
def test_a_process_that_fails_is_one_line(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(JobError, match="measuring process failed"):
        measure(Settings(ModelSpec("llama-60m"), "adamw", batch_size=1))
