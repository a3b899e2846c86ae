// A fused update of whole strides of float32: the clip's scale, the rule, which waits for divisions and roots, and the
// folds, which do not, in the same loop.
#pragma once

#include "blocks.h"
#include "kernels.h"
#include "packet.h"
#include "roots.h"

namespace trainrt {

// One block of a weight with a dense gradient.
struct Strides {
  int size;            // <= kBlock, a multiple of kLanes
  const float* raw;    // the gradient
  const float* taken;  // what was made of it, but for `scale`
  float scale;         // not for `Folding::kAll`: even a factor of one makes zero of a subnormal
  const float* old;    // the weight before it decayed; may be the weight itself
  float* before;       // where that is kept; may be `old`
  float* weight;
  void* const* slots;  // [slots] of float
  StepFold* step;
  BlockFold* of_slot;  // [slots]
};

namespace strides {

// How many sets of lanes are summed in one loop: as many as find registers for their sums.
constexpr int kTogether = kWidth < 16 ? 1 : kSets;

// Sums of `kSubjects` blocks, in registers.
template <int kSubjects>
struct Registers {
  Floats sum[kTogether][kSubjects] = {}, squares[kTogether][kSubjects] = {};
  Range* ranges;  // [kSubjects]

  inline __attribute__((always_inline)) void fold(int set, int subject, Floats x) {
    trainrt::fold(x, magnitudes(x), sum[set][subject], squares[set][subject], ranges[subject]);
  }
  inline __attribute__((always_inline)) void store(int subject, int first_set, Sums& to) const {
    for (int j = 0; j < kTogether; ++j) {
      to.sum[first_set + j] = sum[j][subject];
      to.squares[first_set + j] = squares[j][subject];
    }
    to.range = ranges[subject];
  }
};

// visit(set, i): of the sets from `first_set` on, the elements [i, i + kWidth).
template <typename Visit>
inline __attribute__((always_inline)) void each(int first_set, int size, Visit visit) {
  for (int begin = first_set * kWidth; begin < size; begin += kLanes)
    for (int j = 0; j < kTogether; ++j) visit(j, begin + j * kWidth);
}

// The update is what its rounded sum left of it, so that its fold waits for the weight: a loop of its own.
inline __attribute__((always_inline)) void fold_update(const Strides& b, StepSums& sums) {
  Range ranges[2];
  for (int from = 0; from < kSets; from += kTogether) {
    Registers<2> r{.ranges = ranges};
    Floats product[kTogether] = {};
    each(from, b.size, [&](int j, int i) __attribute__((always_inline)) {
      const Floats w = load(b.weight + i), u = w - load(b.before + i);
      r.fold(j, 0, u);
      r.fold(j, 1, w);
      product[j] = multiply_add(load(b.raw + i), u, product[j]);
    });
    r.store(0, from, sums.update);
    r.store(1, from, sums.weight);
    for (int j = 0; j < kTogether; ++j) sums.product[from + j] = product[j];
  }
}

}  // namespace strides

template <typename R, bool kGraph, Folding kFolding>
void step_and_fold(const float* scalars, const Strides& given) {
  using namespace strides;
  constexpr int kSlots = R::kSlots;
  constexpr bool kFolds = kFolding != Folding::kNone, kScales = kFolding != Folding::kAll;
  constexpr bool kApart = HasRoot<R>::value && kGraph;  // all roots first
  const Strides b = given;
  float* slots[kMaxSlots];
  for (int k = 0; k < kSlots; ++k) slots[k] = static_cast<float*>(b.slots[k]);
  const Packet scale(b.scale);
  const auto gradient_at = [&](int i) __attribute__((always_inline)) {
    const Packet g = load(b.taken + i);
    return kScales ? g * scale : g;
  };
  Packet s[kMaxScalars];
  for (int k = 0; k < R::kScalars; ++k) s[k] = Packet(scalars[k]);
  alignas(64) float roots[kBlock];
  if constexpr (kApart) {
    for (int i = 0; i < b.size; i += kWidth) {
      Packet q[kMaxSlots];
      for (int k = 0; k < kSlots; ++k) q[k] = load(slots[k] + i);
      store(roots + i, R::radicand(s, gradient_at(i), q).v);
      for (int k = 0; k < kSlots; ++k) store(slots[k] + i, q[k].v);
    }
    reciprocal_roots(roots, b.size);
  }
  StepSums sums;
  Sums of_slots[kMaxSlots];
  Range ranges[1 + kSlots];
  for (int from = 0; from < kSets; from += kTogether) {
    Registers<1 + kSlots> r{.ranges = ranges};
    each(from, b.size, [&](int j, int i) __attribute__((always_inline)) {
      if (kFolds) store(b.before + i, load(b.old + i));
      Packet w = load(b.weight + i), q[kMaxSlots];
      const Packet g = gradient_at(i);
      for (int k = 0; k < kSlots; ++k) q[k] = load(slots[k] + i);
      if constexpr (kApart) {
        R::step(s, g, w, q, TimesReciprocal<Packet>{load(roots + i)});
      } else {
        step_element<R>(s, g, w, q);
      }
      store(b.weight + i, w.v);
      if (kFolding == Folding::kAll) r.fold(j, 0, load(b.raw + i));
      for (int k = 0; k < kSlots; ++k) {
        store(slots[k] + i, q[k].v);
        if (kFolds) r.fold(j, 1 + k, q[k].v);
      }
    });
    r.store(0, from, sums.gradient);
    for (int k = 0; k < kSlots; ++k) r.store(1 + k, from, of_slots[k]);
  }
  if (!kFolds) return;
  fold_update(b, sums);
  b.step->add(sums, kFolding == Folding::kAllButGradient, b.raw, b.before, b.weight, b.size);
  for (int k = 0; k < kSlots; ++k) b.of_slot[k].add(of_slots[k], slots[k], b.size);
}

}  // namespace trainrt
