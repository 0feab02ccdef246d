"""Which backend, on which devices: the choice made, the engines opened, and why it is not a better one."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Callable
from dataclasses import replace

from gpu_byoc.backend import Backend
from gpu_byoc.config import ServeConfig
from gpu_byoc.engine.engine import Engine
from gpu_byoc.engine.fleet import Fleet
from gpu_byoc.engine.host import HostBackend
from gpu_byoc.engine.proof import ORACLE, SHIPPED, prove, warm_up
from gpu_byoc.errors import BackendUnavailable, PluginError, said_by
from gpu_byoc.plugins import AUTO, load_backend
from gpu_byoc.processor import FrameProcessor, Processor, processor_name
from gpu_byoc.processors.green_tint import GreenTint
from gpu_byoc.worker.jobs import STREAM

log = logging.getLogger("gpu_byoc.worker")


async def open_engine(config: ServeConfig, processor: Processor, degraded: list[str]) -> Fleet:
    """An engine for each device with the backend that ``config.backend`` names, started. ``degraded`` gets why it is
    not a better one.

    Raises:
        BackendUnavailable: the one that was asked for cannot open; with ``auto``, none can.
        PluginError: several devices, and a processor that cannot be copied.
    """
    timeout = config.engine.processor_timeout
    config = replace(
        config,
        engine=replace(
            config.engine,
            memory=config.engine.memory // len(config.devices),
            processor_timeout=config.job_timeout if timeout is None else timeout,
        ),
    )
    processors = _one_each(processor, len(config.devices))
    fleet = await _choose(config, processors, degraded)
    fleet.open_name(STREAM)
    return fleet


async def _choose(config: ServeConfig, processors: list[Processor], degraded: list[str]) -> Fleet:
    if isinstance(processors[0], FrameProcessor):
        return await _open(_host(config, processors[0]), config, processors)
    if config.backend != "auto":
        fleet = await _open(load_backend(config.backend), config, processors, warm_up)
        log.info("backend %s on %s, as asked for", config.backend, _places(fleet))
        return fleet
    tried = []
    for name in AUTO:
        try:
            fleet = await _proven(name, config, processors)
        except BackendUnavailable as error:
            tried.append(f"{name}: {error}")
            continue
        log.info("backend %s on %s%s", name, _places(fleet), "".join(f"; not {reason}" for reason in tried))
        if tried:
            degraded.append(f"backend {name} instead of a better one: " + "; ".join(tried))
        return fleet
    raise BackendUnavailable("no backend opens here: " + "; ".join(tried))


def _host(config: ServeConfig, processor: Processor) -> Callable[[], Backend]:
    """A FrameProcessor takes bytes and finds a device by itself, if it wants one."""
    name = processor_name(processor)
    if len(config.devices) > 1:
        raise BackendUnavailable(
            f"{name} is a FrameProcessor, which runs once: choose one device, or leave --device out"
        )
    if config.require_gpu:
        raise BackendUnavailable(
            f"--require-gpu: {name} is a FrameProcessor, and whether it uses a GPU cannot be seen from outside; make "
            "it an ArrayProcessor, or leave --require-gpu out"
        )
    if config.backend not in ("auto", ORACLE):
        load_backend(config.backend)
        log.warning(
            "--backend %s is not used: %s is a FrameProcessor, which finds a device by itself", config.backend, name
        )
    return lambda: HostBackend(config.engine.processor_timeout or 0.0)


async def _proven(name: str, config: ServeConfig, processors: list[Processor]) -> Fleet:
    """The backend ``name``, once it has done with a processor of ours what numpy does: with the one that is served, or
    where that is somebody else's with green tint, on an engine of its own.

    Raises:
        BackendUnavailable: it cannot open, or what it did was wrong.
    """
    make = load_backend(name)
    if name == ORACLE:
        return await _open(make, config, processors)
    ours = type(processors[0]) in SHIPPED
    try:
        fleet = await _open(make, config, processors if ours else [GreenTint() for _ in processors], prove)
    except BackendUnavailable:
        raise
    except Exception as error:  # with a processor of ours, whatever goes wrong is the backend's doing
        said = said_by(error).partition("\n")[0]  # CUDA's errors go on for lines
        why = (
            f"it fails the check at start ({type(error).__name__}: {said}): gpu-byoc verify --backend {name} says more"
        )
        log.warning("backend %s is passed over: %s", name, why)
        raise BackendUnavailable(why) from error
    if ours:
        return fleet
    await asyncio.to_thread(fleet.close, timeout=1.0)
    return await _open(make, config, processors, warm_up)


async def _open(
    make: Callable[[], Backend],
    config: ServeConfig,
    processors: list[Processor],
    first: Callable[[Backend, Processor], None] | None = None,
) -> Fleet:
    backends = [make() for _ in config.devices]
    for backend, device in zip(backends, config.devices, strict=True):
        if reason := backend.available(device):
            raise BackendUnavailable(reason)
    fleet = Fleet(
        [
            Engine(backend, processor, config.engine, device, first)
            for backend, processor, device in zip(backends, processors, config.devices, strict=True)
        ]
    )
    try:
        await asyncio.gather(*map(asyncio.wrap_future, fleet.start()))
        if config.require_gpu and any(backend.device == "cpu" for backend in backends):
            raise BackendUnavailable(f"it runs on {_places(fleet)}, and --require-gpu asks for a GPU")
    except BaseException:  # also a cancel: no thread is left behind
        await asyncio.to_thread(fleet.close, timeout=1.0)
        raise
    return fleet


def _one_each(processor: Processor, devices: int) -> list[Processor]:
    """The processor for the first device, a copy of it as it was handed over for each of the others: what ``setup``
    loads belongs to one device."""
    try:
        return [processor, *(copy.deepcopy(processor) for _ in range(devices - 1))]
    except Exception as error:  # whatever its attributes raise
        raise PluginError(
            f"{devices} devices need a copy of {processor_name(processor)} each, and it cannot be copied ({error}): "
            "make in setup() what cannot be copied, give the class a __deepcopy__, or start a worker for each device"
        ) from error


def _places(fleet: Fleet) -> str:
    return ",".join(name for name, _ in fleet.named())
