"""fit: epochs, callbacks and validation in Keras's order, around steps that are observed."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from trainrt import doors
from trainrt.clip import Clip
from trainrt.determinism import modes
from trainrt.determinism.digests import Digests
from trainrt.distribution import lockstep
from trainrt.endurance.checkpoint import Checkpoint
from trainrt.experiment import confirmed
from trainrt.loop import arguments
from trainrt.loop.batches import Batches
from trainrt.loop.journal import floats
from trainrt.loop.training import Training
from trainrt.passport import environment
from trainrt.passport.audit import Audit
from trainrt.record.vocabulary import Epoch
from trainrt.record.windows import BUDGET_BYTES
from trainrt.sinks import Sink


def fit(
    model: keras.Model,
    x: Any = None,
    y: Any = None,
    batch_size: int | None = None,
    epochs: int = 1,
    verbose: str | int = "auto",
    callbacks: Any = None,
    validation_split: float = 0.0,
    validation_data: Any = None,
    shuffle: bool = True,
    class_weight: Mapping[int, float] | None = None,
    sample_weight: Any = None,
    initial_epoch: int = 0,
    steps_per_epoch: int | None = None,
    validation_steps: int | None = None,
    validation_batch_size: int | None = None,
    validation_freq: int | Sequence[int] = 1,
    *,
    logdir: str | None = None,
    clip: float | Clip | None = None,
    observe: bool | int = True,
    deterministic: bool | str = False,
    seed: int | None = None,
    digests: bool | int | Digests | None = None,
    sum_duplicates: bool = False,
    trace: tuple[int, int] | str | None = None,
    on_nonfinite: str = "report",
    on_spike: str | None = None,
    sinks: Sequence[Sink] = (),
    record_budget: int = BUDGET_BYTES,
    distance: bool = False,
    experiment: bool | float = False,
    checkpoint: str | os.PathLike | Checkpoint | None = None,
) -> keras.callbacks.History:
    """Trains like `model.fit`, bit for bit, and records what every step does in every layer.

    The arguments up to `validation_freq` are those of `keras.Model.fit`, with the same defaults and meaning.

    Args:
      model: A compiled Keras 3 model on the TensorFlow backend.
      logdir: Directory below which the run writes a directory of its own, for TensorBoard and `trainrt report`. None
        writes nothing; the record is in `history.run` all the same.
      clip: Clips the gradients before they reach the optimizer, and records it: a number is the global norm;
        `trainrt.clip` has others.
      observe: True observes every step, an int n every n-th, False none. It never changes the training.
      deterministic: True trains the same bits each time, on the same machine with the same versions: see
        `trainrt.determinism`. It holds for the process from then on; "xla" compiles with XLA as well.
      seed: Seeds Python, NumPy, TensorFlow and Keras before the first step. Weights that are there already were drawn
        before: `trainrt.determinism.enable(seed)` above the model covers them.
      digests: Exact digests in the record, to prove with and to find where two runs part (`trainrt compare --bits`): an
        int n digests all stages of every n-th step, True all variables now and then, False nothing. None is True when
        `deterministic`, else False.
      sum_duplicates: Adds up the rows that an embedding's gradient has for the same id before the optimizer sees them.
        Keras does not: its Adam, RMSprop or Adagrad then differ from those of the same model with one-hot inputs. The
        update is dense, which on a GPU also keeps a deterministic one on the device.
      trace: A pair (start, stop): steps `start` to `stop - 1` run under TensorFlow's profiler; what it saw is told in
        words, and TensorBoard's Profile tab shows it. "auto": ten steps once the step time has settled, and again
        when steps become slower.
      on_nonfinite: "report" goes on as Keras does and says where the first NaN was. "skip" takes a step back whose
        loss, gradients, update, slots or weights are not finite, as if its batch had not been in the data, and ends the
        training when more than ten in a row are. "stop" takes it back and ends the training.
      on_spike: "skip" or "stop": the same for a step whose loss or gradient norm is 6 standard deviations above the
        mean of the last 128. None lets it be.
      sinks: More places for the record, see `trainrt.sinks.Sink`.
      record_budget: About how many bytes the record may grow to, 256 MiB unless told otherwise. Windows of steps widen
        so that it does not outgrow them; no step is missing in it, and what is abnormal keeps its full resolution.
      distance: Measures how far each weight is from where this fit found it, `run["distance_norm"]`. It keeps a copy of
        the weights.
      experiment: True, or seconds: where findings are left and none is sure, replays a few batches of the data under
        single changes after the training (`trainrt.explain`), and confirms or drops findings by what moved the loss.
      checkpoint: A directory, or a `trainrt.Checkpoint`, for the checkpoints of this training. After a death the same
        call goes on where the newest one was taken, and ends with the bits of a run that never stopped.

    Returns:
      The Keras `History`, with two attributes more: `run`, the `trainrt.Run`, and `findings`, the list of
      `trainrt.Finding`, likeliest root cause first.

    Raises:
      TypeError, ValueError: A bad argument; the message names the remedy. Nothing has been trained or written then.
      RuntimeError: It is too late in this process for deterministic training. Nothing has been trained then.
      OSError: `logdir` cannot be written. Nothing has been trained then.
      NotImplementedError: Asked for something that is not built yet.
    """
    given = {k: v for k, v in locals().items() if k != "model"}
    request = arguments.check(
        model,
        logdir=logdir,
        clip=clip,
        observe=observe,
        deterministic=deterministic,
        trace=trace,
        on_nonfinite=on_nonfinite,
        on_spike=on_spike,
        sinks=sinks,
        record_budget=record_budget,
        distance=distance,
        experiment=experiment,
        seed=seed,
        digests=digests,
        sum_duplicates=sum_duplicates,
        checkpoint=checkpoint,
    )
    mode = modes.enter(model, request.deterministic, request.seed)
    if verbose:
        print(*(f"trainrt: {change}." for change in mode.changes), sep="\n", end="\n" * bool(mode.changes))
    most = keras.config.max_epochs()
    if most and most < epochs:
        warnings.warn(f"Limiting epochs to {most}", stacklevel=2)
        epochs = most

    arrays = not isinstance(x, (tf.data.Dataset, tf.distribute.DistributedDataset))
    lockstep.meet(model, arrays and bool(shuffle), keeping=request.checkpoint is not None)
    doors.set_evaluation_iterator(model, None)
    if validation_split and validation_data is None:
        (x, y, sample_weight), validation_data = doors.split_validation((x, y, sample_weight), validation_split)
    watched = Audit(x, validation_data, shuffle, enabled=bool(request.every))
    batches = Batches(
        model,
        watched=watched.train,
        keeps_position=request.checkpoint is not None,
        x=x,
        y=y,
        sample_weight=sample_weight,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        shuffle=shuffle,
        class_weight=class_weight,
    )
    if batches.num_batches == 0:
        raise ValueError(f"The data is empty: there is no batch to train on. Received: x={environment.described(x)}.")
    arguments.check_trace(trace, batches.num_batches and batches.num_batches * max(epochs - initial_epoch, 0))
    doors.symbolic_build(model, batches)
    batches.reset()

    if not isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = keras.callbacks.CallbackList(
            callbacks,
            add_history=True,
            add_progbar=verbose != 0,
            verbose=verbose,
            epochs=epochs,
            steps=batches.num_batches,
            model=model,
        )
    if model.built:
        arguments.check_trainable(model, request)
    keeper = lockstep.keeper(model, request.checkpoint, batches)
    training = Training(model, batches, callbacks, request, given, watched, mode, keeper, epochs)
    clock = training.timing
    if request.experiment_s:
        shown = {"x": x, "y": y, "sample_weight": sample_weight, "batch_size": batch_size, "shuffle": bool(shuffle)}
        training.journal.judge = lambda found: confirmed(
            found, model, request.experiment_s, bool(verbose), clip=request.clip, **shown
        )
    saving = keeper or contextlib.nullcontext()
    signals = training.signals
    held = contextlib.closing(training)
    with held, watched, signals, training.journal, training.measuring(), training.tracing, saving, signals.answered():
        model.stop_training = False
        model.make_train_function()
        with clock.of("callbacks"):
            callbacks.on_train_begin()
        start = training.start(initial_epoch)
        training_logs = start.logs
        for epoch in range(start.epoch, epochs):
            if not start.within or epoch > start.epoch:
                model.reset_metrics()
                with clock.of("callbacks"):
                    callbacks.on_epoch_begin(epoch)
            epoch_logs = training.epoch(epoch)
            if validation_data is not None and doors.should_evaluate(model, epoch, validation_freq):
                size = validation_batch_size or batch_size
                with clock.of("validation"):
                    validation = _validate(model, validation_data, size, validation_steps, callbacks, watched)
                epoch_logs.update({f"val_{name}": value for name, value in validation.items()})
            with clock.of("callbacks"):
                callbacks.on_epoch_end(epoch, epoch_logs)
            training.ledger.variables(training.step)
            with clock.of("writing"):
                training.journal.epoch(Epoch(epoch, training.step - 1, floats(epoch_logs)))
                training.time(only_if_due=True)
            training_logs = epoch_logs
            if verbose:
                training.journal.tell()
            ends = training.ends()
            training.ended_epoch(epoch_logs)
            if ends:
                break
        with clock.of("probe"):
            training.probe.end(training.step)
        if isinstance(model.optimizer, keras.optimizers.Optimizer) and epochs > 0:
            model.optimizer.finalize_variable_values(model.trainable_weights)
        doors.drop_evaluation_iterator(model)
        with clock.of("callbacks"):
            callbacks.on_train_end(logs=training_logs)
        training.finished()
    history = model.history
    history.run, history.findings = training.journal.run, training.journal.findings
    if verbose:
        training.journal.show()
    return history


def _validate(model, data, batch_size, steps, callbacks, watched: Audit) -> dict[str, float]:
    x, y, sample_weight = doors.unpack(data)
    arrays = {"x": x, "y": y, "sample_weight": sample_weight, "batch_size": batch_size}
    if doors.evaluation_iterator_of(model) is None:
        doors.set_evaluation_iterator(model, doors.evaluation_iterator(model, steps_per_epoch=steps, **arrays))
    with watched.validating(doors.evaluation_iterator_of(model)):
        return doors.evaluate(model, steps=steps, callbacks=callbacks, **arrays)
