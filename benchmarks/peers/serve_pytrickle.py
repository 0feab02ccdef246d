"""Green tint on pytrickle's StreamServer; run by the Python of the peer's own environment.

``serve_pytrickle.py PORT QUEUE``: QUEUE is ``FrameSkipConfig.max_queue_size``, above which it skips frames. The handler
adds in place, as a float: the least work that pytrickle's tensors (1, height, width, 3; 0 to 1) allow.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from pytrickle import FrameProcessor, FrameSkipConfig, StreamServer

BOOST = 80 / 255


class GreenTint(FrameProcessor):  # type: ignore[misc]
    async def load_model(self, **named: Any) -> None:
        pass

    async def process_video_async(self, frame: Any) -> Any:
        frame.tensor[..., 1].add_(BOOST).clamp_(max=1.0)
        return frame

    async def process_audio_async(self, frame: Any) -> Any:
        return [frame]

    async def update_params(self, params: dict[str, Any]) -> None:
        pass


async def main() -> None:
    skip = FrameSkipConfig(max_queue_size=int(sys.argv[2]))
    server = StreamServer(GreenTint(), port=int(sys.argv[1]), host="127.0.0.1", frame_skip_config=skip)
    await server.run_forever()


if __name__ == "__main__":
    asyncio.run(main())
