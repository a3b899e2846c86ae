"""What is installed from a wheel and from a source archive: complete, and it trains."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """{"wheel": path, "sdist": path}, built as pip builds them."""
    out = tmp_path_factory.mktemp("dist")
    code = "import sys, hatchling.build as b; print(b.build_sdist(sys.argv[1])); print(b.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-m", "venv", str(out / "venv")], check=True)
    python = str(out / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "hatchling>=1.26,<2"], check=True)
    done = subprocess.run([python, "-c", code, str(out)], cwd=ROOT, capture_output=True, text=True, check=True)
    sdist, wheel = done.stdout.split()
    return {"wheel": out / wheel, "sdist": out / sdist}


def names(path):
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist())
    with tarfile.open(path) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def shipped():
    """Every file of the package that is under version control, as it lies in a wheel."""
    listed = subprocess.run(
        ["git", "ls-files", "trainrt", "kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    return {re.sub(r"^kernels/", "trainrt/_kernels/", name) for name in listed}


@pytest.mark.slow
def test_a_wheel_holds_every_file_of_the_package(built):
    held = names(built["wheel"])
    assert shipped() <= held
    assert {"trainrt/py.typed", "trainrt/plugin/static/index.js", "trainrt/data/digits.npz"} <= held
    assert not [name for name in held if "__pycache__" in name or name.startswith(("tests/", "benchmarks/"))]


@pytest.mark.slow
def test_a_source_archive_holds_what_a_wheel_and_the_tests_need(built):
    held = names(built["sdist"])
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = {
        n for n in listed if n.startswith(("trainrt/", "kernels/", "tests/", "benchmarks/", "examples/", "docs/"))
    }
    assert wanted | {"README.md", "LICENSE", "Dockerfile", "pyproject.toml"} <= held


@pytest.mark.slow
def test_metadata_names_licence_commands_and_plugin(built):
    with zipfile.ZipFile(built["wheel"]) as archive:
        (folder,) = {n.partition("/")[0] for n in archive.namelist() if ".dist-info/" in n}
        metadata = archive.read(f"{folder}/METADATA").decode()
        points = archive.read(f"{folder}/entry_points.txt").decode()
        files = archive.namelist()
    assert "License-Expression: Apache-2.0" in metadata
    assert f"{folder}/licenses/LICENSE" in files
    assert "trainrt = trainrt.cli:main" in points
    assert "[tensorboard_plugins]" in points


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_installed_trains_and_finds_its_kernels(built, kind, tmp_path):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(built[kind])]
    subprocess.run(install, check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    code = (
        "import keras, trainrt, trainrt.update.native as n; (x, y), _ = trainrt.digits.load(); "
        "m = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(10)]); "
        "m.compile('adam', keras.losses.SparseCategoricalCrossentropy(from_logits=True)); "
        "h = trainrt.fit(m, x[:64], y[:64], verbose=0); print(trainrt.__file__); print(n.sources()); print(len(h.run))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    where, kernels, steps = done.stdout.split()
    assert str(tmp_path) in where
    assert kernels == str(Path(where).parent / "_kernels")
    assert int(steps) == 2
