"""X-Metadata, the worker's own words about a job: read with care, because a worker is anybody's."""

from __future__ import annotations

import json
import math
from typing import Any


def read_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object in ``text``; empty if there is none: these are notes for people, not the job's result."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def amount(value: object) -> float | None:
    """A count or a number of seconds; None for what is neither: no number, negative, or beyond a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON's integers have no bound
        return None
    return number if math.isfinite(number) and number >= 0 else None
