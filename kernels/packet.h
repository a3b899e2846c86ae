// A vector as an element: what a rule of `updates/` computes with on the CPU, as many weights at a time as the processor
// takes.
#pragma once

#include "vectors.h"

namespace trainrt {

struct Packet {
  Floats v;
  Packet() = default;
  inline __attribute__((always_inline)) Packet(Floats x) : v(x) {}
  inline __attribute__((always_inline)) explicit Packet(float x) : v(x - Floats{}) {}
};

#define TRAINRT_PACKET inline __attribute__((always_inline)) Packet
TRAINRT_PACKET operator+(Packet a, Packet b) { return a.v + b.v; }
TRAINRT_PACKET operator-(Packet a, Packet b) { return a.v - b.v; }
TRAINRT_PACKET operator*(Packet a, Packet b) { return a.v * b.v; }
TRAINRT_PACKET operator/(Packet a, Packet b) { return a.v / b.v; }
TRAINRT_PACKET negative(Packet a) { return -a.v; }
TRAINRT_PACKET magnitude(Packet a) { return reinterpret_cast<Floats>(magnitudes(a.v)); }
TRAINRT_PACKET square_root(Packet a) { return square_root(a.v); }
// As for one element, in `types.h`.
TRAINRT_PACKET sign(Packet a) {
  const Floats zero = {}, one = 1.0f - zero;
  return a.v != a.v ? a.v : a.v > zero ? one : a.v < zero ? -one : zero;
}
TRAINRT_PACKET larger(Packet a, Packet b) {
  return a.v != a.v ? a.v : b.v != b.v ? b.v : a.v > b.v ? a.v : b.v;
}
#undef TRAINRT_PACKET

}  // namespace trainrt
