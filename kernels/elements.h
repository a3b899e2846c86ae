// What happens to one element of a weight: its gradient is prepared, the weight decays, the rule steps. Shared by the
// CPU's loops and the device's threads. No TensorFlow header.
#pragma once

#include <type_traits>

#include "types.h"

namespace trainrt {

// What happens to a gradient before the rule sees it, one operation after the other, each rounded as TensorFlow would.
enum class Prepare : int { kMultiply = 0, kDivide = 1, kClip = 2 };

// Weight decay before the rule: by the product of decay and learning rate, or by one and then the other.
enum class Decay : int { kNone = 0, kMerged = 1, kInTurn = 2 };
constexpr int kDecayScalars = 3;  // the product, the decay, the learning rate

template <typename T>
TRAINRT_HD T prepared(Prepare how, T gradient, T factor) {
  if (how == Prepare::kMultiply) return gradient * factor;
  if (how == Prepare::kDivide) return gradient / factor;
  const T low = negative(factor), below = gradient > factor ? factor : gradient;  // NaN compares false and stays
  return below < low ? low : below;
}

// In a graph Grappler multiplies the two rates first, unless the weight is a scalar too.
template <typename T>
TRAINRT_HD T decayed(Decay how, T weight, const T* rates) {
  if (how == Decay::kMerged) return weight - weight * rates[0];
  return how == Decay::kInTurn ? weight - (weight * rates[1]) * rates[2] : weight;
}

// A rule that divides by a square root names the radicand first; how the root is taken is up to who runs it.
template <typename R, typename = void>
struct HasRoot : std::false_type {};
template <typename R>
struct HasRoot<R, std::void_t<decltype(R::template radicand<float>)>> : std::true_type {};

template <typename T>
struct OverRootOf {
  T radicand;
  TRAINRT_HD T operator()(T x) const { return x / square_root(radicand); }
};

template <typename T>
struct TimesReciprocal {
  T reciprocal_root;
  TRAINRT_HD T operator()(T x) const { return x * reciprocal_root; }
};

template <typename R, typename T>
TRAINRT_HD void step_element(const T* scalars, T gradient, T& weight, T* slots) {
  if constexpr (HasRoot<R>::value) {
    const OverRootOf<T> over_root{R::radicand(scalars, gradient, slots)};
    R::step(scalars, gradient, weight, slots, over_root);
  } else {
    R::step(scalars, gradient, weight, slots);
  }
}

}  // namespace trainrt
