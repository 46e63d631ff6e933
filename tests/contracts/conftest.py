"""Every test that asks for `method` or `problem` runs for every registered recipe."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from problem import METHODS, Problem


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def problem(method: str) -> Callable[..., Problem]:
    return lambda **options: Problem(method, **options)
