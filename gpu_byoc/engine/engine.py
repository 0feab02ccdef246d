"""The engine: leases over preallocated memory, batches across streams, one device thread.

A caller leases slots for one or more frames, writes the frames into ``Lease.views``, submits, is called back, reads
the result from the same views and releases. Whatever happens in between (cancel, failure, shutdown), ``release`` is
the one obligation, it may be called at any moment and any number of times, and it never blocks.

Threads: any thread may call the engine. ``ready`` and ``done`` are called on whichever thread finishes the work,
without the engine's lock, and must return at once (hand over to your own loop).
"""

from __future__ import annotations

import contextvars
import logging
import math
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from gpu_byoc.backend import Arena, Backend, Batch, runs
from gpu_byoc.config import EngineConfig
from gpu_byoc.core.batching import Batcher, Item
from gpu_byoc.core.batchlimit import BatchLimit
from gpu_byoc.core.histogram import Histogram, Reading
from gpu_byoc.core.meter import SECOND, Balance, Meter, Share, Usage
from gpu_byoc.core.slots import Hold, SlotPool, State, Want
from gpu_byoc.engine.device import Device, Outcome, Vitals
from gpu_byoc.errors import BackendUnavailable, DeviceLost, Draining, GpuByocError, Overloaded, TooLarge
from gpu_byoc.frames import FrameSpec
from gpu_byoc.processor import Processor

log = logging.getLogger("gpu_byoc.engine")

STALE = 10.0
"""Seconds after which memory of a frame size that nobody uses goes to another one that could do with more. Sizes that
come in turn keep their own, because pinned memory is slow to make. Chosen, not measured."""

SLOW = 0.25
"""Seconds after which slots that wait for a slow caller may go to one who waits for slots: half as long as a job stands
in the line by default (--slot-wait), so that it still gets them. Chosen, not measured; a 640x480 frame takes so long at
30 Mbit/s, and that matters only where it is in others' way."""

DURATIONS = tuple(
    tenths * SECOND // 10_000
    for tenths in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
)
"""Bounds of the histograms of time: a small frame's kernel takes tenths of a millisecond, a slow processor seconds."""

SIZES = (1, 2, 4, 8, 16, 32, 64)

LEFT = ("full", "max_wait", "device_free", "drain", "alone", "retry")

Ready = Callable[[GpuByocError | None], None]


class Lease:
    """Slots for ``frames`` frames of one spec: the bytes that come in, later the bytes that go out."""

    __slots__ = (
        *("_engine", "_item", "_room", "_want", "client", "context", "done", "frames", "give_way", "hold", "params"),
        *("ready", "spec", "stream"),
    )

    def __init__(
        self, engine: Engine, room: _Room, spec: FrameSpec, frames: int, ready: Ready, client: Hashable
    ) -> None:
        self._engine = engine
        self._room = room
        self._want: Want | None = None
        self._item: Item[Lease] | None = None
        self.hold: Hold | None = None
        self.spec = spec
        self.frames = frames
        self.ready = ready
        self.client = client
        self.give_way: Callable[[], object] | None = None
        self.stream = ""
        self.params: Any = None
        self.done: Callable[[Outcome], None] | None = None
        self.context = contextvars.copy_context()  # of whoever it is for: a log line about it says so

    @property
    def held(self) -> bool:
        """True once the slots are ours, though their memory may still have to be made."""
        return self.hold is not None

    @property
    def granted(self) -> bool:
        """True once the slots are there; until then wait for ``ready``."""
        return self.hold is not None and self._room.arena is not None

    @property
    def views(self) -> list[memoryview]:
        """The frames' bytes in order, neighbouring slots merged. Not to be touched between submit and ``done``."""
        assert self.hold is not None, "not granted yet"
        assert self._room.arena is not None, "not granted yet"
        return [self._room.arena.view(first, count) for first, count in runs(self.hold.slots)]

    def submit(
        self,
        stream: str,
        params: Any,
        done: Callable[[Outcome], None],
        order: Hashable = None,
        alone: bool = False,
    ) -> None:
        """Hand the frames to the device; ``done`` is called once, unless ``release`` comes first.

        ``stream`` is the name the work is booked under. Leases with equal ``order`` (default: the stream) leave in
        the order of their submission. ``alone``: in a batch with no other's.

        Raises:
            Draining: the engine is closing. The lease is still to be released.
        """
        self.stream, self.params, self.done = stream, params, done
        self._engine._submit(self, stream if order is None else order, alone)

    def lend(self, give_way: Callable[[], object]) -> None:
        """From now on until ``keep`` the slots wait for a caller, who sends or reads. ``give_way`` is called if that is
        slow and others need them more, once, on whichever thread: release them soon."""
        self._engine._lend(self, give_way)

    def keep(self) -> None:
        """The caller is through; ``give_way`` is not called any more. Nothing happens where it was not lent."""
        self._engine._keep(self)

    def reclaim(self) -> None:
        """For one that waits in the line; call it from time to time. If another client has more slots than this one's
        would have, and has had some for long while it sent or read, it gives up the oldest of these."""
        self._engine._reclaim(self)

    def release(self) -> None:
        """Give the slots back: the result was read, or nobody wants it any more."""
        self._engine._release(self)


@dataclass(slots=True, eq=False)
class _Room:
    """One arena and who is in it. ``arena`` is None until the device thread has made it."""

    nbytes: int
    pool: SlotPool
    limit: BatchLimit
    used: float = 0.0  # when somebody last asked for slots here, by time.monotonic
    arena: Arena | None = None
    early: list[Lease] | None = None  # leases that wait for the arena itself
    lent: dict[Lease, float] = field(default_factory=dict)
    """Leases that wait for their callers, and since when, oldest first; ``inf``: it was told to give way."""

    @property
    def size(self) -> int:
        return self.nbytes * self.pool.count

    def slots_of(self, client: Hashable) -> int:
        """Slots that a client has, without those that it is giving up."""
        return self.pool.held(client) - sum(each.frames for each in self.leaving if each.client == client)

    @property
    def leaving(self) -> list[Lease]:
        return [each for each, since in self.lent.items() if since == math.inf]

    @property
    def idle(self) -> bool:
        return self.arena is not None and self.pool.free == self.pool.count and not self.pool.waiting


class Engine:
    """One device. Made by ``__init__``, alive from ``start`` to ``close``."""

    def __init__(
        self,
        backend: Backend,
        processor: Processor,
        config: EngineConfig,
        device: str | None = None,
        first: Callable[[Backend, Processor], None] | None = None,
    ) -> None:
        """``first`` is called on the device thread once the backend is open, before anybody is told that it is; what
        it raises is why the start failed."""
        self.backend = backend
        self.processor = processor
        self.first = first
        self.config = config
        self.lock = threading.Condition()
        self.batcher: Batcher[Lease] = Batcher(
            config.max_batch, int(config.max_wait_ms * 1e6), backend.batches, lambda item: item.value._room.limit.frames
        )
        self.meter = Meter()
        self.out_of_memory = 0  # batches that did not fit into the device's memory
        self.reclaimed = 0  # leases whose caller was slow and had to give way
        self.crowded = 0  # leases refused because other frame sizes have the memory
        self.on_fatal: Callable[[GpuByocError], None] | None = None
        self._rooms: dict[int, _Room] = {}  # by nbytes, least recently used first
        self._lines: dict[int, Lease] = {}  # by id of the Want that waits in a pool
        self._tallies = {
            "compute": Histogram(DURATIONS),
            "copy": Histogram(DURATIONS),
            "queue": Histogram(DURATIONS),
            "frames": Histogram(SIZES),
        }
        self._handed = 0  # device time in the results that were handed out
        self._settled = (0, 0)
        self._epoch = time.time_ns() - time.monotonic_ns()
        self._device = Device(self, device)
        self.closing = False

    # --- life

    def start(self) -> Future[None]:
        """Open the backend on the device thread. The future ends when it is ready, or with why it is not.

        What the device is lost by, or the processor stuck in, is in ``fatal`` and told to ``on_fatal``, which is called
        once, on any thread, after all leases have been failed. Set it before, or look at ``fatal`` after setting it.
        """
        return self._device.begin()

    def close(self, flush: bool = True, timeout: float | None = None) -> None:
        """Refuse new work, finish (or with ``flush=False`` fail) what was submitted, and join. Blocks; idempotent.
        From a thread of the engine's own (``ready``, ``done``, ``on_fatal``) it does not wait."""
        self.expel(Draining("the worker is shutting down; send the job elsewhere"), queued=not flush)
        if not self._device.join(timeout) and timeout is not None:
            log.error("the device thread did not end within %.1f s: the processor is still busy", timeout)

    def expel(self, error: GpuByocError, queued: bool) -> None:
        """Refuse new work, turn away who waits for slots, and with ``queued`` fail what was not started yet."""
        with self.lock:
            self.closing = True
            dropped = self.batcher.drain() if queued else []
            waiting = self._dismiss(list(self._lines.values()))
            for room in self._rooms.values():
                waiting += room.early or []
                room.early = None if room.arena else []
            self.lock.notify_all()
        for item in dropped:
            self.finish(item.value, Outcome(error.again()))
        for lease in waiting:
            lease.ready(error.again())

    def close_arenas(self) -> None:
        """On the device thread, at its end. What a lease still refers to goes with the process."""
        with self.lock:
            arenas = [room.arena for room in self._rooms.values() if room.idle and room.arena is not None]
        for arena in arenas:
            arena.close()

    @property
    def alive(self) -> bool:
        return self._device.is_alive()

    @property
    def busy(self) -> bool:
        """Something is on the device or waits for it, whether or not anybody still wants it."""
        return self._device.busy or self.batcher.waiting > 0

    @property
    def fatal(self) -> GpuByocError | None:
        return self._device.fatal

    def now(self) -> int:
        """Nanoseconds since the epoch, by a clock that never jumps."""
        return self._epoch + time.monotonic_ns()

    # --- leases

    def lease(
        self, spec: FrameSpec, frames: int, ready: Ready, patient: bool = False, client: Hashable = None
    ) -> Lease:
        """Ask for slots. If ``granted`` is already true they are there and ``ready`` is not called; otherwise it is
        called once, with None or with why not, unless ``release`` comes first. ``patient`` is for live streams, each of
        which has one place in the line at most: the line is never too long for them. ``client`` says whose it is: they
        get slots in turn, and in a line that is full one with fewer places takes the last of whoever has most.

        Raises:
            TooLarge: this many frames of this size can never be had at once.
            Overloaded: the line is full, or other frame sizes have the memory now.
            Draining: the engine is closing.
        """
        if frames > self.config.max_batch:
            raise TooLarge(
                f"{frames} frames in one job, at most {self.config.max_batch} (--max-batch) fit: send several jobs"
            )
        with self.lock:
            if self.closing:
                raise Draining("the worker is shutting down; send the job elsewhere")
            room = self._room_for(spec, frames)
            given_up = self._make_way(room, client) if room.pool.waiting >= room.pool.count and not patient else []
            lease = Lease(self, room, spec, frames, ready, client)
            want = room.pool.want(frames, client)
            lease.hold = want.hold
            if want.hold is None:
                lease._want = want
                self._lines[id(want)] = lease
            elif room.early is not None:
                room.early.append(lease)
        for one in given_up:
            one.ready(Overloaded("others wait for a slot too, and this client has most of the line; try again"))
        return lease

    def _make_way(self, room: _Room, client: Hashable) -> list[Lease]:
        """Under the lock, in a line that is full: whoever has to leave it for this client. Raises Overloaded."""
        rival = room.pool.rival(client)
        if rival is None:
            raise Overloaded(f"no free slot, and {room.pool.waiting} jobs are already waiting for one; try again")
        return self._dismiss([self._lines[id(rival)]])

    def _room_for(self, spec: FrameSpec, frames: int) -> _Room:
        """Under the lock: the memory of one frame size, made or made anew where more of it can be had now."""
        nbytes, now = spec.nbytes, time.monotonic()
        most = min(self.config.slots, self.config.memory // nbytes)
        if most < frames:
            raise TooLarge(f"{frames} frames of {spec} ({nbytes} bytes each) are more than --memory-mb allows")
        room = self._rooms.get(nbytes)
        count = room.pool.count if room else 0
        if count < most and (room is None or room.idle):
            slots = min(most, self._reach(nbytes, now - STALE))
            if count < frames:  # a full batch, or what there is
                slots = max(slots, min(most, self.config.max_batch, self._reach(nbytes, now)))
            if slots > max(count, frames - 1):
                room = self._make_room(nbytes, most, slots)
        if room is None or room.pool.count < frames:
            self.crowded += 1
            raise Overloaded(f"no memory for {frames} frames of {spec} while other sizes are in use; try again")
        room.used = now
        self._rooms[nbytes] = self._rooms.pop(nbytes)  # most recently used
        return room

    def _reach(self, nbytes: int, unused_since: float) -> int:
        """Slots of ``nbytes`` for which there is memory, if idle rooms make way that nobody has used since then."""
        stays = [
            room.size
            for room in self._rooms.values()
            if room.nbytes != nbytes and not (room.idle and room.used <= unused_since)
        ]
        return (self.config.memory - sum(stays)) // nbytes if len(stays) < self.config.max_frame_sizes else 0

    def _make_room(self, nbytes: int, most: int, slots: int) -> _Room:
        """At least ``slots`` of the ``most`` that are wanted: idle rooms make way for that, those unused for longest
        first. Whatever is free then is used."""
        old = self._rooms.pop(nbytes, None)
        gone = [] if old is None else [old]
        free = self.config.memory - sum(room.size for room in self._rooms.values())
        for room in list(self._rooms.values()):
            if free >= slots * nbytes and len(self._rooms) < self.config.max_frame_sizes:
                break
            if room.idle:
                gone.append(self._rooms.pop(room.nbytes))
                free += room.size
        self._device.todo += [room.arena.close for room in gone if room.arena]
        limit = old.limit if old else BatchLimit(self.config.max_batch)
        room = self._rooms[nbytes] = _Room(nbytes, SlotPool(min(most, free // nbytes)), limit, early=[])
        self._device.todo.append(lambda: self._furnish(room))
        self.lock.notify_all()
        return room

    def _furnish(self, room: _Room) -> None:
        """On the device thread: allocate the arena and let those in who were waiting for it."""
        error: GpuByocError | None = None
        lost: DeviceLost | None = None
        try:
            room.arena = self.backend.arena(room.nbytes, room.pool.count)
        except DeviceLost as cause:
            error = lost = cause
        except BackendUnavailable as cause:  # memory that has to be pinned (--require-pinned) and cannot be
            error = cause
        except Exception as cause:  # each library has an out-of-memory error of its own
            log.warning("no memory for %d frames of %d bytes", room.pool.count, room.nbytes, exc_info=cause)
            error = Overloaded(f"no memory for {room.pool.count} frames of {room.nbytes} bytes: {cause}")
        with self.lock:
            early, room.early = room.early or [], None
            if error is not None:
                del self._rooms[room.nbytes]
                early += self._dismiss([lease for lease in self._lines.values() if lease._room is room])
        for lease in early:
            lease.ready(error.again() if error else None)
        if lost is not None:
            raise lost

    # --- the way through

    def _submit(self, lease: Lease, order: Hashable, alone: bool) -> None:
        with self.lock:
            if self.closing:
                raise Draining("the worker is shutting down; send the job elsewhere")
            assert lease.hold is not None, "not granted yet"
            lease._room.pool.move(lease.hold, "submit")
            key = (lease.spec, lease.params, lease if alone else None)
            lease._item = Item(lease, order, key, lease.frames, time.monotonic_ns())
            self.batcher.add(lease._item)
            self.lock.notify_all()

    def _release(self, lease: Lease) -> None:
        with self.lock:
            pool, hold = lease._room.pool, lease.hold
            if hold is None:
                if lease._want is None:
                    return
                served = pool.cancel(lease._want)
                del self._lines[id(lease._want)]
                lease._want = None
            else:
                if hold.state in (State.FREE, State.ABANDONED):
                    return
                if hold.state is State.QUEUED and lease._item is not None:
                    self.batcher.cancel(lease._item)
                if lease._room.early is not None and lease in lease._room.early:
                    lease._room.early.remove(lease)
                served = pool.move(hold, "release")
            lucky = self._admit(served)
        _tell(lucky)

    def _lend(self, lease: Lease, give_way: Callable[[], object]) -> None:
        with self.lock:
            lease.give_way = give_way
            lease._room.lent[lease] = time.monotonic()

    def _keep(self, lease: Lease) -> None:
        with self.lock:
            lease.give_way = None
            lease._room.lent.pop(lease, None)

    def _reclaim(self, lease: Lease) -> None:
        with self.lock:
            victims = self._slower(lease) if lease._want is not None else []
            ways = [victim.give_way for victim in victims]
            lease._room.lent.update(dict.fromkeys(victims, math.inf))
            self.reclaimed += len(victims)
        for give_way in ways:
            assert give_way is not None
            give_way()

    def _slower(self, lease: Lease) -> list[Lease]:
        """Under the lock: as many leases as ``lease`` needs, the oldest first, that have waited for their caller for
        SLOW seconds. They are one client's, that of most slots among the slow, and it has more than the client of
        ``lease`` has then."""
        room, before = lease._room, time.monotonic() - SLOW
        slow = [each for each, since in room.lent.items() if since <= before and each.client != lease.client]
        client = max((each.client for each in slow), key=room.slots_of, default=None)
        most, share = room.slots_of(client), room.slots_of(lease.client) + lease.frames
        missing = lease.frames - room.pool.free - sum(each.frames for each in room.leaving)
        chosen = []
        for each in slow:
            if each.client == client and missing > 0 and most > share:
                chosen.append(each)
                most, missing = most - each.frames, missing - each.frames
        return chosen

    def _dismiss(self, leases: list[Lease]) -> list[Lease]:
        """Under the lock: out of the line with them, last first, so that nobody is served on the way."""
        for lease in reversed(leases):
            assert lease._want is not None
            lease._room.pool.cancel(lease._want)
            del self._lines[id(lease._want)]
            lease._want = None
        return leases

    def _admit(self, served: list[Want]) -> list[Lease]:
        """Under the lock: wants that got their slots become leases to be told."""
        lucky = []
        for want in served:
            lease = self._lines.pop(id(want))
            lease.hold, lease._want = want.hold, None
            if lease._room.early is not None:
                lease._room.early.append(lease)
            else:
                lucky.append(lease)
        return lucky

    # --- what the device thread calls

    def batch_of(self, leases: list[Lease]) -> Batch:
        arena = leases[0]._room.arena
        assert arena is not None
        slots = tuple(slot for lease in leases if lease.hold for slot in lease.hold.slots)
        return Batch(leases[0].spec, arena, slots, leases[0].params)

    def started(self, items: list[Item[Lease]]) -> None:
        """Under the lock: these are on the device now."""
        for item in items:
            assert item.value.hold is not None
            item.value._room.pool.move(item.value.hold, "start")

    def book(self, items: list[Item[Lease]], began: int, compute: int, copy: int) -> list[Outcome]:
        shares = [
            Share(it.value.stream, it.frames, it.frames * it.value.spec.pixels, (began - it.arrived) * it.frames)
            for it in items
        ]
        frames = sum(item.frames for item in items)
        with self.lock:
            items[0].value._room.limit.fitted(frames, time.monotonic_ns())
            parts = self.meter.book(self.now(), compute, copy, shares)
            self._count(items, began, frames, compute, copy)
        return [
            Outcome(None, began - item.arrived, its_compute, its_copy, frames, self.backend.device)
            for item, (its_compute, its_copy) in zip(items, parts, strict=True)
        ]

    def _count(self, items: list[Item[Lease]], began: int, frames: int, compute: int, copy: int) -> None:
        """Under the lock."""
        tallies = self._tallies
        tallies["compute"].add(compute)
        tallies["copy"].add(copy)
        tallies["frames"].add(frames)
        for item in items:
            tallies["queue"].add(began - item.arrived, item.frames)

    def settle(self) -> None:
        """Under the lock, on the thread that lands batches: all that was booked has been handed out."""
        device = self.meter.device
        self._settled = (device.compute_ns + device.copy_ns, self._handed)

    def finish(self, lease: Lease, outcome: Outcome) -> None:
        """The lease's work is over, well or not: tell its owner, or take the slots back if there is none any more."""
        lucky: list[Lease] = []
        wanted = False
        with self.lock:
            self._handed += outcome.compute_ns + outcome.copy_ns
            room, hold = lease._room, lease.hold
            assert hold is not None
            if hold.state is State.QUEUED:  # failed before it was started
                room.pool.move(hold, "start")
            if hold.state is State.RUNNING:
                room.pool.move(hold, "finish")
                wanted = True
            elif hold.state is State.ABANDONED:
                lucky = self._admit(room.pool.move(hold, "finish"))
        if wanted and lease.done is not None:
            lease.done(outcome)
        _tell(lucky)

    def overran(self, items: list[Item[Lease]]) -> None:
        """A batch of these did not fit into the device's memory."""
        with self.lock:
            self.out_of_memory += 1
            items[0].value._room.limit.failed(sum(item.frames for item in items), time.monotonic_ns())

    # --- looking at it

    def rooms(self) -> list[dict[str, Any]]:
        """Slot use per frame size, for status and metrics."""
        with self.lock:
            return [
                {
                    "frame_bytes": room.nbytes,
                    "slots": room.pool.count,
                    "free": room.pool.free,
                    "waiting": room.pool.waiting,
                    "pinned": None if room.arena is None else room.arena.pinned,
                    "max_batch": room.limit.frames,
                }
                for room in self._rooms.values()
            ]

    def pressure(self, nbytes: int, frames: int) -> tuple[bool, int]:
        """(whether a lease for ``frames`` frames of ``nbytes`` bytes would wait, bytes of all frames in the house and
        in the line): where the next one goes, the lower the better."""
        with self.lock:
            room = self._rooms.get(nbytes)
            full = room is not None and (room.pool.waiting > 0 or room.pool.free < frames)
            held = sum(each.nbytes * (each.pool.count - each.pool.free) for each in self._rooms.values())
            return full, held + sum(lease.frames * lease.spec.nbytes for lease in self._lines.values())

    def tallies(self) -> dict[str, Reading]:
        """Per batch: ``compute`` and ``copy`` (nanoseconds), ``frames``; per frame: ``queue`` (nanoseconds)."""
        with self.lock:
            return {name: tally.read() for name, tally in self._tallies.items()}

    def left(self) -> dict[str, int]:
        """Batches that were started, by why; see ``Batcher.take``. ``retry``: a part of one that failed, once more."""
        with self.lock:
            return {**dict.fromkeys(LEFT, 0), **self.batcher.left}

    def balance(self) -> Balance:
        with self.lock:
            return Balance(*self.meter.spent(), *self._settled)

    def vitals(self) -> Vitals:
        return self._device.vitals()

    def open_stream(self, name: str) -> None:
        """Book ``name`` by itself from now on; see ``end_stream``."""
        with self.lock:
            self.meter.open(name)

    def total(self, name: str) -> Usage:
        """What an open name has used so far."""
        with self.lock:
            return _copy(self.meter.totals.get(name) or Usage())

    def end_stream(self, name: str) -> Usage:
        """A stream is over: its totals, which leave the table."""
        with self.lock:
            return self.meter.end(name)

    def spent(self) -> Usage:
        """The device's own totals, each batch once."""
        with self.lock:
            return _copy(self.meter.device)

    def usage(self) -> tuple[list[tuple[int, str, Usage]], dict[str, Usage], Usage]:
        """(rows of the last minute, totals by name, the device's own totals), copied."""
        with self.lock:
            rows = [(second, name, _copy(usage)) for second, name, usage in self.meter.rows(self.now())]
            totals = {name: _copy(usage) for name, usage in self.meter.totals.items()}
            return rows, totals, _copy(self.meter.device)


def _tell(lucky: list[Lease]) -> None:
    for lease in lucky:
        lease.ready(None)


def _copy(usage: Usage) -> Usage:
    fresh = Usage()
    fresh.add(usage)
    return fresh
