// Numbers as TensorFlow computes them on a CPU: half precision is widened, operated on in float32, and rounded after
// every single operation. No TensorFlow header, so that the device code can share it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define TRAINRT_HD __host__ __device__ __forceinline__
#else
#define TRAINRT_HD inline __attribute__((always_inline))
#endif

namespace trainrt {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
constexpr int kDtypes = 4;

TRAINRT_HD uint32_t bits_of(float x) {
  uint32_t b;
  memcpy(&b, &x, 4);
  return b;
}
TRAINRT_HD uint64_t bits_of(double x) {
  uint64_t b;
  memcpy(&b, &x, 8);
  return b;
}
TRAINRT_HD float float_of(uint32_t b) {
  float x;
  memcpy(&x, &b, 4);
  return x;
}

struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  TRAINRT_HD explicit BFloat16(float x) {
    const uint32_t b = bits_of(x);
    const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    // Eigen writes one NaN for all of a sign.
    const uint32_t nan = ((b >> 16) & 0x8000u) | 0x7fc0u;
    bits = static_cast<uint16_t>((b & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
  }
  TRAINRT_HD explicit operator float() const { return float_of(static_cast<uint32_t>(bits) << 16); }
};

struct Float16 {
  uint16_t bits;
  Float16() = default;
  // Round to nearest even, without branches so that loops over it vectorise (F. Giesen's construction).
  TRAINRT_HD explicit Float16(float x) {
    const uint32_t b = bits_of(x);
    const uint32_t sign = (b >> 16) & 0x8000u;
    const uint32_t a = b & 0x7fffffffu;
    const uint32_t normal = (a + ((15u - 127u) << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
    const uint32_t magic = 126u << 23;  // aligns a subnormal's last bit with the last bit of the float32 sum
    const uint32_t subnormal = bits_of(float_of(a) + float_of(magic)) - magic;
    const uint32_t special = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = a < (113u << 23) ? subnormal : normal;
    bits = static_cast<uint16_t>(sign | (a >= ((127u + 16u) << 23) ? special : finite));
  }
  TRAINRT_HD explicit operator float() const {
    const uint32_t magnitude = (bits & 0x7fffu) << 13;
    const uint32_t exponent = magnitude & (0x1fu << 23);
    const float subnormal = float_of(magnitude + (113u << 23)) - float_of(113u << 23);
    const uint32_t normal = magnitude + ((127u - 15u) << 23);
    const uint32_t special = magnitude + ((255u - 31u) << 23);
    const uint32_t b = exponent == 0 ? bits_of(subnormal) : (exponent == (0x1fu << 23) ? special : normal);
    return float_of(b | (static_cast<uint32_t>(bits & 0x8000u) << 16));
  }
};

template <typename T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr Dtype value = Dtype::kFloat32;
};
template <>
struct DtypeOf<double> {
  static constexpr Dtype value = Dtype::kFloat64;
};
template <>
struct DtypeOf<BFloat16> {
  static constexpr Dtype value = Dtype::kBFloat16;
};
template <>
struct DtypeOf<Float16> {
  static constexpr Dtype value = Dtype::kFloat16;
};

#define TRAINRT_NARROW(T)                                                                           \
  TRAINRT_HD T operator+(T a, T b) { return T(static_cast<float>(a) + static_cast<float>(b)); }     \
  TRAINRT_HD T operator-(T a, T b) { return T(static_cast<float>(a) - static_cast<float>(b)); }     \
  TRAINRT_HD T operator*(T a, T b) { return T(static_cast<float>(a) * static_cast<float>(b)); }     \
  TRAINRT_HD T operator/(T a, T b) { return T(static_cast<float>(a) / static_cast<float>(b)); }     \
  TRAINRT_HD bool operator>(T a, T b) { return static_cast<float>(a) > static_cast<float>(b); }     \
  TRAINRT_HD bool operator<(T a, T b) { return static_cast<float>(a) < static_cast<float>(b); }     \
  TRAINRT_HD T negative(T a) {                                                                      \
    a.bits ^= 0x8000u;                                                                              \
    return a;                                                                                       \
  }                                                                                                 \
  TRAINRT_HD T magnitude(T a) {                                                                     \
    a.bits &= 0x7fffu;                                                                              \
    return a;                                                                                       \
  }                                                                                                 \
  TRAINRT_HD T square_root(T a) { return T(sqrtf(static_cast<float>(a))); }                         \
  TRAINRT_HD bool is_nan(T a) { return (bits_of(static_cast<float>(a)) & 0x7fffffffu) > 0x7f800000u; } \
  TRAINRT_HD bool is_zero(T a) { return (a.bits & 0x7fffu) == 0; }
TRAINRT_NARROW(BFloat16)
TRAINRT_NARROW(Float16)
#undef TRAINRT_NARROW

TRAINRT_HD float negative(float a) { return -a; }
TRAINRT_HD double negative(double a) { return -a; }
TRAINRT_HD float magnitude(float a) { return fabsf(a); }
TRAINRT_HD double magnitude(double a) { return fabs(a); }
TRAINRT_HD float square_root(float a) { return sqrtf(a); }
TRAINRT_HD double square_root(double a) { return sqrt(a); }
TRAINRT_HD bool is_nan(float a) { return a != a; }
TRAINRT_HD bool is_nan(double a) { return a != a; }
TRAINRT_HD bool is_zero(float a) { return (bits_of(a) & 0x7fffffffu) == 0; }
TRAINRT_HD bool is_zero(double a) { return (bits_of(a) & 0x7fffffffffffffffull) == 0; }

// 1, 0 or -1; NaN for a NaN.
template <typename T>
TRAINRT_HD T sign(T a) {
  return is_nan(a) ? a : (a > T(0.0f) ? T(1.0f) : (a < T(0.0f) ? T(-1.0f) : T(0.0f)));
}

// The larger of two; a NaN in either is the result, the first one first, as in Eigen's NaN-propagating maximum.
template <typename T>
TRAINRT_HD T larger(T a, T b) {
  return is_nan(a) ? a : (is_nan(b) ? b : (a > b ? a : b));
}

}  // namespace trainrt
