"""Every example runs, and ends with what it is there to show."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SHOWS = {
    "stagnating": r"no clip moves the loss[\s\S]*cured: accuracy 0\.9\d, 0 findings",
    "compare_runs": r"order of the rows\n$",
    "custom_train_step": r"loss \S+ -> \S+, 225 steps observed\n(.* moved by .*\n){4}$",
    "gan": r"92 steps of both networks, 8 weights\ngenerator .*\ncritic .*\n$",
    "mixed_precision": r"is float32: 0% of its steps[\s\S]*is bfloat16: [1-9]\d?% of its steps",
    "learning_rate": r"Suggested learning rate: 0\.0\d+[\s\S]*with it: loss",
    "multi_worker": r"worker 0: (loss .*)\nworker 1: \1\n$",
}
"""Script -> a pattern of what it prints."""

QUICK = ("custom_train_step",)


def test_every_script_is_run_here_and_told_of():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == set(SHOWS)
    told = (EXAMPLES / "README.md").read_text()
    assert all(f"`{path.name}`" in told for path in EXAMPLES.iterdir() if path.name != "README.md")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SHOWS]
)
def test_an_example_shows_what_it_is_there_for(name, tmp_path):
    done = _run([str(EXAMPLES / f"{name}.py")], tmp_path)
    assert re.search(SHOWS[name], done), done


def _run(arguments, directory):
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=directory, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def notebook():
    return json.loads((EXAMPLES / "notebook.ipynb").read_text())


def test_the_notebook_is_one_of_format_4_without_outputs():
    held = notebook()
    assert (held["nbformat"], held["nbformat_minor"]) == (4, 5)
    assert {"cells", "metadata", "nbformat", "nbformat_minor"} == set(held)
    assert len({cell["id"] for cell in held["cells"]}) == len(held["cells"])
    for cell in held["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert isinstance(cell["metadata"], dict)
        needed = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert set(cell) == needed | {"outputs", "execution_count"}
            assert cell["outputs"] == []
            compile(cell["source"], cell["id"], "exec")
        else:
            assert (cell["cell_type"], set(cell)) == ("markdown", needed)


@pytest.mark.slow
def test_the_notebook_runs_from_the_first_cell_to_the_last(tmp_path):
    cells = [cell["source"] for cell in notebook()["cells"] if cell["cell_type"] == "code"]
    (tmp_path / "cells.py").write_text("\n".join(cells))
    done = _run(["cells.py"], tmp_path)
    assert "clip_too_tight" in done
    assert "no clip moves the loss" in done
