"""``gpu-byoc doctor``: what it finds here, and what it makes of machines that are not here."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpu_byoc.checks import doctor, machine, probes
from gpu_byoc.checks.machine import Finding, Limits, limits
from gpu_byoc.checks.probes import Answer, Probe
from gpu_byoc.config import GIB, MIB
from gpu_byoc.plugins import backend_names
from gpu_byoc.processors.passthrough import Passthrough
from tests.support.workers import asynchronous, running

H100 = {"name": "NVIDIA H100", "memory": 80 * GIB, "capability": "9.0"}


def answers(**changes: Answer) -> doctor.Answers:
    """Those of a machine with one good GPU on which all works; ``changes`` by the question with ``_`` between."""
    good: dict[tuple[str, ...], Any] = {
        ("driver",): {"version": "550.54.15", "cuda": 12_040, "error": 0, "gpus": [H100]},
        **{("imports", name): "1.0" for name in doctor.PACKAGES},
        **{("runtime", name): {"version": "9.9", "cuda": 12_080} for name in doctor.RUNTIMES},
        ("backend", "numpy"): {"device": "cpu", "pinned": False, "degraded": []},
        ("backend", "torch"): {"device": "cuda:0", "pinned": True, "degraded": []},
        ("backend", "cupy"): {"device": "cuda:0", "pinned": True, "degraded": []},
        **{("codec", name, "w"): None for name in doctor.ENCODERS},
        doctor.NVDEC: None,
    }
    found = {question: Answer(value) for question, value in good.items()}
    for name, answer in changes.items():
        (question,) = (each for each in found if "_".join(each) == name)
        found[question] = answer
    return found


def judged(**changes: Answer) -> dict[str, Finding]:
    found = list(doctor.judge(answers(**changes)))
    by_name = {each.name: each for each in found}
    assert len(by_name) == len(found), "every line has a name of its own"
    for each in found:
        assert each.level == "OK" or each.fix, f"no cure: {each}"
    return by_name


def levels(found: dict[str, Finding]) -> set[str]:
    return {each.level for each in found.values()}


def test_a_good_machine_is_ok_throughout() -> None:
    found = judged()
    assert levels(found) == {"OK"}
    assert found["driver"].fact == "550.54.15, runs programs up to CUDA 12.4 (needed: 12.0)"
    assert found["GPU cuda:0"].fact == "NVIDIA H100, 80.0 GiB, compute capability 9.0"
    assert found["CUDA of torch"].fact == "torch 9.9 is built for CUDA 12.8"
    assert found["pinned memory"].fact.startswith("189 MiB, 32 frames of full HD: torch, cupy")
    assert "takes cupy" in found["serving"].fact


def test_without_a_gpu_numpy_serves_and_the_rest_says_why_not() -> None:
    missing = Answer({"why_not": "torch is not installed: pip install torch"})
    found = judged(
        driver=Answer(None),
        runtime_torch=Answer(None),
        runtime_cupy=Answer(None),
        backend_torch=missing,
        backend_cupy=missing,
        codec_h264_nvenc_w=Answer("Cannot load libcuda.so.1"),
    )
    assert doctor.serving(list(found.values()))
    assert "--gpus all" in found["driver"].fix
    assert (found["backend torch"].fact, found["backend torch"].fix) == ("torch is not installed", "pip install torch")
    assert "not tried" in found["pinned memory"].fact
    assert "takes numpy" in found["serving"].fact
    assert "CUDA of torch" not in found
    assert (found["NVENC"].level, found["software encoder"].level) == ("WARN", "OK")


def test_a_driver_that_is_too_old_for_the_wheel() -> None:
    old = Answer({"version": "470.1", "cuda": 11_040, "error": 0, "gpus": [H100]})
    found = judged(driver=old)
    assert found["driver"].level == "WARN"
    assert "525.60" in found["driver"].fix
    assert "goes up to 11.4" in found["CUDA of torch"].fact
    assert "built for CUDA 11" in found["CUDA of torch"].fix


def test_a_newer_minor_version_of_the_wheel_is_fine_and_a_wheel_without_cuda_is_not() -> None:
    found = judged(
        runtime_torch=Answer({"version": "2", "cuda": 0}), runtime_cupy=Answer({"version": "14", "cuda": 12_090})
    )
    assert (found["CUDA of torch"].level, found["CUDA of cupy"].level) == ("WARN", "OK")


def test_a_driver_without_gpus_and_one_that_hangs() -> None:
    none = judged(driver=Answer({"version": "", "cuda": 12_040, "error": 100, "gpus": []}))
    assert (none["GPU"].level, none["GPU"].fact) == ("WARN", "CUDA error 100")
    assert none["driver"].fact.startswith("version unknown")
    hangs = judged(driver=Answer(trouble="no answer within 60 s"))
    assert hangs["driver"].level == "WARN"
    assert "no answer" in hangs["driver"].fact


def test_memory_that_cannot_be_pinned_and_a_degraded_backend() -> None:
    poor = Answer({"device": "cuda:0", "pinned": False, "degraded": ["host memory is not pinned (no): lower --slots"]})
    found = judged(backend_torch=poor)
    assert (found["pinned memory"].level, found["backend torch"].level) == ("WARN", "WARN")
    assert "torch cannot have" in found["pinned memory"].fact
    assert found["backend torch"].fact == "runs on cuda:0, but host memory is not pinned (no)"


@pytest.mark.parametrize("name", ["numpy", "torch", "cupy"])
def test_a_backend_that_crashes_is_a_warning_and_none_at_all_a_failure(name: str) -> None:
    crash = Answer(trouble="the process that asked ended with SIGSEGV")
    found = judged(**{f"backend_{name}": crash})
    assert "SIGSEGV" in found[f"backend {name}"].fact
    assert doctor.serving(list(found.values()))
    none = judged(backend_numpy=crash, backend_torch=crash, backend_cupy=crash)
    assert none["serving"].level == "FAIL"
    assert not doctor.serving(list(none.values()))


def test_a_package_that_does_not_import_and_no_encoder_at_all_are_failures() -> None:
    assert judged(imports_numpy=Answer(trouble="ImportError: libx"))["numpy"].level == "FAIL"
    found = judged(codec_libx264_w=Answer("no"), codec_h264_nvenc_w=Answer("no"))
    assert found["encoders"].level == "FAIL"
    assert judged(codec_libx264_w=Answer("no"))["software encoder"].level == "WARN"


# --- the probes


def test_each_probe_answers_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numpy.py").write_text("raise SystemExit('what lies in the folder must not be imported')")
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    asked = {question: Probe(*question) for question in [("imports", "numpy"), ("backend", "numpy"), ("driver",)]}
    asked["codec", "libx264", "w"] = Probe("codec", "libx264", "w")
    found = {question: probe.answer() for question, probe in asked.items()}
    assert not any(answer.trouble for answer in found.values()), found
    assert found["backend", "numpy"].value["device"] == "cpu"
    assert found["codec", "libx264", "w"].value is None


def test_a_codec_that_does_not_open_says_why() -> None:
    assert "no such codec" in (probes.codec("no such codec", "r") or "no such codec")
    assert Probe("codec", "nonsense", "r").answer().value


@pytest.mark.parametrize("code", ["die", "hang", "shout", "raise"])
def test_a_library_may_crash_hang_shout_or_raise(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = {
        "die": "import os; print('about to die', flush=True); os.kill(os.getpid(), 11)",
        "hang": "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()",
        "shout": "print('x' * 300_000); from gpu_byoc.checks.probes import child; child('imports', ('json',))",
        "raise": "from gpu_byoc.checks.probes import child; child('imports', ('no_such_module',))",
    }
    monkeypatch.setattr(
        probes, "_CHILD", "import sys; sys.path[:] = {path!r}; {name!s}".replace("{name!s}", bodies[code])
    )
    monkeypatch.setattr(probes, "DEADLINE", 1.0 if code == "hang" else 40.0)
    began = time.monotonic()
    answer = Probe("any").answer()
    assert time.monotonic() - began < 30
    wanted = {
        "die": "the process that asked ended with SIGSEGV: about to die",
        "hang": "no answer within 1 s",
        "shout": "PackageNotFoundError",
        "raise": "ModuleNotFoundError: No module named 'no_such_module'",
    }
    assert wanted[code] in answer.trouble


class FakeCuda(SimpleNamespace):
    """The few calls of libcuda that the probe makes; ``gpus`` it has, ``status`` cuInit answers."""

    def __call__(self, name: str) -> Any:
        if name == "libcuda.so.1":
            return self
        if self.nvml is None:
            raise OSError(name)
        return self.nvml

    def cuDriverGetVersion(self, into: Any) -> int:  # noqa: N802
        into._obj.value = 12_040
        return 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return int(self.status)

    def cuDeviceGetCount(self, into: Any) -> int:  # noqa: N802
        into._obj.value = self.gpus
        return 0

    def cuDeviceGet(self, into: Any, index: int) -> int:  # noqa: N802
        into._obj.value = index
        return 0

    def cuDeviceGetName(self, into: Any, size: int, device: Any) -> int:  # noqa: N802
        into.value = f"GPU {device.value}".encode()
        return 0

    def cuDeviceTotalMem_v2(self, into: Any, device: Any) -> int:  # noqa: N802
        assert isinstance(into._obj, ctypes.c_size_t)
        into._obj.value = 80 * GIB
        return 0

    def cuDeviceGetAttribute(self, into: Any, which: int, device: Any) -> int:  # noqa: N802
        into._obj.value = {75: 9, 76: 0}[which]
        return 0


def version_into(text: Any, size: int) -> int:
    assert size == 80
    text.value = b"550.54.15"
    return 0


def test_what_the_driver_says() -> None:
    nvml = SimpleNamespace(nvmlInit_v2=lambda: 0, nvmlSystemGetDriverVersion=version_into, nvmlShutdown=lambda: 0)
    assert probes.driver(FakeCuda(gpus=2, status=0, nvml=nvml)) == {
        "version": "550.54.15",
        "cuda": 12_040,
        "error": 0,
        "gpus": [{"name": f"GPU {i}", "memory": 80 * GIB, "capability": "9.0"} for i in range(2)],
    }
    refused = probes.driver(FakeCuda(gpus=2, status=999, nvml=None))
    assert refused == {"version": "", "cuda": 12_040, "error": 999, "gpus": []}


# --- this machine


@pytest.mark.parametrize(
    ("files", "mine", "wanted"),
    [
        ({"memory.max": "max", "cpu.max": "max 100000"}, "0::/", Limits(None, None)),
        ({"memory.max": "1048576", "cpu.max": "150000 100000"}, "0::/", Limits(1 << 20, 1.5)),
        (
            {"memory.max": "900", "a/memory.max": "max", "a/b/memory.max": "800", "a/cpu.max": "50000 100000"},
            "0::/a/b",
            Limits(800, 0.5),
        ),
        ({"memory.max": "700"}, "0::/docker/not-visible-here", Limits(700, None)),
        (
            {
                "memory/x/memory.limit_in_bytes": "600",
                "memory/memory.limit_in_bytes": str((1 << 63) - 4096),
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
                "cpu/y/cpu.cfs_quota_us": "200000",
                "cpu/y/cpu.cfs_period_us": "100000",
            },
            "5:cpu,cpuacct:/y\n4:memory:/x\n1:name=systemd:/z",
            Limits(600, 2.0),
        ),
        ({"unified/memory.max": "500", "memory/memory.limit_in_bytes": "400"}, "4:memory:/\n0::/", Limits(400, None)),
        ({}, "", Limits(None, None)),
    ],
)
def test_limits_of_control_groups(files: dict[str, str], mine: str, wanted: Limits, tmp_path: Path) -> None:
    groups, own = tmp_path / "groups", tmp_path / "cgroup"
    own.write_text(mine)
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text + "\n")
    assert limits(groups, own) == wanted
    assert limits(groups, tmp_path / "no such file") == Limits(None, None)


def test_little_memory_is_a_warning_with_a_setting_that_fits() -> None:
    found = machine.memory(Limits(800 * MIB, None))
    assert (found.level, found.fix.split(":")[0]) == ("WARN", "serve with --memory-mb 480")
    assert machine.cores(Limits(None, 0.25)).level == "WARN"
    assert "the time of 2" in machine.cores(Limits(None, 2.0)).fact


def test_a_taken_port_names_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as probe:
        port, free = taken.getsockname()[1], probe.getsockname()[1]
        probe.close()
        found = list(machine.ports(free, {port: ("gateway", "gpu-byoc livepeer -httpAddr HOST:PORT")}))
    assert [(each.level, each.name) for each in found] == [("WARN", f"port {port}"), ("OK", "ports")]
    assert f"pid {os.getpid()}" in found[0].fact
    assert found[0].fix == "stop it, or gpu-byoc livepeer -httpAddr HOST:PORT"
    assert found[1].fact == f"{free} free"


@asynchronous
async def test_a_worker_on_its_own_port_is_no_trouble() -> None:
    import asyncio

    async with running(Passthrough()) as worker:
        (found,) = await asyncio.to_thread(lambda: list(machine.ports(worker.port, {})))
    assert (found.level, found.name) == ("OK", f"port {worker.port}")
    assert "says IDLE" in found.fact


@pytest.mark.parametrize(("text", "port"), [("8000", 8000), ("9000", 9000), ("0", 8000), ("nonsense", 8000)])
def test_the_workers_port(text: str, port: int) -> None:
    assert machine.worker_port(text) == port


@pytest.mark.timeout(240)  # each run opens every backend there is, in processes of their own
def test_the_command_examines_this_machine_and_says_it_twice() -> None:
    """As a process: a table for people, plain where there is no terminal, and JSON."""
    runs = [
        subprocess.run(
            [sys.executable, "-m", "gpu_byoc", "doctor", *flags],
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        for flags in ([], ["--json"])
    ]
    assert [run.returncode for run in runs] == [0, 0], runs
    said = json.loads(runs[1].stdout)
    assert said["serving"] is True
    assert {"system", "cores", "memory", "descriptors", "driver", "pinned memory", "NVENC", "NVDEC"} < {
        each["name"] for each in said["findings"]
    }
    assert {f"backend {name}" for name in backend_names()} < {each["name"] for each in said["findings"]}
    lines = runs[0].stdout.splitlines()
    assert all(line[:6] in ("OK    ", "WARN  ", "FAIL  ") or line.strip().startswith("fix: ") for line in lines)
    assert runs[0].stdout.isascii()
    assert runs[0].stderr == runs[1].stderr == ""


def test_a_machine_that_cannot_serve_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [Finding("OK", "system", "fine"), Finding("FAIL", "serving", "no backend opens", "see above")]
    monkeypatch.setattr(doctor, "examine", lambda: broken)
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "OK    system              fine",
        "FAIL  serving             no backend opens",
        f"{'':26}fix: see above",
    ]
    assert doctor.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["serving"] is False
