// The CPU's way to fold: blocks that lie in the first-level cache, in the compiler's own vectors, as wide as the
// processor's. Whatever the width, element i goes to lane i % 32, so that the order of the sums is the same.
#pragma once

#include "moments.h"
#include "vectors.h"

namespace trainrt {

constexpr int kLanes = 32, kSets = kLanes / kWidth;
static_assert(kBlock % kLanes == 0, "a full block is a whole number of strides");

// Size of the next block, of so many elements that are left: whole strides as long as there are any, then what is over.
// Whoever folds, in whatever pass, folds blocks of these sizes, so that the sums of a tensor have the same bits.
inline int block_of(int64_t left) {
  const int n = left < kBlock ? static_cast<int>(left) : kBlock;
  return n > kLanes ? n / kLanes * kLanes : n;
}

// 8 lanes of float64, each the sum of four lanes of float32 in every block.
struct Lanes {
  Doubles8 lane = {};
  void add(const Floats* sets, double factor = 1);  // kSets
  double total() const;
};

// Of the lanes of all sets: bits of the largest and of the smallest magnitude.
struct Range {
  Ints top = {}, least = Ints{} + 0x7fffffff;
};

// Sums of one block.
struct Sums {
  Floats sum[kSets], squares[kSets];
  Range range;
};

inline __attribute__((always_inline)) void fold(Floats v, Ints magnitude, Floats& sum, Floats& squares, Range& range) {
  range.top = range.top > magnitude ? range.top : magnitude;
  range.least = range.least < magnitude ? range.least : magnitude;
  sum += v;
  squares = multiply_add(v, v, squares);
}

// Folds blocks of float32 into the moments of one chunk.
class BlockFold {
 public:
  // x: `size` <= kBlock elements.
  void add(const float* x, int size);
  // The same of a whole number of strides that someone else has summed.
  void add(const Sums& sums, const float* x, int size);
  Moments moments() const;

 private:
  friend class StepFold;
  Lanes sum_, sumsq_;
  Ints top_ = {};       // bits of the largest magnitude of each lane
  float scale_ = 1.0f;  // of the last block that needed one: slots such as Adam's velocity need it in every block
  int32_t seen_ = 0;    // bits of the largest magnitude of the last block that was refused
  int64_t count_ = 0, zeros_ = 0;  // elements, and the zeros of those that went through `take`, less what fills up
  Moments rare_;

  template <bool kScaled>
  bool sum_block(const float* x, int size);
  bool take(const Sums& sums, float scale = 1.0f);
  void add_sums(const Sums& sums, const float* x, int size, float* scratch);
  void add_with_care(const float* x, int size, float* scratch);
};

// Sums of one block of a step.
struct StepSums {
  Sums gradient, update, weight;
  Floats product[kSets];
};

// Folds what a step did to a weight: the moments of its gradient, of the update = after - before, which is never stored,
// and of the weight after it; and what gradient and update share.
class StepFold {
 public:
  // `gradient` may be null, and is not measured if it is `known`.
  void add(const float* gradient, bool known, const float* before, const float* after, int size);
  void add_update(const float* gradient, bool known, const float* update, const float* after, int size);
  // The same of a whole number of strides that someone else has summed.
  void add(const StepSums& sums, bool known, const float* gradient, const float* before, const float* after, int size);
  Moments gradient() const { return gradient_.moments(); }
  Moments update() const { return update_.moments(); }
  Moments weight() const { return weight_.moments(); }
  Joint joint() const;

 private:
  BlockFold gradient_, update_, weight_;
  Lanes product_;
  int64_t rounded_ = 0;
  Joint rest_;

  template <bool kKnown>
  void add_strides(const float* gradient, const float* before, const float* after, int size);
  template <bool kKnown>
  void add_sums(const StepSums& sums, const float* gradient, const float* before, const float* after, int size);
};

// Folds what blocks of a gradient share with the slots beside it; any of the three may be null.
class AdaptiveFold {
 public:
  void add(const float* gradient, const float* momentum, const float* second, int size, const Division& division);
  Adaptive result() const;

 private:
  Lanes product_, normalized_, inverse_;
  template <bool kSecond>
  void add_strides(const float* gradient, const float* momentum, const float* second, int size, const Division& division);
  Adaptive rest_;
};

// The same of float64 elements, one by one.
class WideFold {
 public:
  void add(const double* x, int size);
  Moments moments() const { return moments_; }

 private:
  Moments moments_;
};

class WideStepFold {
 public:
  void add(const double* gradient, bool known, const double* before, const double* after, int size);
  void add_update(const double* gradient, bool known, const double* update, const double* after, int size);
  Moments gradient() const { return gradient_; }
  Moments update() const { return update_; }
  Moments weight() const { return weight_; }
  Joint joint() const { return joint_; }

 private:
  Moments gradient_, update_, weight_;
  Joint joint_;
};

class WideAdaptiveFold {
 public:
  void add(const double* gradient, const double* momentum, const double* second, int size, const Division& division);
  Adaptive result() const { return result_; }

 private:
  Adaptive result_;
};

// How blocks of T are folded: float32 and float64 as they are, half precision widened (exactly).
template <typename T>
struct Folded {
  using Wide = float;
  using Fold = BlockFold;
  using Step = StepFold;
  using Adapt = AdaptiveFold;
  static __attribute__((noinline)) const float* widen(const T* x, int size, float* scratch) {
    for (int i = 0; i < size; ++i) scratch[i] = static_cast<float>(x[i]);
    return scratch;
  }
  static void step(Step& fold, const T* gradient, bool known, const T* before, const T* after, int size) {
    T update[kBlock];
    float wide[3][kBlock];
    for (int i = 0; i < size; ++i) update[i] = after[i] - before[i];
    fold.add_update(gradient ? widen(gradient, size, wide[0]) : nullptr, known, widen(update, size, wide[1]),
                    widen(after, size, wide[2]), size);
  }
  static void adapt(Adapt& fold, const T* gradient, const T* momentum, const T* second, int size, const Division& division) {
    float wide[3][kBlock];
    fold.add(gradient ? widen(gradient, size, wide[0]) : nullptr, momentum ? widen(momentum, size, wide[1]) : nullptr,
             second ? widen(second, size, wide[2]) : nullptr, size, division);
  }
};
template <>
struct Folded<float> {
  using Wide = float;
  using Fold = BlockFold;
  using Step = StepFold;
  using Adapt = AdaptiveFold;
  static const float* widen(const float* x, int, float*) { return x; }
  static void step(Step& fold, const float* gradient, bool known, const float* before, const float* after, int size) {
    fold.add(gradient, known, before, after, size);
  }
  static void adapt(Adapt& fold, const float* gradient, const float* momentum, const float* second, int size,
                    const Division& division) {
    fold.add(gradient, momentum, second, size, division);
  }
};
template <>
struct Folded<double> {
  using Wide = double;
  using Fold = WideFold;
  using Step = WideStepFold;
  using Adapt = WideAdaptiveFold;
  static const double* widen(const double* x, int, double*) { return x; }
  static void step(Step& fold, const double* gradient, bool known, const double* before, const double* after, int size) {
    fold.add(gradient, known, before, after, size);
  }
  static void adapt(Adapt& fold, const double* gradient, const double* momentum, const double* second, int size,
                    const Division& division) {
    fold.add(gradient, momentum, second, size, division);
  }
};

}  // namespace trainrt
