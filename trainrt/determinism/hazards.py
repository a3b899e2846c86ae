"""Which TensorFlow ops raise, go through the host or stay non-deterministic when op determinism is on.

Source: the calls to `OpDeterminismRequired` and `OpDeterminism` messages in the libraries of TensorFlow 2.21 (53 C++
functions hold one), and measurements on the CPU. What happens on a GPU was read, not run. `FAMILIES` and `CLEAN` make
the table complete: every op of the installed TensorFlow in a family is in one of the two, or a test fails.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

RAISES, HOST, VARIES = "raises", "host copy", "varies"


class Node(NamedTuple):
    """One op of a graph.

    Attributes:
      op: Its type.
      attributes: Its attributes as protobuf `AttrValue`s, by name.
      inputs: The shape of each input, None for an unknown size or, as a whole, for an unknown rank.
      output: The shape of the first output.
    """

    op: str
    attributes: Mapping[str, Any]
    inputs: list[tuple[int | None, ...] | None]
    output: tuple[int | None, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Hazard:
    """What op determinism does to an op.

    Attributes:
      effect: "raises", "host copy" (the whole tensor goes to the host and back, the training waits), or "varies".
      where: "GPU", "CPU", "XLA" (on a GPU, when XLA compiles the step), or "all".
      why: What happens, in a few words.
      remedy: The way round.
      when: Whether it holds for a node; always by default.
    """

    effect: str
    where: str
    why: str
    remedy: str
    when: Callable[[Node], bool] = lambda node: True


def _unseeded(node: Node) -> bool:
    return all(node.attributes[name].i == 0 for name in ("seed", "seed2") if name in node.attributes)


def _frozen(node: Node) -> bool:
    return "is_training" in node.attributes and not node.attributes["is_training"].b


def _one_column(node: Node) -> bool:
    shape = node.inputs[0] if node.inputs else None
    return shape is None or len(shape) < 2 or shape[-1] in (1, None)


_FLOATS = (1, 2, 14, 19)  # DT_FLOAT, DT_DOUBLE, DT_BFLOAT16, DT_HALF


def _float_weights_of_a_vector(node: Node) -> bool:
    """Integer counts add exactly, rows of a matrix one by one."""
    shape = node.inputs[0] if node.inputs else None
    weights = node.inputs[2] if len(node.inputs) > 2 else None
    return (
        node.attributes["T"].type in _FLOATS
        and (node.op == "Bincount" or shape is None or len(shape) < 2)
        and (weights is None or 0 not in weights)
    )


_COUNT = Hazard(
    RAISES, "GPU", "counting has no deterministic GPU kernel",
    'count with tf.math.unsorted_segment_sum(ones, ids, size), or in the input pipeline: with tf.device("CPU")',
)  # fmt: skip
_COUNT_CPU = Hazard(
    VARIES, "CPU", "the threads' partial sums of float weights are added in the order in which they end",
    "sum the weights with tf.math.unsorted_segment_sum(weights, ids, size)", _float_weights_of_a_vector,
)  # fmt: skip
_SCATTER = Hazard(
    HOST, "GPU", "the whole tensor is copied to the host, updated there in order, and copied back",
    "for an embedding: an optimizer with dense updates, such as Adam, AdamW or SGD with momentum, or "
    "trainrt.fit(..., sum_duplicates=True), which adds duplicate rows up on the device",
)  # fmt: skip
_SCATTER_TENSOR = dataclasses.replace(
    _SCATTER, remedy="sum with tf.math.unsorted_segment_sum where indices may repeat, or tf.gather the inverse"
)
_REF = Hazard(
    RAISES,
    "GPU",
    "scatter to a TensorFlow 1 variable has no deterministic GPU kernel",
    "use a tf.Variable of version 2",
)
_CROP = Hazard(
    RAISES, "GPU", "the gradient of crop_and_resize has no deterministic GPU kernel",
    "crop in the input pipeline, stop the gradient there, or resample with tf.gather_nd and tf.image.resize",
)  # fmt: skip
_ENTROPY = Hazard(
    RAISES, "GPU", "the fused op has no deterministic GPU kernel; traced in deterministic mode it is not used",
    "switch determinism on before the step is traced, and call tf.nn.*softmax_cross_entropy_with_logits",
)  # fmt: skip
_QUANTISE = Hazard(
    RAISES, "GPU", "the gradient of the quantisation's range has no deterministic GPU kernel",
    "quantise with fixed ranges: tf.quantization.fake_quant_with_min_max_args",
)  # fmt: skip
_DILATION = Hazard(
    RAISES, "GPU", "the gradient of dilation2d has no deterministic GPU kernel",
    "dilate with tf.nn.max_pool2d for a flat filter",
)  # fmt: skip
_NORM = Hazard(
    RAISES, "GPU", "the gradient of a frozen fused batch normalisation has no deterministic GPU kernel",
    "keras.layers.BatchNormalization does not use it; with tf.nn.fused_batch_norm compute it from mean and variance",
    _frozen,
)  # fmt: skip
_UNSEEDED = Hazard(
    RAISES, "all", "a random op without a seed", "pass seed= to trainrt.fit, or use tf.random.stateless_* with a seed",
    _unseeded,
)  # fmt: skip
_FRESH = Hazard(VARIES, "all", "draws from the system's randomness", "use tf.random.Generator.from_seed")

_MANY: tuple[tuple[str, tuple[Hazard, ...]], ...] = (
    ("AdjustContrast AdjustContrastv2", (
        Hazard(RAISES, "GPU", "adjust_contrast has no deterministic GPU kernel",
               "adjust contrast in the input pipeline, or with keras.layers.RandomContrast, which computes it itself"),
    )),
    ("CropAndResizeGradImage CropAndResizeGradBoxes", (_CROP,)),
    ("ResizeNearestNeighborGrad", (
        Hazard(RAISES, "GPU", "the gradient of nearest-neighbour resizing has no deterministic GPU kernel",
               'keras.layers.UpSampling2D for whole factors (it repeats), or interpolation="bilinear"'),
    )),
    ("Bincount DenseBincount", (_COUNT, _COUNT_CPU)),
    ("MaxPoolGradWithArgmax", (
        Hazard(RAISES, "GPU", "the gradient of max_pool_with_argmax has no deterministic GPU kernel",
               "tf.nn.max_pool2d, and the places of the maxima without a gradient"),
    )),
    ("MaxPoolGrad", (
        Hazard(RAISES, "XLA", "XLA has no deterministic gradient of max pooling on a GPU",
               "deterministic=True, which does without XLA, or average pooling or strided convolutions"),
    )),
    ("SparseTensorDenseMatMul", (
        Hazard(RAISES, "GPU", "sparse times dense has no deterministic GPU kernel",
               "tf.nn.embedding_lookup_sparse, or tf.sparse.to_dense for a small matrix"),
    )),
    ("FakeQuantWithMinMaxVarsGradient FakeQuantWithMinMaxVarsPerChannelGradient", (_QUANTISE,)),
    ("Dilation2DBackpropInput Dilation2DBackpropFilter", (_DILATION,)),
    ("FusedBatchNormGrad FusedBatchNormGradV2 FusedBatchNormGradV3", (_NORM,)),
    ("Svd", (
        Hazard(RAISES, "GPU", "the singular values of one-column matrices have no deterministic GPU kernel",
               "the norm of the column is its singular value", _one_column),
    )),
    ("DebugNumericSummaryV2", (
        Hazard(RAISES, "GPU", "tfdbg's health summaries have no deterministic GPU kernel",
               "trainrt's own record tells what is not finite: switch tf.debugging off",
               lambda node: node.attributes["tensor_debug_mode"].i in (3, 4)),
    )),
    ("SoftmaxCrossEntropyWithLogits SparseSoftmaxCrossEntropyWithLogits", (_ENTROPY,)),
    ("ScatterUpdate ScatterAdd ScatterSub ScatterMul ScatterDiv ScatterMin ScatterMax", (_REF,)),
    ("ResourceScatterUpdate ResourceScatterAdd ResourceScatterSub ResourceScatterMul ResourceScatterDiv "
     "ResourceScatterMin ResourceScatterMax", (_SCATTER,)),
    ("ScatterNd ScatterNdAdd ScatterNdSub ScatterNdUpdate ScatterNdMin ScatterNdMax ScatterNdNonAliasingAdd "
     "ResourceScatterNdAdd ResourceScatterNdSub ResourceScatterNdUpdate ResourceScatterNdMin ResourceScatterNdMax "
     "TensorScatterAdd TensorScatterSub TensorScatterUpdate TensorScatterMin TensorScatterMax", (_SCATTER_TENSOR,)),
    ("Timestamp", (
        Hazard(RAISES, "all", "the time is never the same", "take the time outside of the step"),
    )),
    ("RandomUniform RandomUniformInt RandomStandardNormal TruncatedNormal ParameterizedTruncatedNormal RandomShuffle "
     "Multinomial RandomGamma RandomPoisson RandomPoissonV2 RandomCrop SampleDistortedBoundingBox "
     "SampleDistortedBoundingBoxV2 FractionalMaxPool FractionalAvgPool", (_UNSEEDED,)),
    ("NonDeterministicInts", (_FRESH,)),
)  # fmt: skip

HAZARDS: dict[str, tuple[Hazard, ...]] = {name: hazards for names, hazards in _MANY for name in names.split()}
"""Type of an op -> what determinism does to it."""

FAMILIES = re.compile(
    "Scatter|Segment|Bincount|CropAndResize|MaxPool.*Grad|Resize.*Grad|Dilation2D|FakeQuant.*Gradient"
    "|SparseTensorDenseMatMul|Multinomial|ParameterizedTruncated|SampleDistorted|Fractional(Max|Avg)Pool|AdjustContrast"
    "|SoftmaxCrossEntropy|^Svd|FusedBatchNormGrad|DebugNumeric|Timestamp|NonDeterministic|DepthwiseConv2dNativeBackprop"
    "|BiasAddGrad|CTCLoss|^Random(Uniform|Standard|Shuffle$|Gamma|Poisson|Crop)|^TruncatedNormal"
)
"""Names of ops that have, or whose kin have, kernels with an order of sums that can vary, or that draw."""

CLEAN = frozenset(
    """
    BiasAddGrad CTCLoss CTCLossV2 CollectiveReduceScatterV2 CropAndResize DebugNumericSummary
    DepthwiseConv2dNativeBackpropFilter DepthwiseConv2dNativeBackpropInput Dilation2D FakeQuantWithMinMaxArgsGradient
    FractionalAvgPoolGrad FractionalMaxPoolGrad MaxPool3DGrad MaxPool3DGradGrad MaxPoolGradGrad MaxPoolGradGradV2
    MaxPoolGradGradWithArgmax MaxPoolGradV2 RaggedBincount RandomGammaGrad ResizeBicubicGrad ResizeBilinearGrad
    SegmentMax SegmentMaxV2 SegmentMean SegmentMin SegmentMinV2 SegmentProd SegmentProdV2 SegmentSum SegmentSumV2
    SparseBincount SparseSegmentMean SparseSegmentMeanGrad SparseSegmentMeanGradV2 SparseSegmentMeanWithNumSegments
    SparseSegmentSqrtN SparseSegmentSqrtNGrad SparseSegmentSqrtNGradV2 SparseSegmentSqrtNWithNumSegments
    SparseSegmentSum SparseSegmentSumGrad SparseSegmentSumGradV2 SparseSegmentSumWithNumSegments StatelessMultinomial
    StatelessParameterizedTruncatedNormal StatelessSampleDistortedBoundingBox TensorArrayScatter TensorArrayScatterV2
    TensorArrayScatterV3 TensorListScatter TensorListScatterIntoExistingList TensorListScatterV2 UnsortedSegmentJoin
    UnsortedSegmentMax UnsortedSegmentMin UnsortedSegmentProd UnsortedSegmentSum
    """.split()  # noqa: SIM905 - forty lines of quotes say no more
)
"""Ops of those families that are deterministic when the flag is on, or have no kernel on a GPU."""


def hazards_of(node: Node) -> list[Hazard]:
    """What determinism does to one op; empty for most."""
    return [hazard for hazard in HAZARDS.get(node.op, ()) if hazard.when(node)]
