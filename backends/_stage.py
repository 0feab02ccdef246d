"""The processor's side of a device backend: which arrays it is shown, which of its kernels runs, what it may return."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from array_api_compat import device as device_of

from gpu_byoc.errors import ProcessorOutput
from gpu_byoc.frames import BYTES_PER_PIXEL
from gpu_byoc.processor import ArrayProcessor, Kernel, kernel_forms, processor_name

from ._hardware import Hardware
from ._kernels import FRAMES, HEIGHT, WIDTH, Choice, race, that_run
from ._lanes import Stream
from ._library import Library, invite

log = logging.getLogger(__name__)


class Stage(Hardware):
    """Runs one processor on the compute stream, in its own library's arrays or in those of a guest's."""

    name: str = ""
    _library: Library
    _compute: Stream

    def __init__(self) -> None:
        self._degraded: list[str] = []
        self._processor: ArrayProcessor | None = None
        self._guest: Library | None = None
        self._guest_stream: Any = None
        self._kernel: Kernel | None = None

    def _welcome(self, processor: ArrayProcessor) -> dict[str, Any]:
        """Set the processor up and choose its kernel; returns what there is to say of that."""
        if processor.arrays not in ("", self._library.name):
            self._guest = self._invite(processor)
            self._guest.use()
            self._guest_stream = self._guest.external(self._handle(self._compute))
        face = self._guest or self._library
        with self._on_compute():
            processor.setup(face.xp, face.device)
            self._processor = processor
        choice = self._choose_kernel(processor)
        self._kernel = choice.kernel
        return choice.facts()

    @contextmanager
    def _on_compute(self) -> Iterator[None]:
        """The compute stream is current, for the guest's library too."""
        guest = nullcontext() if self._guest is None else self._guest.on(self._guest_stream)
        with self._library.on(self._compute), guest:
            yield

    def _invite(self, processor: ArrayProcessor) -> Library:
        return invite(processor.arrays, self.device, processor_name(processor))

    def _result(self, processor: ArrayProcessor, frames: Any, params: Any) -> Any:
        """What the processor makes of ``frames``, as an array of ours; ``frames`` itself if it is there."""
        face, given = self._library, frames
        if self._kernel is not None:
            result = self._kernel(frames, params)
        else:
            if self._guest is not None:
                face, given = self._guest, self._guest.borrow(frames)
            result = processor.process_batch(given, params, face.xp)
        if result is given:
            return frames
        self._check(result, given, face, processor)
        return result if face is self._library else self._library.borrow(result)

    @staticmethod
    def _frames(array: Any, count: int, shape: tuple[int, int, int]) -> Any:
        height, width, channels = shape
        return array[: count * height * width * channels].reshape(count, height, width, channels)

    def _check(self, result: Any, frames: Any, face: Library, processor: ArrayProcessor) -> None:
        if not face.is_array(result):
            raise ProcessorOutput(
                f"{processor_name(processor)} returned {type(result).__module__}.{type(result).__qualname__}; "
                f"{self.name} needs an array of {face.name}, {tuple(frames.shape)} {frames.dtype} on {self.device}"
            )
        got = (tuple(result.shape), result.dtype, device_of(result))
        want = (tuple(frames.shape), frames.dtype, device_of(frames))
        if got != want:
            raise ProcessorOutput(
                f"{processor_name(processor)} returned {got[0]} {got[1]} on {got[2]} for frames of "
                f"{want[0]} {want[1]} on {want[2]}"
            )

    def _ran_out(self, error: BaseException) -> bool:
        return any(library.is_out_of_memory(error) for library in self._libraries())

    def _libraries(self) -> list[Library]:
        return [self._library] if self._guest is None else [self._library, self._guest]

    def _choose_kernel(self, processor: ArrayProcessor) -> Choice:
        """The processor's kernel for this backend: it runs here, and where several do it is the fastest of them."""
        forms, params = kernel_forms(processor, self.name), processor.Params()
        channels = BYTES_PER_PIXEL[processor.pixel_format]

        def once(kernel: Kernel) -> None:
            with self._on_compute():
                kernel(self._frames(self._empty(16 * channels), 1, (4, 4, channels)), params)

        fit, left_out = that_run(forms, once)
        if forms and not fit:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
            self._degrade(
                f"no {self.name} kernel of {processor_name(processor)} runs here ({reasons}); its slower process_batch "
                "is used"
            )
        choice = Choice(fit[0] if fit else None)
        if len(fit) > 1:
            choice = self._race(fit, (HEIGHT, WIDTH, channels), params) or choice
            self._library.free_cached()
        choice.left_out = left_out
        return choice

    def _race(self, kernels: list[Kernel], shape: tuple[int, int, int], params: Any) -> Choice | None:
        """None on a device that has no memory for it."""
        begin, end = self._event(), self._event()
        try:
            frames = self._frames(self._empty(FRAMES * shape[0] * shape[1] * shape[2]), FRAMES, shape)
        except Exception as error:  # each library has an out-of-memory error of its own; others go on
            if not self._ran_out(error):
                raise
            return None

        def timed(kernel: Kernel, calls: int) -> float:
            with self._on_compute():
                begin.record(self._compute)
                for _ in range(calls):
                    kernel(frames, params)
                end.record(self._compute)
            end.synchronize()
            return self._elapsed_ns(begin, end)

        return race(kernels, timed)

    def _degrade(self, text: str) -> None:
        if text not in self._degraded:
            self._degraded.append(text)
            log.warning("%s: %s", self.name, text)
