// The compiler's own vectors, as wide as the processor's, and what folds their lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_FMA)
#include <arm_neon.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // no vector is passed to what is not inlined

namespace trainrt {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));

inline void store(float* p, Floats v) { memcpy(p, &v, sizeof v); }

inline Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
#if defined(__AVX__)
  asm("" : "+v"(v));  // or the compiler loads it again for every use, and loads are what bounds the loop
#endif
  return v;
}

// a * b + c, rounded once where the processor does that, whatever the compiler may contract.
inline __attribute__((always_inline)) Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_FEATURE_FMA)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

inline Ints magnitudes(Floats v) { return reinterpret_cast<Ints>(v) & 0x7fffffff; }

typedef float Floats8 __attribute__((vector_size(32)));
typedef double Doubles8 __attribute__((vector_size(64)));

// A half of a vector, lane by lane: a vector whose parts were addressed in memory would have to live there.
template <typename Half, int kFrom, typename Vector, int... i>
inline __attribute__((always_inline)) Half half_of(const Vector& v, std::integer_sequence<int, i...>) {
  return Half{v[kFrom + i]...};
}

// Folds the lanes of a vector by halves.
template <typename Lane, int kCount = kWidth, typename Vector, typename Fold>
inline __attribute__((always_inline)) Lane across(const Vector& v, Fold fold) {
  constexpr int kHalfCount = kCount / 2;
  if constexpr (kHalfCount == 1) {
    return fold(v[0], v[1]);
  } else {
    typedef Lane Half __attribute__((vector_size(sizeof(Lane) * kHalfCount)));
    constexpr auto lanes = std::make_integer_sequence<int, kHalfCount>();
    return across<Lane, kHalfCount>(fold(half_of<Half, 0>(v, lanes), half_of<Half, kHalfCount>(v, lanes)), fold);
  }
}

// Folds 32 lanes, in vectors of kWidth, into 8: lane i with lane i + 16 first, then with lane i + 8.
inline __attribute__((always_inline)) Floats8 eight(const Floats* sets) {
#if defined(__AVX512F__)
  const Floats both = sets[0] + sets[1];
  const __m512d bits = _mm512_castps_pd(both);
  return static_cast<Floats8>(_mm512_castps512_ps256(both)) +
         static_cast<Floats8>(_mm256_castpd_ps(_mm512_extractf64x4_pd(bits, 1)));
#elif defined(__AVX__)
  return (sets[0] + sets[2]) + (sets[1] + sets[3]);
#else
  const Floats low = (sets[0] + sets[4]) + (sets[2] + sets[6]), high = (sets[1] + sets[5]) + (sets[3] + sets[7]);
  return Floats8{low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]};
#endif
}

inline __attribute__((always_inline)) Doubles8 widened(const Floats8& x) {
#if defined(__AVX512F__)  // of which the compiler makes shorter vectors
  return _mm512_cvtps_pd(x);
#else
  return __builtin_convertvector(x, Doubles8);
#endif
}

// Whether any lane is not zero.
inline __attribute__((always_inline)) bool any(Ints v) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(v), reinterpret_cast<__m512i>(v)) != 0;
#elif defined(__AVX__)
  return !_mm256_testz_si256(reinterpret_cast<__m256i>(v), reinterpret_cast<__m256i>(v));
#else
  return across<int32_t>(v, [](auto a, auto b) { return a | b; }) != 0;
#endif
}

inline __attribute__((always_inline)) bool any_zero(Ints v) {
#if defined(__AVX512F__)
  return _mm512_testn_epi32_mask(reinterpret_cast<__m512i>(v), reinterpret_cast<__m512i>(v)) != 0;
#else
  return any(v == 0);
#endif
}

// Whether any lane is under `low`, which may be negative, or not under `high`; none is negative.
inline __attribute__((always_inline)) bool any_outside(Ints v, int32_t low, int32_t high) {
  typedef uint32_t Unsigned __attribute__((vector_size(4 * kWidth)));
  const Unsigned above = reinterpret_cast<Unsigned>(v) - static_cast<uint32_t>(low);  // wraps around under `low`
  const Unsigned bound = static_cast<uint32_t>(high) - static_cast<uint32_t>(low) + Unsigned{};
#if defined(__AVX512F__)
  return _mm512_cmpge_epu32_mask(reinterpret_cast<__m512i>(above), reinterpret_cast<__m512i>(bound)) != 0;
#else
  return any(above >= bound);
#endif
}

inline __attribute__((always_inline)) int32_t largest(Ints v) {
  return across<int32_t>(v, [](auto a, auto b) { return a > b ? a : b; });
}

inline __attribute__((always_inline)) int32_t total(Ints v) {
  return across<int32_t>(v, [](auto a, auto b) { return a + b; });
}

inline __attribute__((always_inline)) Ints is_not_zero(Ints magnitude) { return magnitude > 1 ? Ints{} + 1 : magnitude; }

inline Floats square_root(Floats x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX__)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < kWidth; ++i) x[i] = sqrtf(x[i]);
  return x;
#endif
}

}  // namespace trainrt
