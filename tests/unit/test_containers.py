"""The container recipes, as far as they can be read: what they copy is there, and both install the same packages."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKER, APPTAINER = (ROOT / "Dockerfile").read_text(), (ROOT / "shodh.def").read_text()
LAUNCHERS = {"openssh-client", "openssh-server", "pdsh", "openmpi-bin", "slurm-client"}


def packages(recipe: str, variables: dict[str, str]) -> list[str]:
    found = re.search(r"apt-get install -y --no-install-recommends (.*?)(?:\\|$)", recipe, re.M)
    assert found
    text = re.sub(r"\$\{(\w+)\}|\{\{ (\w+) \}\}", lambda match: variables[(match[1] or match[2]).lower()], found[1])
    return text.split()


def docker_steps() -> list[list[str]]:
    """Instructions with their arguments, continued lines joined."""
    joined = DOCKER.replace("\\\n", " ")
    return [line.split(None, 1) for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def sections() -> dict[str, list[str]]:
    """The sections of the Apptainer recipe, by name, and its header under ``""``."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in APPTAINER.splitlines():
        if line.startswith("%"):
            name = line[1:].strip()
            found[name] = []
        elif line.strip() and not line.startswith("#"):
            found[name].append(line.strip())
    return found


def test_both_recipes_install_the_launchers_and_the_same_packages() -> None:
    given = dict(re.findall(r'^ARG (\w+)="?(.*?)"?$', DOCKER, re.M))
    arguments = dict(line.split("=", 1) for line in sections()["arguments"])
    first = packages(DOCKER, {name.lower(): value for name, value in given.items()})
    assert first == packages(APPTAINER, arguments)
    assert set(first) >= LAUNCHERS


@pytest.mark.skipif(shutil.which("apt-cache") is None, reason="no apt-cache: not a Debian system")
def test_the_packages_exist() -> None:
    arguments = dict(line.split("=", 1) for line in sections()["arguments"])
    names = packages(APPTAINER, arguments)
    said = subprocess.run(["apt-cache", "policy", *names], capture_output=True, text=True, timeout=60).stdout
    if "Candidate" not in said:
        pytest.skip("apt-cache has no lists of packages here")
    assert sorted(re.findall(r"^(\S+):$", said, re.M)) == sorted(names) and "Candidate: (none)" not in said


def test_instructions_are_docker_s_and_the_files_are_there() -> None:
    steps = docker_steps()
    assert {step[0] for step in steps} <= {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "CMD"}
    assert all(len(step) == 2 for step in steps)
    order = [step[0] for step in steps]
    assert order.index("COPY") < max(i for i, step in enumerate(steps) if step == ["RUN", "make install"])
    for source, target in (line.split() for line in sections()["files"]):
        assert (ROOT / source).exists() and target == f"/shodh/{source}"
    # What `make install` and `make test` read, of the folders that git keeps.
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {path.split("/")[0] for path in tracked} - {"docs", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml"}
    copied = {line.split()[0] for line in sections()["files"]}
    hidden = {name for name in top if name.startswith(".")} | {"Dockerfile", "shodh.def"}
    assert not tracked or top - hidden == copied


@pytest.mark.parametrize("name", ["post", "environment", "runscript", "test"])
def test_scripts_of_the_recipe_are_shell(name: str) -> None:
    text = re.sub(r"\{\{ \w+ \}\}", "value", "\n".join(sections()[name]))
    assert text and subprocess.run(["sh", "-n"], input=text, text=True, capture_output=True).returncode == 0


def test_commands_of_the_docker_image_are_shell() -> None:
    for kind, text in docker_steps():
        if kind == "RUN":
            assert subprocess.run(["sh", "-n"], input=text, text=True, capture_output=True).returncode == 0
