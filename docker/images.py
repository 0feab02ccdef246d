"""Builds and weighs the images with whatever is here: docker with a running engine, or podman.

    python docker/images.py engine                 how containers are run here, as JSON
    python docker/images.py base                   the base image, pulled or made if it is not here
    python docker/images.py build cpu cupy         builds targets: cpu, cupy, torch, full
    python docker/images.py sizes cpu              MB of an image, of its base, and of what it adds

Needs the standard library alone. Exit status 3: nothing here can build images, or the base image cannot be had; the
last line says why.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

ROOT: Final = Path(__file__).resolve().parent.parent
BASE: Final = "docker.io/library/python:3.11-slim-bookworm"
STANDIN: Final = "localhost/gpu-byoc-standin:bookworm"
IMAGES: Final = {
    "cpu": "gpu-byoc:cpu",
    "cupy": "gpu-byoc:cuda-cupy",
    "torch": "gpu-byoc:cuda-torch",
    "full": "gpu-byoc:cuda",
}
CANNOT: Final = 3


class Cannot(Exception):
    """Images cannot be built here; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Engine:
    """``cli`` and a subcommand make a command line; ``build`` and ``run`` are options that these two need on this host,
    ``gpus`` those for all GPUs."""

    name: str
    cli: tuple[str, ...]
    build: tuple[str, ...] = ()
    run: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ("--gpus", "all")


def find_engine() -> Engine:
    """An engine that answers, not only a client on the PATH. Raises Cannot."""
    reasons = []
    for name, question in (("docker", ("version",)), ("podman", ("info",))):
        if shutil.which(name) is None:
            reasons.append(f"no {name} on the PATH")
            continue
        asked = subprocess.run([name, *question], capture_output=True, text=True, timeout=60, check=False)
        if asked.returncode == 0:
            return Engine("docker", ("docker",)) if name == "docker" else _podman()
        reasons.append(f"{name} does not work ({(asked.stderr.strip() or 'no reason given').splitlines()[-1]})")
    raise Cannot(f"{'; '.join(reasons)}: install podman, or start the docker engine")


def _podman() -> Engine:
    """podman asks for higher limits than a host may grant, and for timers of systemd, which not every host has."""
    limits = []
    for name, which, enough in (("nofile", resource.RLIMIT_NOFILE, 16384), ("nproc", resource.RLIMIT_NPROC, 4096)):
        _, hard = resource.getrlimit(which)
        most = enough if hard == resource.RLIM_INFINITY else min(hard, enough)
        limits += ["--ulimit", f"{name}={most}:{most}"]
    health = [] if Path("/run/systemd/system").exists() else ["--no-healthcheck"]
    return Engine(
        "podman",
        ("podman",),
        build=("--isolation", "chroot", "--format", "docker", "--layers"),
        run=(*limits, *health),
        gpus=("--device", "nvidia.com/gpu=all"),
    )


def _do(engine: Engine, *arguments: str, quiet: bool = False) -> bool:
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run([*engine.cli, *arguments], stdout=output, stderr=output, check=False).returncode == 0


def find_base(engine: Engine, base: str, standin: bool) -> str:
    """The base image, pulled if it is not here; with ``standin`` one of Debian's packages where no registry answers.

    Raises Cannot.
    """
    if _do(engine, "image", "inspect", base, quiet=True) or _do(engine, "pull", "--quiet", base, quiet=True):
        return base
    if not standin:
        raise Cannot(f"no registry gave {base}: give another with --base, or make a stand-in with --standin")
    if _do(engine, "image", "inspect", STANDIN, quiet=True):
        return STANDIN
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        raise Cannot(f"no registry gave {base}, and a stand-in needs root and debootstrap")
    print(f"no registry gave {base}: making a stand-in of Debian's packages, which is not that image", flush=True)
    made = subprocess.run([ROOT / "docker/standin.sh", " ".join(engine.cli), STANDIN], check=False)
    if made.returncode:
        raise Cannot("the stand-in could not be made; see above")
    return STANDIN


def _git(*arguments: str) -> str:
    try:
        asked = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else ""


def source_url(remote: str) -> str:
    """Where anyone can look up what a git remote holds, without user, password or query; "" for a remote that is no
    http, https or ssh address of a public name: a path, a bundle, a host's short name."""
    if "://" not in remote:  # ssh's short form, user@host:path
        host, _, path = remote.partition(":")
        remote = f"ssh://{host}/{path.lstrip('/')}" if path and "/" not in host else ""
    try:
        parts = urlsplit(remote)
    except ValueError:  # half an IPv6 address
        return ""
    path = parts.path.rstrip("/").removesuffix(".git")
    if parts.scheme not in ("http", "https", "ssh") or not path or not _public(parts.hostname or ""):
        return ""
    if parts.scheme == "ssh":  # whose port says nothing about the web's
        return f"https://{parts.hostname}{path}"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}"


def _public(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return "." in host


def labels() -> dict[str, str]:
    """What the image is told about this checkout; what is not known is left out, because each label has a form (a URL,
    a date) that no placeholder has. The commit's date, so that a build can be repeated."""
    version = (ROOT / "gpu_byoc/_version.py").read_text(encoding="utf-8").split('VERSION = "')[1].split('"')[0]
    changed = "-changed" if _git("status", "--porcelain") else ""
    revision = _git("rev-parse", "HEAD")
    named = {
        "version": version,
        "revision": revision + changed if revision else "",
        "created": _git("show", "-s", "--format=%cI"),
        "source": source_url(_git("remote", "get-url", "origin")),
    }
    return {f"org.opencontainers.image.{name}": value for name, value in named.items() if value}


def pip_secrets(folder: Path) -> list[str]:
    """This host's package index and certificate, handed to the build without leaving a trace in it."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    said = {}
    for line in listed.splitlines():
        key, equals, value = line.partition("=")
        if equals:
            said[key.rpartition(".")[2]] = value.strip("'\"")
    lines, secrets = ["[global]"], []
    if (cert := said.get("cert")) and Path(cert).is_file():
        lines.append("cert = /run/secrets/ca_bundle")
        secrets += ["--secret", f"id=ca_bundle,src={cert}"]
    lines += [
        f"{key} = {said[key]}"
        for key in ("index-url", "extra-index-url", "trusted-host")
        if key in said and "file:" not in said[key]
    ]
    if len(lines) == 1:
        return []
    file = folder / "pip.conf"
    file.touch(mode=0o600)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [*secrets, "--secret", f"id=pip_conf,src={file}"]


def build(engine: Engine, targets: list[str], base: str) -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        arguments = [*engine.build, *pip_secrets(folder), "--build-arg", f"BASE={base}"]
        for name, value in labels().items():
            arguments += ["--label", f"{name}={value}"]
        for target in targets:
            file = ["-f", "docker/Dockerfile.cpu"]
            if target != "cpu":
                file = ["-f", "docker/Dockerfile.cuda", "--target", target]
            command = [*engine.cli, "build", *arguments, *file, "-t", IMAGES[target], "."]
            print(f"building {IMAGES[target]}", flush=True)
            subprocess.run(command, cwd=ROOT, check=True)


def sizes(engine: Engine, image: str) -> dict[str, float | str]:
    """Megabytes (10^6 bytes) of the image, of its base, which it names in a label, and of what it adds to that."""
    asked = [*engine.cli, "image", "inspect", "--format", "{{.Size}}"]
    read = subprocess.run([*asked, image], capture_output=True, text=True, check=True).stdout
    label = '{{index .Config.Labels "org.opencontainers.image.base.name"}}'
    name = [*engine.cli, "image", "inspect", "--format", label, image]
    base = subprocess.run(name, capture_output=True, text=True, check=True).stdout.strip()
    under = subprocess.run([*asked, base], capture_output=True, text=True, check=True).stdout
    whole, below = int(read) / 1e6, int(under) / 1e6
    return {"image": image, "base": base, "mb": whole, "base_mb": below, "added_mb": whole - below}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("engine", "base", "build", "sizes"))
    parser.add_argument("targets", nargs="*", choices=(*IMAGES, []), help="cpu, cupy, torch, full")
    parser.add_argument("--base", default=BASE, help="base image, best with its digest (default: %(default)s)")
    parser.add_argument(
        "--standin", action="store_true", help="where no registry answers, make a base of Debian's packages"
    )
    given = parser.parse_args()
    try:
        engine = find_engine()
        if given.command in ("base", "build"):
            base = find_base(engine, given.base, given.standin)
        if given.command == "build":
            build(engine, given.targets or ["cpu"], base)
    except Cannot as error:
        print(error, file=sys.stderr)
        return CANNOT
    except subprocess.CalledProcessError as error:
        print(f"the build failed with status {error.returncode}; see above", file=sys.stderr)
        return 1
    if given.command == "engine":
        print(json.dumps(asdict(engine)))
    elif given.command == "base":
        print(base)
    else:
        for target in given.targets or ["cpu"]:
            print(json.dumps(sizes(engine, IMAGES[target])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
