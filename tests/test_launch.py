"""The launcher, with workers that need no TensorFlow."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from trainrt.distribution import launch


@pytest.fixture
def started(tmp_path):
    """Starts `trainrt launch` on a script's text."""
    processes = []

    def start(text, *options, workers=2):
        script = tmp_path / "script.py"
        script.write_text(f"import json, os, signal, sys, time\nindex = json.loads(os.environ['TF_CONFIG'])\n{text}")
        command = [sys.executable, "-m", "trainrt", "launch", "-n", str(workers), *options, str(script), "given", "-x"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def _lines(output: str, worker: int) -> list[str]:
    return [line.removeprefix(f"[{worker}] ") for line in output.splitlines() if line.startswith(f"[{worker}] ")]


def test_each_worker_gets_its_place_in_one_cluster_and_the_arguments(started):
    process = started("print(os.environ['TF_CONFIG'])\nprint(sys.argv[1:])", workers=3)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    configs = [json.loads(_lines(output, worker)[0]) for worker in range(3)]
    assert [config["task"] for config in configs] == [{"type": "worker", "index": i} for i in range(3)]
    assert all(config["cluster"] == configs[0]["cluster"] for config in configs)
    assert len(set(configs[0]["cluster"]["worker"])) == 3
    assert _lines(output, 2)[1] == "['given', '-x']"


def test_when_one_dies_the_others_are_stopped_and_its_status_is_returned(started):
    process = started("if index['task']['index']: sys.exit(7)\ntime.sleep(600)")
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 7
    assert "worker 1 ended with status 7" in errors
    assert time.monotonic() - began < launch.GRACE_S


def test_a_killed_worker_is_told_by_its_signal(started):
    process = started("if index['task']['index']: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL
    assert "killed by SIGKILL" in errors


def test_all_start_again_as_often_as_allowed(started):
    text = "again = int(os.environ['TRAINRT_RESTART'])\nprint('attempt', again)\n"
    process = started(text + "if index['task']['index'] == 0 and again < 2: sys.exit(1)", "--restarts", "2")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert _lines(output, 0) == ["attempt 0", "attempt 1", "attempt 2"]
    assert "starting all 2 again (2 of 2)" in errors


def test_restarts_end(started):
    process = started("sys.exit(3)", "--restarts", "1")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "giving up" in errors


HANDLES = """
def handle(number, frame):
    print('told', number, flush=True)
    {then}
signal.signal(signal.SIGTERM, handle)
print('ready', flush=True)
while True:
    time.sleep(0.1)
"""


def _ready(process) -> list[str]:
    return [process.stdout.readline() for _ in range(2)]


def test_a_signal_reaches_every_worker_once_and_nothing_is_started_again(started):
    process = started(HANDLES.format(then="sys.exit(0)"), "--restarts", "3")
    _ready(process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert [_lines(output, worker) for worker in (0, 1)] == [[f"told {int(signal.SIGTERM)}"]] * 2


def test_a_second_signal_kills(started):
    process = started(HANDLES.format(then="pass"))
    _ready(process)
    process.send_signal(signal.SIGTERM)
    assert "told" in process.stdout.readline()
    assert "told" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=launch.GRACE_S - 3)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel has to tell")
def test_no_worker_outlives_the_launcher(started):
    process = started("print(os.getpid(), flush=True)\ntime.sleep(600)")
    workers = [int(line.split()[1]) for line in _ready(process)]
    process.kill()
    process.wait()
    until = time.monotonic() + 20
    while any(map(_runs, workers)):
        assert time.monotonic() < until
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_script_that_is_not_there_is_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "trainrt", "launch", "-n", "2", str(tmp_path / "none.py")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "does not exist" in done.stderr
