"""Green tint on LitServe; run by the Python of the peer's own environment.

``serve_litserve.py PORT BATCH WAIT``: WAIT is ``batch_timeout`` in seconds. The request's body is the frame as it is
(FastAPI's raw body), and so is the answer's.
"""

import sys
from typing import Annotated, Any

import litserve
import numpy as np
from fastapi import Body, Response

RAW = "application/octet-stream"


class GreenTint(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        row = 3840  # pixels; longer rows gain nothing
        self.ceiling = np.tile(np.array([255, 175, 255], np.uint8), row)
        self.step = np.tile(np.array([0, 80, 0], np.uint8), row)

    def decode_request(self, request: Annotated[bytes, Body(media_type=RAW)]) -> Any:
        return np.frombuffer(request, np.uint8)

    def predict(self, frames: Any) -> Any:
        return self.tint(frames) if isinstance(frames, np.ndarray) else [self.tint(frame) for frame in frames]

    def tint(self, frame: Any) -> Any:
        rows = frame.reshape(-1, self.step.size)
        tinted = np.minimum(rows, self.ceiling)
        tinted += self.step
        return tinted

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: Any) -> Response:
        return Response(output.tobytes(), media_type=RAW)


if __name__ == "__main__":
    api = GreenTint(max_batch_size=int(sys.argv[2]), batch_timeout=float(sys.argv[3]))
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True, timeout=60)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
