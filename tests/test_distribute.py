"""Several replicas train as one device with the whole batch does. Each strategy has processes of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import replicas_script as script

from trainrt import Run
from trainrt.distribution import launch
from trainrt.endurance.checkpoint import Store

SCRIPT = Path(script.__file__)
EQUAL = 1e-5
"""Most that a weight may differ from the one-device twin: sums in another order, 30 steps long."""


def _run(devices: int, *cases: str) -> dict[str, dict]:
    """Case -> what it printed, all in one process."""
    command = [sys.executable, str(SCRIPT), str(devices), *cases]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TF_CONFIG", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return _answers(done.stdout)


def _workers(count: int, *cases: str, restarts: int = 0) -> list[dict[str, dict]]:
    """For each of so many workers: case -> what it printed."""
    options = ["-n", str(count), "--restarts", str(restarts)]
    command = [sys.executable, "-m", "trainrt", "launch", *options, str(SCRIPT), "1", *cases]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [_answers(done.stdout, f"[{worker}] ") for worker in range(count)]


def _answers(output: str, prefix: str = "") -> dict[str, dict]:
    lines = [line.removeprefix(prefix) for line in output.splitlines() if line.startswith(prefix + '{"case"')]
    return {answer["case"]: answer for answer in map(json.loads, lines)}


QUICK = ("equal:accumulating:0.3", "custom")
UNEVEN = ("uneven:247", "uneven:241", "uneven_own_step:247")
"""Samples in batches of 24: the last one has 7, or 1."""
GUARDED = ("guarded:skip:skip", "guarded:stop:None", "spiked", "spiked:own")
EVERY = tuple(
    f"equal:{optimizer}:{clip}"
    for optimizer in script.OPTIMIZERS
    for clip in (0, 0.3)
    if not (clip and optimizer == "own_clip")
)


@pytest.fixture(scope="module")
def alone():
    return _run(1, *QUICK, UNEVEN[1])


@pytest.fixture(scope="module")
def uneven():
    return _run(1, *UNEVEN)


@pytest.fixture(scope="module")
def two():
    return _run(2, *QUICK, UNEVEN[1], "masks", "drift", "listening", GUARDED[1])


def _same_training(ours: dict, theirs: dict) -> None:
    np.testing.assert_allclose(ours["weights"], theirs["weights"], atol=EQUAL, rtol=0)
    np.testing.assert_allclose(ours["gradient_norm"], theirs["gradient_norm"], rtol=1e-4)
    for name in ("clipped_gradient_norm", "loss"):
        if name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4)
    for name, values in theirs.get("history", {}).items():
        np.testing.assert_allclose(ours["history"][name], values, rtol=1e-4)


def _same_batches(ours: dict, theirs: dict) -> None:
    """What callbacks were told after each batch."""
    assert len(ours["logs"]) == len(theirs["logs"]) == 33
    for mine, its in zip(ours["logs"], theirs["logs"], strict=True):
        assert mine.keys() == its.keys()
        np.testing.assert_allclose(list(mine.values()), list(its.values()), rtol=1e-4)


def _taken_back(case: dict, epochs: int = 2) -> None:
    """The bad batches left no trace on any replica."""
    bad, healthy = case["bad"], case["healthy"]
    assert bad["weights"] == healthy["weights"]
    assert bad["history"] == healthy["history"]
    assert bad["replicas"]["drift"] is None
    told = [(t["epoch"], t["batch"], t["why"]) for t in bad["poison"]["taken_back"]]
    assert told == [(e, b, "nonfinite") for e in range(epochs) for b in (2, 7)]


def _stopped(case: dict) -> None:
    """At the first bad batch, before its update."""
    assert case["bad"]["iterations"] == 2
    assert case["bad"]["poison"]["ended"]
    assert [t["step"] for t in case["bad"]["poison"]["taken_back"]] == [2]
    assert np.isfinite(case["bad"]["weights"]).all()


def _skipped(case: dict) -> None:
    assert [(t["batch"], t["why"]) for t in case["poison"]["taken_back"]] == [(80, "loss")]


def test_a_last_batch_that_does_not_divide_counts_as_on_one_device(alone, two):
    _same_training(two[UNEVEN[1]], alone[UNEVEN[1]])
    _same_batches(two[UNEVEN[1]], alone[UNEVEN[1]])


def test_a_poisoned_step_stops_every_replica_before_its_update(two):
    _stopped(two[GUARDED[1]])


@pytest.mark.parametrize("case", QUICK)
def test_two_replicas_train_as_one_device_with_the_whole_batch(alone, two, case):
    _same_training(two[case], alone[case])


def test_the_clip_bounds_the_sum_of_the_gradients(two):
    norms = np.array(two["equal:accumulating:0.3"]["clipped_gradient_norm"])
    assert (np.array(two["equal:accumulating:0.3"]["gradient_norm"]) > 0.3).all()
    np.testing.assert_allclose(norms, 0.3, rtol=1e-5)


def test_dropout_draws_another_mask_on_each_replica(two):
    shares = np.array(two["masks"]["zero_share"])
    # One mask for both would leave half of the gradient zero, two masks a quarter; the spread of 4096 draws is 0.007.
    np.testing.assert_allclose(shares, 0.25, atol=0.05)
    assert len(set(shares.tolist())) > 1


def test_replicas_that_stay_together_are_proven_to(two):
    proof = two["equal:accumulating:0.3"]["replicas"]
    assert proof["drift"] is None
    assert proof["comparisons"] >= 3
    assert proof["identical_until"] == two["equal:accumulating:0.3"]["steps"][-1]
    assert not two["equal:accumulating:0.3"]["findings"]


def _findings_of_replicas(case: dict) -> dict[str, dict]:
    return {f["severity"]: f for f in case["findings"] if f["rule"] == "replicas"}


def test_a_replica_that_drifts_is_a_finding_that_names_it(two):
    finding = _findings_of_replicas(two["drift"])["error"]
    assert finding["causes"] == ["replica_drift"]
    assert finding["evidence"]["replicas"] == [1]
    assert finding["where"][0].endswith("hidden/kernel")
    assert finding["steps"][0] == 10, "the first epoch of 10 steps ended with identical replicas"


def test_a_layer_with_statistics_of_its_own_is_named_and_no_drift(two):
    finding = _findings_of_replicas(two["drift"])["info"]
    assert finding["where"][0].endswith("norm")
    assert not any("norm/moving" in path for path in _findings_of_replicas(two["drift"])["error"]["where"])


def test_listeners_hear_every_batch_of_data_of_unknown_length(two):
    heard = two["listening"]
    assert heard["batches"] == 20
    assert heard["steps"] == list(range(0, 20, 2))


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """(the log directory, what each of two workers printed under a case's first word)."""
    logdir = tmp_path_factory.mktemp("runs")
    answers = _workers(2, f"{QUICK[0]}:{logdir}", "stopping")
    return logdir, [{case.partition(":")[0]: answer for case, answer in each.items()} for each in answers]


def test_every_worker_trains_as_one_device_with_the_whole_batch(alone, workers):
    for each in workers[1]:
        _same_training(each["equal"], alone[QUICK[0]])
        assert each["equal"]["replicas"]["drift"] is None


def test_one_worker_writes_the_record(workers):
    logdir, (first, second) = workers
    assert Path(first["equal"]["path"]).is_relative_to(logdir)
    assert second["equal"]["path"] is None
    assert len(Run.find(logdir)) == 1
    assert Run.open(logdir).document("replicas")["workers"] == 2


def test_workers_stop_together_when_one_wants_to(workers):
    for each in workers[1]:
        assert each["stopping"]["steps"] == [0, 1, 2, 3]
        assert each["stopping"]["end"]["how"] == "stopped"


def test_workers_without_seeds_train_and_evaluate_as_one(workers):
    first, second = (each["stopping"] for each in workers[1])
    assert first["weights"] == second["weights"]
    assert first["evaluated"] == second["evaluated"]
    assert first["replicas"]["drift"] is None


@pytest.mark.slow
def test_three_workers_train_every_optimizer_as_on_one_device():
    theirs = _run(1, *EVERY)
    for ours in _workers(3, *EVERY):
        for case in EVERY:
            _same_training(ours[case], theirs[case])


@pytest.mark.slow
def test_among_workers_masks_differ_and_a_drift_is_named():
    for each in _workers(2, "masks", "drift", "listening", "custom"):
        np.testing.assert_allclose(each["masks"]["zero_share"], 0.25, atol=0.05)
        finding = _findings_of_replicas(each["drift"])["error"]
        assert finding["evidence"]["replicas"] == [1]
        assert "worker 1" in finding["message"]
        assert each["listening"]["batches"] == 20


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_among_workers_a_poisoned_step_is_taken_back_and_uneven_batches_count_as_on_one_device(uneven, count):
    for each in _workers(count, *GUARDED, *UNEVEN, "uneven:241:norm"):
        _taken_back(each[GUARDED[0]])
        _stopped(each[GUARDED[1]])
        for case in GUARDED[2:]:
            _skipped(each[case])
        for case in UNEVEN:
            _same_training(each[case], uneven[case])
            if "logs" in uneven[case]:
                _same_batches(each[case], uneven[case])
        assert each["uneven:241:norm"]["finite"]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_replicas_run_guards_of_every_kind_and_uneven_batches(uneven, devices):
    more = ("guarded:skip:None:eager", "guarded:skip:None::0", "guarded:skip:None::3")
    ours = _run(devices, *GUARDED, *UNEVEN, *more, "uneven:241:norm")
    for case in (GUARDED[0], *more):
        _taken_back(ours[case])
    _stopped(ours[GUARDED[1]])
    for case in GUARDED[2:]:
        _skipped(ours[case])
    for case in UNEVEN:
        _same_training(ours[case], uneven[case])
    assert ours["uneven:241:norm"]["finite"], "the mean of an empty share is in the statistics of a replica"


def _chief_and_worker() -> list[dict[str, str]]:
    """As Kubeflow and others set TF_CONFIG: the first is a chief."""
    chief, worker = launch.cluster(2)
    tasks = ({"type": "chief", "index": 0}, {"type": "worker", "index": 0})
    cluster = {"chief": [chief], "worker": [worker]}
    return [{"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})} for task in tasks]


def _under_slurm() -> list[dict[str, str]]:
    """What `srun -n 2 --ntasks-per-node=2` sets on one node."""
    port = min(int(address.rpartition(":")[2]) for address in launch.cluster(1))
    node = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}
    return [{**node, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(i), "PORT": str(port)} for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("environments", [_chief_and_worker, _under_slurm])
def test_workers_that_others_start_find_each_other(alone, environments, tmp_path):
    common = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    common.pop("TF_CONFIG", None)
    command = [sys.executable, str(SCRIPT), "1", f"{QUICK[0]}:{tmp_path}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env={**common, **each}, **pipes) for each in environments()]
    written = []
    for process in started:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-4000:]
        (answer,) = _answers(output).values()
        _same_training(answer, alone[QUICK[0]])
        written.append(answer["path"] is not None)
    assert written == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "hook", "step"),
    [
        (signal.SIGTERM, "on_train_batch_end", 14),
        (signal.SIGTERM, "on_test_batch_end", 20),
        (signal.SIGINT, "on_train_batch_end", 14),
    ],
)
def test_a_signal_to_one_worker_ends_all_at_the_same_step_and_they_go_on_from_there(tmp_path, number, hook, step):
    options = ["launch", "-n", "2", str(SCRIPT), "1", f"asked:{tmp_path}:{int(number)}:{hook}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "trainrt", *options], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 128 + number, done.stderr[-4000:]
    for worker in (0, 1):
        kept = Store(tmp_path / "checkpoints" / f"worker-{worker}", 3).newest()
        assert kept.meta["step"] == step
    assert Run.open(tmp_path / "logs").end["detail"] == number.name
    assert Run.open(tmp_path / "logs").steps[-1, 1] == step - 1
    resumed, whole = _workers(2, f"asked:{tmp_path}"), _workers(2, "asked:none")[0]["asked:none"]
    for each in resumed:
        (outcome,) = each.values()
        assert outcome["weights"] == whole["weights"]
        assert outcome["history"] == whole["history"]


@pytest.mark.slow
def test_a_worker_that_the_others_wait_for_is_a_finding_that_names_it():
    for each in _workers(2, "slow:step", "slow:callback", "slow:none"):
        for how in ("step", "callback"):
            (found,) = [f for f in each[f"slow:{how}"]["findings"] if f["rule"] == "slow_worker"]
            assert found["causes"] == ["straggler"]
            assert found["evidence"]["worker"] == 1
        assert not any(f["rule"] == "slow_worker" for f in each["slow:none"]["findings"])


@pytest.mark.slow
def test_workers_of_which_one_was_killed_end_with_the_bits_of_a_run_that_was_not(tmp_path):
    killed = _workers(2, f"resuming:{tmp_path}:dies", restarts=1)
    whole = _workers(2, "resuming:none")[0]["resuming:none"]
    for each in killed:
        (resumed,) = each.values()
        assert resumed["steps"][0] == 14, "the last of the checkpoints, one every 7 steps, before step 17"
        assert resumed["weights"] == whole["weights"]
        assert resumed["history"] == whole["history"]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 4])
def test_every_optimizer_trains_as_on_one_device(devices):
    ours, theirs = _run(devices, *EVERY), _run(1, *EVERY)
    for case in EVERY:
        _same_training(ours[case], theirs[case])
