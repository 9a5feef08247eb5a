"""The files of deploy/: what they promise is in them, and the commands they name exist. Docker itself is not needed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from compllm_rag import __version__
from compllm_rag.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
COMPOSE = ROOT / "deploy" / "compose.yaml"


def instructions() -> list[tuple[str, str]]:
    """Word and rest of each instruction of the Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "deploy" / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
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
    declared = yaml.safe_load(COMPOSE.read_text())["volumes"]
    assert {volume.split(":")[0] for one in made.values() for volume in one["volumes"]} == {*declared}
    owned = next(run for run in values("RUN") if "install -d" in run)
    for volume in made["server"]["volumes"]:
        assert f" {volume.split(':')[1]}" in owned  # a new volume takes its owner from the image


def test_the_commands_that_containers_run() -> None:
    page = (ROOT / "docs/guide/deploy.md").read_text()
    told = re.findall(r"run --rm server (.+)$", page + COMPOSE.read_text(), re.M)
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


@pytest.mark.skipif(
    shutil.which("docker") is None or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode,
    reason="needs docker with its compose plugin",
)
def test_compose_reads_its_file() -> None:
    done = subprocess.run(["docker", "compose", "-f", COMPOSE, "config", "-q"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
