"""Telemetry through the real nvidia-ml-py, against a libnvidia-ml.so.1 that is compiled here; and the host for real."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from trainrt.device import telemetry
from trainrt.device.telemetry import CHUNK, CHUNKS_A_WIDTH, Host, Telemetry, merged

pytest.importorskip("pynvml", reason="nvidia-ml-py is missing: pip install nvidia-ml-py")
COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)

ASK = """
import json, os
from trainrt.device.telemetry import Cards
cards = Cards()
samples = [cards.sample() for _ in range(int(os.environ.get("SAMPLES", 2)))]
print(json.dumps({"cards": cards.cards, "notes": cards.notes, "samples": samples}))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C compiler is installed")
    directory = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).parent / "nvml_stub.c"
    command = [COMPILER, "-shared", "-fPIC", "-o", str(directory / "libnvidia-ml.so.1"), str(source)]
    subprocess.run(command, check=True)
    return directory


@pytest.fixture
def ask(library):
    """What a process with that environment learns of its cards."""

    def run(**environment):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("STUB_", "CUDA_"))}
        whole = clean | {"LD_LIBRARY_PATH": str(library)} | {k: str(v) for k, v in environment.items()}
        out = subprocess.run([sys.executable, "-c", ASK], env=whole, capture_output=True, text=True, check=True)
        return json.loads(out.stdout)

    return run


def uuids(told):
    return [card["uuid"][:8] for card in told["cards"]]


def test_a_card_tells_everything(ask):
    told = ask(STUB_THROTTLE=4, STUB_OTHER=1)
    assert told["notes"] == []
    (card,) = told["cards"]
    assert card["name"] == "Stub A"
    assert card["memory_total_bytes"] == 16 * 2**30
    assert card["power_limit_w"] == 300
    (last,) = told["samples"][-1]
    assert last.pop("nvlink_send_bytes_s") > 0
    assert last.pop("nvlink_receive_bytes_s") > 0
    assert last == {
        "utilisation": 0.4,
        "memory_utilisation": 0.2,
        "memory_bytes": 2**30,
        "process_bytes": 512 * 2**20,
        "others_bytes": 256 * 2**20,
        "others": 1,
        "power_w": 150,
        "temperature_c": 60,
        "sm_mhz": 1500,
        "memory_mhz": 5000,
        "throttle": 4,
        "pcie_send_bytes_s": 1000 * 1024,
        "pcie_receive_bytes_s": 2000 * 1024,
        "ecc_corrected": 3,
        "ecc_uncorrected": 0,
    }


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("2,0", [2, 0]),
        ("", []),
        ("-1", []),
        ("1,-1,2", [1]),
        ("3,9,1", [3]),
        ("GPU-2222", [2]),
        ("GPU-2222,GPU-1", [2, 1]),
        ("GPU-none,1", []),
    ],
)
def test_cards_are_those_that_cuda_shows_in_its_order(ask, visible, expected):
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    told = ask(STUB_CARDS=4, SAMPLES=1, **environment)
    assert uuids(told) == [f"GPU-{n}{n}{n}{n}" for n in expected]
    assert [s["temperature_c"] for s in told["samples"][0]] == [60 + n for n in expected]


def test_cards_that_differ_are_numbered_by_speed_and_that_is_said(ask):
    told = ask(STUB_CARDS=2, STUB_NAMES="differ", CUDA_VISIBLE_DEVICES="1")
    assert any("CUDA_DEVICE_ORDER" in note for note in told["notes"])
    told = ask(STUB_CARDS=2, STUB_NAMES="differ", CUDA_VISIBLE_DEVICES="1", CUDA_DEVICE_ORDER="PCI_BUS_ID")
    assert told["notes"] == []
    assert uuids(told) == ["GPU-1111"]


@pytest.mark.parametrize("visible", ["1", "MIG-10000000-0000-0000-0000-000000000000"])
def test_a_mig_instance_has_its_own_memory_and_its_cards_temperature(ask, visible):
    told = ask(STUB_CARDS=2, STUB_MIG=1, CUDA_VISIBLE_DEVICES=visible)
    (card,) = told["cards"]
    assert card["mig"]
    assert card["uuid"].startswith("MIG-10")
    assert card["memory_total_bytes"] == 4 * 2**30
    (last,) = told["samples"][-1]
    assert last["temperature_c"] == 61
    assert "utilisation" not in last
    assert [note for note in told["notes"] if "utilisation" in note] == told["notes"], "and that is said once"
    assert len(told["notes"]) == 1


@pytest.mark.parametrize("how", ["STUB_UNSUPPORTED", "STUB_FORBIDDEN"])
def test_what_a_card_does_not_tell_is_said_once_and_the_rest_goes_on(ask, how):
    told = ask(STUB_CARDS=2, SAMPLES=4, **{how: "power,throttle,ecc,nvlink"})
    assert len(told["notes"]) == 2 * 4
    for sample in (s for row in told["samples"] for s in row):
        assert not {"power_w", "throttle", "ecc_corrected", "nvlink_send_bytes_s"} & set(sample)
        assert {"utilisation", "temperature_c", "memory_bytes"} <= set(sample)


def test_a_card_that_falls_off_the_bus_is_left_and_the_other_goes_on(ask):
    told = ask(STUB_CARDS=2, SAMPLES=5, STUB_LOST="0:2")
    assert [note for note in told["notes"] if "fell off the bus" in note] == told["notes"]
    assert len(told["notes"]) == 1
    first = [bool(row[0]) for row in told["samples"]]
    assert first[:2] == [True, True]
    assert not any(first[3:])
    assert all(row[1]["utilisation"] == 0.41 for row in told["samples"])


def test_a_driver_that_fails_leaves_no_card(ask):
    told = ask(STUB_INIT=999)
    assert told["cards"] == []
    assert told["samples"] == [[], []]


def test_without_a_driver_there_is_no_card_and_no_complaint(tmp_path):
    if os.path.exists("/dev/nvidiactl"):
        pytest.skip("this machine has a driver")
    cards = telemetry.Cards({})
    assert (cards.cards, cards.notes, cards.sample()) == ([], [], [])


# ---------------------------------------------------------------------------------------------------------------- host


def test_the_host_tells_what_the_process_does():
    host = Host()
    block = np.ones(40_000_000)
    until = time.process_time() + 0.3
    while time.process_time() < until:
        block[:1000].sum()
    sample = host.sample()
    assert 0 < sample["cpu_cores"] <= os.cpu_count() + 1
    assert sample["rss_bytes"] > block.nbytes
    if sys.platform == "linux":
        assert 0 <= sample["machine_cpu"] <= 1


class Written:
    def __init__(self):
        self.documents = []

    def __call__(self, kind, describe):
        assert kind == "telemetry"
        self.documents.append(json.loads(json.dumps(describe(), allow_nan=False)))


def no_cards():
    return telemetry.Cards({"CUDA_VISIBLE_DEVICES": ""})


def test_samples_carry_their_step_and_the_last_is_the_end(monkeypatch):
    monkeypatch.setattr(telemetry, "SAMPLE_S", 0.05)
    monkeypatch.setattr(telemetry, "TICK_S", 0.01)
    written, step, looks = Written(), [0], []
    with Telemetry(written, lambda: step[0], lambda: looks.append(1), cards=no_cards):
        for _ in range(6):
            time.sleep(0.1)
            step[0] += 10
    steps = [s for document in written.documents for s in document["samples"]["step"]]
    assert steps == sorted(steps)
    assert steps[-1] == 60
    assert len(steps) >= 3
    assert len(looks) > len(steps)


def test_a_long_run_writes_ever_fewer_documents():
    written = Written()
    watch = Telemetry(written, lambda: 0, cards=no_cards)
    cards = no_cards()
    seconds = 3 * CHUNK * CHUNKS_A_WIDTH  # one width at 1 s, one at 2 s
    for second in range(seconds):
        watch._take(
            {"time": float(second), "step": second, "cpu_cores": second % 2, "gpu0/throttle": 4.0 * (second == 7)},
            cards,
        )
    assert len(written.documents) == 2 * CHUNKS_A_WIDTH
    assert {len(document["samples"]["time"]) for document in written.documents} == {CHUNK}
    assert written.documents[-1]["samples"]["cpu_cores"] == [0.5] * CHUNK
    assert sum(map(any, (document["samples"]["gpu0/throttle"] for document in written.documents))) == 1


def test_merged_samples_keep_flags_peaks_and_the_last_count():
    rows = [
        {"step": 1, "gpu0/throttle": 4.0, "gpu0/memory_bytes": 9.0, "gpu0/power_w": 1.0, "gpu0/ecc_corrected": 1.0},
        {"step": 2, "gpu0/throttle": 32.0, "gpu0/memory_bytes": 5.0, "gpu0/power_w": 2.0, "gpu0/ecc_corrected": 4.0},
    ]
    assert merged(rows) == {
        "step": 2,
        "gpu0/throttle": 36.0,
        "gpu0/memory_bytes": 9.0,
        "gpu0/power_w": 1.5,
        "gpu0/ecc_corrected": 4.0,
    }


def test_a_fault_in_the_thread_ends_it_with_a_note():
    def broken():
        raise ValueError("no step")

    written = Written()
    with Telemetry(written, broken, cards=no_cards):
        pass
    assert written.documents[-1]["notes"] == ["The telemetry ended: ValueError: no step"]


def test_a_real_run_has_samples_of_its_steps(digits):
    import keras

    import trainrt

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy")
    history = trainrt.fit(model, *digits, epochs=2, verbose=0)
    samples = history.run.document("telemetry")["samples"]
    assert samples["step"][-1] == 4
    assert all(size > 1e6 for size in samples["rss_bytes"])


@pytest.mark.gpu
def test_a_real_card_is_watched():
    cards = telemetry.Cards()
    if not cards.cards:
        pytest.skip("no NVIDIA card")
    sample = cards.sample()[0]
    assert sample["memory_bytes"] > 0
    assert 0 <= sample["utilisation"] <= 1
