"""The steps of one fit: how many run in one call, and who is told of them."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from trainrt import doors
from trainrt.determinism import modes, preflight
from trainrt.determinism.digests import Ledger
from trainrt.device import timing
from trainrt.device.phases import Scopes
from trainrt.device.retracing import Retracing
from trainrt.device.telemetry import Telemetry
from trainrt.device.trace import Tracing
from trainrt.device.trace import step as marked_step
from trainrt.distribution import replicas
from trainrt.distribution.lockstep import Lockstep
from trainrt.endurance import resume
from trainrt.endurance.poison import Guard
from trainrt.endurance.resume import Keeper, Start
from trainrt.endurance.signals import Signals
from trainrt.looks.probe import Cost, Prober
from trainrt.loop import arguments, stopping
from trainrt.loop.arguments import Request
from trainrt.loop.batches import Batches, Execution
from trainrt.loop.journal import Journal, Resumed
from trainrt.loop.pace import Pace, listens_to_batches
from trainrt.loop.step import Step
from trainrt.passport import environment
from trainrt.passport.audit import Audit
from trainrt.update import fused, native


def _own_memory() -> list[dict[str, float]]:
    """What TensorFlow itself has allocated on each GPU, and the most so far."""
    found = []
    for device in tf.config.list_logical_devices("GPU"):
        told = tf.config.experimental.get_memory_info(device.name.removeprefix("/device:"))
        found.append({"tf_bytes": float(told["current"]), "tf_peak_bytes": float(told["peak"])})
    return found


def _column(vectors: tf.Tensor, scalars: Sequence[str], name: str) -> np.ndarray:
    """[steps] a scalar, which stand last in the vectors; NaN where it is not measured."""
    rows = vectors.numpy()
    return rows[:, scalars.index(name) - len(scalars)] if name in scalars else np.full(len(rows), np.nan)


class Training:
    """Runs the steps of one `fit`, in calls of many steps where nobody listens to each.

    Attributes:
      step: Number of the next step in the run.
      journal: Where the record goes.
    """

    def __init__(
        self,
        model: keras.Model,
        batches: Batches,
        callbacks: keras.callbacks.CallbackList,
        request: Request,
        given: Mapping[str, Any],
        watched: Audit,
        mode: modes.Mode,
        keeper: Keeper | None,
        epochs: int,
    ):
        self._model = model
        self._batches = batches
        self._callbacks = callbacks
        self._given = given
        self._mode = mode
        self._preflight: dict[str, Any] | None = None
        self._request = request
        self._keeper = keeper
        self._epochs = epochs
        self._epoch = 0
        self._epoch_logs: dict | None = None
        self._poison: list[dict[str, Any]] = []
        self._halted = False
        self._step: Step | None = None
        self._logs: Any = {}
        self.step = 0
        self._begun_with: str | None = None
        self._surroundings = environment.Surroundings()
        self.ledger = Ledger(request.digests, model, self._write_digests)
        self._lockstep = Lockstep(model) if replicas.several(model.distribute_strategy) else None
        if self._lockstep is not None:
            self._lockstep.check(steps=batches.num_batches, epochs=given["epochs"], every=request.every)
        writes = self._lockstep is None or self._lockstep.seat.worker == 0
        together = self._lockstep is not None and self._lockstep.seat.workers > 1
        self._pace = Pace(together)
        self.signals = Signals(keeper is not None or request.logdir is not None, together)
        resumed = None
        if keeper is not None and (begun := keeper.start()) is not None:
            resumed = Resumed(keeper.run, keeper.step, begun.stopped or begun.epoch >= epochs)
        self.journal = Journal(
            request.logdir if writes else None,
            request.sinks if writes else (),
            watched,
            self._weights,
            resumed,
            request.record_budget,
        )
        self.journal.unbegun = self._open_unbegun
        self.retracing = Retracing(lambda: self.step)
        self.timing = timing.Timing(timing.kind(given["x"]), timing.stages(given["x"]))
        self.probe = Prober(
            model,
            lambda: batches.arrays,
            watched.train.first_rows,
            self.journal.document,
            enabled=bool(request.every) and self._lockstep is None,
        )
        asked, path = request.trace, self.journal.path
        seat = self._lockstep.seat if self._lockstep else None
        if seat is not None and seat.workers > 1:
            if asked == "auto":
                warnings.warn(
                    "`trace='auto'` traces nothing among several workers: each would choose other steps. Name them: "
                    "trace=(start, stop).",
                    stacklevel=3,
                )
                asked = None
            if seat.worker and request.logdir is not None:
                path = Path(request.logdir) / f"worker-{seat.worker}"  # a trace of its own, in a place of its own
        self.tracing = Tracing(asked, path, self.journal.document, self._scopes, model.steps_per_execution)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Watches the machine and the clock while the context lasts, where anything is observed."""
        if not self._request.every:
            yield
            return
        try:
            with (
                Telemetry(self.journal.document, lambda: self.step, self.timing.glance, _own_memory),
                self.retracing.watch(),
            ):
                yield
        finally:
            self.time()

    def close(self) -> None:
        """Lets go of the data: the parts of a training refer to each other, and go when Python collects such cycles."""
        self._batches.close()
        self._given = {}

    def time(self, only_if_due: bool = False) -> None:
        """Tells where the time went so far."""
        if self._request.every and (self.timing.due or not only_if_due):
            told = {**self.timing.told(), "retraced": self.retracing.told()}
            self.journal.document("timing", lambda: told)

    def start(self, initial_epoch: int) -> Start:
        """Where to begin: where the caller says, or where a checkpoint was taken, with everything as it was there."""
        model, keeper = self._model, self._keeper
        if keeper is not None:
            keeper.began(self._callbacks)
            start = keeper.start()
            if start is not None:
                self._build()
                if start.within:
                    self._callbacks.on_epoch_begin(start.epoch)
                self._logs = keeper.restore(self._callbacks)
                self.step, self._epoch_logs = keeper.step, start.logs
                self._poison = keeper.poison
                if self._step is not None and self._step.guard is not None:
                    self._step.guard.go_on()
                self._begun_with = self._weights()
                return start._replace(epoch=self._epochs) if start.stopped else start
        return Start(doors.initial_epoch(model, initial_epoch), False, None, False)

    def _build(self) -> None:
        """Makes every variable of the training, whose values are about to be put back."""
        if self._model.run_eagerly or doors.makes_own_train_function(self._model):
            batch = resume.blank(self._batches.element_spec)
            self._model.train_step(batch)
        if not doors.makes_own_train_function(self._model):
            self._step = self._prepared(self._batches)

    def ended_epoch(self, logs: dict) -> None:
        """The epoch is over, its validation and callbacks too."""
        self._epoch_logs = logs
        if self._keeper is not None:
            with self.timing.of("writing"):
                self._save(within=False)
        self.signals.answer()

    def _between(self) -> None:
        """Two steps meet: saves if it is due, or if a signal came, and ends then."""
        keeper, asked = self._keeper, self.signals.asked
        if keeper is not None and (keeper.due(self.step) or (asked and keeper.unsaved(self.step))):
            with self.timing.of("writing"):
                self._save(within=True)
        self.signals.answer()

    def _save(self, within: bool) -> None:
        assert self._keeper is not None
        self._keeper.save(
            epoch=self._epoch,
            step=self.step,
            within=within,
            logs=self._epoch_logs,
            last=self._logs,
            stopped=bool(self._model.stop_training),
            poison=self._poison,
            journal=self.journal,
        )

    def epoch(self, number: int) -> dict:
        """Trains on one epoch, or what is left of it; returns its logs as Keras reports them."""
        self._epoch = number
        model, callbacks, per = self._model, self._callbacks, self._model.steps_per_execution
        epoch = self._batches.epoch()
        place = next(epoch, None)
        while place is not None:
            self._between()
            with self.timing.of("callbacks"):
                callbacks.on_train_batch_begin(place.begin)
            executions = self._executions(place)
            before = self.step
            self.signals.waits = self.step > 0
            count = self._run(place, executions * per)
            self.ledger.took(before, self.step)
            ran = math.ceil(count / per)
            if ran < executions and not self._halted:
                self._overrun(place.iterator)
            if ran:
                with self.timing.of("callbacks"):
                    callbacks.on_train_batch_end(place.begin + ran * per - 1, self._logs)
                self._keep_together()
                if model.stop_training:
                    break
            try:
                place = epoch.send((ran, ran < executions))
            except StopIteration:
                place = None
        if self._keeper is None:
            self.signals.answer()
            self.signals.waits = False
        with self.timing.of("trace"):
            self.tracing.stop()
        if not self.step:
            raise ValueError(
                "The data ended before the first batch, so nothing was trained. "
                f"Received: x={environment.described(self._given['x'])}."
            )
        self._keep_together(at_once=True)
        return doors.epoch_logs(model, self._logs)

    def _keep_together(self, at_once: bool = False) -> None:
        """Where several replicas train: compares them, and settles with the other workers what comes next."""
        together = self._lockstep
        if together is None:
            return
        if together.compare(self.step - 1, at_once):
            self._tell_of_replicas(together)
        self._settle(together)

    def _settle(self, together: Lockstep) -> None:
        self.signals.agreed = together.settle(self._wanted(), self.signals.came)

    def _tell_of_replicas(self, together: Lockstep) -> None:
        content = together.content()
        self.journal.document("replicas", lambda: content)

    def ends(self) -> bool:
        """Whether `stop_training` is set, by a callback of any worker."""
        if self._lockstep is not None:
            if (told := self._lockstep.workers(self.step - 1)) is not None and self._request.every:
                self.journal.document("workers", lambda: told)
            self._settle(self._lockstep)
        return bool(self._model.stop_training)

    def finished(self) -> None:
        """The training came to its end."""
        if self._lockstep is not None:
            self._tell_of_replicas(self._lockstep)
        if self._model.stop_training:
            who = ["on_nonfinite or on_spike"] if self._halted else stopping.stoppers(self._callbacks.callbacks)
            self.journal.stopped(" or ".join(who))

    def _overrun(self, iterator) -> None:
        """Runs Keras's own step once into the end of the data, as Keras does when it does not know where that is.

        The step fails for want of a batch, but what does not depend on one has happened by then:
        `optimizer.iterations` is one higher, seeds have moved on, weights have decayed once more (seen in Keras 3.12 to
        3.15). Whoever wants the same bits needs the same step too much.
        """
        model = self._model
        if self._step is None or model.run_eagerly or model.steps_per_execution > 1:
            return
        if model.distribute_strategy.num_replicas_in_sync == 1:
            with contextlib.suppress(StopIteration, tf.errors.OutOfRangeError):
                model.train_function(iterator)

    def _executions(self, place: Execution) -> int:
        """How many executions to run before Python is needed again."""
        agreed = self._lockstep.calls if self._lockstep else None
        executions = self._wanted() if agreed is None else agreed
        return executions if place.available is None else min(executions, place.available)

    def _wanted(self) -> int:
        """How many executions this process would run in one call."""
        if listens_to_batches(self._callbacks) or doors.makes_own_train_function(self._model):
            return 1
        first = self._step.most if self._step else 1
        steps = min(self._pace.steps, first, self.probe.room(self.step), self.tracing.room(self.step))
        if self._keeper is not None:
            steps = min(steps, self._keeper.until_due(self.step) or steps)
        return max(1, self.ledger.most(self.step, steps) // self._model.steps_per_execution)

    def _run(self, place: Execution, count: int) -> int:
        """Runs up to `count` steps and records them; returns how many ran before the data ended."""
        if doors.makes_own_train_function(self._model):
            return self._run_own(place.iterator, count)
        if self._step is None:
            with self.timing.of("first_call"):
                self._step = self._prepared(place.iterator)
            self._begun_with = self._weights()
        with self.timing.of("probe"):
            self.probe.before(self.step)
        with self.timing.of("trace"):
            singly, marked = self.tracing.singly(self.step), self.tracing.begin(self.step)
        begun = time.time()
        try:
            outcome = self._step.run(place.iterator, self.step, count, singly, marked, self.timing.clocks)
        except tf.errors.OutOfRangeError:
            return 0
        ended = time.time()
        if not singly:
            self._pace.took(outcome.steps, ended - begun)
        if outcome.steps:
            self._logs = outcome.logs
            times = self.timing.call(self.step, outcome.steps, begun, ended, outcome.clock, singly)
            with self.timing.of("first_call"):
                self._open()
            if self._lockstep is not None and outcome.vectors is not None and self._step and self._step.roster:
                self._lockstep.took(times, _column(outcome.vectors, self._step.roster.scalars, replicas.REDUCE))
            if outcome.digests is not None and self._step:
                self.ledger.rows(self._step.digest_names, self.step, outcome.digests)
            if outcome.vectors is not None:
                with self.timing.of("writing"):
                    self.journal.push(self.step, self._step.every, outcome.vectors, begun, ended, times)
            self.step += outcome.steps
            with self.timing.of("trace"):
                self.tracing.took(self.step, outcome.steps, ended - begun)
            with self.timing.of("probe"):
                self.probe.after(self.step, outcome.steps)
            self._tell_of_poison(place, outcome.steps)
        return outcome.steps

    def _tell_of_poison(self, place: Execution, ran: int) -> None:
        """Writes down which batches were taken back, and ends the training where that was one too many."""
        guard = self._step.guard if self._step else None
        if guard is None or not (news := guard.news()):
            return
        first = self.step - ran
        self._poison += [
            {"step": t.step, "epoch": self._epoch, "batch": place.begin + t.step - first, "why": t.why} for t in news
        ]
        self._halted = bool(guard.halted)
        content = {"taken_back": self._poison[-1000:], "count": len(self._poison), "ended": self._halted}
        self.journal.document("poison", lambda: content)
        if self._halted:
            self._model.stop_training = True
            last = self._poison[-1]
            print(
                f"trainrt: the training ends: batch {last['batch']} of epoch {last['epoch'] + 1} was taken back "
                f"({last['why']}). {guard.described()}",
                flush=True,
            )

    def _prepared(self, iterator) -> Step:
        """The step, traced; that of an earlier fit when the model is still as it was compiled then."""
        function = self._model.train_function
        wanted = self._request
        key = (wanted.clip, wanted.every, wanted.digests, wanted.sum_duplicates)
        more = wanted.distance, self._lockstep is not None and self._batches.uneven
        asked = (wanted.on_nonfinite, wanted.on_spike)
        guarded = asked != arguments.UNGUARDED
        made = getattr(function, "_trainrt", None)
        anew = made is None or made[0] != (key, asked, more)
        if anew:
            if type(self._model.optimizer) in fused.RULES:
                doors.build_optimizer(self._model)
            if self._given["verbose"] and native.status().pending:
                print("trainrt: building its native kernels for this machine, once; about 10 s.", flush=True)
            step = Step(self._model, *key, Guard(self._model, *asked) if guarded else None, *more)
            function._trainrt = ((key, asked, more), step, Cost())
        step, self.probe.cost = function._trainrt[1:]
        self.timing.clock_s = step.clock_s
        if step.guard:
            step.guard.reset()
        if step.origins:
            step.origins.reset()
        step.prepare(iterator.element_spec)
        if anew and self._given["verbose"]:
            for name, path in step.paths.items():
                how = "in one fused pass" if path == "fused" else f"by its own apply ({path})"
                print(f"trainrt: the optimizer {name} updates {how}.", flush=True)
        if self._request.deterministic:
            graph = step.graph(iterator.element_spec)
            self._preflight = preflight.before_training(self._model, graph, iterator.element_spec, self._mode.xla)
        if not self._model.run_eagerly:
            arguments.check_trainable(self._model, self._request)
        if self._keeper is not None:
            self._keeper.traced(step.variables, step.operations)
        return step

    def _open_unbegun(self) -> None:
        """Opens the record of a training that failed before it could be opened: what was asked for may say why."""
        roster = self._step.roster if self._step else None
        self.journal.open(roster, lambda: environment.passport(self._model, self._given))

    def _open(self) -> None:
        """Opens the record, once the step has been traced (or has run, when eager) and its weights are known."""
        if self.journal.open_already:
            return
        arguments.check_trainable(self._model, self._request)
        unseen = self._step.unseen if self._step else "the model has a train function of its own"
        if unseen and self._request.every:
            warnings.warn(
                f"trainrt does not observe this run, it only trains it: {unseen}. No gradients are recorded.",
                stacklevel=5,
            )
        roster = self._step.roster if self._step else None
        passport = {
            **environment.passport(self._model, self._given),
            "observed": roster is not None,
            "unobserved": unseen,
            "updates": self._step.paths if self._step else {},
            "weights_digest": self._begun_with,
        }

        def whole():
            known = {**passport, **self._surroundings.answers()}
            return {**known, "determinism": modes.passport(self._mode, self._model, known, self._given)}

        self.journal.open(roster, whole)
        if self._preflight is not None:
            told = self._preflight
            self.journal.document("preflight", lambda: told)

    def _write_digests(self, describe) -> None:
        self.journal.document("digests", describe)

    def _scopes(self) -> Scopes:
        return self._step.scopes() if self._step else Scopes()

    def _weights(self) -> str | None:
        """Digest of the weights as they are; None where nothing is recorded, or they are not built yet."""
        return environment.weights_digest(self._model) if self._request.every else None

    def _run_own(self, iterator, count: int) -> int:
        """One execution of a `train_function` that the user made."""
        begun = time.time()
        try:
            with marked_step(self.step, self.tracing.begin(self.step)):
                self._logs = self._model.train_function(iterator)
        except (StopIteration, tf.errors.OutOfRangeError):
            return 0
        self._open()
        self.probe.before(self.step)
        self.step += count
        self.tracing.took(self.step, count, time.time() - begun)
        self.probe.after(self.step, count)
        return count
