// The compiler's own vectors, as wide as the processor's, and what folds their lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX__)
#include <immintrin.h>
#endif

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

inline Floats load(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
#if defined(__AVX__)
  asm("" : "+v"(v));  // or the compiler loads it again for every use, and loads are what bounds the loop
#endif
  return v;
}

inline Ints magnitudes(Floats v) { return reinterpret_cast<Ints>(v) & 0x7fffffff; }

// A half of a vector, lane by lane: a vector whose parts were addressed in memory would have to live there.
template <typename Half, int kFrom, typename Vector, int... i>
inline __attribute__((always_inline)) Half half_of(Vector v, std::integer_sequence<int, i...>) {
  return Half{v[kFrom + i]...};
}

// Folds the lanes of a vector by halves.
template <typename Lane, int kCount = kWidth, typename Vector, typename Fold>
inline __attribute__((always_inline)) Lane across(Vector v, Fold fold) {
  constexpr int kHalfCount = kCount / 2;
  if constexpr (kHalfCount == 1) {
    return fold(v[0], v[1]);
  } else {
    typedef Lane Half __attribute__((vector_size(sizeof(Lane) * kHalfCount)));
    constexpr auto lanes = std::make_integer_sequence<int, kHalfCount>();
    return across<Lane, kHalfCount>(fold(half_of<Half, 0>(v, lanes), half_of<Half, kHalfCount>(v, lanes)), fold);
  }
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
