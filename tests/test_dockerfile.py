"""The image's recipe, checked without an engine: linted, and its own steps run in a new virtual environment."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INSTRUCTIONS = {"ARG", "FROM", "RUN", "COPY", "ENV", "USER", "WORKDIR", "EXPOSE", "CMD"}
"""What the recipe may use: ADD fetches and unpacks unasked, and a HEALTHCHECK is for servers."""


def instructions():
    """[(word, rest)], continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(" ", 1)) for line in joined.splitlines()]


def of(word):
    return [rest for each, rest in instructions() if each == word]


def defaults():
    """name -> default of every ARG."""
    return {name: value.strip('"') for name, _, value in (rest.partition("=") for rest in of("ARG"))}


def test_only_known_instructions_are_used():
    assert {word for word, _ in instructions()} <= INSTRUCTIONS


def test_the_base_is_named_by_tag_and_can_be_replaced():
    for rest in of("FROM"):
        assert rest.split()[0] == "${BASE}"
    base = defaults()["BASE"]
    assert ":" in base
    assert not base.endswith(":latest")


def test_packages_of_the_system_are_few_and_leave_no_lists():
    for line in of("RUN"):
        if "apt-get" in line:
            assert "--no-install-recommends" in line
            assert "rm -rf /var/lib/apt/lists/*" in line
            assert line.index("apt-get update") < line.index("apt-get install -y") or "install -y" in line
        if "pip install" in line:
            assert "--no-cache-dir" in line
        assert "sudo" not in line
        assert "curl" not in line


def test_it_runs_as_a_user_who_is_not_root():
    words = [word for word, _ in instructions()]
    assert of("USER") == ["trainrt"]
    assert words.index("USER") > len(words) - 1 - words[::-1].index("RUN")
    assert words.index("USER") < words.index("CMD")


def test_without_a_command_the_doctor_comes():
    (command,) = of("CMD")
    assert json.loads(command) == ["trainrt", "doctor"]


def test_tensorboards_port_is_told():
    assert of("EXPOSE") == ["6006"]


def test_what_is_copied_is_there_and_not_ignored():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for rest in of("COPY"):
        if rest.startswith("--from"):
            continue
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored
    assert ignored[0] == "*"


def test_kernels_are_built_where_the_image_looks_for_them():
    (environment,) = of("ENV")
    kernels = re.search(r"TRAINRT_KERNELS=(\S+)", environment)[1]
    assert any(f"--directory {kernels}" in line for line in of("RUN"))
    assert any(line.startswith(f"--from=build {Path(kernels).parent}") for line in of("COPY"))


@pytest.mark.slow
def test_its_steps_make_an_installation_that_trains(tmp_path):
    places = {"/opt/trainrt": tmp_path / "opt", "/src": tmp_path / "src"}
    for rest in of("COPY"):
        if not rest.startswith("--from"):
            *sources, _ = rest.split()
            for source in sources:
                places["/src"].mkdir(exist_ok=True)
                subprocess.run(["cp", "-r", str(ROOT / source), str(places["/src"])], check=True)
    arguments = {**defaults(), "EXTRA": "", "TARGETS": defaults()["TARGETS"].split()[-1]}  # one is built as the other
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {**arguments, "HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    ran = 0
    for line in of("RUN"):
        if "apt-get" in line:
            continue  # needs root; what it installs is here
        for place, here in places.items():
            line = line.replace(place, shlex.quote(str(here)))
        subprocess.run(["sh", "-euc", line], check=True, env=environment, cwd=tmp_path)
        ran += 1
    assert ran == 3
    command = json.loads(of("CMD")[0])
    environment["TRAINRT_KERNELS"] = str(places["/opt/trainrt"] / "kernels")
    environment["TRAINRT_CACHE"] = str(tmp_path / "empty")
    environment["CXX"] = "/nonexistent"
    there = places["/opt/trainrt"] / "venv" / "bin" / command[0]
    done = subprocess.run(
        [str(there), *command[1:], "--json"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["training"]["status"] == "ok"
    assert str(places["/opt/trainrt"] / "kernels") in checks["kernels"]["says"]
    assert "TensorBoard" in checks
    assert checks["TensorBoard"]["status"] == "ok"
