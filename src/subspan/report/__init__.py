"""Reports of runs and comparisons: one self-contained HTML file, and tables for the terminal."""

from __future__ import annotations

from subspan.report.loading import Arm, Report, load
from subspan.report.page import build_report, render
from subspan.report.runs import Run, load_run

__all__ = ["Arm", "Report", "Run", "build_report", "load", "load_run", "render"]
