"""``gpu-byoc doctor``: can this machine serve, with what, and what to do about the rest.

What could crash or hang is asked by ``probes`` in processes of their own, all at once; nothing of a GPU needs to be
installed for any of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Final

from gpu_byoc._version import VERSION
from gpu_byoc.checks import machine
from gpu_byoc.checks.machine import Finding
from gpu_byoc.checks.probes import FULL_HD, SLOTS, Answer, Probe
from gpu_byoc.config import GIB, MIB, env
from gpu_byoc.plugins import AUTO, backend_names

PACKAGES: Final = ("numpy", "av", "aiohttp")
"""Without one of them no worker starts."""

OLDEST_CUDA: Final = 12_000
OLDEST_DRIVER: Final = "525.60"  # Linux, for CUDA 12: NVIDIA, CUDA Compatibility, table 2
RUNTIMES: Final = ("torch", "cupy")

_VIDEO: Final = "start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
ENCODERS: Final = {
    "libx264": ("software encoder", "install PyAV again: pip install --force-reinstall av"),
    "h264_nvenc": (
        "NVENC",
        f"nothing must be done, libx264 encodes; for a GPU with NVENC (A100, H100 have none): {_VIDEO}",
    ),
}
NVDEC: Final = ("codec", "h264_cuvid", "r")

Answers = dict[tuple[str, ...], Answer]


def examine() -> list[Finding]:
    """Everything that can be found out, in the order in which one thing needs another. A minute at most."""
    questions: list[tuple[str, ...]] = [("driver",)]
    questions += [("imports", name) for name in PACKAGES]
    questions += [("runtime", name) for name in RUNTIMES]
    questions += [("backend", name) for name in backend_names()]
    questions += [("codec", name, "w") for name in ENCODERS] + [NVDEC]
    with ExitStack() as stack:
        probes = {}
        for question in questions:
            probes[question] = Probe(*question)
            stack.callback(probes[question].close)
        findings = list(_here())
        answers = {question: probe.answer() for question, probe in probes.items()}
    return findings + list(judge(answers))


def _here() -> Iterator[Finding]:
    limits = machine.limits()
    yield machine.system()
    yield machine.cores(limits)
    yield machine.memory(limits)
    yield machine.descriptors()
    yield from machine.ports(machine.worker_port(env("GPU_BYOC_PORT", "8000")))


def judge(answers: Answers) -> Iterator[Finding]:
    """What the probes' answers mean, by question."""
    yield from _packages(answers)
    yield from _driver(answers["driver",])
    yield from _runtimes(answers)
    yield from _backends({name: answer for (kind, name, *_), answer in _named(answers) if kind == "backend"})
    yield from _codecs(answers)


def _named(answers: Answers) -> list[tuple[tuple[str, ...], Answer]]:
    return [(question, answer) for question, answer in answers.items() if len(question) > 1]


def _packages(answers: Answers) -> Iterator[Finding]:
    versions = []
    for name in PACKAGES:
        answer = answers["imports", name]
        if answer.trouble:
            yield Finding("FAIL", name, answer.trouble, f"pip install --force-reinstall {name}")
        else:
            versions.append(f"{name} {answer.value}")
    yield Finding("OK", "packages", ", ".join([f"gpu-byoc {VERSION}", *versions]))


def _driver(answer: Answer) -> Iterator[Finding]:
    found = answer.value
    if answer.trouble:
        yield Finding("WARN", "driver", f"it does not answer: {answer.trouble}", "nvidia-smi on the host; reboot it")
    elif found is None:
        yield Finding(
            "WARN",
            "driver",
            "no NVIDIA driver here (libcuda.so.1 is missing): numpy on the CPU serves",
            "for a GPU: docker run --gpus all, with the NVIDIA Container Toolkit on the host; or install the driver",
        )
    else:
        fact = f"{found['version'] or 'version unknown'}, runs programs up to CUDA {_dotted(found['cuda'])}"
        if found["cuda"] < OLDEST_CUDA:
            yield Finding("WARN", "driver", fact, f"update it to {OLDEST_DRIVER} or later, made for CUDA 12")
        else:
            yield Finding("OK", "driver", f"{fact} (needed: {_dotted(OLDEST_CUDA)})")
        if not found["gpus"]:
            status = f"CUDA error {found['error']}" if found["error"] else "the driver sees none"
            yield Finding(
                "WARN", "GPU", status, "docker run --gpus all; unset CUDA_VISIBLE_DEVICES; nvidia-smi on the host"
            )
        for index, gpu in enumerate(found["gpus"]):
            fact = f"{gpu['name']}, {gpu['memory'] / GIB:.1f} GiB, compute capability {gpu['capability']}"
            yield Finding("OK", f"GPU cuda:{index}", fact)


def _runtimes(answers: Answers) -> Iterator[Finding]:
    """What torch and cupy are built for against what the driver runs; silent about those that are not installed."""
    newest = (answers["driver",].value or {}).get("cuda", 0)
    for library in RUNTIMES:
        answer = answers["runtime", library]
        name = f"CUDA of {library}"
        if answer.trouble:
            yield Finding("WARN", name, answer.trouble, f"install {library} again")
        elif answer.value:
            version, built = answer.value["version"], answer.value["cuda"]
            fact = f"{library} {version} is built " + (f"for CUDA {_dotted(built)}" if built else "without CUDA")
            if newest and built // 1000 > newest // 1000:
                fix = f"update the driver, or install a {library} built for CUDA {newest // 1000}"
                yield Finding("WARN", name, f"{fact}; the driver goes up to {_dotted(newest)}", fix)
            elif newest and not built:
                yield Finding("WARN", name, fact, f"install a {library} built for CUDA {newest // 1000}")
            else:
                yield Finding("OK", name, fact)


def _backends(answers: dict[str, Answer]) -> Iterator[Finding]:
    for name, answer in answers.items():
        found = answer.value or {}
        if answer.trouble:
            fix = "install its library again; if the driver line is not OK either, that comes first"
            yield Finding("WARN", f"backend {name}", answer.trouble, fix)
        elif "why_not" in found:
            fact, fix = _cure(found["why_not"])
            yield Finding("WARN", f"backend {name}", fact, fix)
        elif found["degraded"]:
            fact, fix = _cure("; ".join(found["degraded"]))
            yield Finding("WARN", f"backend {name}", f"runs on {found['device']}, but {fact}", fix)
        else:
            yield Finding("OK", f"backend {name}", f"runs on {found['device']}")
    running = {name: answer.value for name, answer in answers.items() if "device" in (answer.value or {})}
    yield _pinned(running)
    best = next((name for name in AUTO if name in running), None)
    if best:
        yield Finding("OK", "serving", f"possible; --backend auto takes {best}")
    else:
        yield Finding("FAIL", "serving", "no backend opens", "see the backends above; numpy needs no GPU")


def _pinned(running: dict[str, Any]) -> Finding:
    size = f"{FULL_HD[0] * FULL_HD[1] * 3 * SLOTS // MIB} MiB, {SLOTS} frames of full HD"
    lock = f"RLIMIT_MEMLOCK is {machine.memlock()}"
    tried = {name: found["pinned"] for name, found in running.items() if found["device"] != "cpu"}
    if not tried:
        return Finding(
            "WARN", "pinned memory", f"not tried, no backend runs on a GPU; {lock}", "see the backends above"
        )
    if all(tried.values()):
        return Finding("OK", "pinned memory", f"{size}: {', '.join(tried)}; {lock}")
    failed = ", ".join(name for name, pinned in tried.items() if not pinned)
    fix = "free host memory, docker run --ulimit memlock=-1 and a higher --memory, or serve with fewer --slots"
    return Finding("WARN", "pinned memory", f"{failed} cannot have {size}; copies are slow; {lock}", fix)


def _codecs(answers: Answers) -> Iterator[Finding]:
    working = []
    for name, (what, fix) in ENCODERS.items():
        answer = answers["codec", name, "w"]
        if why_not := answer.trouble or answer.value:
            yield Finding("WARN", what, f"{name} does not open: {why_not}", fix)
        else:
            yield Finding("OK", what, f"{name} works")
            working.append(name)
    if not working:
        yield Finding("FAIL", "encoders", "none works, so no live stream can be served", "see the encoders above")
    answer = answers[NVDEC]
    fact = f"does not open: {answer.trouble or answer.value}" if answer.trouble or answer.value else "works"
    yield Finding("OK", "NVDEC", f"h264_cuvid {fact}; not used, the worker decodes on the CPU")


def _cure(text: str) -> tuple[str, str]:
    """(what is wrong, what to do): reasons are written with a colon between them."""
    fact, colon, fix = text.rpartition(": ")
    return (fact, fix) if colon else (text, "")


def _dotted(version: int) -> str:
    """12080 -> "12.8", as CUDA counts."""
    return f"{version // 1000}.{version % 1000 // 10}"


# --- on paper


def serving(findings: Sequence[Finding]) -> bool:
    return not any(finding.level == "FAIL" for finding in findings)


def plain(findings: Sequence[Finding]) -> str:
    """A line for each finding, and one for its fix; for logs and pipes."""
    lines = []
    for each in findings:
        lines.append(f"{each.level:4}  {each.name:18}  {each.fact}")
        if each.fix:
            lines.append(f"{'':26}fix: {each.fix}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """0 when this machine can serve, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog="gpu-byoc doctor",
        allow_abbrev=False,
        description="Say whether this machine can serve, with what, and what to do about the rest.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    given = parser.parse_args(argv)
    if given.json:
        findings = examine()
        said = {"version": VERSION, "serving": serving(findings), "findings": [asdict(each) for each in findings]}
        print(json.dumps(said, indent=1))
    elif sys.stdout.isatty():
        findings = _show()
    else:
        findings = examine()
        print(plain(findings))
    return 0 if serving(findings) else 1


def _show() -> list[Finding]:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    with console.status("asking drivers and libraries, a minute at most"):
        findings = examine()
    table = Table("", "what", "fact and fix", title=f"gpu-byoc {VERSION} doctor", title_justify="left")
    colours = {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}
    for each in findings:
        text = Text(each.fact)
        if each.fix:
            text.append(f"\n-> {each.fix}", style="dim")
        table.add_row(Text(each.level, style=colours[each.level]), each.name, text)
    console.print(table)
    return findings
