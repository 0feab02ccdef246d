"""One live stream's frames: transport stream in, batches through the engine, transport stream out.

Two threads of its own. The inner one runs the ``Intake``: it decodes, takes a slot for each frame and submits it. The
outer one encodes what comes back and muxes it with the audio: the ``Outlet``. Between them is the ``House``. A stream
holds no more than its share of the slots, so one whose output is stuck does not starve the others.

What is counted and what ends is told through ``tell``, which is called on these threads and must not block.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from gpu_byoc.bridge import Closed, ToLoop, ToThread
from gpu_byoc.core.errorbudget import SECONDS, ErrorBudget
from gpu_byoc.engine.engine import Engine
from gpu_byoc.errors import GpuByocError, ProcessorError, StreamQuarantined
from gpu_byoc.logs import about
from gpu_byoc.worker.house import House, Tell, Ticket
from gpu_byoc.worker.intake import Arrival, Intake, OpenReader
from gpu_byoc.worker.outlet import Departure, Outlet
from gpu_byoc.worker.streamparams import StreamParams


class Pump:
    """Made on the event loop, started once; ``join`` when the output has ended.

    ``source`` carries what arrives; its end is the end of input. Pieces of the output go to ``sink``, which is ended
    when all is out, or with the error that stopped it. ``sink`` None: frames are computed and not encoded. ``budget``
    is within how many seconds of its arrival a frame must have a slot; None waits as long as it takes. ``share`` is how
    many slots the stream may hold now, ``may_fail`` the share of its frames that the processor may fail at.
    ``open_reader`` and ``pixel_rate`` are the ``Intake``'s, ``most_audio`` and ``most_audio_bytes`` the ``House``'s.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        params: StreamParams,
        source: ToThread[Arrival],
        sink: ToLoop[Departure] | None,
        tell: Tell,
        *,
        encoder: str,
        budget: float | None,
        pixel_format: str,
        share: Callable[[], int],
        may_fail: float,
        open_reader: OpenReader,
        pixel_rate: float | None,
        most_audio: int,
        most_audio_bytes: int,
    ) -> None:
        self.house = House(share, most_audio, most_audio_bytes)
        self._intake = Intake(
            engine,
            self.house,
            name,
            params,
            tell,
            budget=budget,
            pixel_format=pixel_format,
            open_reader=open_reader,
            pixel_rate=pixel_rate,
        )
        self._source = source
        self._sink = sink
        self._tell = tell
        self.outlet = Outlet(encoder, sink, tell)
        self._budget = ErrorBudget(may_fail)
        self._error: BaseException | None = None  # what ended the inner thread
        self._inner = threading.Thread(target=about(stream=name)(self._run_inner), name=f"{name}-decode", daemon=True)
        self._outer = threading.Thread(target=about(stream=name)(self._run_outer), name=f"{name}-encode", daemon=True)

    def start(self) -> None:
        self._inner.start()
        self._outer.start()

    def update(self, params: StreamParams) -> None:
        """From the next frame on. Any thread."""
        self._intake.params = params

    def stop(self) -> None:
        """Drop what is inside and end at once. Any thread."""
        self._source.abandon()
        self._intake.stop()
        if self._sink is not None:
            self._sink.abandon()
        self.house.stop()

    def join(self, timeout: float | None = None) -> bool:
        """Block until both threads have ended; False if they have not in time."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in (self._inner, self._outer):
            if thread.ident is not None:
                thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not (self._inner.is_alive() or self._outer.is_alive())

    def _run_inner(self) -> None:
        try:
            self._intake.run(self._source)
        except Closed:
            pass
        except BaseException as error:  # handed to the outer thread, which ends the stream with it
            self._error = error
        finally:
            self.house.input_ended()

    def _run_outer(self) -> None:
        error: BaseException | None = None
        try:
            self._encode()
        except Closed:
            pass
        except BaseException as failure:  # told to the stream through the sink and ``tell``
            error = failure
        finally:
            for _ in range(self.house.close() + self.outlet.inside):
                self._tell("dropped", "stopped")
            self.outlet.close()
            error = error or self._error
            if self._sink is not None:
                self._sink.end(error)
            self._tell("finished", error)

    def _encode(self) -> None:
        while items := self.house.take():
            for item in items:
                if isinstance(item, Ticket):
                    self._frame(item)
                else:
                    self.outlet.audio(item)
            self.outlet.send()
        self.outlet.finish()

    def _frame(self, ticket: Ticket) -> None:
        assert ticket.outcome is not None
        try:
            self.house.check()
            if ticket.outcome.error is not None:
                self._tell("failed_frame", ticket.outcome.error)
            else:
                self.outlet.video(ticket)
        except BaseException as error:  # the stream ends with it: the frame is counted all the same
            self._tell("dropped", error.code if isinstance(error, GpuByocError) else "stopped")
            raise
        finally:
            self.house.leave(ticket)
        self._spend(ticket.outcome.error)

    def _spend(self, error: GpuByocError | None) -> None:
        """Raises StreamQuarantined: a frame that fails is computed again and again, beside those of other streams."""
        if self._budget.spend(isinstance(error, ProcessorError), time.monotonic()):
            raise StreamQuarantined(
                f"{self._budget.failed} of the last {self._budget.frames} frames failed within {SECONDS} s "
                f"(--error-budget), the last one with: {error}",
                "" if error is None else error.code,
            )
