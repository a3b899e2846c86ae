// Moments of one tensor, and the joint sums of a gradient and an update: what a row holds, and how elements fold into
// it. No TensorFlow header.
//
// Sums are over the finite elements. float32 elements are summed in float32 over blocks of at most `kBlock`, spread over
// 32 lanes (so 16 additions a lane), and blocks are folded in float64 in order: a relative error of a few 1e-7 and the
// same bits whatever the number of threads. A block whose squares would leave float32's range is scaled by a power of
// two, which is exact.
#pragma once

#include "types.h"

namespace trainrt {

constexpr int kMoments = 6;  // record.DEVICE_MOMENTS
constexpr int kSumsq = 2, kAbsmax = 3, kNonfinite = 5;  // columns of them
constexpr int kBlock = 512;  // long enough to pay for folding its lanes; see also `block_of`
constexpr int64_t kChunk = 16384;  // elements of one task: fixed, so that sums do not depend on the number of threads

struct Moments {
  int64_t count = 0;
  double sum = 0, sumsq = 0, absmax = 0;
  int64_t zeros = 0, nonfinite = 0;

  TRAINRT_HD void merge(const Moments& other) {
    count += other.count;
    sum += other.sum;
    sumsq += other.sumsq;
    absmax = other.absmax > absmax ? other.absmax : absmax;
    zeros += other.zeros;
    nonfinite += other.nonfinite;
  }

  TRAINRT_HD void store(double* row) const {
    row[0] = static_cast<double>(count);
    row[1] = sum;
    row[2] = sumsq;
    row[3] = absmax;
    row[4] = static_cast<double>(zeros);
    row[5] = static_cast<double>(nonfinite);
  }
};

struct Joint {
  double product = 0;  // NaN as soon as one element's is
  int64_t rounded = 0;

  TRAINRT_HD void merge(const Joint& other) {
    product += other.product;
    rounded += other.rounded;
  }
};

// An optimizer steps by `rate` times something divided by sqrt(second moment + inside) + outside; one of the two is its
// epsilon. Second moments under `floor` count for less than it; over `correction` they have no bias to zero.
struct Division {
  double inside = 0, outside = 0, floor = 0, rate = __builtin_nan(""), correction = __builtin_nan("");
};

// What a gradient shares with its weight's slots. A gradient or second moment that is not finite makes the sums NaN.
struct Adaptive {
  double product = 0;     // gradient . momentum
  double normalized = 0;  // sum of (gradient / divisor)^2
  double inverse = 0;     // sum of 1 / divisor
  double lowest = __builtin_inf();  // smallest second moment
  int64_t under = 0;                // second moments under the floor

  TRAINRT_HD void merge(const Adaptive& other) {
    product += other.product;
    normalized += other.normalized;
    inverse += other.inverse;
    lowest = other.lowest < lowest ? other.lowest : lowest;
    under += other.under;
  }
};

// A float32 as float64, right also where the processor reads subnormals as zero.
TRAINRT_HD double exact(float x) {
  const uint32_t b = bits_of(x), mantissa = b & 0x7fffffu;
  if ((b & 0x7f800000u) != 0) return static_cast<double>(x);
  const double value = static_cast<double>(static_cast<int32_t>(mantissa)) * 0x1p-149;
  return b >> 31 ? -value : value;
}
TRAINRT_HD double exact(double x) { return x; }
TRAINRT_HD double exact(BFloat16 x) { return exact(static_cast<float>(x)); }
TRAINRT_HD double exact(Float16 x) { return exact(static_cast<float>(x)); }

TRAINRT_HD bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }
TRAINRT_HD bool is_finite(double x) { return (bits_of(x) & 0x7ff0000000000000ull) != 0x7ff0000000000000ull; }
TRAINRT_HD bool is_finite(BFloat16 x) { return is_finite(static_cast<float>(x)); }
TRAINRT_HD bool is_finite(Float16 x) { return is_finite(static_cast<float>(x)); }

// One element, in float64. The device code folds with this; the CPU takes it where a block needs care.
template <typename T>
TRAINRT_HD void fold(T x, Moments& into) {
  into.count += 1;
  if (!is_finite(x)) {
    into.nonfinite += 1;
    return;
  }
  const double value = exact(x), size = value < 0 ? -value : value;
  into.sum += value;
  into.sumsq += value * value;
  into.absmax = size > into.absmax ? size : into.absmax;
  into.zeros += is_zero(x);
}

// One element of a gradient and of its slots; any of them may be null.
template <typename T>
TRAINRT_HD void fold(const T* gradient, const T* momentum, const T* second, const Division& division, Adaptive& into) {
  const double g = gradient ? exact(*gradient) : 0;
  if (momentum) into.product += g * exact(*momentum);
  if (!second) return;
  const double v = exact(*second), inverse = 1 / (sqrt(v + division.inside) + division.outside);
  into.normalized += g * inverse * (g * inverse);
  into.inverse += inverse;
  into.lowest = v < into.lowest ? v : into.lowest;
  into.under += v < division.floor;
}

template <typename T>
TRAINRT_HD void fold(T gradient, T update, Joint& into) {
  into.product += exact(gradient) * exact(update);
  into.rounded += !is_zero(gradient) && is_zero(update);
}

}  // namespace trainrt
