"""Replaces `optimizer.apply` by one pass that updates, and measures what it updates, bit for bit as Keras would.

A Keras optimizer is a dozen elementwise ops a weight, each a trip through memory. Here one op takes all weights of a
dtype: it loads gradient, weight and slots, steps, stores, and folds the moments of each while they lie in the cache.
The scalar factors (learning rate, bias corrections) and the norms of Keras's own clips are computed by the very
TensorFlow ops that Keras uses, so that their bits agree.

This holds for the exact optimizer types in `RULES`, while the Keras source that was matched is the one installed
(`matched.py`), and for options that `plan` does not refuse. Everything else takes the generic path, which is always
right: `optimizer.apply`, measured from outside (`generic.py`).

Weights with a sparse gradient are part of it where Keras makes that dense first, as Adam does, and else updated beside
it, by Keras's own ops (`sparse.py`).

On a GPU the pass is that of `cuda.py`'s library, once it has passed its trial there (`parity.py`).

**A step that XLA compiles takes no fused update**, though `jit_compile=True` is what Keras chooses on a GPU. An op of
ours cannot be inside the cluster, so it is the pass outside of it, or statistics in plain ops inside. By argument, as
nothing of it has been measured on a GPU:

- In bytes the pass may win. Gradients of matrix products and convolutions come from library calls, which write them
  to memory in any case. From there XLA's update moves what ours does (28 a parameter for Adam: it fuses the
  elementwise ops of each weight), but its reductions are fusions of their own, which read gradient, weight, update
  and slots once more: up to 24, and the old weight has to be kept. Its launches are several for each weight; ours are
  three for all.
- But the cluster is the whole train step, and the update is in its middle: metrics, a custom `train_step`, a second
  optimizer may read weights after it. To take it out is to run the rest of a step, which is the user's code, before
  its update. For steps that do not look nothing would change; which those are cannot be told from here.
- Gradients that XLA makes itself (biases, normalisation, embeddings), and the weights' buffers that it updates in
  place, would have to leave the cluster, and with them the fusions across the border.
- Keras's bits under XLA are those of XLA's fusions. Another update beside them is another training.

So right comes first, and the statistics are XLA's. Who wants the pass on a GPU compiles with `jit_compile=False`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from trainrt import clip, doors
from trainrt.record import vocabulary as record
from trainrt.update import adaptive, cuda, matched, native, native_ops, parity, sparse

DECAY_NONE, DECAY_MERGED, DECAY_IN_TURN = range(3)
"""As `Decay` in `kernels/kernels.h`."""

GRAPPLER = ("arithmetic_optimization", "constant_folding", "remapping", "disable_meta_optimizer")
OFF = ("disable_meta_optimizer",)
"""Options of TensorFlow's graph optimizer that change bits, and those of them that are off as it comes."""

DTYPES = ("float32", "float64", "bfloat16", "float16")


class Observation(NamedTuple):
    """What one step did; P rows in the order of the weights.

    Attributes:
      subjects: "gradient", "update", "weight", then the slots as Keras calls them.
      cube: [P, S, 6] float64 moments of the subjects: the gradient before any scale or clip, with a loss scale divided
        out; the weight after the step minus the weight before it; weight and slots after the step. NaN where there is
        none.
      joint: [P, J] float64, columns as in `record.JOINT`.
      learning_rate: [] float64, of the step.
      correction: [] float64, by which the second moment is divided to have no bias to zero; None if nothing is divided.
    """

    subjects: tuple[str, ...]
    cube: tf.Tensor
    joint: tf.Tensor
    learning_rate: tf.Tensor
    correction: tf.Tensor | None

    def moments(self, subject: str) -> tf.Tensor:
        """[P, 6] of one subject."""
        return self.cube[:, self.subjects.index(subject)]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a Keras optimizer maps to a rule of the library.

    Attributes:
      name: Of the rule, in `kernels/updates/`.
      slots: Name of each slot, in the rule's order -> the optimizer's attribute that lists it.
      scalars: (optimizer, dtype, learning rate) -> the rule's scalars, computed as `update_step` does.
    """

    name: str
    slots: dict[str, str]
    scalars: Callable[[Any, str, Any], list]


def _sgd(optimizer) -> Rule:
    if optimizer.momentum == 0:
        return Rule("sgd", {}, lambda o, dtype, lr: [lr])
    name = "sgd_nesterov" if optimizer.nesterov else "sgd_momentum"
    return Rule(name, {"momentum": "momentums"}, lambda o, dtype, lr: [lr, ops.cast(o.momentum, dtype)])


def _adam(optimizer) -> Rule:
    def scalars(o, dtype, lr):
        local_step = ops.cast(o.iterations + 1, dtype)
        beta_1_power = ops.power(ops.cast(o.beta_1, dtype), local_step)
        beta_2_power = ops.power(ops.cast(o.beta_2, dtype), local_step)
        alpha = lr * ops.sqrt(1 - beta_2_power) / (1 - beta_1_power)
        return [alpha, 1 - o.beta_1, 1 - o.beta_2, o.epsilon]

    slots = {"momentum": "_momentums", "velocity": "_velocities"}
    if optimizer.amsgrad:
        return Rule("adam_amsgrad", {**slots, "velocity_hat": "_velocity_hats"}, scalars)
    return Rule("adam", slots, scalars)


def _rmsprop(optimizer) -> Rule:
    name, slots, momentum = "rmsprop", {"velocity": "_velocities"}, []
    if optimizer.centered:
        name += "_centered"
    if optimizer.momentum > 0:
        name += "_momentum"
        slots["momentum"] = "_momentums"
        momentum = [optimizer.momentum]
    if optimizer.centered:
        slots["average_gradient"] = "_average_gradients"
    return Rule(name, slots, lambda o, dtype, lr: [lr, o.rho, 1 - o.rho, o.epsilon, *momentum])


def _adagrad(optimizer) -> Rule:
    return Rule("adagrad", {"accumulator": "_accumulators"}, lambda o, dtype, lr: [lr, o.epsilon])


def _adadelta(optimizer) -> Rule:
    slots = {"accumulated_grad": "_accumulated_grads", "accumulated_delta_var": "_accumulated_delta_vars"}
    return Rule("adadelta", slots, lambda o, dtype, lr: [lr, o.rho, 1 - o.rho, o.epsilon])


def _adamax(optimizer) -> Rule:
    def scalars(o, dtype, lr):
        beta_1_power = ops.power(ops.cast(o.beta_1, dtype), ops.cast(o.iterations + 1, dtype))
        return [lr, 1 - o.beta_1, o.beta_2, 1 - beta_1_power, o.epsilon]

    return Rule("adamax", {"momentum": "_m", "norm": "_u"}, scalars)


def _nadam(optimizer) -> Rule:
    def scalars(o, dtype, lr):
        local_step = ops.cast(o.iterations + 1, dtype)
        next_step = ops.cast(o.iterations + 2, dtype)
        decay = ops.cast(0.96, dtype)
        beta_1 = ops.cast(o.beta_1, dtype)
        beta_2 = ops.cast(o.beta_2, dtype)
        u_t = beta_1 * (1.0 - 0.5 * (ops.power(decay, local_step)))
        u_t_1 = beta_1 * (1.0 - 0.5 * (ops.power(decay, next_step)))
        u_product_t = ops.cast(o._u_product, dtype)
        u_product_t_1 = u_product_t * u_t_1
        beta_2_power = ops.power(beta_2, local_step)
        return [
            lr,
            1 - beta_1,
            1 - beta_2,
            u_t_1,
            1 - u_product_t_1,
            1 - u_t,
            1 - u_product_t,
            1 - beta_2_power,
            o.epsilon,
        ]

    return Rule("nadam", {"momentum": "_momentums", "velocity": "_velocities"}, scalars)


def _lion(optimizer) -> Rule:
    def scalars(o, dtype, lr):
        beta_1, beta_2 = ops.cast(o.beta_1, dtype), ops.cast(o.beta_2, dtype)
        return [lr, beta_1, 1.0 - beta_1, beta_2, 1.0 - beta_2]

    return Rule("lion", {"momentum": "_momentums"}, scalars)


RULES: dict[type, Callable[[Any], Rule]] = {
    keras.optimizers.SGD: _sgd,
    keras.optimizers.Adam: _adam,
    keras.optimizers.AdamW: _adam,
    keras.optimizers.RMSprop: _rmsprop,
    keras.optimizers.Adagrad: _adagrad,
    keras.optimizers.Adadelta: _adadelta,
    keras.optimizers.Adamax: _adamax,
    keras.optimizers.Nadam: _nadam,
    keras.optimizers.Lion: _lion,
}
"""The optimizers that have a fused update; subclasses have none."""


ROOTS = (keras.optimizers.RMSprop, keras.optimizers.Adagrad, keras.optimizers.Adadelta)
"""Those that divide by a square root, which a graph computes by an estimate of the processor: `kernels/roots.h`."""

MULTIPLIES_GRADIENT = (keras.optimizers.RMSprop, keras.optimizers.Lion)
"""Those that multiply the gradient by a constant."""


@tf.autograph.experimental.do_not_convert
def plan(
    optimizer: keras.optimizers.Optimizer,
    variables: Sequence,
    gradients: Sequence | None = None,
    *,
    jit_compile: bool = False,
) -> Fused | str:
    """Whether one fused pass may stand in for `optimizer.apply(gradients, variables)`.

    Args:
      optimizer: A built optimizer.
      variables: P weights that it was built with, `keras.Variable` or `tf.Variable`.
      gradients: The gradients, where they are known: one of another dtype than its weight is refused, and a
        `tf.IndexedSlices` where `sparse.refusal` says so.
      jit_compile: Whether XLA compiles the step that this is a part of.

    Returns:
      The fused pass; or why there is none, as the end of a sentence about the optimizer.
    """
    reason = _refusal(optimizer, list(variables), jit_compile)
    if reason is None and gradients is not None:
        reason = _gradient_refusal(optimizer, gradients, variables)
    reason = reason or _device_refusal(optimizer, list(variables))
    return reason or Fused(optimizer, list(variables))


def _refusal(optimizer, variables: list, jit_compile: bool) -> str | None:
    kind: Any = type(optimizer)
    if kind not in RULES:
        return f"{_name(kind)} has no fused update"
    if stranger := matched.stranger(kind):
        return f"Keras {keras.__version__}'s {stranger} is not the one that was matched"
    if changed := matched.METHODS.intersection(vars(optimizer)):
        return f"{kind.__name__} with its own {min(changed)}"
    if jit_compile:
        return "XLA compiles the step"
    if not optimizer.built:
        return f"{kind.__name__} is not built"
    for option in ("use_ema", "gradient_accumulation_steps"):
        if getattr(optimizer, option):
            return f"{kind.__name__} with {option}"
    if (factor := optimizer.loss_scale_factor) is not None and (
        kind in MULTIPLIES_GRADIENT or math.frexp(factor)[0] != 0.5
    ):
        # Grappler divides by the constant by multiplying with its inverse, and merges that with other constants.
        return f"{kind.__name__} with loss_scale_factor={factor}"
    if any(tf.config.optimizer.get_experimental_options().get(k, k not in OFF) != (k not in OFF) for k in GRAPPLER):
        return "TensorFlow's graph optimizer is not as it comes"
    if platform.machine() not in ("x86_64", "AMD64") and kind in ROOTS:
        return f"{kind.__name__} on {platform.machine()} was not matched"
    rate = optimizer._learning_rate
    if not isinstance(rate, (keras.Variable, keras.optimizers.schedules.LearningRateSchedule)):
        return f"{kind.__name__} whose learning rate is a function"
    replicas = max(
        tf.distribute.get_strategy().num_replicas_in_sync, optimizer._distribution_strategy.num_replicas_in_sync
    )
    if replicas > 1:
        return f"a tf.distribute strategy with {replicas} replicas"
    if (reason := _variable_refusal(optimizer, variables)) is not None:
        return reason
    if native.load() is None:
        return f"the native ops are not there: {native.status().reason}"
    return None


def _variable_refusal(optimizer, variables: list) -> str | None:
    if not variables:
        return "no weights"
    for variable in variables:
        path = getattr(variable, "path", variable.name)
        raw = _raw(variable)
        if not tf.is_tensor(raw) or type(raw).__name__ != "ResourceVariable":
            return f"{path} is a {type(raw).__name__}"
        if optimizer._var_key(variable) not in optimizer._trainable_variables_indices:
            return f"{path} is not among the weights that the optimizer was built with"
        if raw.dtype.name not in DTYPES:
            return f"{path} is {raw.dtype.name}"
        if getattr(variable, "overwrite_with_gradient", False):
            return f"{path} is overwritten with its gradient"
        if getattr(variable, "constraint", None) is not None:
            return f"{path} has a constraint"
    if optimizer.global_clipnorm and len({_raw(v).dtype for v in variables}) > 1:
        return "global_clipnorm over weights of several dtypes"
    return None


def _device_refusal(optimizer, variables: list) -> str | None:
    """Why not on the weights' device: there are no kernels for it, or they failed their trial."""
    reason = cuda.refusal(variables)
    if reason is None and cuda.on_gpu(variables[0]):
        device = _raw(variables[0]).device
        for dtype in sorted({_raw(v).dtype.name for v in variables}):
            key = parity.key(optimizer, dtype, device)
            reason = reason or cuda.distrust(key, functools.partial(parity.complaint, optimizer, dtype, device, Fused))
    return reason


def _gradient_refusal(optimizer, gradients: Sequence, variables: Sequence) -> str | None:
    for gradient, variable in zip(gradients, variables, strict=True):
        path = getattr(variable, "path", variable.name)
        if isinstance(gradient, tf.IndexedSlices):
            if reason := sparse.refusal(optimizer, gradient, variable):
                return reason
        elif gradient is not None and gradient.dtype != _raw(variable).dtype:
            return f"{path} is {_raw(variable).dtype.name} and its gradient {gradient.dtype.name}"
    return None


class Fused:
    """One pass that does what `optimizer.apply` does for these weights. Made by `plan`.

    Attributes:
      optimizer: The optimizer.
      variables: P weights.
      rule: The rule that updates them.
      takes_rows: Whether weights with a sparse gradient are part of the pass.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer, variables: list):
        self.optimizer = optimizer
        self.variables = variables
        self.rule = RULES[type(optimizer)](optimizer)
        apart = self.rule.name in ("adam", "adam_amsgrad") and clip.own(optimizer) is None
        self.takes_rows = apart and not cuda.on_gpu(variables[0])

    @tf.autograph.experimental.do_not_convert
    def apply(
        self,
        gradients: Sequence[tf.Tensor | tf.IndexedSlices | None],
        scale: tf.Tensor | None = None,
        observe: bool = True,
        measured: tf.Tensor | None = None,
        every: int = 1,
    ) -> Observation | None:
        """Updates weights, slots and `optimizer.iterations`, inside a `tf.function` or eagerly.

        Args:
          gradients: P gradients of their weights' dtypes, dense or sparse; None where the loss does not reach, which
            Keras warns about.
          scale: [P]: each gradient is multiplied by its own, as float32, before Keras's clip. None does not
            multiply.
          observe: Whether to measure.
          measured: [P, 6] moments of the gradients with a loss scale divided out, if the caller has them already.
          every: How many steps there are to one observed, which says when the slots are held against the gradient.

        Returns:
          The measurements; None unless `observe`.

        Raises:
          TypeError: A gradient is one that `plan(..., gradients)` refuses.
          ValueError: No gradient at all, as Keras.
        """
        optimizer = self.optimizer
        if reason := _gradient_refusal(optimizer, gradients, self.variables):
            raise TypeError(f"A fused update takes gradients of their weights' dtypes. Received: {reason}.")
        optimizer._filter_empty_gradients(list(gradients), self.variables)  # warns, or raises, as Keras does
        if self.rule.name == "nadam":
            dtype = optimizer._u_product.dtype
            power = ops.power(0.96, ops.cast(optimizer.iterations + 1, dtype))
            optimizer.assign(optimizer._u_product, optimizer._u_product * optimizer.beta_1 * (1.0 - 0.5 * power))
        rate = ops.convert_to_tensor(optimizer.learning_rate)
        scale = None if scale is None else tf.cast(scale, tf.float64)
        if observe:
            step = (tf.cast(doors.raw(optimizer.iterations), tf.int64), tf.cast(rate, tf.float64), every)
        else:
            step = (tf.constant(0, tf.int64), tf.constant(0.0, tf.float64), 1)
        groups: dict[str, list[int]] = {}
        rows = [i for i, g in enumerate(gradients) if isinstance(g, tf.IndexedSlices) and not self.takes_rows]
        for i, variable in enumerate(self.variables):
            if (gradients[i] is not None or observe) and i not in rows:
                groups.setdefault(_raw(variable).dtype.name, []).append(i)
        parts = [
            self._apply_group(dtype, index, gradients, scale, rate, observe, measured, step)
            for dtype, index in groups.items()
        ]
        if rows:
            groups[""] = rows
            its = [None if t is None else tf.gather(t, rows) for t in (scale, measured)]
            some, weights = ([row[i] for i in rows] for row in (gradients, self.variables))
            parts.append(sparse.apply(optimizer, some, weights, rate, *its, step if observe else None))
        optimizer._iterations.assign_add(1)
        if not observe:
            return None
        cube, joint, correction = parts[0]
        if len(parts) > 1:
            place = [i for index in groups.values() for i in index]
            order = sorted(range(len(place)), key=place.__getitem__)
            cube, joint = (tf.gather(tf.concat(pieces, 0), order) for pieces in list(zip(*parts, strict=True))[:2])
        divides = adaptive.kind(optimizer) is not None
        subjects = (record.GRADIENT, record.UPDATE, record.WEIGHT, *self.rule.slots)
        return Observation(subjects, cube, joint, step[1], correction if divides else None)

    def _apply_group(self, dtype, index, gradients, scale, rate, observe, measured, step):
        """One op for the weights of one dtype: [N, S, 6], [N, J] and the correction."""
        optimizer, rule = self.optimizer, self.rule
        weights = [self.variables[i] for i in index]
        missing = tf.zeros([0], dtype)
        pairs = [(gradients[i], self.variables[i]) for i in index]
        present = [native_ops.Rows.of(g, v) if isinstance(g, tf.IndexedSlices) else g for g, v in pairs]
        if len(index) < len(self.variables):
            scale = None if scale is None else tf.gather(scale, index)
            measured = None if measured is None else tf.gather(measured, index)
        factors = []
        if optimizer.loss_scale_factor is not None:
            factors.append(("divide", tf.constant(optimizer.loss_scale_factor, dtype)))
        own = clip.own(optimizer)
        if own is not None:
            scaled = [] if scale is None else [("multiply", tf.cast(tf.cast(scale, tf.float32), dtype))]
            factors += self._clip(present, scaled + factors, dtype)
        graph = not tf.executing_eagerly()
        decay = [DECAY_NONE if g is None else self._decay(v, graph) for g, v in zip(present, weights, strict=True)]
        learning_rate = ops.cast(rate, dtype)
        scalars = [ops.convert_to_tensor(s, dtype) for s in rule.scalars(optimizer, dtype, learning_rate)]
        if any(decay):
            rate_of_decay = tf.cast(optimizer.weight_decay, dtype)
            scalars += [rate_of_decay * learning_rate, rate_of_decay, learning_rate]
        at = [optimizer._get_variable_index(v) for v in weights]
        slots = [getattr(optimizer, attribute)[i] for attribute in rule.slots.values() for i in at]
        iterations, rate64, every = step
        names = list(rule.slots)
        divides, second = adaptive.kind(optimizer) or ("", None)
        return native_ops.update(
            rule=rule.name,
            weights=[_raw(v).handle for v in weights],
            slots=[_raw(s).handle for s in slots],
            gradients=[missing if g is None else g for g in present],
            factors=[values for _, values in factors],
            prepare=[how for how, _ in factors],
            scalars=scalars,
            decay=decay,
            graph=graph,
            observe=observe,
            measured=measured,
            scale=scale,
            iterations=iterations,
            learning_rate=rate64,
            constants=self._constants(own),
            every=every,
            own_clip="" if own is None else own.native,
            divides=divides,
            momentum=names.index("momentum") if "momentum" in names else -1,
            second=names.index(second) if second in names else -1,
        )

    def _constants(self, own) -> tf.Tensor:
        """The optimizer's numbers as its float32 ops take them, in float64."""
        o = self.optimizer
        numbers = [getattr(o, name, 0.0) for name in ("beta_1", "beta_2", "epsilon")]
        numbers += [o.weight_decay or 0.0, 1.0 if o.loss_scale_factor is None else o.loss_scale_factor]
        return tf.constant([*map(np.float32, numbers), 0.0 if own is None else own.threshold], tf.float64)

    def _decay(self, variable, graph: bool) -> int:
        """How the weight decays: Grappler multiplies the two rates first, unless the weight is a scalar too."""
        raw = _raw(variable)
        if self.optimizer.weight_decay is None or not self.optimizer._use_weight_decay(raw):
            return DECAY_NONE
        return DECAY_MERGED if graph and raw.shape.rank else DECAY_IN_TURN

    def _clip(self, gradients, factors, dtype) -> list[tuple[str, tf.Tensor]]:
        """Keras's own clip, as what happens to each element; the norms by the ops that Keras takes them with."""
        optimizer = self.optimizer
        if optimizer.clipnorm and optimizer.clipnorm > 0:
            norm = tf.constant(optimizer.clipnorm, dtype)
            norms = [
                norm if g is None else tf.reshape(_clip_divisor(g, optimizer.clipnorm), [])
                for g in _prepared(gradients, factors)
            ]
            return [("multiply", norm), ("divide", tf.stack(norms))]
        if optimizer.global_clipnorm and optimizer.global_clipnorm > 0:
            known = [g for g in _prepared(gradients, factors) if g is not None]
            squared = ops.sum(ops.stack([ops.sum(ops.square(g)) for g in known]))
            use_norm = ops.sqrt(squared)
            limit = optimizer.global_clipnorm
            scale_for_finite = limit * ops.minimum(1.0 / use_norm, 1.0 / limit)
            return [("multiply", scale_for_finite + (use_norm - use_norm))]
        if optimizer.clipvalue and optimizer.clipvalue > 0:
            return [("clip", tf.constant(optimizer.clipvalue, dtype))]
        return []


def _prepared(gradients, factors) -> list:
    """The gradients as they are when Keras takes their norm."""
    result = list(gradients)
    for how, values in factors:
        for i, gradient in enumerate(result):
            if gradient is not None:
                value = values[i] if values.shape.rank else values
                result[i] = gradient * value if how == "multiply" else gradient / value
    return result


def _clip_divisor(values: tf.Tensor, limit: float) -> tf.Tensor:
    """What `tf.clip_by_norm` divides by."""
    total = tf.reduce_sum(values * values, None, keepdims=True)
    positive = total > 0
    norm = tf.where(positive, tf.sqrt(tf.where(positive, total, tf.ones_like(total))), total)
    return tf.maximum(norm, limit)


def _raw(variable) -> tf.Variable:
    return variable.value if isinstance(variable, keras.Variable) else variable


def _name(kind: type) -> str:
    module = "keras.optimizers" if kind.__module__.startswith("keras.") else kind.__module__
    return f"{module}.{kind.__qualname__}"
