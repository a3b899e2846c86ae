// keras.optimizers.RMSprop, with momentum, centered, and both.
#pragma once

#include "../types.h"

namespace trainrt {

// scalars: learning rate, rho, 1 - rho, epsilon, and momentum where there is any.
// slots: velocity; then momentum; then average_gradient.
template <bool kMomentum, bool kCentered>
struct RmspropRule {
  static constexpr int kSlots = 1 + kMomentum + kCentered, kScalars = 4 + kMomentum;
  template <typename T>
  TRAINRT_HD static T radicand(const T* s, T g, T* q) {
    q[0] = s[1] * q[0] + s[2] * (g * g);
    if constexpr (kCentered) {
      T& average = q[1 + kMomentum];
      average = s[1] * average + s[2] * g;
      return (q[0] - average * average) + s[3];
    } else {
      return q[0] + s[3];
    }
  }
  template <typename T, typename OverRoot>
  TRAINRT_HD static void step(const T* s, T g, T& w, T* q, OverRoot over_root) {
    const T increment = over_root(s[0] * g);
    if constexpr (kMomentum) {
      q[1] = s[4] * q[1] + increment;
      w = w - q[1];
    } else {
      w = w - increment;
    }
  }
};

struct Rmsprop : RmspropRule<false, false> {
  static constexpr const char* kName = "rmsprop";
};
struct RmspropMomentum : RmspropRule<true, false> {
  static constexpr const char* kName = "rmsprop_momentum";
};
struct RmspropCentered : RmspropRule<false, true> {
  static constexpr const char* kName = "rmsprop_centered";
};
struct RmspropCenteredMomentum : RmspropRule<true, true> {
  static constexpr const char* kName = "rmsprop_centered_momentum";
};

}  // namespace trainrt
