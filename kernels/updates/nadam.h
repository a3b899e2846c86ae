// keras.optimizers.Nadam.
#pragma once

#include "../types.h"

namespace trainrt {

// With u_t the momentum's schedule and U_t the product of u_1 to u_t:
// scalars: learning rate, 1 - beta_1, 1 - beta_2, u_(t+1), 1 - U_(t+1), 1 - u_t, 1 - U_t, 1 - beta_2^t, epsilon.
struct Nadam {  // slots: momentum, velocity
  static constexpr const char* kName = "nadam";
  static constexpr int kSlots = 2, kScalars = 9;
  template <typename T>
  TRAINRT_HD static void step(const T* s, T g, T& w, T* q) {
    q[0] = q[0] + (g - q[0]) * s[1];
    q[1] = q[1] + (g * g - q[1]) * s[2];
    const T m_hat = (s[3] * q[0]) / s[4] + (s[5] * g) / s[6];
    const T v_hat = q[1] / s[7];
    w = w - (m_hat * s[0]) / (square_root(v_hat) + s[8]);
  }
};

}  // namespace trainrt
