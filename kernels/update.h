// A fused update on the CPU: load, step, store and fold, block by block, each block's statistics taken while it lies in
// the first-level cache. The rule itself is elementwise (`updates/`), shared with the device code.
#pragma once

#include <limits>

#include "blocks.h"
#include "kernels.h"

namespace trainrt {

template <typename T>
inline void prepare(Prepare how, T factor, int size, T* gradient) {
  switch (how) {
    case Prepare::kMultiply:
      for (int i = 0; i < size; ++i) gradient[i] = gradient[i] * factor;
      break;
    case Prepare::kDivide:
      for (int i = 0; i < size; ++i) gradient[i] = gradient[i] / factor;
      break;
    case Prepare::kClip: {
      const T low = negative(factor);
      for (int i = 0; i < size; ++i) {
        const T x = gradient[i], y = x > factor ? factor : x;  // NaN compares false and stays
        gradient[i] = y < low ? low : y;
      }
      break;
    }
  }
}

template <typename T>
inline void decay(T rate, T learning_rate, int size, T* weight) {
  for (int i = 0; i < size; ++i) weight[i] = weight[i] - (weight[i] * rate) * learning_rate;
}

// difference: null, or where to put the weight's displacement.
template <typename R, typename T>
inline void step_block(const T* scalars, int size, const T* __restrict gradient, T* __restrict weight,
                       T* __restrict slot0, T* __restrict slot1, T* __restrict slot2) {
  T s[kMaxScalars];
  for (int i = 0; i < R::kScalars; ++i) s[i] = scalars[i];
#pragma omp simd
  for (int i = 0; i < size; ++i) {
    T w = weight[i], q[3];
    if (R::kSlots > 0) q[0] = slot0[i];
    if (R::kSlots > 1) q[1] = slot1[i];
    if (R::kSlots > 2) q[2] = slot2[i];
    R::step(s, gradient[i], w, q);
    weight[i] = w;
    if (R::kSlots > 0) slot0[i] = q[0];
    if (R::kSlots > 1) slot1[i] = q[1];
    if (R::kSlots > 2) slot2[i] = q[2];
  }
}

struct Partial {
  Moments gradient, update, weight, slots[kMaxSlots];
  Joint joint;
};

template <typename R, typename T>
void update_chunk(const Update& u, int index, int64_t offset, Partial& partial) {
  using Fold = typename Folded<T>::Fold;
  using Wide = typename Folded<T>::Wide;
  const Weight& one = u.weights[index];
  const int64_t size = std::min(kChunk, one.size - offset);
  T* weight = static_cast<T*>(one.weight) + offset;
  T* slots[kMaxSlots];
  for (int k = 0; k < kMaxSlots; ++k) slots[k] = k < R::kSlots ? static_cast<T*>(one.slots[k]) + offset : nullptr;
  const T* gradient = one.gradient ? static_cast<const T*>(one.gradient) + offset : nullptr;

  T scalars[kMaxScalars];
  const int given = R::kScalars + (one.decay ? 2 : 0);
  for (int i = 0; i < given; ++i) scalars[i] = *static_cast<const T*>(u.scalars[i]);

  Fold of_gradient, of_update, of_weight, of_slot[kMaxSlots];
  JointFold joint;
  alignas(64) T prepared[kBlock], before[kBlock];
  alignas(64) Wide scratch[kBlock], wide_gradient[kBlock];
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, size - begin));
    T* w = weight + begin;
    T* q[kMaxSlots];
    for (int k = 0; k < kMaxSlots; ++k) q[k] = k < R::kSlots ? slots[k] + begin : nullptr;
    if (gradient) {
      const T* g = gradient + begin;
      if (u.factor_count) {
        __builtin_memcpy(prepared, g, n * sizeof(T));
        for (int f = 0; f < u.factor_count; ++f) {
          const Factor& factor = u.factors[f];
          prepare(factor.how, static_cast<const T*>(factor.values)[factor.each ? index : 0], n, prepared);
        }
        g = prepared;
      }
      if (u.observe) __builtin_memcpy(before, w, n * sizeof(T));
      if (one.decay) decay(scalars[R::kScalars], scalars[R::kScalars + 1], n, w);
      step_block<R, T>(scalars, n, g, w, q[0], q[1], q[2]);
    }
    if (!u.observe) continue;
    if (gradient) {
      for (int i = 0; i < n; ++i) before[i] = w[i] - before[i];
      const Wide* difference = Folded<T>::widen(before, n, scratch);
      const Wide* raw = Folded<T>::widen(gradient + begin, n, wide_gradient);
      if (u.gradient_moments) of_gradient.add(raw, n);
      of_update.add(difference, n);
      joint.add(raw, difference, n);
    }
    of_weight.add(Folded<T>::widen(w, n, scratch), n);
    for (int k = 0; k < R::kSlots; ++k) of_slot[k].add(Folded<T>::widen(q[k], n, scratch), n);
  }
  if (!u.observe) return;
  partial.weight = of_weight.moments();
  for (int k = 0; k < R::kSlots; ++k) partial.slots[k] = of_slot[k].moments();
  if (gradient) {
    partial.gradient = of_gradient.moments();
    partial.update = of_update.moments();
    partial.joint = joint.joint();
  } else {  // did not move
    partial.update = Moments();
    partial.update.count = partial.update.zeros = size;
  }
}

template <typename R, typename T>
void run_update(const Update& u, const Parallel& parallel) {
  // Kept by the thread from one step to the next, so that a step allocates nothing.
  static thread_local Chunks chunks;
  static thread_local std::vector<Partial> partials;
  const Chunks& plan = chunks;
  chunks.plan(u.count, [&](int t) { return u.weights[t].gradient || u.observe ? u.weights[t].size : int64_t{0}; });
  if (u.observe) partials.resize(plan.count());
  Partial* const results = partials.data();
  parallel(plan.count(), plan.elements, [&](int64_t begin, int64_t end) {
    Partial unused;
    plan.each(begin, end, [&](int64_t chunk, int tensor, int64_t offset) {
      update_chunk<R, T>(u, tensor, offset, u.observe ? results[chunk] : unused);
    });
  });
  if (!u.observe) return;
  for (int t = 0; t < u.count; ++t) {
    Partial whole;
    for (int64_t chunk = plan.first[t]; chunk < plan.first[t + 1]; ++chunk) {
      whole.gradient.merge(results[chunk].gradient);
      whole.update.merge(results[chunk].update);
      whole.weight.merge(results[chunk].weight);
      for (int k = 0; k < R::kSlots; ++k) whole.slots[k].merge(results[chunk].slots[k]);
      whole.joint.merge(results[chunk].joint);
    }
    const bool missing = !u.weights[t].gradient && u.weights[t].size;
    const double nan = std::numeric_limits<double>::quiet_NaN();
    if (u.gradient_moments) {
      whole.gradient.store(u.gradient + t * kMoments);
      if (missing) std::fill_n(u.gradient + t * kMoments, kMoments, nan);
    }
    whole.update.store(u.update + t * kMoments);
    whole.weight.store(u.weight + t * kMoments);
    for (int k = 0; k < R::kSlots; ++k) whole.slots[k].store(u.slots[k] + t * kMoments);
    u.joint[t * kJoint] = missing ? nan : whole.joint.product;
    u.joint[t * kJoint + 1] = missing ? nan : static_cast<double>(whole.joint.rounded);
  }
}

template <typename R>
Rule rule() {
  return {R::kName, R::kSlots, R::kScalars,
          {run_update<R, float>, run_update<R, double>, run_update<R, BFloat16>, run_update<R, Float16>}};
}

}  // namespace trainrt
