// The CPU's way to fold: blocks that lie in the first-level cache, in the compiler's own vectors, as wide as the
// processor's. Whatever the width, element i goes to lane i % 32, so that the order of the sums is the same.
#pragma once

#include "moments.h"

namespace trainrt {

#if defined(__AVX__)
constexpr int kWidth = 8;  // 16 is no faster where AVX-512 is, the lanes' sums costing more than they save
#else
constexpr int kWidth = 4;
#endif
constexpr int kLanes = 32, kSets = kLanes / kWidth;
constexpr int kHalf = kSets / 2;   // vectors of float64 lanes, which are half as many
constexpr int kAhead = 4 * kBlock;  // elements; hides the memory's latency behind the arithmetic (benchmarks/kernels.py)
static_assert(kBlock % kLanes == 0, "a full block is a whole number of strides");

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));

// 16 lanes of float64, each the sum of two lanes of float32 in every block.
struct Lanes {
  double lane[kLanes / 2] = {};
  void add(const Floats* sets, double factor);
  double total() const;
};

// Folds blocks of float32 into the moments of one chunk.
class BlockFold {
 public:
  // x: `size` <= kBlock elements. `ahead`: where to fetch as many elements from meanwhile; may be any address.
  void add(const float* x, int size, const float* ahead);
  Moments moments() const;

 private:
  friend class MotionFold;
  Lanes sum_, sumsq_;
  int32_t absmax_ = 0;
  float scale_ = 1.0f;  // of the last block that needed one: slots such as Adam's velocity need it in every block
  int32_t seen_ = 0;    // bits of the largest magnitude of the block that was summed last
  int64_t count_ = 0, zero_count_ = 0;
  Moments rare_;

  template <bool kScaled>
  bool sum_block(const float* x, int size, const float* ahead);
  bool accept(Ints top, const Floats* sum, const Floats* sumsq, int64_t zeros, float scale);
  void add_with_care(const float* x, int size, float* scratch);
};

// Folds a weight's motion: the moments of after - before, which is never stored, and what it shares with the gradient.
class MotionFold {
 public:
  void add(const float* gradient, const float* before, const float* after, int size);
  void add(const float* gradient, const float* update, int size);  // gradient may be null
  Moments moments() const { return update_.moments(); }
  Joint joint() const;

 private:
  BlockFold update_;
  Lanes product_;
  int64_t rounded_ = 0;
  Joint rest_;
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
  void add(const double* x, int size, const double*);
  Moments moments() const { return moments_; }

 private:
  Moments moments_;
};

class WideMotionFold {
 public:
  void add(const double* gradient, const double* before, const double* after, int size);
  void add(const double* gradient, const double* update, int size);
  Moments moments() const { return update_; }
  Joint joint() const { return joint_; }

 private:
  Moments update_;
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
  using Motion = MotionFold;
  using Adapt = AdaptiveFold;
  static __attribute__((noinline)) const float* widen(const T* x, int size, float* scratch) {
    for (int i = 0; i < size; ++i) scratch[i] = static_cast<float>(x[i]);
    return scratch;
  }
  static void move(Motion& motion, const T* gradient, const T* before, const T* after, int size) {
    T difference[kBlock];
    float wide[kBlock], wide_gradient[kBlock];
    for (int i = 0; i < size; ++i) difference[i] = after[i] - before[i];
    motion.add(gradient ? widen(gradient, size, wide_gradient) : nullptr, widen(difference, size, wide), size);
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
  using Motion = MotionFold;
  using Adapt = AdaptiveFold;
  static const float* widen(const float* x, int, float*) { return x; }
  static void move(Motion& motion, const float* gradient, const float* before, const float* after, int size) {
    motion.add(gradient, before, after, size);
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
  using Motion = WideMotionFold;
  using Adapt = WideAdaptiveFold;
  static const double* widen(const double* x, int, double*) { return x; }
  static void move(Motion& motion, const double* gradient, const double* before, const double* after, int size) {
    motion.add(gradient, before, after, size);
  }
  static void adapt(Adapt& fold, const double* gradient, const double* momentum, const double* second, int size,
                    const Division& division) {
    fold.add(gradient, momentum, second, size, division);
  }
};

}  // namespace trainrt
