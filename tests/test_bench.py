"""The benchmark's table, plot and verdict on the bits, from outcomes; the processes themselves are a slow test."""

import json
import xml.etree.ElementTree

import pytest

from trainrt.determinism import bench
from trainrt.determinism.zoo import FAMILIES, ZOO


def outcomes():
    fast = bench.Outcome("mlp", "fast", [1e-3, 2e-3, 3e-3], [1.0, 1.0], 32e3, [2.0, 2.0], [2**20] * 2, distinct=2)
    fast.divergence = "step 3, variable: embedding"
    card = {"utilisation": 80.0, "clock_mhz": 1500.0, "power_w": 300.0, "throttled": 0.25}
    slow = bench.Outcome(
        "mlp", "deterministic", [4e-3, 5e-3], [2.0, 3.0], 7e3, [2.0, 2.5], [2**21] * 2, [2**22], card, distinct=1
    )
    broken = bench.Outcome("mlp", "deterministic+xla", failed="UnimplementedError: no such kernel")
    return [fast, slow, broken]


def test_the_table_tells_times_ratios_bits_a_throttled_card_and_what_failed():
    head, fast, slow, broken = bench.table(outcomes()).splitlines()
    assert head.split()[:2] == ["workload", "mode"]
    assert "2.000" in fast
    assert "2 of 2 distinct" in fast
    assert "2.50" in slow
    assert "25% throttled" in slow
    assert "1500 MHz" in slow
    assert "the same in 2" in slow
    assert "no such kernel" in broken


def test_the_plot_is_an_svg_with_a_bar_for_each_mode_that_ran():
    root = xml.etree.ElementTree.fromstring(bench.plot(outcomes()))
    bars = [e for e in root.iter("{http://www.w3.org/2000/svg}rect") if e.get("fill") != "#fff"]
    assert len(bars) == 2
    assert float(bars[1].get("width")) > float(bars[0].get("width"))


def test_the_json_holds_every_figure():
    said = json.loads(bench.as_json(outcomes(), {"devices": ["CPU 0"]}))
    assert said["machine"] == {"devices": ["CPU 0"]}
    assert [o["step_s"] for o in said["outcomes"]] == [o.step_s for o in outcomes()]


@pytest.mark.parametrize("name", [*ZOO, *FAMILIES])
def test_the_same_seed_gives_the_same_data(name):
    workload = {**ZOO, **FAMILIES}[name]
    _, x, y = workload.make(1)
    _, again, labels = workload.make(1)
    assert (x == again).all()
    assert (y == labels).all()
    assert len(x) == len(y) == workload.batch


@pytest.mark.slow
def test_every_mode_runs_on_a_cpu_and_tells_whether_its_bits_repeat(tmp_path):
    found = {o.mode: o for o in bench.bench(["embedding_sgd"], rounds=2, repeats=2, steps=12, logdir=tmp_path)}
    assert set(found) == set(bench.MODES)
    assert not [o.failed for o in found.values() if o.failed]
    assert found["fast"].distinct == 2
    assert "embedding" in found["fast"].divergence
    assert found["deterministic"].distinct == found["deterministic+xla"].distinct == 1
    assert all(len(o.step_s) == 4 and len(o.ratios) == 2 for o in found.values())
