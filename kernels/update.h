// A fused update on the CPU: load, step, store and fold, block by block, each block's statistics taken while it lies in
// the first-level cache. The rule itself is elementwise (`updates/`), shared with the device code. Whole strides of
// float32, nearly all that is ever trained, go through `strides.h`.
#pragma once

#include "blocks.h"
#include "kernels.h"
#include "roots.h"
#include "strides.h"

namespace trainrt {

template <Prepare kHow, typename T>
inline void prepare(const T* gradient, T factor, int size, T* to) {
#pragma GCC ivdep  // `to` may be the gradient itself
  for (int i = 0; i < size; ++i) to[i] = prepared(kHow, gradient[i], factor);
}

template <typename T>
inline void prepare(Prepare how, const T* gradient, T factor, int size, T* to) {
  switch (how) {  // outside of the loops, so that they vectorise
    case Prepare::kMultiply: return prepare<Prepare::kMultiply>(gradient, factor, size, to);
    case Prepare::kDivide: return prepare<Prepare::kDivide>(gradient, factor, size, to);
    case Prepare::kClip: return prepare<Prepare::kClip>(gradient, factor, size, to);
  }
}

template <typename T>
inline void decay(Decay how, const T* rates, int size, T* weight) {
  if (how == Decay::kMerged) {
    for (int i = 0; i < size; ++i) weight[i] = decayed(Decay::kMerged, weight[i], rates);
  } else if (how == Decay::kInTurn) {
    for (int i = 0; i < size; ++i) weight[i] = decayed(Decay::kInTurn, weight[i], rates);
  }
}

// Macros, because the compiler forgets `__restrict` inside a lambda and then does not vectorise.
#define TRAINRT_LOAD_SLOTS                          \
  if constexpr (R::kSlots > 0) q[0] = slot0[i];     \
  if constexpr (R::kSlots > 1) q[1] = slot1[i];     \
  if constexpr (R::kSlots > 2) q[2] = slot2[i];
#define TRAINRT_STORE_SLOTS                         \
  if constexpr (R::kSlots > 0) slot0[i] = q[0];     \
  if constexpr (R::kSlots > 1) slot1[i] = q[1];     \
  if constexpr (R::kSlots > 2) slot2[i] = q[2];

// Whether a rule can take the gradient's square apart from the gradient.
template <typename R, typename = void>
struct TakesApart : std::false_type {};
template <typename R>
struct TakesApart<R, std::void_t<decltype(&R::template step_apart<float>)>> : std::true_type {};

// The rule over one block: the only code there is for each rule and dtype.
template <typename R, typename T, bool kGraph, bool kApart = false>
void step_block(const void* scalars, int size, const void* gradient_data, const void* square_data, void* weight_data,
                void* const* slots) {
  T s[kMaxScalars];
  for (int i = 0; i < R::kScalars; ++i) s[i] = static_cast<const T*>(scalars)[i];
  const T* __restrict gradient = static_cast<const T*>(gradient_data);
  T* __restrict weight = static_cast<T*>(weight_data);
  T* __restrict slot0 = static_cast<T*>(slots[0]);
  T* __restrict slot1 = static_cast<T*>(slots[1]);
  T* __restrict slot2 = static_cast<T*>(slots[2]);
  if constexpr (HasRoot<R>::value) {
    alignas(64) T roots[kBlock];
    for (int i = 0; i < size; ++i) {
      T q[kMaxSlots];
      TRAINRT_LOAD_SLOTS
      roots[i] = R::radicand(s, gradient[i], q);
      TRAINRT_STORE_SLOTS
    }
    if (kGraph) reciprocal_roots(roots, size);
    for (int i = 0; i < size; ++i) {
      T w = weight[i], q[kMaxSlots];
      TRAINRT_LOAD_SLOTS
      R::step(s, gradient[i], w, q, std::conditional_t<kGraph, TimesReciprocal<T>, OverRootOf<T>>{roots[i]});
      weight[i] = w;
      TRAINRT_STORE_SLOTS
    }
  } else if constexpr (kApart) {
    const T* __restrict square = static_cast<const T*>(square_data);
    for (int i = 0; i < size; ++i) {
      T w = weight[i], q[kMaxSlots];
      TRAINRT_LOAD_SLOTS
      R::step_apart(s, gradient[i], square[i], w, q);
      weight[i] = w;
      TRAINRT_STORE_SLOTS
    }
  } else {
    for (int i = 0; i < size; ++i) {
      T w = weight[i], q[kMaxSlots];
      TRAINRT_LOAD_SLOTS
      step_element<R>(s, gradient[i], w, q);
      weight[i] = w;
      TRAINRT_STORE_SLOTS
    }
  }
}

#undef TRAINRT_LOAD_SLOTS
#undef TRAINRT_STORE_SLOTS

inline bool missing(const Weight& weight) { return !weight.gradient && weight.size; }

struct Partial {
  Moments gradient, update, weight, slots[kMaxSlots];
  Joint joint;
  Adaptive adaptive;
};

template <typename T>
void update_chunk(const Rule& rule, const Update& u, const T* scales, int index, int64_t offset, Partial& partial) {
  using Fold = typename Folded<T>::Fold;
  using Wide = typename Folded<T>::Wide;
  const Weight& one = u.weights[index];
  const int64_t size = std::min(kChunk, one.size - offset);
  T* weight = static_cast<T*>(one.weight) + offset;
  T* slots[kMaxSlots] = {};
  for (int k = 0; k < rule.slots; ++k) slots[k] = static_cast<T*>(one.slots[k]) + offset;
  const Rows* rows = one.rows;
  const T* gradient = static_cast<const T*>(one.gradient) + (one.gradient && !rows ? offset : 0);

  const Step step = (rows ? rule.apart : u.graph ? rule.graph : rule.eager)[static_cast<int>(DtypeOf<T>::value)];
  const bool scaled = scales && !u.factor_count && (u.measured || !u.observe);  // in the loop of the step
  const bool strides = std::is_same_v<T, float> && gradient && !rows && (u.observe || scaled);
  const Folding folding = !u.observe ? Folding::kNone : scaled ? Folding::kAllButGradient : Folding::kAll;
  const auto folds = (u.graph ? rule.graph_folds : rule.eager_folds)[static_cast<int>(folding)];
  T scalars[kMaxScalars];
  const int given = rule.scalars + (one.decay == Decay::kNone ? 0 : kDecayScalars);
  for (int i = 0; i < given; ++i) scalars[i] = *static_cast<const T*>(u.scalars[i]);
  const T scale = scales ? scales[index] : T(1.0f);

  Fold of_slot[kMaxSlots];
  typename Folded<T>::Step folded;
  typename Folded<T>::Adapt adaptive;
  const bool adapts = u.slots_due && (u.momentum >= 0 || u.second >= 0), decays = one.decay != Decay::kNone;
  alignas(64) T prepared[kBlock], before[kBlock], summed[kBlock], squares[kBlock];
  alignas(64) Wide scratch[kBlock];
  for (int64_t begin = 0, n = 0; begin < size; begin += n) {
    n = u.observe || strides ? block_of(size - begin) : std::min<int64_t>(kBlock, size - begin);
    const bool whole = strides && n % kLanes == 0;
    T* w = weight + begin;
    void* q[kMaxSlots] = {};
    for (int k = 0; k < rule.slots; ++k) q[k] = slots[k] + begin;
    const T *raw = gradient ? gradient + begin : nullptr, *taken = raw;
    if (gradient) {
      if (rows) {
        gather(*rows, gradient, scale, offset + begin, n, {summed, scales ? prepared : nullptr, squares});
        raw = summed;
        taken = scales ? prepared : summed;
      } else {
        const auto prepare_by = [&](Prepare how, T factor) {
          prepare(how, taken, factor, n, prepared);
          taken = prepared;
        };
        if (scales && !(whole && scaled)) prepare_by(Prepare::kMultiply, scale);
        for (int f = 0; f < u.factor_count; ++f) {
          const Factor& factor = u.factors[f];
          prepare_by(factor.how, static_cast<const T*>(factor.values)[factor.each ? index : 0]);
        }
      }
      if (u.observe && (decays || !whole)) __builtin_memcpy(before, w, n * sizeof(T));
      if (decays) decay(one.decay, scalars + rule.scalars, n, w);
      if constexpr (std::is_same_v<T, float>) {
        const T* old = decays ? before : w;
        if (whole) folds(scalars, {static_cast<int>(n), raw, taken, scale, old, before, w, q, &folded, of_slot});
      }
      if (!whole) step(scalars, n, taken, rows ? squares : nullptr, w, q);
    }
    if (!u.observe) continue;
    if (!whole) {
      Folded<T>::step(folded, raw, u.measured, gradient ? before : w, w, n);
      for (int k = 0; k < rule.slots; ++k) of_slot[k].add(Folded<T>::widen(slots[k] + begin, n, scratch), n);
    }
    const auto slot_at = [&](int k) { return k < 0 ? nullptr : slots[k] + begin; };
    if (adapts) Folded<T>::adapt(adaptive, raw, slot_at(u.momentum), slot_at(u.second), n, u.division);
  }
  if (!u.observe) return;
  partial.gradient = folded.gradient();
  partial.update = folded.update();
  partial.weight = folded.weight();
  partial.joint = folded.joint();
  partial.adaptive = adaptive.result();
  for (int k = 0; k < rule.slots; ++k) partial.slots[k] = of_slot[k].moments();
  if (gradient) return;
  partial.update = Moments();  // did not move, even from a NaN
  partial.update.count = partial.update.zeros = size;
}

template <typename T>
void run_update(const Rule& rule, const Update& u, const Parallel& parallel) {
  // Kept by the thread from one step to the next, so that a step allocates nothing.
  static thread_local Chunks chunks;
  static thread_local std::vector<Partial> partials;
  static thread_local std::vector<T> scale;
  static thread_local std::vector<double> rows, own_scale;
  const Chunks& plan = chunks;
  chunks.plan(u.count, [&](int t) { return u.weights[t].gradient || u.observe ? u.weights[t].size : int64_t{0}; });
  if (u.observe) partials.resize(plan.count());
  scale.resize(u.count);
  for (int t = 0; u.scale && t < u.count; ++t) scale[t] = T(static_cast<float>(u.scale[t]));
  Partial* const results = partials.data();
  const T* const scales = u.scale ? scale.data() : nullptr;
  parallel(plan.count(), plan.elements, [&](int64_t begin, int64_t end) {
    Partial unused;
    plan.each(begin, end, [&](int64_t chunk, int tensor, int64_t offset) {
      update_chunk<T>(rule, u, scales, tensor, offset, u.observe ? results[chunk] : unused);
    });
  });
  if (!u.observe) return;
  const int subjects = 3 + rule.slots, width = subjects * kMoments;
  for (int t = 0; t < u.count; ++t) {
    double* cube = u.cube + t * width;
    Moments gradient, update, weight, slots[kMaxSlots];
    for (int64_t chunk = plan.first[t]; chunk < plan.first[t + 1]; ++chunk) {
      gradient.merge(results[chunk].gradient);
      update.merge(results[chunk].update);
      weight.merge(results[chunk].weight);
      for (int k = 0; k < rule.slots; ++k) slots[k].merge(results[chunk].slots[k]);
    }
    store_gradient(gradient, missing(u.weights[t]), u.measured ? u.measured + t * kMoments : nullptr, u.loss_scale, cube);
    update.store(cube + kMoments);
    weight.store(cube + 2 * kMoments);
    for (int k = 0; k < rule.slots; ++k) slots[k].store(cube + (3 + k) * kMoments);
  }
  const double* clipped = u.scale;
  if (!clipped && u.own_clip != Clip::kNone) {
    rows.resize(u.count * kMoments);
    own_scale.resize(u.count);
    for (int t = 0; t < u.count; ++t) std::copy_n(u.cube + t * width, kMoments, &rows[t * kMoments]);
    clip(u.own_clip, u.own_threshold, rows.data(), u.count, own_scale.data());
    clipped = own_scale.data();
  }
  for (int t = 0; t < u.count; ++t) {
    const double* cube = u.cube + t * width;
    Joint joint;
    Adaptive adaptive;
    for (int64_t chunk = plan.first[t]; chunk < plan.first[t + 1]; ++chunk) {
      joint.merge(results[chunk].joint);
      adaptive.merge(results[chunk].adaptive);
    }
    Account a;
    a.missing = missing(u.weights[t]);
    a.slots_seen = u.slots_due;
    a.momentum = u.momentum >= 0;
    a.second = u.second >= 0;
    a.scale = clipped ? clipped[t] : 1;
    a.loss_scale = u.loss_scale;
    a.decay = u.weights[t].decay == Decay::kNone ? 0 : u.decay;
    if (a.momentum) a.momentum_squares = cube[(3 + u.momentum) * kMoments + kSumsq];
    if (a.second) a.highest = cube[(3 + u.second) * kMoments + kAbsmax];
    a.division = u.division;
    store_joint(joint, adaptive, a, cube, cube + 2 * kMoments, u.joint + t * kJointColumns);
  }
}

template <typename R, bool kGraph>
constexpr Steps steps() {
  return {step_block<R, float, kGraph>, step_block<R, double, kGraph>, step_block<R, BFloat16, kGraph>,
          step_block<R, Float16, kGraph>};
}

template <typename R>
constexpr Steps apart() {
  if constexpr (TakesApart<R>::value)
    return {step_block<R, float, true, true>, step_block<R, double, true, true>, step_block<R, BFloat16, true, true>,
            step_block<R, Float16, true, true>};
  else
    return {};
}

template <typename R, bool kGraph>
constexpr Folds folds() {
  return {step_and_fold<R, kGraph, Folding::kNone>, step_and_fold<R, kGraph, Folding::kAllButGradient>,
          step_and_fold<R, kGraph, Folding::kAll>};
}

template <typename R>
Rule rule() {
  constexpr bool kAlike = !HasRoot<R>::value;
  return {R::kName,          R::kSlots,  R::kScalars,      steps<R, true>(),
          steps<R, kAlike>(), apart<R>(), folds<R, true>(), folds<R, kAlike>()};
}

}  // namespace trainrt
