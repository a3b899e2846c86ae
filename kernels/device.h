// The device's way: one launch over the chunks of many tensors, then one that folds each tensor's chunks. Every thread
// folds the elements it loads, 16 bytes at a time; threads fold in a tree of fixed shape, warps and chunks in order:
// the same bits at every launch, and no atomics.
//
// The bodies are templates over the thread that runs them, so that `shim.h` can run them on a host. No TensorFlow header.
#pragma once

#include "elements.h"
#include "moments.h"

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

struct Chunk {  // elements [offset, offset + kChunk) of a weight
  int weight;
  int64_t offset;
};

struct Arguments {  // all pointers are the device's
  const Weight* weights;
  const Chunk* chunks;
  const void* factors[kFactorsMost];
  Prepare prepare[kFactorsMost];
  bool each[kFactorsMost];  // one factor for each weight, or one for all
  int factor_count;
  const void* scalars[kScalarsMost];
  bool observe;
};

// What one chunk comes to; also what a whole weight does.
struct Row {
  Moments moments[kSubjects];
  Joint joint;
};

// 16 bytes of T.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kCount = 16 / sizeof(T);
  T values[kCount];
};

// Moments of at most kChunk / kThreads elements: small enough to keep six of them in registers.
struct Tally {
  double sum = 0, sumsq = 0;
  float absmax = 0;
  uint32_t zeros = 0, nonfinite = 0;

  template <typename T>
  TRAINRT_HD void add(T x) {
    if (!is_finite(x)) {
      ++nonfinite;
      return;
    }
    const double value = exact(x), size = value < 0 ? -value : value;
    sum += value;
    sumsq += value * value;
    absmax = static_cast<float>(size) > absmax ? static_cast<float>(size) : absmax;
    zeros += is_zero(x);
  }
};

// Folds a tally over the block; thread 0 has the result. `shared`: kWarps doubles.
template <typename Thread, typename V, typename Fold>
TRAINRT_HD V fold_block(Thread& me, V value, double* shared, Fold fold) {
  for (int delta = kWarp / 2; delta; delta /= 2) value = fold(value, static_cast<V>(me.from_below(value, delta)));
  if (me.index() % kWarp == 0) shared[me.index() / kWarp] = static_cast<double>(value);
  me.sync();
  if (me.index() == 0)
    for (int warp = 1; warp < kWarps; ++warp) value = fold(value, static_cast<V>(shared[warp]));
  me.sync();
  return value;
}

template <typename Thread>
TRAINRT_HD void fold_tally(Thread& me, const Tally& tally, int64_t count, double* shared, Moments* into) {
  const auto add = [](auto a, auto b) { return a + b; };
  const auto larger_of = [](float a, float b) { return a > b ? a : b; };
  Moments m;
  m.count = count;
  m.sum = fold_block(me, tally.sum, shared, add);
  m.sumsq = fold_block(me, tally.sumsq, shared, add);
  m.absmax = fold_block(me, tally.absmax, shared, larger_of);
  m.zeros = fold_block(me, tally.zeros, shared, add);
  m.nonfinite = fold_block(me, tally.nonfinite, shared, add);
  if (me.index() == 0) *into = m;
}

// First launch, one block a chunk. rows: one a chunk.
template <typename R, typename T, typename Thread>
TRAINRT_HD void update_chunk(Thread& me, const Arguments& a, Row* rows, double* shared) {
  const Chunk chunk = a.chunks[me.block()];
  const Weight one = a.weights[chunk.weight];
  const int64_t left = one.size - chunk.offset, size = left < kChunk ? left : kChunk;
  T scalars[kScalarsMost];
  const int given = R::kScalars + (one.decay == Decay::kNone ? 0 : kDecayScalars);
  for (int i = 0; i < given; ++i) scalars[i] = *static_cast<const T*>(a.scalars[i]);
  T factors[kFactorsMost];
  for (int f = 0; f < a.factor_count; ++f)
    factors[f] = static_cast<const T*>(a.factors[f])[a.each[f] ? chunk.weight : 0];

  Tally tallies[kSubjects];
  Joint joint;
  const auto element = [&](const T* gradient, T& weight, T* slots) {
    const T before = weight;
    if (gradient) {
      T g = *gradient;
      for (int f = 0; f < a.factor_count; ++f) g = prepared(a.prepare[f], g, factors[f]);
      weight = decayed(one.decay, weight, scalars + R::kScalars);
      step_element<R>(scalars, g, weight, slots);
    }
    if (!a.observe) return;
    const T update = weight - before;
    if (gradient) {
      tallies[0].add(*gradient);
      fold(*gradient, update, joint);
    }
    tallies[1].add(update);
    tallies[2].add(weight);
    for (int k = 0; k < R::kSlots; ++k) tallies[3 + k].add(slots[k]);
  };

  constexpr int kCount = Pack<T>::kCount;
  const T* gradient = one.gradient ? static_cast<const T*>(one.gradient) + chunk.offset : nullptr;
  T* weight = static_cast<T*>(one.weight) + chunk.offset;
  T* slots[kSlotsMost] = {};
  for (int k = 0; k < R::kSlots; ++k) slots[k] = static_cast<T*>(one.slots[k]) + chunk.offset;
  const int64_t packed = size / kCount * kCount;
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
  const auto add = [](auto x, auto y) { return x + y; };
  const double product = fold_block(me, joint.product, shared, add);
  const uint32_t rounded = fold_block(me, static_cast<uint32_t>(joint.rounded), shared, add);
  if (me.index() == 0) {
    row->joint.product = product;
    row->joint.rounded = rounded;
  }
}

// First launch of a measurement alone: the moments of each chunk of `weights[i].weight`, into subject 2.
template <typename T, typename Thread>
TRAINRT_HD void measure_chunk(Thread& me, const Arguments& a, Row* rows, double* shared) {
  const Chunk chunk = a.chunks[me.block()];
  const Weight one = a.weights[chunk.weight];
  const int64_t left = one.size - chunk.offset, size = left < kChunk ? left : kChunk;
  const T* x = static_cast<const T*>(one.weight) + chunk.offset;
  constexpr int kCount = Pack<T>::kCount;
  const int64_t packed = size / kCount * kCount;
  Tally tally;
  for (int64_t i = int64_t{me.index()} * kCount; i < packed; i += int64_t{kThreads} * kCount) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(x + i);
    for (int j = 0; j < kCount; ++j) tally.add(pack.values[j]);
  }
  for (int64_t i = packed + me.index(); i < size; i += kThreads) tally.add(x[i]);
  fold_tally(me, tally, size, shared, &rows[me.block()].moments[2]);
}

// Second launch, one thread a weight: folds its chunks in their order. first: [weights + 1] index of each one's chunks.
template <typename Thread>
TRAINRT_HD void fold_chunks(Thread& me, const Row* rows, const int64_t* first, int weights, Row* totals) {
  const int weight = me.block() * kThreads + me.index();
  if (weight >= weights) return;
  Row total = {};
  for (int64_t chunk = first[weight]; chunk < first[weight + 1]; ++chunk) {
    for (int s = 0; s < kSubjects; ++s) total.moments[s].merge(rows[chunk].moments[s]);
    total.joint.merge(rows[chunk].joint);
  }
  totals[weight] = total;
}

}  // namespace device
}  // namespace trainrt
