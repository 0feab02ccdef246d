"""A virtual environment for each peer, made when it is first asked for and kept.

Only wheels are installed: what would have to be compiled counts as not available here.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(".venv-peers")
"""Under the current directory; git does not see it."""

OURS: Final = "gpu-byoc"
SERVE: Final = ("-m", "gpu_byoc", "serve", "--backend", "numpy", "--host", "127.0.0.1")

INSTALL_SECONDS: Final = 900.0  # the largest is torch with CUDA, some gigabytes
_LIST: Final = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"


class PeerUnavailable(Exception):
    """A peer cannot be had on this machine; the message is the reason, as the report shows it."""


@dataclass(frozen=True, slots=True)
class Peer:
    """``requirements`` are what pip installs, pinned. ``script`` is its server, in the folder ``peers``."""

    name: str
    requirements: tuple[str, ...]
    script: str

    def command(self, python: Path, *arguments: object) -> tuple[str, ...]:
        """What starts its server. The interpreter's own libraries come first: servers that embed Python look for
        libpython, and must find the one whose standard library they get (as pytriton's installation notes say)."""
        libraries = sysconfig.get_config_var("LIBDIR") or ""
        script = Path(__file__).resolve().parent / "peers" / self.script
        return ("/usr/bin/env", f"LD_LIBRARY_PATH={libraries}", str(python), str(script), *map(str, arguments))


PEERS: Final = {
    peer.name: peer
    for peer in (
        # Its newest release allows PyAV up to 14.4.0; 14.2.0 is the newest with wheels for every Python that we take.
        Peer("pytrickle", ("pytrickle==0.1.6", "av==14.2.0", "torch==2.13.0"), "serve_pytrickle.py"),
        Peer("pytriton", ("nvidia-pytriton==0.7.0", "numpy==1.26.4"), "serve_triton.py"),
        Peer("litserve", ("litserve==0.2.19", "numpy==2.4.6"), "serve_litserve.py"),
    )
}


def python_of(peer: Peer, root: Path = ROOT, seconds: float = INSTALL_SECONDS) -> Path:
    """The interpreter of the peer's environment, which is made now if it is not there as it should be.

    Raises:
        PeerUnavailable: it cannot be installed here; with pip's own last words.
    """
    home = (root / peer.name).absolute()
    python, stamp = home / "bin" / "python", home / f"made-{_digest(peer)}"
    if not (stamp.exists() and python.exists()):
        _run(peer, seconds, sys.executable, "-m", "venv", "--clear", str(home))
        pip = (str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet")
        _run(peer, seconds, *pip, "--only-binary", ":all:", *peer.requirements)
        stamp.touch()
    return python


def install(peer: Peer) -> tuple[Path, str]:
    """Its interpreter, and in words what was installed. Raises PeerUnavailable."""
    python = python_of(peer)
    found = versions(python)
    named = [requirement.partition("==")[0] for requirement in peer.requirements]
    told = ", ".join(f"{name} {found[name.lower()]}" for name in named)
    return python, f"{told}; Python {sys.version.split()[0]}"


def versions(python: Path) -> dict[str, str]:
    """What is installed beside an interpreter, by name in lower case."""
    asked = subprocess.run([str(python), "-c", _LIST], capture_output=True, text=True, check=True, timeout=60)
    return {name.lower(): version for name, version in json.loads(asked.stdout).items()}


def _digest(peer: Peer) -> str:
    """Another pin or another Python makes another environment."""
    made_of = "\n".join([sys.version, *peer.requirements])
    return hashlib.sha256(made_of.encode()).hexdigest()[:12]


def _run(peer: Peer, seconds: float, *command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise PeerUnavailable(f"{peer.name} could not be installed within {seconds:g} s") from None
    except OSError as error:
        raise PeerUnavailable(f"{peer.name} could not be installed: {error}") from error
    if done.returncode:
        raise PeerUnavailable(f"{peer.name} could not be installed: {_reason(done.stderr or done.stdout)}")


def _reason(said: str) -> str:
    """pip's errors, which stand among its warnings; the last line where none is marked."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.upper().startswith("ERROR")]
    return " ".join(errors[:2] or lines[-1:])[:400] or "no reason was given"
