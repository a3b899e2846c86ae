"""PyTorch's monitors, each over a bare loop of its own: `peers.py --torch PYTHON` runs this with an interpreter that
has them (`pip install torch mosaicml cockpit-for-pytorch 'setuptools<81'`, Python 3.12; TensorFlow is not needed).

Composer's `OptimizerMonitor` is held against Composer's `Trainer` without it, logging into a file in both, and looks
after each step (by default it looks after every tenth). Cockpit's economy configuration is held against the plain loop.
"""

from __future__ import annotations

import contextlib
import io
import json
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

DIGITS = Path(__file__).parents[1] / "trainrt" / "data" / "digits.npz"
BATCH = 32


def model_of(workload: str) -> torch.nn.Sequential:
    """The models of `peers.py`."""
    layers = {
        "mlp": [torch.nn.Flatten(), torch.nn.Linear(64, 512), torch.nn.ReLU(),
                torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10)],
        "cnn": [torch.nn.Conv2d(1, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3), torch.nn.ReLU(),
                torch.nn.Flatten(), torch.nn.Linear(512, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)],
    }[workload]  # fmt: skip
    return torch.nn.Sequential(*layers)


def batches(data):
    x, y = data
    order = torch.randperm(len(y))
    for start in range(0, len(y), BATCH):
        rows = order[start : start + BATCH]
        yield x[rows], y[rows]


def bare(workload: str, data, epochs: int, logdir: str) -> Callable[[], None]:
    model = model_of(workload)
    optimizer, loss_of = torch.optim.Adam(model.parameters()), torch.nn.CrossEntropyLoss()

    def run():
        for _ in range(epochs):
            for x, y in batches(data):
                optimizer.zero_grad()
                loss_of(model(x), y).backward()
                optimizer.step()

    return run


def cockpit(workload: str, data, epochs: int, logdir: str) -> Callable[[], None]:
    from backpack import extend
    from cockpit import Cockpit
    from cockpit.utils.configuration import configuration

    model = extend(model_of(workload))
    optimizer = torch.optim.Adam(model.parameters())
    loss_of, of_each = (extend(torch.nn.CrossEntropyLoss(reduction=how)) for how in ("mean", "none"))
    board = Cockpit(model.parameters(), quantities=configuration("economy"))
    step = 0

    def run():
        nonlocal step
        for _ in range(epochs):
            for x, y in batches(data):
                optimizer.zero_grad()
                predicted = model(x)
                loss, losses = loss_of(predicted, y), of_each(predicted, y)
                info = {"batch_size": len(y), "individual_losses": losses, "loss": loss, "optimizer": optimizer}
                with board(step, info=info):
                    loss.backward(create_graph=board.create_graph(step))
                optimizer.step()
                step += 1

    run.finish = lambda: board.write(f"{logdir}/cockpit")  # type: ignore[attr-defined]
    return run


def _composer(workload: str, data, epochs: int, logdir: str, callbacks) -> Callable[[], None]:
    import composer
    from composer.loggers import FileLogger

    class Classifier(composer.ComposerModel):
        def __init__(self):
            super().__init__()
            self.layers = model_of(workload)

        def forward(self, batch):
            return self.layers(batch[0])

        def loss(self, outputs, batch):
            return torch.nn.functional.cross_entropy(outputs, batch[1])

    model = Classifier()
    rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=BATCH, shuffle=True)
    logger = FileLogger(filename=f"{logdir}/log-{len(callbacks)}.txt", overwrite=True, flush_interval=100)
    trainer = composer.Trainer(
        model=model,
        train_dataloader=rows,
        optimizers=composer.optim.DecoupledAdamW(model.parameters(), lr=0.001, weight_decay=0.0),
        max_duration=f"{epochs}ep",
        device="cpu",
        progress_bar=False,
        loggers=[logger],
        callbacks=callbacks,
    )
    return lambda: trainer.fit(duration=f"{epochs}ep")


def composer_bare(workload, data, epochs, logdir):
    return _composer(workload, data, epochs, logdir, [])


def composer_monitor(workload, data, epochs, logdir):
    from composer.callbacks import OptimizerMonitor

    return _composer(workload, data, epochs, logdir, [OptimizerMonitor(batch_log_interval=1)])


WAYS = {"torch": (bare, bare), "composer": (composer_bare, composer_monitor), "cockpit": (bare, cockpit)}
"""A way -> (its bare loop, the watched one)."""


def measure(way: str, workload: str, rounds: int, epochs: int) -> dict:
    """As `peers.measure`: bare and watched rounds alternate, medians are compared."""
    with np.load(DIGITS) as archive:
        x, y = archive["x"][360:], archive["y"][360:]
    data = torch.from_numpy((x[:, None] / 16).astype("float32")), torch.from_numpy(y.astype("int64"))
    steps = -(-len(y) // BATCH) * epochs
    torch.manual_seed(0)
    times: dict[str, list[float]] = {"plain": [], "watched": []}
    with tempfile.TemporaryDirectory() as plain_logs, tempfile.TemporaryDirectory() as logs:
        make_plain, make_watched = WAYS[way]
        ways = {"plain": make_plain(workload, data, epochs, plain_logs)}
        ways["watched"] = make_watched(workload, data, epochs, logs) if way != "torch" else ways["plain"]
        for run in ways.values():
            run()
        for _ in range(rounds):
            for name, run in ways.items():
                begun = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - begun)
        # Cockpit writes all that it has seen, as JSON, once at the end: that is not in the time.
        getattr(ways["watched"], "finish", lambda: None)()
        size = sum(file.stat().st_size for file in Path(logs).rglob("*") if file.is_file())
    plain = statistics.median(times["plain"])
    return {
        "time": statistics.median(times["watched"]) / plain,
        "bare_ms": 1e3 * plain / steps,
        "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "bytes": size / (steps * (rounds + 1)),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _way, _workload, _rounds, _epochs = sys.argv[1:]
    with contextlib.redirect_stdout(io.StringIO()):
        _found = measure(_way, _workload, int(_rounds), int(_epochs))
    print(json.dumps(_found))
