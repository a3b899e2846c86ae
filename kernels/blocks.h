// The CPU's way to fold: blocks that lie in the first-level cache, in vectors of 16 float32. The vector type is the
// compiler's own, so the lanes, and with them the bits, are the same on SSE, AVX2, AVX-512 and NEON.
#pragma once

#include "moments.h"

namespace trainrt {

constexpr int kWidth = 16, kSets = 4, kLanes = kWidth * kSets;
static_assert(kBlock % kLanes == 0, "a full block is a whole number of strides");

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(128)));

inline __attribute__((always_inline)) Floats load(const float* p) {
  Floats v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

inline __attribute__((always_inline)) int32_t largest(Ints v) {
  int32_t lanes[kWidth];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (int width = kWidth / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

inline __attribute__((always_inline)) double total(Doubles v) {
  double sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += v[i];
  return sum;
}

// A scaled magnitude under `kLow` may lose squares to underflow, one over `kHigh` may overflow when kBlock are summed.
constexpr int kLow = 127 - 45, kHigh = 127 + 57;

// Folds blocks of float32 into the moments of one chunk.
class BlockFold {
 public:
  // x: `size` <= kBlock elements.
  __attribute__((noinline)) void add(const float* x, int size) {
    alignas(64) float padded[kBlock];
    int padding = 0;
    const int tail = size % kLanes;
    count_ += size;
    if (__builtin_expect(tail != 0, 0)) {
      __builtin_memcpy(padded, x, size * sizeof(float));
      padding = kLanes - tail;
      __builtin_memset(padded + size, 0, padding * sizeof(float));
      x = padded;
      size += padding;
      zero_count_ -= padding;
    }
    if (__builtin_expect(scale_ == 1.0f && sum_block<false>(x, size), 1)) return;
    add_with_care(x, size, padded);
  }

  Moments moments() const {
    Moments m = rare_;
    m.count = count_;
    m.sum += total(sum_);
    m.sumsq += total(sumsq_);
    const double absmax = exact(float_of(static_cast<uint32_t>(absmax_)));
    m.absmax = absmax > m.absmax ? absmax : m.absmax;
    m.zeros += zero_count_;
    for (int i = 0; i < kWidth; ++i) m.zeros += zeros_[i];
    return m;
  }

 private:
  Doubles sum_ = {}, sumsq_ = {};
  Ints zeros_ = {};
  int32_t absmax_ = 0;
  float scale_ = 1.0f;  // of the last block that needed one: slots such as Adam's velocity need it in every block
  int64_t count_ = 0, zero_count_ = 0;
  Moments rare_;
  int32_t seen_ = 0;  // bits of the largest magnitude of the block that was summed last

  // False, with nothing folded, if the block does not fit float32 at this scale; `seen_` then says why.
  template <bool scaled>
  inline __attribute__((always_inline)) bool sum_block(const float* x, int size) {
    Floats s[kSets] = {}, q[kSets] = {};
    Ints top[kSets] = {}, zeros[kSets] = {};
    const Floats factor = scale_ - Floats{};
    for (int i = 0; i < size; i += kLanes) {
      for (int j = 0; j < kSets; ++j) {
        Floats v = load(x + i + j * kWidth);
        const Ints magnitude = reinterpret_cast<Ints>(v) & 0x7fffffff;
        top[j] = top[j] > magnitude ? top[j] : magnitude;
        zeros[j] -= magnitude == 0;  // a true lane is -1
        if (scaled) v *= factor;
        s[j] += v;
        q[j] += v * v;
      }
    }
    const Ints t01 = top[0] > top[1] ? top[0] : top[1], t23 = top[2] > top[3] ? top[2] : top[3];
    seen_ = largest(t01 > t23 ? t01 : t23);
    const int exponent = (seen_ >> 23) + (scaled ? (static_cast<int>(bits_of(scale_) >> 23) - 127) : 0);
    if (seen_ != 0 && (exponent < kLow || exponent > kHigh || seen_ >= 0x7f800000)) return false;
    zeros_ += (zeros[0] + zeros[1]) + (zeros[2] + zeros[3]);
    absmax_ = seen_ > absmax_ ? seen_ : absmax_;
    const Floats sum = (s[0] + s[1]) + (s[2] + s[3]), sumsq = (q[0] + q[1]) + (q[2] + q[3]);
    if (scaled) {
      const double back = 1.0 / static_cast<double>(scale_);
      sum_ += __builtin_convertvector(sum, Doubles) * back;
      sumsq_ += __builtin_convertvector(sumsq, Doubles) * (back * back);
    } else {
      sum_ += __builtin_convertvector(sum, Doubles);
      sumsq_ += __builtin_convertvector(sumsq, Doubles);
    }
    return true;
  }

  // x: a whole number of strides; scratch: kBlock floats, may be x itself.
  __attribute__((noinline)) void add_with_care(const float* x, int size, float* scratch) {
    if (scale_ != 1.0f && sum_block<true>(x, size)) return;
    scale_ = 1.0f;
    if (sum_block<false>(x, size)) return;
    if (seen_ >= 0x7f800000) {
      int64_t nonfinite = 0;
      for (int i = 0; i < size; ++i) {
        const bool finite = is_finite(x[i]);
        nonfinite += !finite;
        scratch[i] = finite ? x[i] : 0.0f;
      }
      rare_.nonfinite += nonfinite;
      zero_count_ -= nonfinite;
      x = scratch;
      if (sum_block<false>(x, size)) return;
    }
    if (seen_ >= 0x00800000) {  // normal: the largest magnitude goes to about 1
      int shift = 127 - (seen_ >> 23);
      shift = shift > 126 ? 126 : shift < -126 ? -126 : shift;
      scale_ = float_of(static_cast<uint32_t>(shift + 127) << 23);
      if (sum_block<true>(x, size)) return;
      scale_ = 1.0f;
    }
    Moments slow;
    for (int i = 0; i < size; ++i) fold(x[i], slow);
    rare_.merge(slow);
  }
};

// The same of float64 elements: 8 lanes are enough, the additions are exact enough.
class WideFold {
 public:
  void add(const double* x, int size) {
    for (int i = 0; i < size; ++i) fold(x[i], moments_);
  }
  Moments moments() const { return moments_; }

 private:
  Moments moments_;
};

// Folds a gradient with an update, block by block, the products in float64.
class JointFold {
 public:
  __attribute__((noinline)) void add(const float* gradient, const float* update, int size) {
    Doubles product[2] = {};
    Ints rounded = {};
    int i = 0;
    for (; i + 2 * kWidth <= size; i += 2 * kWidth) {
      for (int j = 0; j < 2; ++j) {
        const Floats g = load(gradient + i + j * kWidth), u = load(update + i + j * kWidth);
        const Ints gm = reinterpret_cast<Ints>(g) & 0x7fffffff, um = reinterpret_cast<Ints>(u) & 0x7fffffff;
        rounded -= (gm != 0) & (um == 0);
        product[j] += __builtin_convertvector(g, Doubles) * __builtin_convertvector(u, Doubles);
      }
    }
    product_ += product[0] + product[1];
    rounded_ += rounded;
    for (; i < size; ++i) fold(gradient[i], update[i], rest_);
  }
  void add(const double* gradient, const double* update, int size) {
    for (int i = 0; i < size; ++i) fold(gradient[i], update[i], rest_);
  }

  Joint joint() const {
    Joint j = rest_;
    j.product += total(product_);
    for (int i = 0; i < kWidth; ++i) j.rounded += rounded_[i];
    return j;
  }

 private:
  Doubles product_ = {};
  Ints rounded_ = {};
  Joint rest_;
};

// How a block of T is folded: float32 as it is, half precision widened (exactly), float64 as it is.
template <typename T>
struct Folded {
  using Wide = float;
  using Fold = BlockFold;
  static __attribute__((noinline)) const float* widen(const T* x, int size, float* scratch) {
    for (int i = 0; i < size; ++i) scratch[i] = static_cast<float>(x[i]);
    return scratch;
  }
};
template <>
struct Folded<float> {
  using Wide = float;
  using Fold = BlockFold;
  static const float* widen(const float* x, int, float*) { return x; }
};
template <>
struct Folded<double> {
  using Wide = double;
  using Fold = WideFold;
  static const double* widen(const double* x, int, double*) { return x; }
};

}  // namespace trainrt
