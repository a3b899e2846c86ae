"""What the doctor says of this machine, and what a script learns from its exit status."""

import json
import subprocess
import sys

import keras
import pytest

from trainrt import doctor
from trainrt.doctor import BROKEN, MISSING, STATUSES, WELL, Check
from trainrt.update import fused, native


@pytest.fixture(scope="module")
def checks():
    return {check.name: check for check in doctor.examine()}


def test_every_check_comes_to_an_end_under_its_own_name(checks):
    assert list(checks) == list(doctor._CHECKS)
    assert {check.status for check in checks.values()} <= set(STATUSES)
    assert all(check.says for check in checks.values())


def test_this_machine_trains(checks):
    assert checks["training"].status == WELL
    assert checks["TensorFlow"].status == WELL
    assert f"Keras {keras.__version__}" in checks["TensorFlow"].says


def test_what_is_missing_names_a_remedy(checks):
    for check in checks.values():
        assert bool(check.remedy) == (check.status != WELL), check


def test_every_fused_optimizer_is_told_to_be_fused(checks):
    if native.load() is None:
        pytest.skip("there are no kernels here")
    (line,) = [line for line in checks["updates"].says.splitlines() if line.startswith("one fused pass")]
    assert set(line.partition(": ")[2].split(", ")) == {kind.__name__ for kind in fused.RULES}


def test_every_optimizer_of_keras_is_told_of(checks):
    told = checks["updates"].says.replace("\n", ", ")
    assert all(kind.__name__ in told for kind in doctor._optimizers())
    assert keras.optimizers.Muon in doctor._optimizers() or not hasattr(keras.optimizers, "Muon")


def test_a_check_that_raises_is_broken_and_the_others_go_on(monkeypatch):
    def fails():
        raise OSError("no such thing")

    monkeypatch.setitem(doctor._CHECKS, "XLA", fails)
    monkeypatch.setitem(doctor._CHECKS, "training", lambda: Check("training", WELL, "it does"))
    found = {check.name: check for check in doctor.examine()}
    assert found["XLA"].status == BROKEN
    assert "OSError: no such thing" in found["XLA"].says
    assert found["training"].status == WELL


@pytest.mark.parametrize("worst", STATUSES)
def test_the_exit_status_is_that_of_the_worst_check(worst):
    checks = [Check("a", WELL, ""), Check("b", worst, ""), Check("c", WELL, "")]
    assert doctor.status(checks) == STATUSES[worst]


def test_what_is_required_and_missing_breaks(monkeypatch):
    monkeypatch.setattr(doctor, "_CHECKS", {"GPU": lambda: Check("GPU", WELL, "none, so the CPU trains")})
    assert doctor.status(doctor.examine()) == 0
    assert doctor.status(doctor.examine(["gpu"])) == STATUSES[BROKEN]
    monkeypatch.setattr(doctor, "_CHECKS", {"GPU": lambda: Check("GPU", WELL, "TensorFlow sees 1: H100")})
    assert doctor.status(doctor.examine(["gpu"])) == 0


def test_without_kernels_the_remedy_is_to_build_them(monkeypatch):
    monkeypatch.setenv("TRAINRT_NATIVE", "0")
    check = doctor._kernels()
    assert (check.status, check.remedy) == (MISSING, "trainrt kernels build")


def test_the_command_prints_json_for_scripts(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "trainrt", "doctor", "--json"], capture_output=True, text=True, timeout=120
    )
    told = json.loads(done.stdout)
    assert told["status"] == done.returncode
    assert {check["name"] for check in told["checks"]} == set(doctor._CHECKS)
