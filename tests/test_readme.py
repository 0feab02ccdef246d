"""The README is true: its code and commands run, and print what it says they print.

A comment before a fenced block says how it is run. The blocks of one ``##`` section share a folder and their servers:

``<!-- test: file NAME -->``         is saved as NAME
``<!-- test: server "LINE" -->``     is started; the next block waits until it has logged LINE
``<!-- test: server listening N -->``  is started; the next block waits until port N takes connections
``<!-- test: run -->``               has to end with status 0
``<!-- test: prints -->``            is what the block before it printed

Each section runs on free ports instead of the ones it names, on the loopback interface, and with a home of its own.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
SCRIPTS = Path(sys.executable).parent

PORTS = ("8000", "8935", "8936", "7936", "5935")
START_SECONDS = 60.0
STOP_SECONDS = 15.0

BLOCK = re.compile(r"(?:^<!-- test: (?P<how>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    how: str
    language: str
    body: str


def blocks(text: str) -> list[Block]:
    return [Block(found["how"] or "", found["language"], found["body"]) for found in BLOCK.finditer(text)]


def sections() -> dict[str, list[Block]]:
    """Title to blocks, of every section that has one to run."""
    parts = re.split(r"^## (.+)$", README, flags=re.M)[1:]
    found = {title: blocks(text) for title, text in zip(parts[::2], parts[1::2], strict=True)}
    return {title: those for title, those in found.items() if any(block.how for block in those)}


def code() -> Iterator[tuple[Path, str]]:
    """Every command line that a page shows, in a fence or between backticks, continued lines joined."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fenced = [block.body for block in blocks(text) if block.language == "bash"]
        spans = re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
        for line in "\n".join([*fenced, *spans]).replace("\\\n", " ").splitlines():
            yield page, line.strip()


class Server:
    """A command that runs until it is stopped, and what it printed."""

    def __init__(self, command: str, folder: Path, environment: dict[str, str], line: str) -> None:
        self.process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.printed = ""
        self._line = line
        self._seen = threading.Event()  # the line, or the end
        self._reader = threading.Thread(target=self._read)

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed += line
            if self._line and self._line in line:
                self._seen.set()
        self._seen.set()

    def wait(self, port: str) -> None:
        """Until the line was printed, or the port takes connections."""
        if not port:
            assert self._seen.wait(START_SECONDS), f"no {self._line!r} in {START_SECONDS} s:\n{self.printed}"
            assert self._line in self.printed, f"ended without {self._line!r}:\n{self.printed}"
            return
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", int(port)), timeout=1).close()
                return
            except OSError:
                assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.printed}"
                assert time.monotonic() < until, f"port {port} is still closed:\n{self.printed}"
                time.sleep(0.02)  # a port cannot be waited for

    def __exit__(self, *_: object) -> None:
        """Ctrl-C, as a reader would end it; what it leaves behind is killed and reported."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        try:
            self.process.wait(STOP_SECONDS)
            stuck = False
        except subprocess.TimeoutExpired:
            stuck = True
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        assert not stuck, f"did not end {STOP_SECONDS} s after Ctrl-C:\n{self.printed}"
        assert "Traceback" not in self.printed, self.printed


class Reader:
    """Somebody who follows one section of the README, block by block."""

    def __init__(self, folder: Path, servers: ExitStack) -> None:
        self.folder = folder
        self.servers = servers
        self.output = ""
        self.instead = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("GPU_BYOC")} | {
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder),
            "GPU_BYOC_HOST": "127.0.0.1",
            "PYTHONUNBUFFERED": "1",
        }
        (folder / "examples").mkdir()
        for path in (ROOT / "examples").glob("*.py"):
            (folder / "examples" / path.name).write_text(self.here(path.read_text(encoding="utf-8")), encoding="utf-8")

    def here(self, text: str) -> str:
        """The same on this section's ports, and not open to other machines."""
        moved = re.sub(rf"(?<!\d)({'|'.join(PORTS)})(?!\d)", lambda found: self.instead[found[0]], text)
        moved = re.sub(r"(run_processor\(.*port=\d+)\)", r'\1, host="127.0.0.1")', moved)
        return moved.replace("0.0.0.0", "127.0.0.1")

    def follow(self, block: Block) -> None:
        how, *rest = shlex.split(self.here(block.how))
        body = self.here(block.body)
        if how == "file":
            (self.folder / rest[0]).write_text(body, encoding="utf-8")
        elif how == "server":
            port = rest[1] if rest[0] == "listening" else ""
            server = Server(body, self.folder, self.environment, "" if port else rest[0])
            self.servers.enter_context(server).wait(port)
        elif how == "run":
            self.output = self.run(body)
        elif how == "prints":
            assert self.output.rstrip("\n") == body.rstrip("\n")
        else:
            pytest.fail(f"README.md has a block with an unknown comment: test: {block.how}")

    def run(self, commands: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, f"{commands}\n{done.stdout}{done.stderr}"
        assert done.stdout, f"printed nothing:\n{commands}"
        return done.stdout


def free_ports(count: int) -> list[str]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [str(each.getsockname()[1]) for each in sockets]


@pytest.mark.parametrize("title", sections())
def test_the_section_runs(title: str, tmp_path: Path) -> None:
    story = sections()[title]
    if any("curl " in block.body for block in story) and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    with ExitStack() as servers:
        reader = Reader(tmp_path, servers)
        for block in story:
            if block.how:
                reader.follow(block)


def test_no_block_is_left_out() -> None:
    """What is not run is a list of make targets, or output that a block that is run prints."""
    printed = [block.body for block in blocks(README) if block.how == "prints"]
    for block in blocks(README):
        if block.how:
            continue
        if block.language == "bash":
            assert all(line.startswith("make ") for line in block.body.splitlines()), block.body
        else:
            assert block.language == "text", block.body
            assert block.body in printed, f"nothing that the README runs prints this:\n{block.body}"


def test_every_make_target_exists() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    wanted = {
        (page.name, word)
        for page, line in code()
        if line.startswith("make ")
        for word in line.partition("#")[0].split()[1:]
        if re.fullmatch("[a-z]+", word)
    }
    assert wanted
    assert {(page, word) for page, word in wanted if word not in targets} == set()


def test_every_flag_exists() -> None:
    shown: dict[str, set[str]] = {}
    for _, line in code():
        for command, arguments in re.findall(r"gpu-byoc ([a-z]+)((?: +[^ |]+)*)", line.partition("#")[0]):
            flags = {word for word in arguments.split() if re.fullmatch(r"--?[a-zA-Z][\w-]*", word)}
            shown.setdefault(command, set()).update(flags)
    assert {"run", "serve", "livepeer", "usage", "job"} <= set(shown)
    for command, flags in shown.items():
        helped = subprocess.run(
            [SCRIPTS / "gpu-byoc", command, "--help"], capture_output=True, text=True, timeout=30, check=False
        )
        assert helped.returncode == 0, helped.stderr
        known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", helped.stdout))
        known |= {flag.lower() for flag in known}  # the page's -datadir is the older spelling of -dataDir
        assert flags - {"--help"} <= known, f"gpu-byoc {command} --help does not list {flags - known}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text(encoding="utf-8")), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        place, _, anchor = target.partition("#")
        linked = (page.parent / place).resolve() if place else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}"
