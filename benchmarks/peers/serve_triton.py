"""Green tint in NVIDIA Triton through pytriton; run by the Python of the peer's own environment.

``serve_triton.py PORT BATCH WIDTH HEIGHT``: frames are tensors (batch, height, width, 3) of uint8. The numbers are
added in numpy over contiguous rows, which is the fastest form that numpy has for it.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

PORT, BATCH, WIDTH, HEIGHT = map(int, sys.argv[1:5])
CEILING = np.tile(np.array([255, 175, 255], np.uint8), WIDTH).reshape(WIDTH, 3)
STEP = np.tile(np.array([0, 80, 0], np.uint8), WIDTH).reshape(WIDTH, 3)


@batch  # type: ignore[untyped-decorator]
def tint(frames: Any) -> dict[str, Any]:
    tinted = np.minimum(frames, CEILING)
    tinted += STEP
    return {"tinted": tinted}


def main() -> None:
    config = TritonConfig(http_address="127.0.0.1", http_port=PORT, allow_grpc=False, allow_metrics=False)
    shape = (HEIGHT, WIDTH, 3)
    with Triton(config=config) as triton:
        triton.bind(
            model_name="green_tint",
            infer_func=tint,
            inputs=[Tensor(name="frames", dtype=np.uint8, shape=shape)],
            outputs=[Tensor(name="tinted", dtype=np.uint8, shape=shape)],
            config=ModelConfig(max_batch_size=BATCH, batcher=DynamicBatcher()),
            strict=False,
        )
        triton.serve()


if __name__ == "__main__":
    main()
