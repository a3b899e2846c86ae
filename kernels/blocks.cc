// Compiled apart from the updates: here a multiplication and an addition may become one instruction, there never.
#include "blocks.h"

#include <cmath>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace trainrt {
namespace {

// A magnitude under 2^-45 may lose squares to underflow, one over 2^57 may overflow when kBlock are summed.
constexpr int kLow = 127 - 45, kHigh = 127 + 57;
// kBlock subnormals are less than 2^-20 of anything over 2^-97.
constexpr int kSubnormalsCount = 127 - 97;

inline Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
#if defined(__AVX__)
  asm("" : "+x"(v));  // or the compiler loads it again for every use, and loads are what bounds the loop
#endif
  return v;
}

inline Ints magnitudes(Floats v) { return reinterpret_cast<Ints>(v) & 0x7fffffff; }

// Folds the lanes of a vector by halves.
template <typename Lane, int kCount, typename Fold>
inline __attribute__((always_inline)) Lane across(const void* lanes, Fold fold) {
  if constexpr (kCount == 4) {
    Lane l[4];
    memcpy(l, lanes, sizeof l);
    return fold(fold(l[0], l[2]), fold(l[1], l[3]));
  } else {
    typedef Lane Half __attribute__((vector_size(sizeof(Lane) * kCount / 2)));
    Half low, high;
    memcpy(&low, lanes, sizeof low);
    memcpy(&high, static_cast<const char*>(lanes) + sizeof low, sizeof high);
    const Half half = fold(low, high);
    return across<Lane, kCount / 2>(&half, fold);
  }
}

// Counts the lanes that are zero.
struct ZeroCount {
  Ints lanes = {};
  void add(Ints v) { lanes -= v == 0; }  // a true lane is -1
  int64_t total() const {
    return across<int32_t, kWidth>(&lanes, [](auto a, auto b) { return a + b; });
  }
};

inline __attribute__((always_inline)) int32_t largest(Ints v) {
  return across<int32_t, kWidth>(&v, [](auto a, auto b) { return a > b ? a : b; });
}

inline __attribute__((always_inline)) float roughly_total(const Floats* sets) {
  Floats v = sets[0];
  for (int j = 1; j < kSets; ++j) v += sets[j];
  return across<float, kWidth>(&v, [](auto a, auto b) { return a + b; });
}

// Whether products of these gradients fit float32: their sum is neither infinite nor so small that underflow would show,
// or all are zero. A whole number of strides.
inline __attribute__((always_inline)) bool fits(float product, const float* gradient, int size) {
  if (__builtin_expect((product >= 0x1p-90f || product <= -0x1p-90f) && product - product == 0, 1)) return true;
  if (product != 0) return false;
  Ints any = {};
  for (int i = 0; i < size; i += kWidth) any |= magnitudes(load(gradient + i));
  return largest(any) == 0;
}

}  // namespace

inline __attribute__((always_inline)) void Lanes::add(const Floats* sets, double factor) {
  typedef double Doubles __attribute__((vector_size(8 * kWidth)));
  for (int j = 0; j < kHalf; ++j) {
    Doubles sum;
    memcpy(&sum, lane + j * kWidth, sizeof sum);
    sum += __builtin_convertvector(sets[j] + sets[j + kHalf], Doubles) * factor;
    memcpy(lane + j * kWidth, &sum, sizeof sum);
  }
}

double Lanes::total() const {
  double sum = 0;
  for (const double one : lane) sum += one;
  return sum;
}

// Takes one block's lanes. False, with nothing folded, if they do not fit float32 at this scale: `seen_` says why.
inline __attribute__((always_inline)) bool BlockFold::accept(Ints top, const Floats* sum, const Floats* sumsq,
                                                             int64_t zeros, float scale) {
  seen_ = largest(top);
  const int exponent = (seen_ >> 23) + static_cast<int>(bits_of(scale) >> 23) - 127;
  if (seen_ != 0 && (exponent < kLow || exponent > kHigh || seen_ >= 0x7f800000)) return false;
  zero_count_ += zeros;
  absmax_ = seen_ > absmax_ ? seen_ : absmax_;
  const double back = scale == 1.0f ? 1.0 : 1.0 / static_cast<double>(scale);
  sum_.add(sum, back);
  sumsq_.add(sumsq, back * back);
  return true;
}

template <bool kScaled>
inline __attribute__((always_inline)) bool BlockFold::sum_block(const float* x, int size, const float* ahead) {
  Floats s[kSets] = {}, q[kSets] = {};
  Ints top = {};
  ZeroCount zeros;
  const Floats factor = scale_ - Floats{};
  for (int i = 0; i < size; i += kLanes) {
    for (int j = 0; j < kSets; ++j) {
      if (j * kWidth % 16 == 0) __builtin_prefetch(ahead + i + j * kWidth, 0, 1);
      Floats v = load(x + i + j * kWidth);
      const Ints magnitude = magnitudes(v);
      top = top > magnitude ? top : magnitude;
      zeros.add(magnitude);
      if (kScaled) v *= factor;
      s[j] += v;
      q[j] += v * v;
    }
  }
  return accept(top, s, q, zeros.total(), kScaled ? scale_ : 1.0f);
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
  // The largest magnitude goes to about 1; where it is so small that subnormals count, TensorFlow's threads, which read
  // them as zero, must not multiply them.
  if (seen_ >> 23 >= kSubnormalsCount) {
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
  m.sum += sum_.total();
  m.sumsq += sumsq_.total();
  const double absmax = exact(float_of(static_cast<uint32_t>(absmax_)));
  m.absmax = absmax > m.absmax ? absmax : m.absmax;
  m.zeros += zero_count_;
  return m;
}

void MotionFold::add(const float* gradient, const float* before, const float* after, int size) {
  if (__builtin_expect(size % kLanes == 0 && update_.scale_ == 1.0f, 1)) {
    Floats s[kSets] = {}, q[kSets] = {}, p[kSets] = {};
    Ints top = {};
    ZeroCount zeros, both;
    for (int i = 0; i < size; i += kLanes) {
      for (int j = 0; j < kSets; ++j) {
        const int at = i + j * kWidth;
        if (j * kWidth % 16 == 0) __builtin_prefetch(gradient + kAhead + at, 0, 1);
        const Floats g = load(gradient + at), u = load(after + at) - load(before + at);
        const Ints magnitude = magnitudes(u);
        top = top > magnitude ? top : magnitude;
        zeros.add(magnitude);
        both.add(magnitude | magnitudes(g));
        s[j] += u;
        q[j] += u * u;
        p[j] += g * u;
      }
    }
    const int64_t still = zeros.total();
    if (__builtin_expect(fits(roughly_total(p), gradient, size), 1) && update_.accept(top, s, q, still, 1.0f)) {
      update_.count_ += size;
      product_.add(p, 1.0);
      rounded_ += still - both.total();
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
  for (int i = 0; i < size; ++i) fold(gradient[i], update[i], rest_);
}

Joint MotionFold::joint() const {
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

inline Floats square_root(Floats x) {
#if defined(__AVX__)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < kWidth; ++i) x[i] = sqrtf(x[i]);
  return x;
#endif
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
  Ints any = {};  // bits of the gradients
  for (int i = 0; i < size; i += kLanes) {
    for (int j = 0; j < kSets; ++j) {
      const int at = i + j * kWidth;
      const Floats g = load(gradient + at);
      p[j] += g * load(other + at);
      if (!kSecond) continue;
      const Floats v = load(second + at), one_over = 1.0f / (square_root(v + inside) + outside), scaled = g * one_over;
      any |= reinterpret_cast<Ints>(g);
      n[j] += scaled * scaled;
      y[j] += one_over;
      low = v < low ? v : low;
    }
  }
  if (momentum && __builtin_expect(fits(roughly_total(p), gradient, size), 1)) {
    product_.add(p, 1.0);
  } else if (momentum) {
    for (int i = 0; i < size; ++i) rest_.product += exact(gradient[i]) * exact(momentum[i]);
  }
  if (!kSecond) return;
  const float squares = roughly_total(n);
  const bool lost = squares < 0x1p-90f && largest(any & 0x7fffffff) != 0;  // to underflow, some of it
  if (__builtin_expect(lost || !is_finite_sum(squares) || !is_finite_sum(roughly_total(y)), 0)) {
    for (int i = 0; i < size; ++i) adapt_one<float>(gradient + i, nullptr, second + i, division, rest_);
    return;
  }
  normalized_.add(n, 1.0);
  inverse_.add(y, 1.0);
  const double lowest = exact(across<float, kWidth>(&low, [](auto a, auto b) { return a < b ? a : b; }));
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
