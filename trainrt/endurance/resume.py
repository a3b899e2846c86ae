"""The whole state of a training, taken between two steps and given back in another process.

What `model.save` and `tf.train.Checkpoint(model, optimizer)` leave out decides whether a resumed run goes on with the
same bits: seed generators of dropout, metric accumulators in the middle of an epoch, the position in the data, Python's
and NumPy's generators, and what callbacks remember.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from trainrt import doors
from trainrt.endurance.checkpoint import Checkpoint, Saved, Store
from trainrt.loop.batches import Batches
from trainrt.loop.journal import Journal
from trainrt.record.digest import digest_all

REMEMBERS: dict[type, tuple[str, ...]] = {
    keras.callbacks.History: ("epoch", "history"),
    keras.callbacks.EarlyStopping: ("wait", "stopped_epoch", "best", "best_epoch", "best_weights"),
    keras.callbacks.ReduceLROnPlateau: ("wait", "cooldown_counter", "best"),
    keras.callbacks.ModelCheckpoint: ("best", "_batches_seen_since_last_saving", "_last_batch_seen", "_current_epoch"),
    keras.callbacks.SwapEMAWeights: ("_ema_weights_in_model",),
    keras.callbacks.TensorBoard: ("_global_train_batch", "_global_test_batch"),
    keras.callbacks.LearningRateScheduler: (),
    keras.callbacks.TerminateOnNaN: (),
    keras.callbacks.ProgbarLogger: (),
    keras.callbacks.CSVLogger: (),
    keras.callbacks.RemoteMonitor: (),
}
"""What Keras's callbacks change while they train, all of it."""

_STATEFUL_RANDOM = frozenset(
    [
        "RandomStandardNormal",
        "RandomUniform",
        "RandomUniformInt",
        "TruncatedNormal",
        "RandomShuffle",
        "Multinomial",
        "RandomGamma",
        "RandomPoisson",
        "RandomPoissonV2",
        "ParameterizedTruncatedNormal",
    ]
)
"""TensorFlow's old random ops keep their state in the kernel, where nobody can read it."""


class Start(NamedTuple):
    """Where a training goes on.

    Attributes:
      epoch: The epoch to go on with.
      within: Whether it had begun.
      logs: Of the last epoch that was finished; None: none was.
      stopped: Whether the training had come to its end by `model.stop_training`.
    """

    epoch: int
    within: bool
    logs: dict[str, Any] | None
    stopped: bool


class Keeper(contextlib.AbstractContextManager):
    """Saves a training as often as was asked for, and brings it back.

    Args:
      settings: Where, when and how many.
      model: The model.
      batches: Its data.

    Attributes:
      saved: The checkpoint to go on from; None: there is none.
    """

    def __init__(self, settings: Checkpoint, model: keras.Model, batches: Batches):
        self.settings = settings
        self._model = model
        self._batches = batches
        self._callbacks: keras.callbacks.CallbackList | None = None
        self._store = Store(settings.directory, settings.keep)
        self._step_variables: list[tf.Variable] = []
        self._last_step = -1
        self._last_time = time.monotonic()
        self.saved: Saved | None = self._store.newest()
        if self.saved is not None:
            self._check_place(self.saved.meta)

    # ------------------------------------------------------------------------------------------ coming back

    def agree(self, exchange: Callable[[Sequence[int]], np.ndarray]) -> None:
        """Settles among workers, each of which has checkpoints of its own, on the newest step that all of them have.

        Args:
          exchange: Numbers of this worker -> [workers, K] those of all.
        """
        while True:
            steps = exchange([-1 if self.saved is None else self.step])[:, 0]
            if (steps == steps[0]).all():
                return
            self.saved = self._store.newest(at_most=int(steps.min()))

    @property
    def run(self) -> str | None:
        """The name of the run's directory below `logdir`, to go on in it."""
        return None if self.saved is None else self.saved.meta["run"]

    @property
    def step(self) -> int:
        return 0 if self.saved is None else int(self.saved.meta["step"])

    def start(self) -> Start | None:
        """Where to go on; None: at the beginning."""
        if self.saved is None:
            return None
        meta = self.saved.meta
        return Start(
            meta["epoch"] if meta["within"] else meta["epoch"] + 1, meta["within"], meta["logs"], meta["stopped"]
        )

    @property
    def poison(self) -> list[dict[str, Any]]:
        """What was told of the steps that were taken back before."""
        return [] if self.saved is None else list(self.saved.meta.get("poison", ()))

    def restore(self, callbacks: keras.callbacks.CallbackList) -> Any:
        """Puts everything back, when the step has been traced and the callbacks have begun.

        Returns:
          What the last step logged.

        Raises:
          ValueError: The checkpoint is of another model or of other data.
        """
        assert self.saved is not None
        meta = self.saved.meta
        self._give_back_variables(meta)
        self._batches.go_back(meta["data"], meta["within"])
        self._remind_all(callbacks, list(meta["callbacks"]))
        _set_random_states(meta["random"])
        self._last_step = int(meta["step"])
        return meta["last"]

    def _remind_all(self, callbacks: keras.callbacks.CallbackList, kept: list[dict[str, Any]]) -> None:
        """Gives each callback what the next one of its class remembered."""
        for callback in _stateful(callbacks):
            mine = next((one for one in kept if one["class"] == type(callback).__name__), None)
            if mine is not None:
                kept = [one for one in kept if one is not mine]
                _remind(callback, mine["state"])
        lost = [one["class"] for one in kept if any(one["state"].values())]
        if lost:
            warnings.warn(
                f"trainrt: the run goes on without {', '.join(lost)}, which it began with: what it remembered is lost.",
                stacklevel=5,
            )

    def _check_place(self, meta: Mapping[str, Any]) -> None:
        now = _surroundings()
        changed = [f"{k} was {v!r}, is {now[k]!r}" for k, v in meta["surroundings"].items() if now.get(k) != v]
        if changed:
            warnings.warn(
                "trainrt: the run goes on where the bits may be others than where it began: "
                + "; ".join(changed)
                + ".",
                stacklevel=4,
            )

    def _give_back_variables(self, meta: Mapping[str, Any]) -> None:
        live = self._variables()
        for group, kept in meta["variables"].items():
            here = live[group]
            if group == "metrics" and len(kept) != len(here):
                continue  # one that only validation makes, and resets
            wrong = [
                f"{k['name']} {k['value'].shape} is now {name} {tuple(v.shape)}"
                for k, (name, v) in zip(kept, here, strict=False)
                if tuple(v.shape) != k["value"].shape
                or v.dtype != k["value"].dtype
                or _plain(name) != _plain(k["name"])
            ]
            if len(kept) != len(here):
                wrong.insert(0, f"{len(kept)} variables of the {group} are now {len(here)}")
            if wrong:
                raise ValueError(
                    f"A checkpoint goes back into the model that it was taken of. Received: "
                    f"checkpoint={str(self.settings.directory)!r}, where {'; '.join(wrong[:3])}. "
                    "Pass another directory for another model."
                )
            for k, (_, variable) in zip(kept, here, strict=True):
                variable.assign(k["value"])

    # ------------------------------------------------------------------------------------------ saving

    def began(self, callbacks: keras.callbacks.CallbackList) -> None:
        """The training begins; says at once what cannot be saved.

        Raises:
          ValueError: The source cannot be gone back into, or another callback resumes too.
        """
        self._callbacks = callbacks
        for callback in callbacks.callbacks:
            if isinstance(callback, keras.callbacks.BackupAndRestore):
                raise ValueError(
                    "`checkpoint` and keras.callbacks.BackupAndRestore would both go back. Received both. Keep one; "
                    "`checkpoint` is the one that goes on with the same bits."
                )
        silent = [type(c).__name__ for c in _stateful(callbacks) if not _known(c) and _has_state(c)]
        if silent:
            warnings.warn(
                f"trainrt: {', '.join(dict.fromkeys(silent))} may remember what a checkpoint does not hold. Give it "
                "`get_state()`, which returns plain values and arrays, and `set_state(state)`.",
                stacklevel=4,
            )
        if self.settings.source is None:
            self._batches.check_position()

    def traced(self, variables: Iterable[tf.Variable], operations: Iterable[str]) -> None:
        """The step is traced: what it reads or writes, and the types of its operations."""
        self._step_variables = list(variables)
        old = sorted(_STATEFUL_RANDOM.intersection(operations))
        if old:
            warnings.warn(
                f"trainrt: the step draws random numbers with {', '.join(old)}, whose state nobody can save: a resumed "
                "run draws others. keras.random and tf.random.Generator can be saved.",
                stacklevel=4,
            )

    def until_due(self, step: int) -> int | None:
        """Steps until the next checkpoint; None: it is not counted in steps."""
        every = self.settings.every
        return every - step % every if isinstance(every, int) else None

    def due(self, step: int) -> bool:
        """Whether to save in the middle of an epoch, before step number `step`."""
        every = self.settings.every
        if not self.unsaved(step):
            return False
        if isinstance(every, int):
            return step % every == 0
        return isinstance(every, datetime.timedelta) and time.monotonic() - self._last_time >= every.total_seconds()

    def unsaved(self, step: int) -> bool:
        """Whether anything was trained since the last checkpoint, before step number `step`."""
        return step not in (0, self._last_step)

    def save(
        self,
        *,
        epoch: int,
        step: int,
        within: bool,
        logs: Any,
        last: Any,
        stopped: bool,
        poison: Sequence[Mapping[str, Any]],
        journal: Journal,
    ) -> None:
        """Copies everything to the host; a thread writes it.

        Args:
          epoch: The epoch that goes on, or has just ended.
          step: Number of the next step.
          within: Whether the epoch goes on.
          logs: Of the last epoch that was finished.
          last: What the last step logged.
          stopped: Whether `model.stop_training` ended the training.
          poison: What was told of the steps that were taken back.
          journal: Of the run: what it was told has to be on disk before the checkpoint is.
        """
        assert self._callbacks is not None
        self._last_step, self._last_time = step, time.monotonic()
        live = self._variables()
        variables = {
            group: [{"name": name, "value": np.array(tf.convert_to_tensor(v))} for name, v in rows]
            for group, rows in live.items()
        }
        meta = {
            "epoch": epoch,
            "step": step,
            "within": within,
            "logs": None if logs is None else _floats(logs),
            "last": _floats(last),
            "stopped": stopped,
            "poison": [dict(told) for told in poison],
            "run": None if journal.path is None else journal.path.name,
            "variables": variables,
            "data": self._batches.position(self.settings.source),
            "callbacks": [{"class": type(c).__name__, "state": _remembered(c)} for c in _stateful(self._callbacks)],
            "random": _random_states(),
            "surroundings": _surroundings(),
        }
        values = {id(v): row["value"] for row, (_, v) in zip(variables["model"], live["model"], strict=True)}
        weights: list[Any] = [values[id(doors.raw(weight))] for weight in self._model.weights]
        written = journal.mark()

        def before(digest: str) -> None:
            written()
            content = {"epoch": epoch, "within": within, "digest": digest, "weights_digest": digest_all(weights)}
            journal.document("checkpoint", lambda: {**content, "directory": str(self.settings.directory)})

        self._store.save(meta, before)

    def __exit__(self, *error) -> None:
        """However the training ends, the last checkpoint is on disk."""
        self._store.wait()

    def _variables(self) -> dict[str, list[tuple[str, tf.Variable]]]:
        """Every variable of the training, once, by group, in an order that is the same in every process."""
        model, seen = self._model, set()

        def fresh(variables) -> list[tuple[str, tf.Variable]]:
            rows = []
            for variable in variables:
                raw = doors.raw(variable)
                if id(raw) not in seen:
                    seen.add(id(raw))
                    rows.append((getattr(variable, "path", None) or raw.name.partition(":")[0], raw))
            return rows

        metrics = {id(doors.raw(v)) for v in model.metrics_variables}
        optimizers = [v for optimizer in doors.optimizers(model) for v in optimizer.variables]
        generator = doors.global_seed_generator()
        groups = {
            "model": fresh(v for v in model.variables if id(doors.raw(v)) not in metrics),
            "optimizer": fresh(optimizers),
            "metrics": fresh(model.metrics_variables),
            "seeds": fresh([generator.state] if generator is not None else []),
        }
        groups["others"] = sorted(fresh(self._step_variables), key=lambda row: (row[0], _made(row[1])))
        return groups


# ------------------------------------------------------------------------------------------ callbacks


def _stateful(callbacks: keras.callbacks.CallbackList) -> list[keras.callbacks.Callback]:
    return [c for c in callbacks.callbacks if not isinstance(c, keras.callbacks.ProgbarLogger)]


def _known(callback: keras.callbacks.Callback) -> bool:
    own = callable(getattr(callback, "get_state", None)) and callable(getattr(callback, "set_state", None))
    return own or type(callback) in REMEMBERS


def _has_state(callback: keras.callbacks.Callback) -> bool:
    """Whether it has anything of its own that could change: attributes besides those of every callback."""
    empty = vars(keras.callbacks.Callback())
    if type(callback) is keras.callbacks.LambdaCallback:
        return False
    return any(name not in empty for name in vars(callback))


def _remembered(callback: keras.callbacks.Callback) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for kind, names in REMEMBERS.items():
        if isinstance(callback, kind):
            state["keras"] = {n: _copied(getattr(callback, n)) for n in names if hasattr(callback, n)}
    if callable(getattr(callback, "get_state", None)) and callable(getattr(callback, "set_state", None)):
        state["own"] = _checked(callback, _copied(callback.get_state()))
    return state


def _remind(callback: keras.callbacks.Callback, state: Mapping[str, Any]) -> None:
    for name, value in state.get("keras", {}).items():
        setattr(callback, name, _copied(value))
    if "own" in state:
        callback.set_state(_copied(state["own"]))
    if type(callback) is keras.callbacks.History:
        callback.model.history = callback


def _copied(value: Any) -> Any:
    """The value with arrays of its own, tensors as arrays, and containers that nobody else changes."""
    if isinstance(value, (np.ndarray, tf.Tensor, tf.Variable, keras.Variable)):
        array = np.array(tf.convert_to_tensor(value) if not isinstance(value, np.ndarray) else value)
        return array if array.ndim else array.item()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): _copied(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(inner) for inner in value]
    return value


def _checked(callback: keras.callbacks.Callback, value: Any) -> Any:
    for leaf in keras.tree.flatten(value):
        if not (leaf is None or isinstance(leaf, (bool, int, float, str, np.ndarray))):
            raise TypeError(
                f"`get_state` returns plain values, arrays, and lists and dicts of them. Received: "
                f"{type(leaf).__name__} from {type(callback).__name__}. Return what it can be made from."
            )
    return value


def _floats(logs: Any) -> Any:
    """Logs with plain floats for tensors; what is no number is left out."""
    if isinstance(logs, Mapping):
        return {str(key): _floats(value) for key, value in logs.items()}
    try:
        array = np.asarray(logs)
        return float(array) if not array.ndim else array.astype(np.float64)
    except (TypeError, ValueError):
        return None


# ------------------------------------------------------------------------------------------ surroundings


def _random_states() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, np.array(words, np.int64), gauss],
        "numpy": [kind, np.array(keys, np.int64), int(position), int(has_gauss), float(cached)],
    }


def _set_random_states(states: Mapping[str, Any]) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(int(word) for word in words), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, np.asarray(keys).astype(np.uint32), position, has_gauss, cached))


def _surroundings() -> dict[str, Any]:
    """What the bits depend on besides the code and the data."""
    return {
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "cores": os.cpu_count(),
        "intra_op_threads": tf.config.threading.get_intra_op_parallelism_threads(),
        "inter_op_threads": tf.config.threading.get_inter_op_parallelism_threads(),
        "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS"),
        "floatx": keras.config.floatx(),
        "devices": [d.device_type for d in tf.config.list_logical_devices()],
    }


def _made(variable: tf.Variable) -> int:
    """Grows with each variable that TensorFlow makes; tells those of one name apart."""
    digits = re.search(r"\d+$", str(getattr(variable, "_unique_id", "")))
    return int(digits[0]) if digits else 0


def _plain(name: str) -> str:
    """A name without the numbers that Keras gives the second layer of a kind."""
    return re.sub(r"_\d+(?=/|_|$)", "", name)


def blank(element_spec: Any) -> Any:
    """A batch of one row of zeros, to run an eager step with that only has to make its variables."""

    def zeros(spec):
        optional = isinstance(spec, tf.OptionalSpec)
        return None if optional else tf.zeros([1, *(size or 1 for size in spec.shape[1:])], spec.dtype)

    return keras.tree.map_structure(zeros, element_spec)
