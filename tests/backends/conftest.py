"""``case`` runs a test on every backend that is installed, on every device it has here."""

from __future__ import annotations

from typing import Any

import pytest

from tests.backends.kit import CASES


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Any:
    return request.param
