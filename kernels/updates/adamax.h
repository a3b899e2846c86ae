// keras.optimizers.Adamax.
#pragma once

#include "../types.h"

namespace trainrt {

struct Adamax {  // scalars: learning rate, 1 - beta_1, beta_2, 1 - beta_1^t, epsilon. Slots: momentum, norm
  static constexpr const char* kName = "adamax";
  static constexpr int kSlots = 2, kScalars = 5;
  template <typename T>
  TRAINRT_HD static void step(const T* s, T g, T& w, T* q) {
    q[0] = q[0] + (g - q[0]) * s[1];
    q[1] = larger(s[2] * q[1], magnitude(g));
    w = w - (s[0] * q[0]) / (s[3] * (q[1] + s[4]));
  }
};

}  // namespace trainrt
