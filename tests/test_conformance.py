"""Keras's own tests, with every `model.fit` in them routed to `trainrt.fit`.

The harness is not part of the project: `TRAINRT_CONFORMANCE` names its directory, by default `../shared/conformance`
beside the checkout.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(os.environ.get("TRAINRT_CONFORMANCE", Path(__file__).parents[2] / "shared" / "conformance"))

pytestmark = [
    pytest.mark.conformance,
    pytest.mark.skipif(
        not (HARNESS / "keras_conformance.py").exists(), reason="no harness: set TRAINRT_CONFORMANCE to its directory"
    ),
]


def _conformance(tmp_path, *options, **environment):
    out = tmp_path / "conformance.json"
    done = subprocess.run(
        [sys.executable, HARNESS / "keras_conformance.py", "--candidate", "trainrt:fit", "--json", out, *options],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "CONFORMANCE_FORBID_DELEGATION": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert out.exists(), done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(out.read_text()), done.stdout


def _failed(result) -> list[str]:
    return [name for name, test in result["tests"].items() if test["outcome"] == "failed"]


def _quick_list(tmp_path) -> Path:
    """The quick list, less what the installed Keras does not have."""
    import keras

    site = Path(keras.__file__).parents[1]
    names = [line for line in (HARNESS / "quick.txt").read_text().splitlines() if (site / line.split("::")[0]).exists()]
    path = tmp_path / "quick.txt"
    path.write_text("\n".join(names))
    return path


def test_the_quick_set_of_keras_passes(tmp_path):
    result, _ = _conformance(tmp_path, "--list", _quick_list(tmp_path))
    assert not _failed(result)
    assert result["passed"] >= 100
    assert result["delegated"] == 0


@pytest.mark.slow
def test_every_test_of_keras_passes(tmp_path):
    result, _ = _conformance(tmp_path)
    assert not _failed(result)
    assert not result["missing"]
    assert not result["under_routed"]
    assert result["passed"] == 635


@pytest.mark.slow
def test_every_call_that_can_be_replayed_agrees_with_stock(tmp_path):
    _, output = _conformance(tmp_path, "--shadow")
    shadow = [line for line in output.splitlines() if line.startswith("shadow")]
    assert shadow, output[-2000:]
    agree, _, comparable = shadow[0].split()[1].partition("/")
    assert agree == comparable, output[-4000:]
