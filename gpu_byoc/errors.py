"""Every error this project raises on purpose.

::

    GpuByocError                      blame       HTTP   what it ends
    |- ClientError                    client
    |  |- BadFrame                    client      400    the job
    |  |- BadParams (field)           client      422    the job; the old parameters stay
    |  |- BadRequest                  client      400    the job
    |  |- BodyTimeout                 client      408    the job
    |  |- CorruptImage                client      422    the job
    |  |- DecoderFailed               client      422    its stream, where it happens again and again
    |  |- ExpectationFailed           client      417    the job
    |  |- NoCapability                client      400    the job
    |  |- OriginRefused (field)       client      403    the call; nothing was connected to
    |  |- TooLarge                    client      413    the job, before its body is read
    |  |- Unauthorized                client      401    the call, before its body is read
    |  `- UnsupportedMedia            client      415    the job
    |- Unavailable (retry_after)      load
    |  |- AllBusy                     load        503    the job; nothing was started
    |  |- Draining                    load        503    the job; the process is on its way out
    |  |- LedgerUnavailable           load        503    the job; nothing was started, for it could not be booked
    |  |- NoCapacity                  load        503    the job, here; another orchestrator may take it
    |  |- NotReady                    load        503    the job; the processor is still loading
    |  `- Overloaded                  load        503    the job; nothing was started
    |- ProcessorError                 processor
    |  |- ProcessorFailed             processor   500    its frames; the next job works
    |  |  `- ProcessorSpoiled         processor   500    its batch: a kernel failed in the middle of writing
    |  |- ProcessorOutput             processor   500    its frames; the next job works
    |  |- ProcessorTimeout            processor   504    the job; the process, where the processor cannot be stopped
    |  `- StreamQuarantined (reason)  processor   500    its stream: too many of its frames have failed
    |- DeviceError                    device
    |  |- DeviceLost                  device      500    the process: only a restart helps
    |  |- DeviceOutOfMemory           device      503    its frames, after smaller batches failed too
    |  `- EncoderFailed               device      500    its stream
    |- NetworkError                   network
    |  |- ContainerTimeout            network     504    the job
    |  |- ContainerUnauthorized       network     502    the job, and the container's registration
    |  |- ContainerUnreachable        network     502    the job
    |  |- OrchestratorTimeout         network     504    the job; no other one is asked, they would all compute it
    |  |- OrchestratorUnreachable     network     502    the job, after every other one was asked; a registration
    |  `- RegistrationRefused         network     -      one attempt to register; the next one comes by itself
    `- OperatorError                  operator
       |- BackendUnavailable          operator    -      the start
       |- ConfigError                 operator    -      the start
       |- PluginError                 operator    -      the start
       `- PortInUse                   operator    -      the start

Only these cross the wire, as ``{"status": "error", "error": <code>, "message": <text>}`` plus what a class adds
(``field``). The message says what to do next. Anything else that reaches a request handler is a bug of ours and is
answered as 500 ``internal`` without its text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self


class GpuByocError(Exception):
    """Root of the tree. ``code`` is stable and machine readable; ``str(error)`` is for people."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    blame: ClassVar[str] = "worker"
    retry_after: int | None = None  # seconds, sent as Retry-After where set

    def body(self) -> dict[str, Any]:
        """The JSON object that is sent to the caller."""
        return {"status": "error", "error": self.code, "message": str(self), **self.extra()}

    def extra(self) -> Mapping[str, Any]:
        return {}

    def again(self) -> Self:
        """A fresh one that says the same, for each of those it is told to: a raised exception collects tracebacks."""
        fresh = type(self).__new__(type(self), *self.args)  # not by __init__, whose arguments are its class's own
        fresh.__dict__.update(self.__dict__)
        return fresh


# --- the caller sent something that cannot work


class ClientError(GpuByocError):
    status = 400
    blame = "client"


class BadRequest(ClientError):
    code = "bad_request"


class BadFrame(ClientError):
    """Length, geometry or pixel format do not fit one another."""

    code = "bad_frame"


class BadParams(ClientError):
    """A processor parameter is unknown, of the wrong type or out of range; ``field`` names it."""

    code = "bad_params"
    status = 422

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"parameter {field!r}: {message}")
        self.field = field

    def extra(self) -> Mapping[str, Any]:
        return {"field": self.field}


class BodyTimeout(ClientError):
    """Nothing more of a request's body came for too long."""

    code = "body_timeout"
    status = 408


class CorruptImage(ClientError):
    code = "corrupt_image"
    status = 422


class DecoderFailed(ClientError):
    """What a stream sent has crashed or hung the process that decodes it, and its next keyframe starts a new one; or no
    process can be had that may decode it, and the stream ends."""

    code = "decoder_failed"
    status = 422


class ExpectationFailed(ClientError):
    code = "expectation_failed"
    status = 417


class NoCapability(ClientError):
    """No orchestrator advertises the capability that was asked for. Names are case-sensitive."""

    code = "no_capability"


class OriginRefused(ClientError):
    """A URL that this worker does not open for this caller. ``field`` names it; the text says what an operator can do,
    and nothing of the URL but its origin."""

    code = "origin_refused"
    status = 403

    def __init__(self, field: str, origin: str, why: str) -> None:
        super().__init__(f"{field}: {origin}: {why}")
        self.field = field

    def extra(self) -> Mapping[str, Any]:
        return {"field": self.field}


class TooLarge(ClientError):
    code = "too_large"
    status = 413


class Unauthorized(ClientError):
    """A call from the network without the bearer token that this worker has given its orchestrator."""

    code = "unauthorized"
    status = 401


class UnsupportedMedia(ClientError):
    code = "unsupported_media_type"
    status = 415


# --- nothing is wrong, there is just no room now


class Unavailable(GpuByocError):
    status = 503
    blame = "load"
    retry_after = 1


class AllBusy(Unavailable):
    """Every orchestrator that has the capability is at capacity."""

    code = "all_busy"


class Draining(Unavailable):
    code = "draining"
    retry_after = 10


class LedgerUnavailable(Unavailable):
    """The orchestrator's disk does not take the ledger's rows."""

    code = "ledger_unavailable"
    retry_after = 10


class NoCapacity(Unavailable):
    """This orchestrator does not have the capability that it was sent a job for."""

    code = "no_capacity"


class NotReady(Unavailable):
    code = "not_ready"
    retry_after = 2


class Overloaded(Unavailable):
    """No slot became free in time."""

    code = "overloaded"


# --- the user's code


class ProcessorError(GpuByocError):
    blame = "processor"


class ProcessorFailed(ProcessorError):
    """The processor raised; ``__cause__`` is what it raised."""

    code = "processor_failed"


class ProcessorSpoiled(ProcessorFailed):
    """A kernel that works in place raised: its frames are half written, so they cannot be tried again."""

    code = "processor_spoiled"


class ProcessorTimeout(ProcessorError):
    """The processor did not answer in time. If it cannot be stopped either the process ends, with ``EXIT_STUCK``."""

    code = "processor_timeout"
    status = 504


class ProcessorOutput(ProcessorError):
    """The processor returned something that is not a frame like the one it was given."""

    code = "processor_output"


class StreamQuarantined(ProcessorError):
    """The processor failed at more of a stream's frames than ``--error-budget`` allows. ``reason`` is the code of the
    last failure. Other parameters, or another input, may do better: start the stream anew."""

    code = "stream_quarantined"

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def extra(self) -> Mapping[str, Any]:
        return {"reason": self.reason}


# --- the device


class DeviceError(GpuByocError):
    blame = "device"


class DeviceLost(DeviceError):
    """A sticky device error. The process has to end; ``EXIT_DEVICE_LOST`` tells a supervisor why."""

    code = "device_lost"


class DeviceOutOfMemory(DeviceError):
    code = "device_out_of_memory"
    status = 503
    retry_after = 1


class EncoderFailed(DeviceError):
    """A video encoder that had opened refused a frame."""

    code = "encoder_failed"


# --- between the parts


class NetworkError(GpuByocError):
    status = 502
    blame = "network"


class ChannelClosed(NetworkError):
    """A publisher still had something to say when its channel was closed. For a reader that is an end, not an error."""

    code = "channel_closed"


class ChannelFailed(NetworkError):
    """The server could not be reached, or made no sense, several times in a row; the last reason is in the text."""

    code = "channel_failed"


class ChannelMissing(NetworkError):
    """The first answer was 404: a wrong URL, or nobody has created the channel."""

    code = "channel_missing"


class ContainerTimeout(NetworkError):
    """The container took the job and then let nothing be heard of it."""

    code = "container_timeout"
    status = 504


class ContainerUnauthorized(NetworkError):
    """The container does not take the orchestrator's token, or the orchestrator has none for it."""

    code = "container_unauthorized"


class ContainerUnreachable(NetworkError):
    code = "container_unreachable"


class OrchestratorTimeout(NetworkError):
    """The orchestrator took the job and then let nothing be heard of it."""

    code = "orchestrator_timeout"
    status = 504


class OrchestratorUnreachable(NetworkError):
    code = "orchestrator_unreachable"


class RegistrationRefused(NetworkError):
    """The orchestrator answered a registration, and did not take it."""

    code = "registration_refused"


class SegmentFailed(NetworkError):
    """Segment ``seq`` was cut off, refused or stuck. The channel is fine: go on with the next segment."""

    code = "segment_failed"

    def __init__(self, seq: int, message: str) -> None:
        super().__init__(f"segment {seq}: {message}")
        self.seq = seq


# --- how it was started


class OperatorError(GpuByocError):
    """Printed without a traceback; the command ends with ``EXIT_USAGE``."""

    blame = "operator"


class BackendUnavailable(OperatorError):
    """A backend was asked for by name and cannot open. Says what is missing and how to install it."""

    code = "backend_unavailable"


class ConfigError(OperatorError):
    code = "config"


class PluginError(OperatorError):
    code = "plugin"


class PortInUse(OperatorError):
    code = "port_in_use"


def said_by(error: BaseException) -> str:
    """What an exception of a stranger's says: its ``__str__`` is code of theirs, too, and may raise."""
    try:
        return str(error)
    except Exception:  # whatever it is
        return "(its text cannot be read)"


EXIT_USAGE = 2
"""Exit status for an OperatorError, as argparse uses for wrong arguments."""

EXIT_INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""

EXIT_DEVICE_LOST = 70
"""Exit status after DeviceLost (EX_SOFTWARE of sysexits.h): restart the process, the device may be fine then."""

EXIT_STUCK = 75
"""Exit status where a processor holds the device's thread and does not come back (EX_TEMPFAIL): restart the process,
and look at the processor if it happens again."""
