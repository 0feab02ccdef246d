"""A processor that captures a CUDA graph at its first batch, while other batches and the canary are on their way.

Captured in mode "global", the default, which any other thread's wait for an event would invalidate. Needs a GPU, and
has not been run on one yet.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest

from gpu_byoc.checks.rig import Job, Subject, rig
from gpu_byoc.engine.proof import noise, same
from gpu_byoc.plugins import load_backend
from gpu_byoc.processor import ArrayProcessor, NoParams

ROUNDS = 200


class Captures(ArrayProcessor):
    """Adds one, by a graph that is captured anew every tenth batch."""

    def __init__(self) -> None:
        self.calls = 0
        self.kept: Any = None

    def process_batch(self, frames: Any, params: Any, xp: Any) -> Any:
        import torch

        self.calls += 1
        if self.calls % 10 == 1 or self.kept[1].shape != frames.shape:
            graph, given = torch.cuda.CUDAGraph(), frames.clone()
            with torch.cuda.graph(graph):
                result = given + 1
            self.kept = graph, given, result
        graph, given, result = self.kept
        given.copy_(frames)
        graph.replay()
        return result


@pytest.mark.needs_cuda
@pytest.mark.needs_torch
def test_a_graph_is_captured_under_load() -> None:
    rng, flying = np.random.default_rng(0), deque[Job]()
    subject = Subject("torch", load_backend("torch"), "cuda")
    with rig(subject, Captures(), slots=16, max_batch=4) as engine:
        for number in range(ROUNDS):
            flying.append(engine.job(noise(rng, 4, 320, 240), NoParams(), stream=f"stream {number % 3}"))
            if len(flying) == 4:
                job = flying.popleft()
                same(job.take("a captured graph"), job.frames + np.uint8(1), "a captured graph")
        for job in flying:
            same(job.take("a captured graph"), job.frames + np.uint8(1), "a captured graph")
