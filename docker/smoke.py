"""The containers of compose.yaml without compose, and the quickstart page's send_job.py against them.

    python docker/smoke.py                     profile cpu
    python docker/smoke.py --profile cuda

Reads compose.yaml and runs what it says: images, commands, users, limits, volumes, health checks and their order. Only
the network is another: all containers share one network namespace without a way out, in which each service's name is
127.0.0.1, so nothing is published, and nothing on this host can be in the way. Needs PyYAML and requests.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).resolve().parent.parent
HEALTHY_SECONDS: Final = 60.0
# What the page prints, with the sum that its own processor gives.
EXPECTED: Final = "Status: 200\nResponse size: 921600 bytes\nGreen channel sum: 24576000 (input was 0)\n"
# How a key of compose.yaml is said to `run`. A key that is in neither of these two is an error: it would be left out.
OPTIONS: Final = {
    "read_only": "--read-only",
    "cap_drop": "--cap-drop",
    "security_opt": "--security-opt",
    "tmpfs": "--tmpfs",
    "pids_limit": "--pids-limit",
    "mem_limit": "--memory",
    "cpus": "--cpus",
}
ELSEWHERE: Final = {
    *("profiles", "image", "build", "command", "networks", "ports", "healthcheck", "depends_on", "volumes"),
    *("stop_grace_period", "restart", "deploy"),
}


class Failed(Exception):
    pass


class Services:
    """The services of one profile as containers, started in order."""

    def __init__(self, engine: dict[str, Any], services: dict[str, Any], stack: ExitStack) -> None:
        self._engine, self._stack = engine, stack
        self.services = services
        self.prefix = f"gpu-byoc-smoke-{uuid.uuid4().hex[:8]}"
        self.first: str | None = None  # the container whose network namespace all share
        self._hosts = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "hosts"
        self._hosts.write_text(f"127.0.0.1 localhost runner {' '.join(services)}\n", encoding="utf-8")
        self._hosts.chmod(0o644)

    def call(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*self._engine["cli"], *arguments], capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise Failed(f"{' '.join(arguments)}: {done.stderr or done.stdout}")
        return done

    def start(self, name: str) -> str:
        service = self.services[name]
        if unknown := service.keys() - OPTIONS.keys() - ELSEWHERE:
            raise Failed(f"compose.yaml: {name} says {', '.join(sorted(unknown))}, which this script does not pass on")
        options = [word for key, option in OPTIONS.items() if key in service for word in said(option, service[key])]
        for volume in service.get("volumes", []):
            source, path = volume.split(":")
            options += ["--volume", f"{self.prefix}-{source}:{path}"]
            self._stack.callback(self.call, "volume", "rm", "--force", f"{self.prefix}-{source}", check=False)
        if "deploy" in service:
            options += self._engine["gpus"]
        container = f"{self.prefix}-{name}"
        self._stack.callback(self.call, "rm", "--force", container, check=False)
        run = ["run", "--detach", "--name", container, *self._network(), *self._engine["run"], *options]
        self.call(*run, service["image"], *service["command"])
        self.first = self.first or container
        return container

    def _network(self) -> list[str]:
        network = "none" if self.first is None else f"container:{self.first}"
        return ["--network", network, "--volume", f"{self._hosts}:/etc/hosts:ro"]

    def until_healthy(self, name: str, container: str) -> float:
        """Seconds until the service's own health check passed."""
        _, *check = self.services[name]["healthcheck"]["test"]
        began = time.monotonic()
        while self.call("exec", container, *check, check=False).returncode:
            if time.monotonic() - began > HEALTHY_SECONDS or not self.running(container):
                raise Failed(f"{name} did not become healthy:\n{self.log(container)}")
            time.sleep(0.1)
        return time.monotonic() - began

    def running(self, container: str) -> bool:
        return self.call("inspect", "--format", "{{.State.Running}}", container).stdout.strip() == "true"

    def log(self, container: str) -> str:
        done = self.call("logs", container, check=False)
        return done.stdout + done.stderr

    def stop(self, container: str) -> tuple[int, float]:
        """Exit status, and the seconds that it took."""
        began = time.monotonic()
        self.call("stop", "-t", "10", container)
        took = time.monotonic() - began
        return int(self.call("inspect", "--format", "{{.State.ExitCode}}", container).stdout), took

    def client(self, image: str, script: Path) -> str:
        """What the page's script prints, run where the containers are."""
        mounts = ["--volume", f"{script}:/client/{script.name}:ro"]
        for package in ("requests", "urllib3", "idna", "certifi", "charset_normalizer"):
            found = importlib.util.find_spec(package)
            if found is None or found.origin is None:
                raise Failed(f"{script.name} needs {package}: pip install requests")
            mounts += ["--volume", f"{Path(found.origin).parent}:/client/{package}:ro"]
        run = ["run", "--rm", *self._network(), *self._engine["run"], *mounts, "--entrypoint", "python"]
        return self.call(*run, image, f"/client/{script.name}").stdout


def said(option: str, value: object) -> list[str]:
    """An option, once for each value; by itself for ``true``."""
    if value is True:
        return [option]
    return [word for each in (value if isinstance(value, list) else [value]) for word in (option, filled(str(each)))]


def filled(text: str) -> str:
    """With ``${NAME:-default}`` replaced as compose does it."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: os.environ.get(found[1]) or found[2], text)


def order(services: dict[str, Any]) -> list[str]:
    """Names, each behind those that it waits for."""
    done: list[str] = []
    while len(done) < len(services):
        ready = [
            name
            for name, service in services.items()
            if name not in done and all(need in done or need not in services for need in service.get("depends_on", {}))
        ]
        if not ready:
            raise Failed("compose.yaml: the services wait for one another")
        done += ready
    return done


def smoke(profile: str) -> None:
    found = subprocess.run(
        [sys.executable, ROOT / "docker/images.py", "engine"], capture_output=True, text=True, check=False
    )
    if found.returncode:
        raise Failed(found.stderr.strip())
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text(encoding="utf-8"))
    chosen = {
        name: service for name, service in compose["services"].items() if profile in service.get("profiles", [profile])
    }
    with ExitStack() as stack:
        services = Services(json.loads(found.stdout), chosen, stack)
        containers = {}
        for name in order(chosen):
            containers[name] = services.start(name)
            print(f"{name}: healthy after {services.until_healthy(name, containers[name]):.1f} s", flush=True)
        printed = services.client(chosen["gateway"]["image"], ROOT / "examples/send_job.py")
        print(printed, end="")
        if printed != EXPECTED:
            raise Failed(f"that is not what the page prints:\n{EXPECTED}\n{services.log(containers['gateway'])}")
        usage = services.call(
            "exec", containers["orchestrator"], "gpu-byoc", "usage", "-datadir", "/data", "-json"
        ).stdout
        if (jobs := len(json.loads(usage)["jobs"])) != 1:
            raise Failed(f"the ledger has {jobs} jobs, not 1")
        for name in reversed(containers):
            status, took = services.stop(containers[name])
            print(f"{name}: stopped with status {status} in {took:.1f} s", flush=True)
            if status:
                raise Failed(f"{name} ended with status {status}:\n{services.log(containers[name])}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="cpu", choices=("cpu", "cuda"))
    try:
        smoke(parser.parse_args().profile)
    except Failed as error:
        print(f"smoke: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
