"""Reports of finished runs: one self-contained HTML file, and a table for the terminal."""

from __future__ import annotations

from subspan.report.page import build_report
from subspan.report.runs import Run, load_run, load_runs

__all__ = ["Run", "build_report", "load_run", "load_runs"]
