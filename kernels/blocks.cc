// Compiled apart from the updates: here a multiplication and an addition may become one instruction, there never.
#include "blocks.h"

#include <cstring>

namespace trainrt {
namespace {

// A magnitude under 2^-45 may lose squares to underflow, one over 2^57 may overflow when kBlock are summed.
constexpr int kLow = 127 - 45, kHigh = 127 + 57;
// kBlock subnormals are less than 2^-20 of anything over 2^-97.
constexpr int kSubnormalsCount = 127 - 97;

inline __attribute__((always_inline)) float roughly_total(const Floats* sets) {
  return across<float, 8>(eight(sets), [](auto a, auto b) { return a + b; });
}

// Whether products of these gradients fit float32: their sum is neither infinite nor so small that underflow would show,
// or all are zero. A whole number of strides.
inline __attribute__((always_inline)) bool fits(float product, const float* gradient, int size) {
  if (__builtin_expect((product >= 0x1p-90f || product <= -0x1p-90f) && product - product == 0, 1)) return true;
  if (product != 0) return false;
  Ints bits = {};
  for (int i = 0; i < size; i += kWidth) bits |= magnitudes(load(gradient + i));
  return !any(bits);
}

// How many of the values, a whole number of strides, are zero: asked for where the smallest magnitude of a block is.
template <typename ValueAt>
inline __attribute__((always_inline)) int64_t zeros_of(int size, ValueAt value_at) {
  Ints nonzero = {};
  for (int i = 0; i < size; i += kWidth) nonzero += is_not_zero(magnitudes(value_at(i)));
  return size - total(nonzero);
}

inline __attribute__((always_inline)) bool has_zero(const Range& range) {
  return __builtin_expect(any_zero(range.least), 0);
}

// Whether squares fit float32 at a scale.
struct Limits {
  int low, high;  // bits of the smallest magnitude whose square does, and of the first one whose does not
  explicit Limits(float scale) {
    const int shift = static_cast<int>(bits_of(scale) >> 23) - 127, last = kHigh + 1 - shift;
    low = (kLow - shift) * (1 << 23);
    high = (last < 255 ? last : 255) * (1 << 23);
  }
  inline __attribute__((always_inline)) bool hold(int largest) const {
    return largest == 0 || (largest >= low && largest < high);
  }
  inline __attribute__((always_inline)) bool hold(Ints top) const {
    return __builtin_expect(!any_outside(top, low, high), 1) || hold(largest(top));
  }
};

}  // namespace

inline __attribute__((always_inline)) void Lanes::add(const Floats* sets, double factor) {
  const Doubles8 wide = widened(eight(sets));
  lane += factor == 1 ? wide : wide * factor;
}

double Lanes::total() const {
  double sum = 0;
  for (int i = 0; i < 8; ++i) sum += lane[i];
  return sum;
}

// Takes the sums of one block. False, with nothing folded, if they do not fit float32. Zeros are not among them.
inline __attribute__((always_inline)) bool BlockFold::take(const Sums& sums, float scale) {
  if (!Limits(scale).hold(sums.range.top)) return false;
  top_ = top_ > sums.range.top ? top_ : sums.range.top;
  const double back = scale == 1.0f ? 1.0 : 1.0 / static_cast<double>(scale);
  sum_.add(sums.sum, back);
  sumsq_.add(sums.squares, back * back);
  return true;
}

template <bool kScaled>
inline __attribute__((always_inline)) bool BlockFold::sum_block(const float* x, int size) {
  Sums sums;
  for (int j = 0; j < kSets; ++j) sums.sum[j] = sums.squares[j] = Floats{};
  const Floats factor = scale_ - Floats{};
  for (int i = 0; i < size; i += kLanes) {
    for (int j = 0; j < kSets; ++j) {
      const Floats v = load(x + i + j * kWidth);
      fold(kScaled ? v * factor : v, magnitudes(v), sums.sum[j], sums.squares[j], sums.range);
    }
  }
  if (take(sums, kScaled ? scale_ : 1.0f)) {
    if (has_zero(sums.range)) zeros_ += zeros_of(size, [&](int i) { return load(x + i); });
    return true;
  }
  seen_ = largest(sums.range.top);
  return false;
}

void BlockFold::add(const float* x, int size) {
  alignas(64) float padded[kBlock];
  const int tail = size % kLanes;
  count_ += size;
  if (__builtin_expect(tail != 0, 0)) {
    const int padding = kLanes - tail;
    memcpy(padded, x, size * sizeof(float));
    memset(padded + size, 0, padding * sizeof(float));
    x = padded;
    size += padding;
    zeros_ -= padding;
  }
  if (__builtin_expect(scale_ == 1.0f && sum_block<false>(x, size), 1)) return;
  add_with_care(x, size, padded);
}

// x: a whole number of strides; scratch: kBlock floats.
inline __attribute__((always_inline)) void BlockFold::add_sums(const Sums& sums, const float* x, int size,
                                                               float* scratch) {
  if (!take(sums)) {
    add_with_care(x, size, scratch);
  } else if (has_zero(sums.range)) {
    zeros_ += zeros_of(size, [&](int i) { return load(x + i); });
  }
}

void BlockFold::add(const Sums& sums, const float* x, int size) {
  alignas(64) float scratch[kBlock];
  count_ += size;
  add_sums(sums, x, size, scratch);
}

// x: a whole number of strides; scratch: kBlock floats, may be x itself.
__attribute__((noinline)) void BlockFold::add_with_care(const float* x, int size, float* scratch) {
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
    zeros_ -= nonfinite;
    x = scratch;
    if (sum_block<false>(x, size)) return;
  }
  // The largest magnitude goes to about 1; where it is so small that subnormals count, TensorFlow's threads, which read
  // them as zero, must not multiply them.
  if (seen_ >> 23 >= kSubnormalsCount) {
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

Moments BlockFold::moments() const {
  Moments m = rare_;
  m.count = count_;
  m.sum += sum_.total();
  m.sumsq += sumsq_.total();
  const double absmax = exact(float_of(static_cast<uint32_t>(largest(top_))));
  m.absmax = absmax > m.absmax ? absmax : m.absmax;
  m.zeros += zeros_;
  return m;
}

void StepFold::add(const float* gradient, bool known, const float* before, const float* after, int size) {
  alignas(64) float padded[3][kBlock];
  if (__builtin_expect(!gradient, 0)) {
    for (int i = 0; i < size; ++i) padded[0][i] = after[i] - before[i];
    return add_update(nullptr, known, padded[0], after, size);
  }
  if (kWidth < 16 && !known) {  // there are too few registers for the sums of all three
    gradient_.add(gradient, size);
    known = true;
  }
  const int padding = -size & (kLanes - 1);
  for (BlockFold* one : {known ? nullptr : &gradient_, &update_, &weight_}) {
    if (!one) continue;
    one->count_ += size;
    one->zeros_ -= padding;
  }
  if (__builtin_expect(padding != 0, 0)) {
    const float** const all[] = {&gradient, &before, &after};
    for (int k = 0; k < 3; ++k) {
      memcpy(padded[k], *all[k], size * sizeof(float));
      memset(padded[k] + size, 0, padding * sizeof(float));
      *all[k] = padded[k];
    }
    size += padding;
  }
  known ? add_strides<true>(gradient, before, after, size) : add_strides<false>(gradient, before, after, size);
}

template <bool kKnown>
void StepFold::add_strides(const float* gradient, const float* before, const float* after, int size) {
  StepSums sums;
  for (int j = 0; j < kSets; ++j) {  // one set after the other, as all do not fit the registers
    Floats sum[3] = {}, squares[3] = {}, product = {};
    for (int i = j * kWidth; i < size; i += kLanes) {
      const Floats g = load(gradient + i), w = load(after + i), u = w - load(before + i);
      if (!kKnown) fold(g, magnitudes(g), sum[0], squares[0], sums.gradient.range);
      fold(u, magnitudes(u), sum[1], squares[1], sums.update.range);
      fold(w, magnitudes(w), sum[2], squares[2], sums.weight.range);
      product = multiply_add(g, u, product);
    }
    int subject = 0;
    for (Sums* one : {&sums.gradient, &sums.update, &sums.weight}) {
      one->sum[j] = sum[subject];
      one->squares[j] = squares[subject++];
    }
    sums.product[j] = product;
  }
  add_sums<kKnown>(sums, gradient, before, after, size);
}

template <bool kKnown>
inline __attribute__((always_inline)) void StepFold::add_sums(const StepSums& sums, const float* gradient,
                                                              const float* before, const float* after, int size) {
  alignas(64) float scratch[kBlock], update[kBlock];
  const auto update_at = [&](int i) { return load(after + i) - load(before + i); };
  if (!kKnown) gradient_.add_sums(sums.gradient, gradient, size, scratch);
  weight_.add_sums(sums.weight, after, size, scratch);
  const bool taken = update_.take(sums.update);
  const int64_t still = has_zero(sums.update.range) ? zeros_of(size, update_at) : 0;
  if (taken) update_.zeros_ += still;
  const float product = roughly_total(sums.product);
  const bool fit = (product == 0 && !any(sums.update.range.top)) || fits(product, gradient, size);
  if (__builtin_expect(fit, 1)) {
    product_.add(sums.product);
    const auto either_at = [&](int i) {
      return reinterpret_cast<Floats>(magnitudes(load(gradient + i)) | magnitudes(update_at(i)));
    };
    if (still) rounded_ += still - zeros_of(size, either_at);
  }
  if (__builtin_expect(taken && fit, 1)) return;
  for (int i = 0; i < size; ++i) update[i] = after[i] - before[i];
  if (!taken) update_.add_with_care(update, size, scratch);
  for (int i = 0; !fit && i < size; ++i) fold(gradient[i], update[i], rest_);
}

void StepFold::add(const StepSums& sums, bool known, const float* gradient, const float* before, const float* after,
                   int size) {
  update_.count_ += size;
  weight_.count_ += size;
  if (known) return add_sums<true>(sums, gradient, before, after, size);
  gradient_.count_ += size;
  add_sums<false>(sums, gradient, before, after, size);
}

void StepFold::add_update(const float* gradient, bool known, const float* update, const float* after, int size) {
  update_.add(update, size);
  weight_.add(after, size);
  if (!gradient) return;
  if (!known) gradient_.add(gradient, size);
  for (int i = 0; i < size; ++i) fold(gradient[i], update[i], rest_);
}

Joint StepFold::joint() const {
  Joint j = rest_;
  j.product += product_.total();
  j.rounded += rounded_;
  return j;
}

namespace {

template <typename T>
void adapt_one(const T* gradient, const T* momentum, const T* second, const Division& division, Adaptive& into) {
  fold(gradient, momentum, second, division, into);
}

inline bool is_finite_sum(float sum) { return sum - sum == 0; }

}  // namespace

void AdaptiveFold::add(const float* gradient, const float* momentum, const float* second, int size,
                       const Division& division) {
  const int slow = gradient ? size / kLanes * kLanes : 0;  // from where on
  if (__builtin_expect(slow < size, 0)) {
    for (int i = slow; i < size; ++i)
      adapt_one(gradient ? gradient + i : nullptr, momentum ? momentum + i : nullptr, second ? second + i : nullptr,
                division, rest_);
    size = slow;
    if (!size) return;
  }
  second ? add_strides<true>(gradient, momentum, second, size, division)
         : add_strides<false>(gradient, momentum, gradient, size, division);
}

template <bool kSecond>
void AdaptiveFold::add_strides(const float* gradient, const float* momentum, const float* second, int size,
                               const Division& division) {
  const Floats inside = static_cast<float>(division.inside) - Floats{};
  const Floats outside = static_cast<float>(division.outside) - Floats{};
  const float* const other = momentum ? momentum : gradient;
  Floats p[kSets] = {}, n[kSets] = {}, y[kSets] = {}, low = load(second);
  Ints bits = {};  // of the gradients
  for (int i = 0; i < size; i += kLanes) {
    for (int j = 0; j < kSets; ++j) {
      const int at = i + j * kWidth;
      const Floats g = load(gradient + at);
      p[j] += g * load(other + at);
      if (!kSecond) continue;
      const Floats v = load(second + at), one_over = 1.0f / (square_root(v + inside) + outside), scaled = g * one_over;
      bits |= reinterpret_cast<Ints>(g);
      n[j] += scaled * scaled;
      y[j] += one_over;
      low = v < low ? v : low;
    }
  }
  if (momentum && __builtin_expect(fits(roughly_total(p), gradient, size), 1)) {
    product_.add(p);
  } else if (momentum) {
    for (int i = 0; i < size; ++i) rest_.product += exact(gradient[i]) * exact(momentum[i]);
  }
  if (!kSecond) return;
  const float squares = roughly_total(n);
  const bool lost = squares < 0x1p-90f && any(bits & 0x7fffffff);  // to underflow, some of it
  if (__builtin_expect(lost || !is_finite_sum(squares) || !is_finite_sum(roughly_total(y)), 0)) {
    for (int i = 0; i < size; ++i) adapt_one<float>(gradient + i, nullptr, second + i, division, rest_);
    return;
  }
  normalized_.add(n);
  inverse_.add(y);
  const double lowest = exact(across<float>(low, [](auto a, auto b) { return a < b ? a : b; }));
  rest_.lowest = lowest < rest_.lowest ? lowest : rest_.lowest;
  if (lowest < division.floor) {
    const float floor = static_cast<float>(division.floor);
    int under = 0;
    for (int i = 0; i < size; ++i) under += second[i] < floor;
    rest_.under += under;
  }
}

Adaptive AdaptiveFold::result() const {
  Adaptive a = rest_;
  a.product += product_.total();
  a.normalized += normalized_.total();
  a.inverse += inverse_.total();
  return a;
}

void WideAdaptiveFold::add(const double* gradient, const double* momentum, const double* second, int size,
                           const Division& division) {
  for (int i = 0; i < size; ++i)
    adapt_one(gradient ? gradient + i : nullptr, momentum ? momentum + i : nullptr, second ? second + i : nullptr,
              division, result_);
}

void WideFold::add(const double* x, int size) {
  for (int i = 0; i < size; ++i) fold(x[i], moments_);
}

void WideStepFold::add(const double* gradient, bool known, const double* before, const double* after, int size) {
  double update[kBlock];
  for (int i = 0; i < size; ++i) update[i] = after[i] - before[i];
  add_update(gradient, known, update, after, size);
}

void WideStepFold::add_update(const double* gradient, bool known, const double* update, const double* after, int size) {
  for (int i = 0; i < size; ++i) {
    fold(update[i], update_);
    fold(after[i], weight_);
    if (!gradient) continue;
    fold(gradient[i], update[i], joint_);
    if (!known) fold(gradient[i], gradient_);
  }
}

}  // namespace trainrt
