"""The worker within a container's memory limit. The limit itself is tested on a container: tests/images."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_byoc.config import GIB, MIB, EngineConfig, ServeConfig
from gpu_byoc.errors import ConfigError
from gpu_byoc.worker.limits import LEAST, RESIDENT, fitted, memory_limit


@pytest.mark.parametrize(
    ("first", "second", "limit"),
    [
        ("268435456\n", None, 268435456),
        ("max\n", None, None),
        (None, "268435456\n", 268435456),
        (None, "9223372036854771712\n", None),  # what version 1 says where there is no limit
        (None, None, None),
        ("", "1024\n", 1024),
    ],
)
def test_both_versions_of_control_groups_are_read(
    tmp_path: Path, first: str | None, second: str | None, limit: int | None
) -> None:
    files = [tmp_path / "memory.max", tmp_path / "limit_in_bytes"]
    for file, text in zip(files, (first, second), strict=True):
        if text is not None:
            file.write_text(text)
    assert memory_limit(files) == limit


def test_without_a_limit_or_with_a_wide_one_nothing_changes() -> None:
    config = ServeConfig()
    assert fitted(config, None) == (config, "")
    assert fitted(config, 64 * GIB) == (config, "")


@given(limit=st.integers(LEAST, 8 * GIB), memory=st.integers(1, 4 * GIB), bodies=st.integers(1, 4 * GIB))
def test_frames_bodies_and_the_worker_fit_in_any_limit(limit: int, memory: int, bodies: int) -> None:
    config = ServeConfig(engine=EngineConfig(memory=memory), max_collected=bodies)
    within, said = fitted(config, limit)
    assert within.engine.memory <= memory
    assert within.max_collected <= bodies
    assert RESIDENT + within.engine.memory + within.max_collected <= limit
    assert bool(said) == (within != config)


def test_a_limit_that_serves_nobody_is_an_error() -> None:
    with pytest.raises(ConfigError, match="memory limit is 64 MiB, and a worker needs at least 160"):
        fitted(ServeConfig(), 64 * MIB)
    assert fitted(ServeConfig(), LEAST)[0].engine.memory >= 32 * 640 * 480 * 3
