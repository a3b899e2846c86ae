"""Every private name of Keras that trainrt uses, each behind one function of this file.

Nothing else in the package touches a name of Keras that begins with an underscore or lives under `keras.src`, but for
`fused.py`: it stands in for optimizers whose source it was matched with, and `matched.py` checks that it still is.
Supported: Keras 3.12 to 3.15, each checked with Keras's own tests.

| private name | used for | what would replace it |
|---|---|---|
| `TensorFlowTrainer` | is it a model that `fit` can train; is its `make_train_function` its own; where `fit` is taken over in a script | a public trainer protocol |
| `data_adapters.get_data_adapter` | x, y, sample_weight to the dataset that `Model.fit` reads | a public `keras.utils` function for it |
| `ArrayDataAdapter` and four of its attributes, `array_slicing.convert_to_sliceable` | arrays that the loop reads itself; without them, Keras's dataset | nothing, it only saves time |
| that `ArrayDataAdapter.get_tf_dataset` maps the order of an epoch's rows first | the data passport of arrays costs no call of Python for each batch | nothing, it only saves time |
| `TFDatasetAdapter` | can a checkpoint go back into the source | nothing |
| `global_state` and its `"global_seed_generator"` | the state of `keras.random` without a seed, in a checkpoint and in digests | a public `keras.random` function |
| `array_slicing.train_validation_split` | `validation_split` | the same |
| `data_adapter_utils.unpack_x_y_sample_weight` | `validation_data` | `keras.utils.unpack_x_y_sample_weight`, for tuples only |
| `TFEpochIterator`, its `_distributed_dataset`, `model._eval_epoch_iterator` | `evaluate` inside `fit` builds its dataset once, and is watched | a public way to pass an iterator to `evaluate` |
| `model._assert_compile_called` | the error for a model that is not compiled | `model.compiled`, with a text of our own |
| `model._maybe_symbolic_build` | builds a model that was made under a `tf.distribute` strategy | nothing yet |
| `model._initial_epoch` | where `BackupAndRestore` wants to go on | an argument of the callback |
| `model._get_metrics_result_or_logs`, `model._should_eval` | logs of an epoch, `validation_freq` | 15 lines of our own |
| `reduce_per_replica` | logs of several replicas to one; repaired for several workers, with `_maybe_symbolic_build` | `Strategy.reduce`; a Keras that works there |
| `model._aggregate_additional_loss` | tells the data loss from `add_loss` and regularisers | a public hook in `compute_loss` |
| `model._jit_compile` | what `compile` was asked for, before `jit_compile` resolves it; XLA with determinism, which the setter refuses | an argument of `compile` |
| `model._compile_loss` | the loss of some predictions, without regularisers | `compute_loss` less `model.losses` |
| `model._compile_loss._user_loss`, `model._compile_metrics._user_metrics` | what `compile` was given, for the passport | `model.get_compile_config` |
| `layer._flatten_layers`, `layer._call_has_training_arg` | every layer at any depth; a forward pass that shows its output | a public `keras.Layer.layers` for layers too |
| `tensor._keras_history` | which layer makes an output | a public name for it |
| `map_op._MapDataset` of TensorFlow | the data passport of a pipeline takes 40 us less a batch | nothing, it only saves time |
| `context._rng` of TensorFlow | a pass draws none of the op seeds that are drawn after it | a public name for it |
| `optimizer._distribution_strategy`, `LossScaleOptimizer._common_apply`, `Strategy.extended._use_merge_call` | updates one replica as if it were alone, with `tf.cond` and gradient accumulation | an `apply` that takes reduced gradients, as Keras 2 had |
| `losses.loss.scale_loss_for_distribution`, `unscale_loss_for_distribution` | a replica's loss counts by its share of the batch | a public question to the strategy |
| `SeedGenerator.next` | other dropout masks on each replica | a seed of each replica's own in Keras |
| `optimizer._get_current_learning_rate` | an experiment with another rate, whatever it comes from | a setter that takes a schedule back |
| `optimizer._use_weight_decay`, `_apply_weight_decay` | which weights decay, and whether as in Keras | a public question |
| `optimizer._clip_gradients` | updates weights with sparse gradients beside a fused update, as `apply` does | an `apply` for some of the weights |
| `optimizer._trainable_variables`, its per-variable lists | pairs slots with weights | public slot names |
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

if keras.backend.backend() != "tensorflow":
    raise RuntimeError(
        f"trainrt trains on Keras's TensorFlow backend. Received: KERAS_BACKEND={keras.backend.backend()!r}. "
        "Set KERAS_BACKEND=tensorflow in the environment before keras is imported."
    )

import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.backend.tensorflow import trainer as tf_trainer
from keras.src.losses import loss as loss_module
from keras.src.trainers import data_adapters
from keras.src.trainers.data_adapters import array_data_adapter, array_slicing, data_adapter_utils
from tensorflow.python.eager import context as tf_context

_GLOBAL_SEED_GENERATOR = "global_seed_generator"  # Keras 3.12 has no name for it


def is_trainer(model: Any) -> bool:
    """Whether `model` has Keras's `fit` on TensorFlow: a `keras.Model`, or a layer with the trainer mixed in."""
    return isinstance(model, tf_trainer.TensorFlowTrainer)


def assert_compiled(model: keras.Model) -> None:
    """Raises Keras's own ValueError for a model that is not compiled."""
    model._assert_compile_called("fit")


def makes_own_train_function(model: keras.Model) -> bool:
    """Whether the user's `make_train_function`, or a `train_function` set by hand, stands in for Keras's."""
    if type(model).make_train_function is not tf_trainer.TensorFlowTrainer.make_train_function:
        return True
    function = model.train_function
    return function is not None and not (
        inspect.isfunction(function) and function.__code__.co_filename == tf_trainer.__file__
    )


def data_adapter(**arguments):
    """Keras's adapter of x, y, sample_weight; has get_tf_dataset, num_batches, on_epoch_begin and on_epoch_end."""
    return data_adapters.get_data_adapter(**arguments)


def dense_arrays(adapter, most_bytes: int, batch_bytes: int) -> tuple[Any, int, int, bool] | None:
    """What an adapter of arrays holds, as dense tensors on the host: (arrays, samples, batch size, shuffle).

    None for an adapter of anything else, for sparse or ragged arrays, for shuffling within batches, and for more bytes
    in all or in a batch than given.
    """
    if type(adapter) is not array_data_adapter.ArrayDataAdapter or adapter._shuffle == "batch":
        return None
    samples, batch_size = adapter._num_samples, adapter._batch_size
    sizes = [getattr(a, "nbytes", most_bytes + 1) for a in keras.tree.flatten(adapter._inputs) if a is not None]
    if sum(sizes) > most_bytes or sum(sizes) * batch_size > batch_bytes * samples:
        return None
    with tf.device("CPU"):
        arrays = keras.tree.lists_to_tuples(
            array_slicing.convert_to_sliceable(adapter._inputs, target_backend="tensorflow")
        )
        leaves = keras.tree.flatten(arrays)
        if not all(a is None or isinstance(a, (np.ndarray, tf.Tensor)) for a in leaves):
            return None
        arrays = keras.tree.map_structure(lambda a: None if a is None else tf.convert_to_tensor(a), arrays)
    return arrays, samples, batch_size, bool(adapter._shuffle)


def host_arrays(adapter) -> tuple[Any, int] | None:
    """(arrays, batch size) of an adapter of dense arrays on the host, as they were given; None for anything else.

    A memory map is something else: whoever looks at all of it reads a file.
    """
    if type(adapter) is not array_data_adapter.ArrayDataAdapter or adapter._shuffle == "batch":
        return None
    leaves = [a for a in tf.nest.flatten(keras.tree.lists_to_tuples(adapter._inputs)) if a is not None]
    on_host = [
        (type(a) is np.ndarray and a.dtype.kind in "fiub")
        or (isinstance(a, tf.Tensor) and hasattr(a, "numpy") and "CPU" in a.device)
        for a in leaves
    ]
    return (keras.tree.lists_to_tuples(adapter._inputs), adapter._batch_size) if leaves and all(on_host) else None


def dataset_telling_order(adapter, tell: Callable[[np.ndarray], None]) -> tf.data.Dataset | None:
    """Keras's dataset over arrays, which tells the order of the rows, [rows] int64, when somebody begins to read it.

    Its elements are those of `get_tf_dataset`. None where Keras does not make the order first.
    """
    mapped = tf.data.Dataset.map
    telling: list[tf.TensorSpec] = []

    def told(order):
        tf.numpy_function(tell, [order], [])
        return order

    def mapping(dataset, *arguments, **keywords):
        result = mapped(dataset, *arguments, **keywords)
        spec = result.element_spec
        if telling or not isinstance(spec, tf.TensorSpec) or spec.dtype != tf.int64 or spec.shape.rank != 1:
            return result
        telling.append(spec)
        return mapped(result, tf.autograph.experimental.do_not_convert(told))

    tf.data.Dataset.map = mapping
    try:
        dataset = adapter.get_tf_dataset()
    finally:
        tf.data.Dataset.map = mapped
    return dataset if telling and telling[0].shape[0] == adapter._num_samples else None


def mapped_by_one_thread(dataset: tf.data.Dataset, function: Callable) -> tf.data.Dataset:
    """`dataset.map(function)` whose operations run one after the other in the thread that asks for the element."""
    try:
        from tensorflow.python.data.ops import map_op

        return map_op._MapDataset(dataset, function, use_inter_op_parallelism=False, force_synchronous=True)
    except (ImportError, AttributeError, TypeError):
        return dataset.map(function)


def is_over_arrays(adapter) -> bool:
    """Whether an adapter reads arrays."""
    return type(adapter) is array_data_adapter.ArrayDataAdapter


def shuffles_within_batches(adapter) -> bool:
    """Whether an adapter of arrays was given `shuffle="batch"`."""
    return adapter._shuffle == "batch"


def reads_python(adapter) -> bool:
    """Whether an adapter calls Python for each batch: a generator, a `PyDataset`, a loader of PyTorch."""
    return not isinstance(adapter, (array_data_adapter.ArrayDataAdapter, data_adapters.TFDatasetAdapter))


def source_name(adapter) -> str:
    """What an adapter adapts, for a message: "generator", "py dataset"."""
    words = re.findall("[A-Z][a-z]*", type(adapter).__name__.removesuffix("Adapter").removesuffix("Data"))
    return " ".join(words).lower()


def global_seed_generator():
    """Keras's own seed generator, for random ops that were given none; None as long as nobody asked for it."""
    return global_state.get_global_attribute(_GLOBAL_SEED_GENERATOR)


def distributed(model: keras.Model, dataset):
    """The dataset as the model's strategy reads it."""
    if isinstance(dataset, tf.distribute.DistributedDataset):
        return dataset
    return model.distribute_strategy.experimental_distribute_dataset(dataset)


def split_validation(arrays, share: float):
    return array_slicing.train_validation_split(arrays, validation_split=share)


def unpack(data):
    return data_adapter_utils.unpack_x_y_sample_weight(data)


def evaluation_iterator(model: keras.Model, **arguments):
    """What `evaluate` reads when it is called from `fit`: built once, used each time."""
    return tf_trainer.TFEpochIterator(
        distribute_strategy=model.distribute_strategy,
        steps_per_execution=model.steps_per_execution,
        shuffle=False,
        **arguments,
    )


def evaluation_dataset(iterator):
    """The dataset of an iterator that `evaluation_iterator` made; None where it has none."""
    return getattr(iterator, "_distributed_dataset", None)


def set_evaluation_dataset(iterator, dataset) -> None:
    """From the next `iter` on it reads another dataset of the same elements."""
    iterator._distributed_dataset = dataset


def set_evaluation_iterator(model: keras.Model, iterator) -> None:
    model._eval_epoch_iterator = iterator


def evaluation_iterator_of(model: keras.Model):
    return getattr(model, "_eval_epoch_iterator", None)


def drop_evaluation_iterator(model: keras.Model) -> None:
    if getattr(model, "_eval_epoch_iterator", None) is not None:
        del model._eval_epoch_iterator


def evaluate(model: keras.Model, **arguments) -> dict[str, float]:
    """`model.evaluate`, the user's if it is overridden, on the iterator that was set."""
    return model.evaluate(return_dict=True, _use_cached_eval_dataset=True, **arguments)


def has_keras_train_step(model: keras.Model) -> bool:
    """Whether the train step is Keras's own."""
    return type(model).train_step is tf_trainer.TensorFlowTrainer.train_step


def symbolic_build(model: keras.Model, batches) -> None:
    """Builds a model made under a strategy, from one batch; any other is built while its step is traced."""
    model._maybe_symbolic_build(iterator=batches)


def repair_workers() -> None:
    """Makes `evaluate`, `predict` and the building of a model work among several workers, in this process for good.

    Two functions of Keras 3.12 to 3.15 raise there, always: one takes the mean of a whole batch as if it were one
    tensor, the other reduces scalars along their first axis. Both are as they were in every other case.
    """
    build, reduce = tf_trainer.TensorFlowTrainer._maybe_symbolic_build, tf_trainer.reduce_per_replica
    if getattr(build, "_trainrt", False):
        return

    @functools.wraps(build)
    def built(self, iterator=None, data_batch=None):
        strategy = self._distribute_strategy
        if strategy is None or not _of_workers(strategy):
            return build(self, iterator, data_batch)
        for _, _, batches in () if iterator is None else iterator:
            first = next(batches)
            data_batch = keras.tree.map_structure(lambda v: strategy.experimental_local_results(v)[0], first)
            break
        with strategy.scope():
            return self._symbolic_build(data_batch=data_batch)

    @functools.wraps(reduce)
    def reduced(values, strategy, reduction):
        if reduction not in ("auto", "mean", "sum") or not _of_workers(strategy):
            return reduce(values, strategy, reduction)
        operation = "SUM" if reduction == "sum" else "MEAN"
        return keras.tree.map_structure(lambda v: strategy.reduce(operation, v, axis=None), values)

    built._trainrt = True  # type: ignore[attr-defined]
    tf_trainer.TensorFlowTrainer._maybe_symbolic_build, tf_trainer.reduce_per_replica = built, reduced


def global_seed() -> int | None:
    """What `tf.random.set_seed` was given."""
    return tf_context.global_seed()


def _of_workers(strategy) -> bool:
    return tf_trainer._collective_all_reduce_multi_worker(strategy)


def made_under_strategy(model: keras.Model) -> bool:
    return model._distribute_strategy is not None


def initial_epoch(model: keras.Model, epoch: int) -> int:
    return model._initial_epoch or epoch


def epoch_logs(model: keras.Model, logs) -> dict:
    return dict(model._get_metrics_result_or_logs(logs))


def should_evaluate(model: keras.Model, epoch: int, validation_freq) -> bool:
    return model._should_eval(epoch, validation_freq)


def reduce_logs(values, strategy):
    return tf_trainer.reduce_per_replica(values, strategy, reduction="auto")


def build_optimizer(model: keras.Model) -> None:
    """Builds the optimizer as its first `apply` would, where that is sure to get all weights of the model.

    A step whose trace makes variables is traced twice by TensorFlow; one that finds them is traced once. Only for an
    optimizer whose `build` does nothing but make variables: what else it does in the trace of Keras's own fit is thrown
    away with that trace (`ScheduleFreeAdamW` means to start its momentum from the weights, and does not).
    """
    optimizer, kind = model.optimizer, type(model)
    sure = model.built and kind.__module__.startswith("keras.") and has_keras_train_step(model)
    if sure and model.trainable_weights and isinstance(optimizer, keras.optimizers.Optimizer) and not optimizer.built:
        with keras.name_scope(optimizer.name, caller=optimizer):
            optimizer.build(model.trainable_weights)
        optimizer.built = True


def global_seed_state():
    """The state of the seed generator that `keras.random` uses where it is given no seed; None: there is none yet."""
    generator = global_seed_generator()
    return None if generator is None else generator.state


@contextlib.contextmanager
def scaled_rate(optimizer: keras.optimizers.Optimizer, factor: float) -> Iterator[None]:
    """The learning rate times a factor, be it a variable, a schedule or a function, for what is traced inside."""
    current = optimizer._get_current_learning_rate
    with rate_from(optimizer, lambda: current() * factor):
        yield


@contextlib.contextmanager
def rate_from(optimizer: keras.optimizers.Optimizer, rate: Callable[[], Any]) -> Iterator[None]:
    """The learning rate is what a function says, for what is traced inside."""
    before = optimizer.__dict__.get("_get_current_learning_rate")
    optimizer.__dict__["_get_current_learning_rate"] = rate
    try:
        yield
    finally:
        del optimizer.__dict__["_get_current_learning_rate"]
        if before is not None:
            optimizer.__dict__["_get_current_learning_rate"] = before


def dropouts(model: keras.Model) -> list[tuple[Any, str]]:
    """(layer or cell, attribute) of every rate above zero at which a model drops units or multiplies noise in."""
    found = []
    for layer in layers_of(model):
        for owner in (layer, getattr(layer, "cell", None)):
            kind = type(owner).__name__
            for name in ("rate", "dropout", "recurrent_dropout"):
                value = vars(owner).get(name) if owner is not None else None
                drops = "Dropout" in kind if name == "rate" else True
                if drops and isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
                    found.append((owner, name))
    return found


@contextlib.contextmanager
def without_dropout(model: keras.Model) -> Iterator[None]:
    """Nothing is dropped in what is traced inside."""
    before = [(owner, name, vars(owner)[name]) for owner, name in dropouts(model)]
    for owner, name, _ in before:
        owner.__dict__[name] = 0.0
    try:
        yield
    finally:
        for owner, name, rate in before:
            owner.__dict__[name] = rate


def fit_owner() -> Any:
    """The class that `model.fit` comes from, for a script whose calls of it are taken over."""
    return tf_trainer.TensorFlowTrainer


def layers_of(model: keras.Model) -> list[keras.Layer]:
    """Every layer of a model at any depth, the model first."""
    return list(model._flatten_layers())


def jit_asked_for(model: keras.Model) -> bool | None:
    """Whether XLA compiles the step as things stand; None: Keras decides when it is first asked."""
    return model._jit_compile


def set_jit(model: keras.Model, value: bool) -> None:
    """Sets `jit_compile` past its setter, which refuses XLA in deterministic mode; a step made before is made anew."""
    if model._jit_compile is not value:
        model._jit_compile = value
        model.train_function = model.test_function = model.predict_function = None


def traced_functions(model: keras.Model) -> list[str]:
    """The names of those of a model's functions that were made already, and may have been traced."""
    names = ("train_function", "test_function", "predict_function")
    return [name for name in names if getattr(model, name, None) is not None]


@contextlib.contextmanager
def replaced(owner, name: str, value) -> Iterator[None]:
    """An attribute of the instance has another value for a while.

    It is put past the tracking `__setattr__` of Keras, which would take what it is given for a part of the model;
    through the class where that has a property with a setter.
    """
    missing = object()
    is_property = hasattr(getattr(type(owner), name, None), "__set__")
    before = getattr(owner, name) if is_property else vars(owner).get(name, missing)

    def put(new: Any) -> None:
        if is_property:
            setattr(owner, name, new)
        elif new is missing:
            vars(owner).pop(name, None)
        else:
            vars(owner)[name] = new

    put(value)
    try:
        yield
    finally:
        put(before)


def keras_distribution():
    """The distribution that was set with `keras.distribution.set_distribution`."""
    return keras.distribution.distribution()


def compiled_loss(model: keras.Model):
    """The `loss` that was given to `compile`, for the passport."""
    return getattr(getattr(model, "_compile_loss", None), "_user_loss", None)


def compiled_metrics(model: keras.Model):
    """The `metrics` that were given to `compile`."""
    return getattr(getattr(model, "_compile_metrics", None), "_user_metrics", None)


def data_loss(model: keras.Model, y, y_pred, sample_weight) -> tf.Tensor:
    """The compiled loss of some predictions, without regularisers and `add_loss`."""
    return model._compile_loss(y, y_pred, sample_weight)


def layers_inside(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """All layers below a layer, nested ones too; metrics are none."""
    return list(layer._flatten_layers(include_self=False))


def knows_training(layer: keras.layers.Layer) -> bool:
    """Whether its `call` takes `training`; Keras's train step passes it only then."""
    return bool(layer._call_has_training_arg)


def producer(tensor):
    """The layer or operation that makes a symbolic output of a functional model; None where Keras does not tell."""
    return getattr(getattr(tensor, "_keras_history", None), "operation", None)


def eager_random_state():
    """The state of TensorFlow's eager generator of op seeds; None where there is none."""
    generator = getattr(tf_context.context(), "_rng", None)
    return None if generator is None else generator.getstate()


def set_eager_random_state(state) -> None:
    """Puts back what `eager_random_state` returned."""
    generator = getattr(tf_context.context(), "_rng", None)
    if generator is not None and state is not None:
        generator.setstate(state)


@contextlib.contextmanager
def eager_seeds_of_its_own() -> Iterator[None]:
    """What runs inside draws TensorFlow's eager op seeds from another generator: none of those that are drawn later.

    To put the state back is not enough: an eager kernel is kept by its seeds, and goes on where it was.
    """
    generator = getattr(tf_context.context(), "_rng", None)
    if generator is None:
        yield
        return
    state = eager_random_state()
    generator.seed(f"trainrt {state[1][:3]}")
    try:
        yield
    finally:
        set_eager_random_state(state)


@contextlib.contextmanager
def on_one_replica(optimizer, replica: int) -> Iterator[None]:
    """Inside `strategy.extended.update`, `optimizer.apply` works on the replica at hand alone, as on one device.

    Keras hands each update to the strategy, which makes it on all replicas and forbids that inside of a `tf.cond`. Here
    the gradients are reduced already and every replica runs the whole of `apply`, so what Keras would hand over is done
    at once, to the variable of this replica.
    """
    strategy = tf.distribute.get_strategy()
    with contextlib.ExitStack() as stack:
        for part in (optimizer, *parts(optimizer)):
            stack.enter_context(replaced(part, "_distribution_strategy", _OneReplica(replica)))
            if isinstance(part, keras.optimizers.LossScaleOptimizer):
                stack.enter_context(replaced(part, "_tf_apply", part._common_apply))
        stack.enter_context(replaced(strategy.extended, "_use_merge_call", lambda: False))
        yield


class _OneReplica:
    """Stands for the strategy of an optimizer: updates the variable of one replica."""

    num_replicas_in_sync = 1

    def __init__(self, replica: int):
        self._replica = replica

    @property
    def extended(self):
        return self

    def update(self, variable, function, args=(), kwargs=None, group=True):
        return function(variable.values[self._replica], *args, **(kwargs or {}))


@contextlib.contextmanager
def distinct_seeds() -> Iterator[None]:
    """Random numbers that Keras draws inside a replica differ from replica to replica; those of the first are Keras's.

    A seed generator's state is the same on each, and stays so: what it hands out is told apart, by a multiple of the
    golden ratio that is added to the half of the seed that does not count.
    """
    draw = keras.random.SeedGenerator.next

    def drawn(self, ordered=True):
        seed = draw(self, ordered)
        context = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:
            return seed
        replica = tf.cast(context.replica_id_in_sync_group, seed.dtype)
        return seed + tf.stack([replica * tf.constant(0x9E3779B9, seed.dtype), tf.zeros([], seed.dtype)])

    keras.random.SeedGenerator.next = drawn
    try:
        yield
    finally:
        keras.random.SeedGenerator.next = draw


@contextlib.contextmanager
def loss_shares(share: Callable[[], tf.Tensor | None]) -> Iterator[None]:
    """While the context lasts, a replica's loss counts by `share()`, [] float32; None: all alike, as in Keras.

    Keras divides the mean over a replica's samples by the number of replicas, where its reduction is a mean.
    """
    scale, unscale = loss_module.scale_loss_for_distribution, loss_module.unscale_loss_for_distribution

    def scaled(value):
        factor = share()
        return scale(value) if factor is None else value * tf.cast(factor, value.dtype)

    def unscaled(value):
        factor = share()
        return unscale(value) if factor is None else tf.math.divide_no_nan(value, tf.cast(factor, value.dtype))

    with (
        replaced(loss_module, "scale_loss_for_distribution", scaled),
        replaced(loss_module, "unscale_loss_for_distribution", unscaled),
    ):
        yield


def partial_batches(adapter, replicas: int) -> bool:
    """Whether replicas may be given shares of a batch that are not alike: of arrays that is known."""
    over_arrays = is_over_arrays(adapter)
    return not over_arrays or bool(adapter.has_partial_batch) or adapter.batch_size % replicas != 0


@contextlib.contextmanager
def additional_losses(model: keras.Model, terms: list[tf.Tensor]) -> Iterator[None]:
    """Appends to `terms` each `add_loss` and regulariser term that `compute_loss` adds up, in the order of `model.losses`."""
    aggregate = getattr(model, "_aggregate_additional_loss", None)
    if aggregate is None:
        yield
        return

    def watched(loss):
        term = aggregate(loss)
        terms.append(term)
        return term

    model.__dict__["_aggregate_additional_loss"] = watched
    try:
        yield
    finally:
        del model.__dict__["_aggregate_additional_loss"]


def loss_parts(model: keras.Model, loss: tf.Tensor | None, terms: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
    """The loss of a step and its parts, as far as there are any: Keras adds regularisers last."""
    if loss is None:
        return {}
    if not terms:
        return {"loss": loss}
    regularised = sum(getattr(v, "regularizer", None) is not None for v in model.trainable_weights)
    added, regularization = terms[: len(terms) - regularised], terms[len(terms) - regularised :]
    parts = {"loss": loss, "data_loss": loss - tf.add_n([tf.cast(term, loss.dtype) for term in terms])}
    if added:
        parts["added_loss"] = tf.add_n([tf.cast(term, loss.dtype) for term in added])
    if regularization:
        parts["regularization_loss"] = tf.add_n([tf.cast(term, loss.dtype) for term in regularization])
    return parts


def optimizers(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """The optimizers that are attributes of the model, its compiled one first: a GAN has several."""
    found: dict[int, keras.optimizers.Optimizer] = {}
    for value in (model.optimizer, *vars(model).values()):
        items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
        for item in items:
            if isinstance(item, keras.optimizers.Optimizer):
                found.setdefault(id(item), item)
    return list(found.values())


def trained_variables(optimizer) -> list:
    """The weights that the optimizer was built with."""
    return list(optimizer._trainable_variables)


def learning_rate(optimizer) -> tf.Tensor:
    """The rate of the coming update, [] float64; that of the first optimizer where several share the weights."""
    several = getattr(optimizer, "optimizers", None)
    rate = (several[0] if several else optimizer).learning_rate
    return tf.cast(tf.identity(rate.value if isinstance(rate, keras.Variable) else rate), tf.float64)


def decays_as_keras(optimizer) -> bool:
    """Whether a weight decays as Keras says: by learning rate * weight decay * weight, before the update."""
    return type(optimizer)._apply_weight_decay is keras.optimizers.Optimizer._apply_weight_decay


def decays(optimizer, variable) -> bool:
    """Whether the optimizer decays this weight."""
    return optimizer.weight_decay is not None and optimizer._use_weight_decay(raw(variable))


def raw(variable) -> tf.Variable:
    """The `tf.Variable` in a `keras.Variable`, or itself."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def update_rows(optimizer, gradients, variables, rate) -> None:
    """What `optimizer.apply` does to these weights and their slots, a global clip and its counter of steps aside."""
    raws = [raw(v) for v in variables]
    gradients = optimizer._clip_gradients(gradients)
    optimizer._apply_weight_decay(raws)
    for gradient, variable in zip(gradients, raws, strict=True):
        optimizer.update_step(gradient, variable, rate)


def layer_of(variable) -> str:
    """Path of the layer that owns a variable."""
    path = getattr(variable, "path", None) or variable.name.split(":")[0]
    return path.rpartition("/")[0] or path


def variable_key(variable) -> int:
    """Identity of a weight, the same for a `keras.Variable` and the `tf.Variable` in it."""
    return id(raw(variable))


def slots(optimizer, variables: Sequence) -> dict[str, list]:
    """The optimizer's own variables for each weight: slot name -> one variable (or None) for each of `variables`.

    Every attribute of the optimizer that is a list as long as the list of its weights, of variables or None, pairs
    item i with weight i. Wrapped optimizers are looked into. The name is what Keras gave the slot ("momentum"), or the
    name of the attribute where it gave none.
    """
    index = {variable_key(v): i for i, v in enumerate(variables)}
    found: dict[str, list] = {}
    for part in parts(optimizer):
        weights = trained_variables(part)
        for attribute, items in vars(part).items():
            if attribute in ("_trainable_variables", "_variables") or not _is_slot_list(items, len(weights)):
                continue
            name = _slot_name(attribute, items, weights)
            row = found.setdefault(name, [None] * len(variables))
            for weight, slot in zip(weights, items, strict=True):
                i = index.get(variable_key(weight))
                if i is not None and slot is not None:
                    row[i] = slot
    return {name: row for name, row in found.items() if any(slot is not None for slot in row)}


def parts(optimizer) -> Iterator[keras.optimizers.Optimizer]:
    """The optimizers that update weights: those inside a `LossScaleOptimizer` or a `MultiOptimizer`, or itself."""
    inner = getattr(optimizer, "inner_optimizer", None)
    several = getattr(optimizer, "optimizers", None)
    if inner is not None:
        yield from parts(inner)
    elif several:
        for part in several:
            yield from parts(part)
    else:
        yield optimizer


def _is_slot_list(items, length: int) -> bool:
    return (
        isinstance(items, (list, tuple))
        and len(items) == length
        and any(item is not None for item in items)
        and all(item is None or isinstance(item, keras.Variable) for item in items)
    )


def _slot_name(attribute: str, items, weights) -> str:
    for weight, slot in zip(weights, items, strict=True):
        prefix = str(getattr(weight, "path", weight.name)).replace("/", "_").replace(":", "_") + "_"
        if slot is not None and slot.name.startswith(prefix):
            return slot.name.removeprefix(prefix)
    return attribute.strip("_")
