// keras.optimizers.Lion.
#pragma once

#include "../types.h"

namespace trainrt {

struct Lion {  // scalars: learning rate, beta_1, 1 - beta_1, beta_2, 1 - beta_2. Slots: momentum
  static constexpr const char* kName = "lion";
  static constexpr int kSlots = 1, kScalars = 5;
  template <typename T>
  TRAINRT_HD static void step(const T* s, T g, T& w, T* q) {
    w = w - s[0] * sign(q[0] * s[1] + g * s[2]);
    q[0] = q[0] * s[3] + g * s[4];
  }
};

}  // namespace trainrt
