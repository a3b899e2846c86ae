// The CPU's half of the library: everything of `kernels.h`. Compiled for this processor; knows nothing of TensorFlow.
#include "kernels.h"

#include <cmath>

#include "rules.h"
#include "update.h"

namespace trainrt {
namespace {

constexpr double kNaN = __builtin_nan("");

template <typename T>
Moments measure_chunk(const Span& span, int64_t offset) {
  const T* x = static_cast<const T*>(span.data);
  const int64_t end = std::min(span.size, offset + kChunk);
  typename Folded<T>::Fold fold;
  alignas(64) typename Folded<T>::Wide scratch[kBlock];
  alignas(64) T summed[kBlock];
  for (int64_t begin = offset, n = 0; begin < end; begin += n) {
    n = block_of(end - begin);
    if (span.rows) gather(*span.rows, x, T(1.0f), begin, n, {summed, nullptr, nullptr});
    const auto* block = Folded<T>::widen(span.rows ? summed : x + begin, n, scratch);
    fold.add(block, n);
  }
  return fold.moments();
}

// One chunk of a weight that something else updated. G: dtype of the gradient, which need not be the weight's.
template <typename T, typename G>
void observe_chunk(const T* before, const T* after, const G* gradient, bool measures, int64_t size,
                   Partial& partial) {
  constexpr bool kAlike = std::is_same_v<T, G>;
  typename Folded<T>::Step folded;
  typename Folded<G>::Fold of_gradient;
  for (int64_t begin = 0, n = 0; begin < size; begin += n) {
    n = block_of(size - begin);
    const T *old = before + begin, *now = after + begin;
    const G* one = gradient ? gradient + begin : nullptr;
    if constexpr (kAlike) {
      Folded<T>::step(folded, one, !measures, old, now, n);
    } else {
      using Wide = typename Folded<T>::Wide;
      alignas(64) T update[kBlock];
      alignas(64) Wide cast[kBlock], wide_update[kBlock], wide_weight[kBlock];
      alignas(64) typename Folded<G>::Wide wide[kBlock];
      for (int i = 0; i < n; ++i) update[i] = now[i] - old[i];
      for (int i = 0; one && i < n; ++i) cast[i] = static_cast<Wide>(static_cast<typename Folded<G>::Wide>(one[i]));
      folded.add_update(one ? cast : nullptr, true, Folded<T>::widen(update, n, wide_update),
                        Folded<T>::widen(now, n, wide_weight), n);
      if (one && measures) of_gradient.add(Folded<G>::widen(one, n, wide), n);
    }
  }
  partial.gradient = kAlike ? folded.gradient() : of_gradient.moments();
  partial.update = folded.update();
  partial.joint = folded.joint();
  partial.weight = folded.weight();
}

// What one chunk of a weight's gradient, of the same dtype as its slots, shares with them.
template <typename T>
Adaptive adaptive_of_chunk(const Span* gradient, const Span* momentum, const Span* second, int64_t offset, int64_t size,
                           const Division& division) {
  const auto at = [&](const Span* span, int64_t i) {
    return span ? static_cast<const T*>(span->data) + offset + i : nullptr;
  };
  typename Folded<T>::Adapt fold;
  for (int64_t i = 0; i < size; i += kBlock)
    Folded<T>::adapt(fold, at(gradient, i), at(momentum, i), at(second, i),
                     static_cast<int>(std::min<int64_t>(kBlock, size - i)), division);
  return fold.result();
}

// Calls f with a null pointer of the type that `dtype` names.
template <typename F>
auto with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat64: return f(static_cast<const double*>(nullptr));
    case Dtype::kBFloat16: return f(static_cast<const BFloat16*>(nullptr));
    case Dtype::kFloat16: return f(static_cast<const Float16*>(nullptr));
    default: return f(static_cast<const float*>(nullptr));
  }
}

}  // namespace

void measure(const Span* tensors, int count, double* rows, const Parallel& parallel) {
  static thread_local Chunks chunks;
  static thread_local std::vector<Moments> partials;
  const Chunks& plan = chunks;
  chunks.plan(count, [&](int t) { return tensors[t].size; });
  partials.resize(plan.count());
  Moments* const results = partials.data();
  parallel(plan.count(), plan.elements, [&](int64_t begin, int64_t end) {
    plan.each(begin, end, [&](int64_t chunk, int t, int64_t offset) {
      const Span& span = tensors[t];
      results[chunk] = with_type(span.dtype, [&](auto* type) {
        return measure_chunk<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(span, offset);
      });
    });
  });
  for (int t = 0; t < count; ++t) {
    Moments whole;
    for (int64_t chunk = plan.first[t]; chunk < plan.first[t + 1]; ++chunk) whole.merge(results[chunk]);
    whole.store(rows + t * kMoments);
  }
}

void clip(Clip how, double threshold, const double* rows, int count, double* scales) {
  GradientNorm norm;
  if (how == Clip::kGlobalNorm)
    for (int t = 0; t < count; ++t) norm.add(rows + t * kMoments);
  for (int t = 0; t < count; ++t) scales[t] = clip_scale(how, threshold, norm, rows + t * kMoments);
}

void observe(const Observe& o, const Parallel& parallel) {
  static thread_local Chunks chunks;
  static thread_local std::vector<Partial> partials;
  const Chunks& plan = chunks;
  // The weights' chunks, then the slots'.
  chunks.plan(o.count * (1 + o.slots), [&](int t) { return t < o.count ? o.after[t].size : o.slot[t - o.count].size; });
  partials.resize(plan.count());
  Partial* const results = partials.data();
  const auto slot_of = [&](const int* which, int t) -> const Span* {
    if (which[t] < 0) return nullptr;
    const Span* span = o.slot + which[t] * o.count + t;
    return span->data && span->size == o.after[t].size ? span : nullptr;
  };
  const auto division_of = [&](int t) {
    const double* row = o.table + 6 * t;
    return Division{row[0], row[1], row[2], row[3], row[4]};
  };
  const auto gradient_of = [&](int t) { return o.gradients[t].data ? o.gradients + t : nullptr; };
  parallel(plan.count(), plan.elements, [&](int64_t begin, int64_t end) {
    plan.each(begin, end, [&](int64_t chunk, int t, int64_t offset) {
      Partial& partial = results[chunk];
      if (t >= o.count) {
        const Span& span = o.slot[t - o.count];
        partial.weight = with_type(span.dtype, [&](auto* type) {
          return measure_chunk<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(span, offset);
        });
        return;
      }
      const int64_t size = std::min(kChunk, o.after[t].size - offset);
      with_type(o.after[t].dtype, [&](auto* type) {
        with_type(o.gradients[t].dtype, [&](auto* gradient_type) {
          const auto* gradient = static_cast<decltype(gradient_type)>(o.gradients[t].data);
          observe_chunk(static_cast<decltype(type)>(o.before[t].data) + offset,
                        static_cast<decltype(type)>(o.after[t].data) + offset, gradient ? gradient + offset : nullptr,
                        o.measured == nullptr, size, partial);
        });
      });
      partial.adaptive = Adaptive();
      const Span *momentum = slot_of(o.momentum, t), *second = slot_of(o.second, t);
      if (!o.slots_due || (!momentum && !second)) return;
      with_type((momentum ? momentum : second)->dtype, [&](auto* type) {
        using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
        partial.adaptive = adaptive_of_chunk<T>(gradient_of(t), momentum, second, offset, size, division_of(t));
      });
    });
  });
  const int width = (3 + o.slots) * kMoments;
  for (int t = 0; t < o.count; ++t) {
    double* cube = o.cube + t * width;
    Moments gradient, update, weight;
    Joint joint;
    Adaptive adaptive;
    for (int64_t chunk = plan.first[t]; chunk < plan.first[t + 1]; ++chunk) {
      gradient.merge(results[chunk].gradient);
      update.merge(results[chunk].update);
      weight.merge(results[chunk].weight);
      joint.merge(results[chunk].joint);
      adaptive.merge(results[chunk].adaptive);
    }
    Account a;
    a.missing = !o.gradients[t].data && o.after[t].size;
    store_gradient(gradient, a.missing, o.measured ? o.measured + t * kMoments : nullptr, o.loss_scale, cube);
    update.store(cube + kMoments);
    weight.store(cube + 2 * kMoments);
    for (int k = 0; k < o.slots; ++k) {
      const int at = o.count * (1 + k) + t;
      Moments slot;
      for (int64_t chunk = plan.first[at]; chunk < plan.first[at + 1]; ++chunk) slot.merge(results[chunk].weight);
      double* row = cube + (3 + k) * kMoments;
      slot.store(row);
      if (!o.slot[at - o.count].data && o.after[t].size) std::fill_n(row, kMoments, kNaN);
    }
    const Span *momentum = slot_of(o.momentum, t), *second = slot_of(o.second, t);
    a.skipped = o.skipped;
    a.slots_seen = o.slots_due;
    a.momentum = momentum;
    a.second = second;
    a.scale = o.scale ? o.scale[t] : 1;
    a.loss_scale = o.loss_scale;
    a.decay = a.missing ? 0 : o.table[6 * t + 5];
    if (momentum) a.momentum_squares = cube[(3 + o.momentum[t]) * kMoments + kSumsq];
    if (second) a.highest = cube[(3 + o.second[t]) * kMoments + kAbsmax];
    a.division = division_of(t);
    store_joint(joint, adaptive, a, cube, cube + 2 * kMoments, o.joint + t * kJointColumns);
  }
}

void update(const Rule& rule, Dtype dtype, const Update& what, const Parallel& parallel) {
  with_type(dtype, [&](auto* type) {
    run_update<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(rule, what, parallel);
  });
}

static const std::vector<Rule>& rules() {
  #define TRAINRT_RULE(R) rule<R>(),
  static const std::vector<Rule> all = {TRAINRT_RULES(TRAINRT_RULE)};
#undef TRAINRT_RULE
  return all;
}

const Rule* find_rule(const std::string& name) {
  for (const Rule& rule : rules())
    if (rule.name == name) return &rule;
  return nullptr;
}

}  // namespace trainrt
