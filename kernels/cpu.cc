// The CPU's half of the library: everything of `kernels.h`. Compiled for this processor; knows nothing of TensorFlow.
#include "kernels.h"
#include "rules.h"
#include "update.h"

namespace trainrt {
namespace {

template <typename T>
Moments measure_chunk(const T* x, int64_t size) {
  typename Folded<T>::Fold fold;
  alignas(64) typename Folded<T>::Wide scratch[kBlock];
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, size - begin));
    const auto* block = Folded<T>::widen(x + begin, n, scratch);
    fold.add(block, n, block);
  }
  return fold.moments();
}

// G: dtype of the gradient, which need not be the weight's.
template <typename T, typename G>
void update_of_chunk(const T* before, const T* after, const G* gradient, int64_t size, Partial& partial) {
  using Wide = typename Folded<T>::Wide;
  typename Folded<T>::Motion motion;
  alignas(64) T difference[kBlock];
  alignas(64) Wide scratch[kBlock], cast[kBlock];
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, size - begin));
    if constexpr (std::is_same_v<T, G>) {
      if (gradient) {
        Folded<T>::move(motion, gradient + begin, before + begin, after + begin, n);
        continue;
      }
    }
    for (int i = 0; i < n; ++i) difference[i] = after[begin + i] - before[begin + i];
    if (gradient)
      for (int i = 0; i < n; ++i) cast[i] = static_cast<Wide>(static_cast<typename Folded<G>::Wide>(gradient[begin + i]));
    motion.add(gradient ? cast : nullptr, Folded<T>::widen(difference, n, scratch), n);
  }
  partial.update = motion.moments();
  partial.joint = motion.joint();
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
        return measure_chunk(static_cast<decltype(type)>(span.data) + offset, std::min(kChunk, span.size - offset));
      });
    });
  });
  for (int t = 0; t < count; ++t) {
    Moments whole;
    for (int64_t chunk = plan.first[t]; chunk < plan.first[t + 1]; ++chunk) whole.merge(results[chunk]);
    whole.store(rows + t * kMoments);
  }
}

void measure_update(const Span* before, const Span* after, const Span* gradients, int count, double* rows,
                    double* joint, const Parallel& parallel) {
  static thread_local Chunks chunks;
  static thread_local std::vector<Partial> partials;
  const Chunks& plan = chunks;
  chunks.plan(count, [&](int t) { return after[t].size; });
  partials.resize(plan.count());
  Partial* const results = partials.data();
  parallel(plan.count(), plan.elements, [&](int64_t begin, int64_t end) {
    plan.each(begin, end, [&](int64_t chunk, int t, int64_t offset) {
      const int64_t size = std::min(kChunk, after[t].size - offset);
      with_type(after[t].dtype, [&](auto* type) {
        with_type(gradients[t].dtype, [&](auto* gradient_type) {
          const auto* gradient = static_cast<decltype(gradient_type)>(gradients[t].data);
          update_of_chunk(static_cast<decltype(type)>(before[t].data) + offset,
                          static_cast<decltype(type)>(after[t].data) + offset,
                          gradient ? gradient + offset : nullptr, size, results[chunk]);
        });
      });
    });
  });
  for (int t = 0; t < count; ++t) {
    Partial whole;
    for (int64_t chunk = plan.first[t]; chunk < plan.first[t + 1]; ++chunk) {
      whole.update.merge(results[chunk].update);
      whole.joint.merge(results[chunk].joint);
    }
    const bool missing = !gradients[t].data && after[t].size;
    const double nan = std::numeric_limits<double>::quiet_NaN();
    whole.update.store(rows + t * kMoments);
    joint[t * kJoint] = missing ? nan : whole.joint.product;
    joint[t * kJoint + 1] = missing ? nan : static_cast<double>(whole.joint.rounded);
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

std::string rule_names() {
  std::string names;
  for (const Rule& rule : rules()) names += (names.empty() ? "" : ", ") + rule.name;
  return names;
}

}  // namespace trainrt
