// x / sqrt(y) as TensorFlow computes it. In a graph, Grappler makes it x * rsqrt(y); Eigen's rsqrt of float32 is the
// processor's estimate and one Newton step, for all but the last elements of a tensor, which do not fill a vector of 8
// and are 1 / sqrt(y). Run eagerly it is a division. (Eigen/src/Core/arch/AVX/MathFunctions.h, MathFunctionsImpl.h)
#pragma once

#include "elements.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace trainrt {

// roots: `size` numbers; each becomes its reciprocal square root.
#if defined(__x86_64__)
__attribute__((target("avx")))  // TensorFlow itself asks for AVX, whatever this is compiled for
#endif
inline void reciprocal_roots(float* x, int size) {
  int i = 0;
#if defined(__x86_64__)
  const __m256 half = _mm256_set1_ps(-0.5f), one = _mm256_set1_ps(-1.0f);
  for (; i + 8 <= size; i += 8) {
    const __m256 y = _mm256_loadu_ps(x + i), guess = _mm256_rsqrt_ps(y);
    const __m256 error = _mm256_add_ps(_mm256_mul_ps(_mm256_mul_ps(y, guess), guess), one);
    const __m256 root = _mm256_add_ps(_mm256_mul_ps(_mm256_mul_ps(guess, half), error), guess);
    // Zero and infinity make a NaN of the step: their estimate is exact.
    _mm256_storeu_ps(x + i, _mm256_blendv_ps(root, guess, _mm256_cmp_ps(root, root, _CMP_UNORD_Q)));
  }
#endif
  for (; i < size; ++i) x[i] = 1.0f / sqrtf(x[i]);
}

inline void reciprocal_roots(double* x, int size) {
  for (int i = 0; i < size; ++i) x[i] = 1.0 / sqrt(x[i]);
}

template <typename T>
inline void reciprocal_roots(T* x, int size) {
  int i = 0;
#if defined(__x86_64__)
  for (; i + 8 <= size; i += 8) {
    float wide[8];
    for (int j = 0; j < 8; ++j) wide[j] = static_cast<float>(x[i + j]);
    reciprocal_roots(wide, 8);
    for (int j = 0; j < 8; ++j) x[i + j] = T(wide[j]);
  }
#endif
  for (; i < size; ++i) x[i] = T(1.0f) / square_root(x[i]);
}

}  // namespace trainrt
