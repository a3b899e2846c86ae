// Compiled apart from the updates: here a multiplication and an addition may become one instruction, there never.
#include "blocks.h"

#include <cstring>

namespace trainrt {
namespace {

// A magnitude under 2^-45 may lose squares to underflow, one over 2^57 may overflow when kBlock are summed.
constexpr int kLow = 127 - 45, kHigh = 127 + 57;

inline Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline Ints magnitudes(Floats v) { return reinterpret_cast<Ints>(v) & 0x7fffffff; }

inline int32_t largest(const Ints& v) {
  int32_t lanes[kWidth];
  memcpy(lanes, &v, sizeof v);
  for (int width = kWidth / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}

inline double total(const Doubles& v) {
  double sum = 0;
  for (int i = 0; i < kWidth; ++i) sum += v[i];
  return sum;
}

}  // namespace

// Takes one block's lanes. False, with nothing folded, if they do not fit float32 at this scale: `seen_` says why.
inline bool BlockFold::accept(Ints top, Floats sum, Floats sumsq, Ints zeros, float scale) {
  seen_ = largest(top);
  const int exponent = (seen_ >> 23) + static_cast<int>(bits_of(scale) >> 23) - 127;
  if (seen_ != 0 && (exponent < kLow || exponent > kHigh || seen_ >= 0x7f800000)) return false;
  zeros_ += zeros;
  absmax_ = seen_ > absmax_ ? seen_ : absmax_;
  if (scale == 1.0f) {
    sum_ += __builtin_convertvector(sum, Doubles);
    sumsq_ += __builtin_convertvector(sumsq, Doubles);
  } else {
    const double back = 1.0 / static_cast<double>(scale);
    sum_ += __builtin_convertvector(sum, Doubles) * back;
    sumsq_ += __builtin_convertvector(sumsq, Doubles) * (back * back);
  }
  return true;
}

template <bool kScaled>
inline __attribute__((always_inline)) bool BlockFold::sum_block(const float* x, int size, const float* ahead) {
  Floats s[kSets] = {}, q[kSets] = {};
  Ints top[kSets] = {}, zeros[kSets] = {};
  const Floats factor = scale_ - Floats{};
  for (int i = 0; i < size; i += kLanes) {
    for (int j = 0; j < kSets; ++j) {
      __builtin_prefetch(ahead + i + j * kWidth, 0, 1);
      Floats v = load(x + i + j * kWidth);
      const Ints magnitude = magnitudes(v);
      top[j] = top[j] > magnitude ? top[j] : magnitude;
      zeros[j] -= magnitude == 0;  // a true lane is -1
      if (kScaled) v *= factor;
      s[j] += v;
      q[j] += v * v;
    }
  }
  return accept(top[0] > top[1] ? top[0] : top[1], s[0] + s[1], q[0] + q[1], zeros[0] + zeros[1],
                kScaled ? scale_ : 1.0f);
}

void BlockFold::add(const float* x, int size, const float* ahead) {
  alignas(64) float padded[kBlock];
  const int tail = size % kLanes;
  count_ += size;
  if (__builtin_expect(tail != 0, 0)) {
    const int padding = kLanes - tail;
    memcpy(padded, x, size * sizeof(float));
    memset(padded + size, 0, padding * sizeof(float));
    x = padded;
    size += padding;
    zero_count_ -= padding;
  }
  if (__builtin_expect(scale_ == 1.0f && sum_block<false>(x, size, ahead), 1)) return;
  add_with_care(x, size, padded);
}

// x: a whole number of strides; scratch: kBlock floats, may be x itself.
__attribute__((noinline)) void BlockFold::add_with_care(const float* x, int size, float* scratch) {
  if (scale_ != 1.0f && sum_block<true>(x, size, x)) return;
  scale_ = 1.0f;
  if (sum_block<false>(x, size, x)) return;
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
    if (sum_block<false>(x, size, x)) return;
  }
  if (seen_ >= 0x00800000) {  // normal: the largest magnitude goes to about 1
    int shift = 127 - (seen_ >> 23);
    shift = shift > 126 ? 126 : shift < -126 ? -126 : shift;
    scale_ = float_of(static_cast<uint32_t>(shift + 127) << 23);
    if (sum_block<true>(x, size, x)) return;
    scale_ = 1.0f;
  }
  Moments slow;
  for (int i = 0; i < size; ++i) fold(x[i], slow);
  rare_.merge(slow);
}

Moments BlockFold::moments() const {
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

void MotionFold::add(const float* gradient, const float* before, const float* after, int size) {
  if (__builtin_expect(size % kLanes == 0 && update_.scale_ == 1.0f, 1)) {
    Floats s[kSets] = {}, q[kSets] = {}, p[kSets] = {};
    Ints top[kSets] = {}, zeros[kSets] = {}, rounded[kSets] = {};
    for (int i = 0; i < size; i += kLanes) {
      for (int j = 0; j < kSets; ++j) {
        const int at = i + j * kWidth;
        __builtin_prefetch(gradient + kAhead + at, 0, 1);
        const Floats g = load(gradient + at), u = load(after + at) - load(before + at);
        const Ints magnitude = magnitudes(u), still = magnitude == 0;
        top[j] = top[j] > magnitude ? top[j] : magnitude;
        zeros[j] -= still;
        rounded[j] -= still & (magnitudes(g) != 0);
        s[j] += u;
        q[j] += u * u;
        p[j] += g * u;
      }
    }
    // The products fit float32 if their sum is neither infinite nor so small that underflow would show.
    const double product = total(__builtin_convertvector(p[0] + p[1], Doubles));
    const bool fits = (product >= 0x1p-90 || product <= -0x1p-90) && product - product == 0;
    if (__builtin_expect(fits, 1) && update_.accept(top[0] > top[1] ? top[0] : top[1], s[0] + s[1], q[0] + q[1],
                                                    zeros[0] + zeros[1], 1.0f)) {
      update_.count_ += size;
      product_ += product;
      rounded_ += rounded[0] + rounded[1];
      return;
    }
  }
  alignas(64) float update[kBlock];
  for (int i = 0; i < size; ++i) update[i] = after[i] - before[i];
  add(gradient, update, size);
}

void MotionFold::add(const float* gradient, const float* update, int size) {
  update_.add(update, size, update);
  if (!gradient) return;
  Doubles product = {};
  int i = 0;
  for (; i + kWidth <= size; i += kWidth) {
    const Floats g = load(gradient + i), u = load(update + i);
    rounded_ -= (magnitudes(g) != 0) & (magnitudes(u) == 0);
    product += __builtin_convertvector(g, Doubles) * __builtin_convertvector(u, Doubles);
  }
  product_ += total(product);
  for (; i < size; ++i) fold(gradient[i], update[i], rest_);
}

Joint MotionFold::joint() const {
  Joint j = rest_;
  j.product += product_;
  for (int i = 0; i < kWidth; ++i) j.rounded += rounded_[i];
  return j;
}

void WideFold::add(const double* x, int size, const double*) {
  for (int i = 0; i < size; ++i) fold(x[i], moments_);
}

void WideMotionFold::add(const double* gradient, const double* before, const double* after, int size) {
  double update[kBlock];
  for (int i = 0; i < size; ++i) update[i] = after[i] - before[i];
  add(gradient, update, size);
}

void WideMotionFold::add(const double* gradient, const double* update, int size) {
  for (int i = 0; i < size; ++i) {
    fold(update[i], update_);
    if (gradient) fold(gradient[i], update[i], joint_);
  }
}

}  // namespace trainrt
