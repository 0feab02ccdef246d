"""Real containers for tests: started with what this host's engine needs, watched by their log, always removed."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.processes import WAIT

ROOT = Path(__file__).resolve().parents[2]

HARDENED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")


class Container:
    """A container whose log lines arrive as they are written."""

    def __init__(self, engine: Engine, name: str, popen: subprocess.Popen[str]) -> None:
        self.engine, self.name, self.popen = engine, name, popen
        self.log: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.log.append(line.rstrip("\n"))
            self._lines.put(line)
        self._lines.put(None)

    def wait_for(self, text: str) -> str:
        """The first line with ``text`` from here on; an early end or 30 seconds without a line is a failure."""
        while True:
            line = self._lines.get(timeout=WAIT)
            assert line is not None, f"ended before it said {text!r}:\n" + "\n".join(self.log)
            if text in line:
                return line.rstrip("\n")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command inside."""
        return self.engine.call("exec", self.name, *command)

    def ask(self, what: str) -> str:
        """A field of ``inspect``."""
        return self.engine.say("inspect", "--format", "{{" + what + "}}", self.name)

    def stop(self, seconds: int = 10) -> tuple[int, float]:
        """Exit status after ``stop``, which kills after ``seconds``, and how many seconds it took."""
        began = time.monotonic()
        self.engine.say("stop", "-t", str(seconds), self.name)
        took = time.monotonic() - began
        return int(self.ask(".State.ExitCode")), took

    def wait(self) -> int:
        """The exit status of one that ends by itself."""
        code = self.popen.wait(WAIT)
        self.reader.join(WAIT)
        return code


@dataclass(frozen=True)
class Engine:
    """What ``docker/images.py engine`` found."""

    name: str
    cli: list[str]
    build: list[str]
    run_options: list[str]
    gpus: list[str]

    def call(self, *arguments: str, seconds: float = 50) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self.cli, *arguments], capture_output=True, text=True, timeout=seconds, check=False)

    def say(self, *arguments: str) -> str:
        """What a command that has to succeed prints."""
        done = self.call(*arguments)
        assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def run(self, image: str, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """A container that ends by itself, without a network."""
        return self.call("run", "--rm", "--network", "none", *self.run_options, *options, image, *command)

    @contextlib.contextmanager
    def start(self, image: str, *command: str, options: tuple[str, ...] = ()) -> Iterator[Container]:
        """A container on this host's network; its commands bind 127.0.0.1."""
        name = f"gpu-byoc-test-{uuid.uuid4().hex[:12]}"
        argv = [*self.cli, "run", "--name", name, "--network", "host", *self.run_options, *options, image, *command]
        popen = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        container = Container(self, name, popen)
        try:
            yield container
        finally:
            self.call("rm", "--force", name)
            popen.wait(WAIT)
            container.reader.join(WAIT)
            assert popen.stdout is not None
            popen.stdout.close()

    def config(self, image: str) -> dict[str, Any]:
        """What the image says about how it is run: Entrypoint, Cmd, Env, User, Labels ..."""
        (said,) = json.loads(self.say("image", "inspect", image))
        return {"Healthcheck": said.get("Healthcheck"), **said["Config"]}  # podman says that one a level higher


def find_engine() -> Engine:
    """Raises AssertionError with the reason where nothing can run containers."""
    asked = subprocess.run(
        [sys.executable, ROOT / "docker/images.py", "engine"], capture_output=True, text=True, timeout=50, check=False
    )
    assert asked.returncode == 0, asked.stderr
    said = json.loads(asked.stdout)
    return Engine(said["name"], said["cli"], said["build"], said["run"], said["gpus"])
