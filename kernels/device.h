// The device's way: one launch over the chunks of many tensors, one block a chunk; one that folds each tensor's chunks,
// one block a tensor; and one block that does the little arithmetic at the end. Every thread folds the elements it loads,
// 16 bytes at a time; threads and chunks fold in trees of fixed shape: the same bits at every launch, and no atomics.
// Nothing waits for the host: what a step needs to know (its number, its learning rate) is read where it lies.
//
// The bodies are templates over the thread that runs them, so that `shim.h` can run them on a host. No TensorFlow header.
#pragma once

#include "account.h"
#include "elements.h"

namespace trainrt {
namespace device {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;
constexpr int kSlotsMost = 3, kScalarsMost = 12, kFactorsMost = 4;
constexpr int kSubjects = 3 + kSlotsMost;  // gradient, update, weight, slots

struct Weight {
  const void* gradient;  // null: missing
  void* weight;
  void* slots[kSlotsMost];
  int64_t size;
  Decay decay;
};

// What an op of TrainrtMeasure or TrainrtObserve looks at: a tensor alone, or a weight before and after a step.
struct Subject {
  const void *before, *after;  // `before` null: only `after` is measured
  const void* gradient;        // null: missing
  const void *momentum, *second;
  int64_t size;
  Dtype dtype, gradient_dtype, slot_dtype;
  int weight;  // which row of `table`
};

struct Chunk {  // elements [offset, offset + kChunk) of a tensor
  int tensor;
  int64_t offset;
};

// How an optimizer divides in this step, from numbers on the device.
struct Clock {
  const int64_t* iterations;
  const double *learning_rate, *constants;
  Divides divides;
  int64_t every;

  TRAINRT_HD bool due() const { return slots_due(*iterations, every); }
  TRAINRT_HD Division division() const {
    return division_of(divides, *iterations, *learning_rate, constants[kBeta1], constants[kBeta2], constants[kEpsilon]);
  }
};

struct Arguments {  // all pointers are the device's
  const Weight* weights;
  const Chunk* chunks;
  const double* scale;  // of the clip, one for each weight, before any factor; null: none
  const void* factors[kFactorsMost];
  Prepare prepare[kFactorsMost];
  bool each[kFactorsMost];  // one factor for each weight, or one for all
  int factor_count;
  const void* scalars[kScalarsMost];
  bool graph;    // a root divides by its reciprocal, as Grappler has it
  bool observe, measured;  // measured: the gradients' moments are known
  int momentum, second;  // which slot is; -1: none
  Clock clock;           // read only if one of them is
};

// What one chunk comes to; also what a whole tensor does.
struct Row {
  Moments moments[kSubjects];
  Joint joint;
  Adaptive adaptive;
};

// Of one block.
struct Shared {
  double lanes[kWarps];
  Division division;
  bool due;
};

// 16 bytes of T.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kCount = 16 / sizeof(T);
  T values[kCount];
};

TRAINRT_HD bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// 1 / sqrt(x) as the device's own instruction has it, which TensorFlow's ops use there too.
TRAINRT_HD float reciprocal_root(float x) {
#if defined(__CUDA_ARCH__)
  return rsqrtf(x);
#else
  return 1.0f / sqrtf(x);
#endif
}
TRAINRT_HD double reciprocal_root(double x) {
#if defined(__CUDA_ARCH__)
  return rsqrt(x);
#else
  return 1.0 / sqrt(x);
#endif
}
template <typename T>
TRAINRT_HD T reciprocal_root(T x) {
  return T(reciprocal_root(static_cast<float>(x)));
}

template <typename R, typename T>
TRAINRT_HD void step_element(bool graph, const T* scalars, T gradient, T& weight, T* slots) {
  if constexpr (HasRoot<R>::value) {
    if (graph) {
      const TimesReciprocal<T> over_root{reciprocal_root(R::radicand(scalars, gradient, slots))};
      R::step(scalars, gradient, weight, slots, over_root);
      return;
    }
  }
  trainrt::step_element<R>(scalars, gradient, weight, slots);
}

// Moments of at most kChunk / kThreads elements: small enough to keep six of them in registers.
template <typename T>
struct Tally {
  using Top = std::conditional_t<std::is_same_v<T, double>, double, float>;
  double sum = 0, sumsq = 0;
  Top absmax = 0;
  uint32_t zeros = 0, nonfinite = 0;

  TRAINRT_HD void add(T x) {
    if (!is_finite(x)) {
      ++nonfinite;
      return;
    }
    const double value = exact(x), size = value < 0 ? -value : value;
    sum += value;
    sumsq += value * value;
    absmax = static_cast<Top>(size) > absmax ? static_cast<Top>(size) : absmax;
    zeros += is_zero(x);
  }
};

// Folds a number over the block; thread 0 has the result.
template <typename Thread, typename V, typename Fold>
TRAINRT_HD V fold_block(Thread& me, V value, Shared& shared, Fold fold) {
  for (int delta = kWarp / 2; delta; delta /= 2) value = fold(value, static_cast<V>(me.from_below(value, delta)));
  if (me.index() % kWarp == 0) shared.lanes[me.index() / kWarp] = static_cast<double>(value);
  me.sync();
  if (me.index() == 0)
    for (int warp = 1; warp < kWarps; ++warp) value = fold(value, static_cast<V>(shared.lanes[warp]));
  me.sync();
  return value;
}

struct Add {
  template <typename V>
  TRAINRT_HD V operator()(V a, V b) const {
    return a + b;
  }
};
struct Larger {
  template <typename V>
  TRAINRT_HD V operator()(V a, V b) const {
    return a > b ? a : b;
  }
};
struct Smaller {
  template <typename V>
  TRAINRT_HD V operator()(V a, V b) const {
    return b < a ? b : a;
  }
};

template <typename Thread, typename T>
TRAINRT_HD void fold_tally(Thread& me, const Tally<T>& tally, int64_t count, Shared& shared, Moments* into) {
  Moments m;
  m.count = count;
  m.sum = fold_block(me, tally.sum, shared, Add());
  m.sumsq = fold_block(me, tally.sumsq, shared, Add());
  m.absmax = fold_block(me, tally.absmax, shared, Larger());
  m.zeros = fold_block(me, tally.zeros, shared, Add());
  m.nonfinite = fold_block(me, tally.nonfinite, shared, Add());
  if (me.index() == 0) *into = m;
}

template <typename Thread>
TRAINRT_HD Moments fold_moments(Thread& me, const Moments& mine, Shared& shared) {
  Moments m;
  m.count = fold_block(me, mine.count, shared, Add());
  m.sum = fold_block(me, mine.sum, shared, Add());
  m.sumsq = fold_block(me, mine.sumsq, shared, Add());
  m.absmax = fold_block(me, mine.absmax, shared, Larger());
  m.zeros = fold_block(me, mine.zeros, shared, Add());
  m.nonfinite = fold_block(me, mine.nonfinite, shared, Add());
  return m;
}

template <typename Thread>
TRAINRT_HD Joint fold_joint(Thread& me, const Joint& mine, Shared& shared) {
  Joint j;
  j.product = fold_block(me, mine.product, shared, Add());
  j.rounded = fold_block(me, mine.rounded, shared, Add());
  return j;
}

template <typename Thread>
TRAINRT_HD Adaptive fold_adaptive(Thread& me, const Adaptive& mine, Shared& shared) {
  Adaptive a;
  a.product = fold_block(me, mine.product, shared, Add());
  a.normalized = fold_block(me, mine.normalized, shared, Add());
  a.inverse = fold_block(me, mine.inverse, shared, Add());
  a.lowest = fold_block(me, mine.lowest, shared, Smaller());
  a.under = fold_block(me, mine.under, shared, Add());
  return a;
}

// First launch of an update, one block a chunk. rows: one a chunk.
template <typename R, typename T, typename Thread>
TRAINRT_HD void update_chunk(Thread& me, const Arguments& a, Row* rows, Shared& shared) {
  const Chunk chunk = a.chunks[me.block()];
  const Weight one = a.weights[chunk.tensor];
  const int64_t left = one.size - chunk.offset, size = left < kChunk ? left : kChunk;
  const bool divides = a.observe && (a.momentum >= 0 || a.second >= 0);
  if (divides) {
    if (me.index() == 0) {
      shared.due = a.clock.due();
      shared.division = a.clock.division();
    }
    me.sync();
  }
  const bool adapts = divides && shared.due;
  const Division division = adapts ? shared.division : Division();
  T scalars[kScalarsMost];
  const int given = R::kScalars + (one.decay == Decay::kNone ? 0 : kDecayScalars);
  for (int i = 0; i < given; ++i) scalars[i] = *static_cast<const T*>(a.scalars[i]);
  T factors[kFactorsMost], scale = T(1.0f);
  for (int f = 0; f < a.factor_count; ++f)
    factors[f] = static_cast<const T*>(a.factors[f])[a.each[f] ? chunk.tensor : 0];
  if (a.scale) scale = T(static_cast<float>(a.scale[chunk.tensor]));

  Tally<T> tallies[kSubjects];
  Joint joint;
  Adaptive adaptive;
  const auto element = [&](const T* gradient, T& weight, T* slots) {
    const T before = weight;
    if (gradient) {
      T g = *gradient;
      if (a.scale) g = prepared(Prepare::kMultiply, g, scale);
      for (int f = 0; f < a.factor_count; ++f) g = prepared(a.prepare[f], g, factors[f]);
      weight = decayed(one.decay, weight, scalars + R::kScalars);
      step_element<R>(a.graph, scalars, g, weight, slots);
    }
    if (!a.observe) return;
    const T update = gradient ? weight - before : T(0.0f);
    if (gradient) {
      if (!a.measured) tallies[0].add(*gradient);
      fold(*gradient, update, joint);
    }
    tallies[1].add(update);
    tallies[2].add(weight);
    const T *momentum = nullptr, *second = nullptr;
    for (int k = 0; k < R::kSlots; ++k) {
      tallies[3 + k].add(slots[k]);
      if (k == a.momentum) momentum = slots + k;
      if (k == a.second) second = slots + k;
    }
    if (adapts) fold(gradient, momentum, second, division, adaptive);
  };

  constexpr int kCount = Pack<T>::kCount;
  const T* gradient = one.gradient ? static_cast<const T*>(one.gradient) + chunk.offset : nullptr;
  T* weight = static_cast<T*>(one.weight) + chunk.offset;
  T* slots[kSlotsMost] = {};
  bool packs = aligned(gradient) && aligned(weight);
  for (int k = 0; k < R::kSlots; ++k) {
    slots[k] = static_cast<T*>(one.slots[k]) + chunk.offset;
    packs = packs && aligned(slots[k]);
  }
  const int64_t packed = packs ? size / kCount * kCount : 0;
  for (int64_t i = int64_t{me.index()} * kCount; i < packed; i += int64_t{kThreads} * kCount) {
    Pack<T> w = *reinterpret_cast<const Pack<T>*>(weight + i), g = {}, q[kSlotsMost] = {};
    if (gradient) g = *reinterpret_cast<const Pack<T>*>(gradient + i);
    for (int k = 0; k < R::kSlots; ++k) q[k] = *reinterpret_cast<const Pack<T>*>(slots[k] + i);
    for (int j = 0; j < kCount; ++j) {
      T own[kSlotsMost];
      for (int k = 0; k < R::kSlots; ++k) own[k] = q[k].values[j];
      element(gradient ? &g.values[j] : nullptr, w.values[j], own);
      for (int k = 0; k < R::kSlots; ++k) q[k].values[j] = own[k];
    }
    *reinterpret_cast<Pack<T>*>(weight + i) = w;
    for (int k = 0; k < R::kSlots; ++k) *reinterpret_cast<Pack<T>*>(slots[k] + i) = q[k];
  }
  for (int64_t i = packed + me.index(); i < size; i += kThreads) {
    T own[kSlotsMost];
    for (int k = 0; k < R::kSlots; ++k) own[k] = slots[k][i];
    element(gradient ? gradient + i : nullptr, weight[i], own);
    for (int k = 0; k < R::kSlots; ++k) slots[k][i] = own[k];
  }

  if (!a.observe) return;
  Row* row = rows + me.block();
  for (int s = 0; s < 3 + R::kSlots; ++s)
    fold_tally(me, tallies[s], s == 0 && !gradient ? 0 : size, shared, &row->moments[s]);
  const Joint whole = fold_joint(me, joint, shared);
  if (me.index() == 0) row->joint = whole;
  if (!divides) return;
  const Adaptive together = fold_adaptive(me, adaptive, shared);
  if (me.index() == 0) row->adaptive = together;
}

// The moments of one chunk of a tensor.
template <typename T, typename Thread>
TRAINRT_HD void measure_chunk(Thread& me, const T* x, int64_t size, Moments* into, Shared& shared) {
  constexpr int kCount = Pack<T>::kCount;
  const int64_t packed = aligned(x) ? size / kCount * kCount : 0;
  Tally<T> tally;
  for (int64_t i = int64_t{me.index()} * kCount; i < packed; i += int64_t{kThreads} * kCount) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(x + i);
    for (int j = 0; j < kCount; ++j) tally.add(pack.values[j]);
  }
  for (int64_t i = packed + me.index(); i < size; i += kThreads) tally.add(x[i]);
  fold_tally(me, tally, size, shared, into);
}

// What one chunk of a weight did in a step that something else took: update, joint sums, and `after`'s own moments.
// G: dtype of the gradient, which need not be the weight's.
template <typename T, typename G, typename Thread>
TRAINRT_HD void motion_of_chunk(Thread& me, const T* before, const T* after, const G* gradient, int64_t size, Row* row,
                                Shared& shared) {
  Tally<T> of_update, of_weight;
  Tally<G> of_gradient;
  Joint joint;
  for (int64_t i = me.index(); i < size; i += kThreads) {
    const T update = after[i] - before[i];
    of_update.add(update);
    of_weight.add(after[i]);
    if (!gradient) continue;
    of_gradient.add(gradient[i]);
    joint.product += exact(gradient[i]) * exact(update);
    joint.rounded += !is_zero(gradient[i]) && is_zero(update);
  }
  fold_tally(me, of_gradient, gradient ? size : 0, shared, &row->moments[0]);
  fold_tally(me, of_update, size, shared, &row->moments[1]);
  fold_tally(me, of_weight, size, shared, &row->moments[2]);
  const Joint whole = fold_joint(me, joint, shared);
  if (me.index() == 0) row->joint = whole;
}

// Calls f with a null pointer of the type that `dtype` names.
template <typename F>
TRAINRT_HD void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32: return f(static_cast<const float*>(nullptr));
    case Dtype::kFloat64: return f(static_cast<const double*>(nullptr));
    case Dtype::kBFloat16: return f(static_cast<const BFloat16*>(nullptr));
    case Dtype::kFloat16: return f(static_cast<const Float16*>(nullptr));
  }
}

struct Looks {  // the device's pointers
  const Subject* subjects;
  const Chunk* chunks;
  const double* table;  // [weights, 6] of `Observe`; null: nothing but moments
  Clock clock;          // its iterations say whether slots are held against gradients
};

// First launch of TrainrtMeasure and TrainrtObserve, one block a chunk.
template <typename Thread>
TRAINRT_HD void look_chunk(Thread& me, const Looks& a, Row* rows, Shared& shared) {
  const Chunk chunk = a.chunks[me.block()];
  const Subject one = a.subjects[chunk.tensor];
  const int64_t left = one.size - chunk.offset, size = left < kChunk ? left : kChunk;
  Row* row = rows + me.block();
  if (!one.before) {
    with_type(one.dtype, [&](auto* type) {
      measure_chunk(me, static_cast<decltype(type)>(one.after) + chunk.offset, size, &row->moments[2], shared);
    });
    return;
  }
  with_type(one.dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    with_type(one.gradient_dtype, [&](auto* gradient_type) {
      using G = std::remove_const_t<std::remove_pointer_t<decltype(gradient_type)>>;
      motion_of_chunk(me, static_cast<const T*>(one.before) + chunk.offset, static_cast<const T*>(one.after) + chunk.offset,
                      one.gradient ? static_cast<const G*>(one.gradient) + chunk.offset : nullptr, size, row, shared);
    });
  });
  if ((!one.momentum && !one.second) || !a.clock.due()) return;
  const double* d = a.table + 6 * one.weight;
  const Division division = {d[0], d[1], d[2], d[3], d[4]};
  with_type(one.slot_dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    Adaptive adaptive;
    const auto at = [&](const void* data, int64_t i) {
      return data ? static_cast<const T*>(data) + chunk.offset + i : nullptr;
    };
    for (int64_t i = me.index(); i < size; i += kThreads)
      fold(at(one.gradient, i), at(one.momentum, i), at(one.second, i), division, adaptive);
    const Adaptive together = fold_adaptive(me, adaptive, shared);
    if (me.index() == 0) row->adaptive = together;
  });
}

// What the second launch stores, one block a tensor.
struct Totals {
  const Row* rows;       // of the chunks
  const int64_t* first;  // [tensors + 1] index of each one's chunks
  Row* totals;           // [tensors]
};

// Second launch: folds the chunks of one tensor, in strides of the block and then in a tree.
template <typename Thread>
TRAINRT_HD void fold_chunks(Thread& me, const Totals& a, Shared& shared) {
  const int tensor = me.block();
  Row mine = {}, total = {};
  for (int64_t chunk = a.first[tensor] + me.index(); chunk < a.first[tensor + 1]; chunk += kThreads) {
    for (int s = 0; s < kSubjects; ++s) mine.moments[s].merge(a.rows[chunk].moments[s]);
    mine.joint.merge(a.rows[chunk].joint);
    mine.adaptive.merge(a.rows[chunk].adaptive);
  }
  for (int s = 0; s < kSubjects; ++s) total.moments[s] = fold_moments(me, mine.moments[s], shared);
  total.joint = fold_joint(me, mine.joint, shared);
  total.adaptive = fold_adaptive(me, mine.adaptive, shared);
  if (me.index() == 0) a.totals[tensor] = total;
}

// The scales of a clip, from rows of moments that lie `stride` apart; by one block.
template <typename Thread>
TRAINRT_HD void clip_rows(Thread& me, Clip how, double threshold, const double* rows, int stride, int count,
                          double* scales, Shared& shared) {
  GradientNorm norm;
  if (how == Clip::kGlobalNorm) {
    for (int t = me.index(); t < count; t += kThreads) norm.add(rows + int64_t{t} * stride);
    const double squares = fold_block(me, norm.squares, shared, Add());
    const uint32_t broken = fold_block(me, static_cast<uint32_t>(norm.broken), shared, Add());
    if (me.index() == 0) {
      shared.lanes[0] = squares;
      shared.lanes[1] = broken;
    }
    me.sync();
    norm.squares = shared.lanes[0];
    norm.broken = shared.lanes[1] > 0;
    me.sync();
  }
  for (int t = me.index(); t < count; t += kThreads)
    scales[t] = clip_scale(how, threshold, norm, rows + int64_t{t} * stride);
}

// Last launch of a measurement, one block: the rows, and the scales of a clip.
struct Measured {
  const Row* totals;
  int count;
  double* rows;  // [count, kMoments]
  Clip clip;
  const double* threshold;
  double* scales;  // [count], if it clips
};

template <typename Thread>
TRAINRT_HD void finish_measure(Thread& me, const Measured& a, Shared& shared) {
  for (int t = me.index(); t < a.count; t += kThreads) a.totals[t].moments[2].store(a.rows + t * kMoments);
  me.sync();
  if (a.clip != Clip::kNone) clip_rows(me, a.clip, *a.threshold, a.rows, kMoments, a.count, a.scales, shared);
}

// Last launch of an update or an observation, one block: cube and joint.
struct Finish {
  const Row* totals;  // of the weights; of an observation then those of the slots, slot by slot
  int count, slots;
  // Of an update:
  const Weight* weights;
  Clock clock;
  Clip own_clip;
  double* own_scale;   // [count], where the optimizer clips and we do not
  double* correction;
  // Of an observation:
  const Subject* subjects;
  const double* table;
  const double* loss_scale;
  const bool* skipped;
  const int *momentums, *seconds;  // [count]; of an update the two below are for all
  int momentum, second;
  // Of both:
  const double *measured, *scale;  // or null
  double *cube, *joint;
};

template <typename Thread>
TRAINRT_HD void finish(Thread& me, const Finish& a, Shared& shared) {
  const bool updates = a.weights != nullptr;
  const int width = (3 + a.slots) * kMoments;
  const double loss_scale = updates ? a.clock.constants[kLossScale] : *a.loss_scale;
  if (updates && me.index() == 0) {
    shared.division = a.clock.division();
    *a.correction = shared.division.correction;
  }
  me.sync();
  const Division division = updates ? shared.division : Division();
  for (int t = me.index(); t < a.count; t += kThreads) {
    const Row& total = a.totals[t];
    const int64_t size = updates ? a.weights[t].size : a.subjects[t].size;
    const bool missing = size && !(updates ? a.weights[t].gradient : a.subjects[t].gradient);
    double* cube = a.cube + int64_t{t} * width;
    store_gradient(total.moments[0], missing, a.measured ? a.measured + t * kMoments : nullptr, loss_scale, cube);
    total.moments[1].store(cube + kMoments);
    total.moments[2].store(cube + 2 * kMoments);
    for (int k = 0; k < a.slots; ++k) {
      const int at = a.count * (1 + k) + t;
      double* row = cube + (3 + k) * kMoments;
      (updates ? total.moments[3 + k] : a.totals[at].moments[2]).store(row);
      if (!updates && size && !a.subjects[at].after) fill(row, kMoments, __builtin_nan(""));
    }
  }
  me.sync();
  const double* clipped = a.scale;
  if (a.count && !clipped && updates && a.own_clip != Clip::kNone) {
    clip_rows(me, a.own_clip, a.clock.constants[kOwnThreshold], a.cube, width, a.count, a.own_scale, shared);
    clipped = a.own_scale;
    me.sync();
  }
  for (int t = me.index(); t < a.count; t += kThreads) {
    const Row& total = a.totals[t];
    const double* cube = a.cube + int64_t{t} * width;
    const int momentum = updates ? a.momentum : a.momentums[t], second = updates ? a.second : a.seconds[t];
    Account account;
    account.slots_seen = a.clock.due();
    account.scale = clipped ? clipped[t] : 1;
    account.loss_scale = loss_scale;
    if (updates) {
      account.missing = a.weights[t].size && !a.weights[t].gradient;
      account.momentum = momentum >= 0;
      account.second = second >= 0;
      account.decay =
          a.weights[t].decay == Decay::kNone ? 0 : *a.clock.learning_rate * a.clock.constants[kWeightDecay];
      account.division = division;
    } else {
      const double* d = a.table + 6 * t;
      account.missing = a.subjects[t].size && !a.subjects[t].gradient;
      account.skipped = *a.skipped;
      account.momentum = a.subjects[t].momentum;
      account.second = a.subjects[t].second;
      account.decay = account.missing ? 0 : d[5];
      account.division = Division{d[0], d[1], d[2], d[3], d[4]};
    }
    if (account.momentum) account.momentum_squares = cube[(3 + momentum) * kMoments + kSumsq];
    if (account.second) account.highest = cube[(3 + second) * kMoments + kAbsmax];
    store_joint(total.joint, total.adaptive, account, cube, cube + 2 * kMoments, a.joint + t * kJointColumns);
  }
}

}  // namespace device
}  // namespace trainrt
