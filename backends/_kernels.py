"""Which of a processor's kernels runs: those that do not run here are left out, and the fastest of the others wins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from gpu_byoc.processor import Kernel

FRAMES: Final = 16
WIDTH: Final = 1920
HEIGHT: Final = 1080
"""What the race is run over: 100 MB of RGB, more than a GPU's second-level cache holds."""

_ROUNDS: Final = 5
_CALLS: Final = 4  # in a row, so that all but the first call's launch is hidden behind the device's work


@dataclass(slots=True)
class Choice:
    """``kernel`` is what runs, None for ``process_batch``. ``microseconds`` of one call, where there was a race."""

    kernel: Kernel | None = None
    microseconds: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # why, by kernel

    def facts(self) -> dict[str, Any]:
        """For status: empty where the processor has no kernels for this backend."""
        if self.kernel is None and not self.left_out:
            return {}
        facts: dict[str, Any] = {"used": None if self.kernel is None else name_of(self.kernel)}
        if self.microseconds:
            facts["microseconds"] = {name: round(each, 1) for name, each in self.microseconds.items()}
        if self.left_out:
            facts["left_out"] = dict(self.left_out)
        return {"kernel": facts}


def name_of(kernel: Kernel) -> str:
    return getattr(kernel, "__name__", repr(kernel))


def that_run(forms: tuple[Kernel, ...], call: Callable[[Kernel], None]) -> tuple[list[Kernel], dict[str, str]]:
    """The kernels for which ``call`` succeeds, which also compiles them, and why the others do not run."""
    fit, left_out = [], {}
    for kernel in forms:
        try:
            call(kernel)
        except Exception as error:  # a compiler that is missing, a source that does not build: all have one cure
            # Compilers add pages of source to their first line.
            left_out[name_of(kernel)] = f"{type(error).__name__}: {error}".strip().partition("\n")[0][:300]
        else:
            fit.append(kernel)
    return fit, left_out


def race(kernels: list[Kernel], timed: Callable[[Kernel, int], float]) -> Choice:
    """The fastest by its best round; rounds alternate, so that a clock that rises favours none.

    ``timed(kernel, calls)`` is the device's time for so many calls in a row, in nanoseconds.
    """
    best: dict[str, float] = {}
    for _ in range(_ROUNDS):
        for kernel in kernels:
            name, taken = name_of(kernel), timed(kernel, _CALLS) / _CALLS / 1e3
            best[name] = min(taken, best.get(name, taken))
    return Choice(min(kernels, key=lambda kernel: best[name_of(kernel)]), best)
