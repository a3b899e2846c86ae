// keras.optimizers.Adam and AdamW (decay comes before the rule), and their amsgrad.
#pragma once

#include "../types.h"

namespace trainrt {

// scalars: alpha = learning rate * sqrt(1 - beta_2^t) / (1 - beta_1^t), 1 - beta_1, 1 - beta_2, epsilon.
// `step_apart` takes the gradient's square apart from it: of a sparse gradient Keras squares the rows, and adds up those of
// the same index afterwards.
struct Adam {  // slots: momentum, velocity
  static constexpr const char* kName = "adam";
  static constexpr int kSlots = 2, kScalars = 4;
  template <typename T>
  TRAINRT_HD static void step(const T* s, T g, T& w, T* q) {
    step_apart(s, g, g * g, w, q);
  }
  template <typename T>
  TRAINRT_HD static void step_apart(const T* s, T g, T square, T& w, T* q) {
    q[0] = q[0] + (g - q[0]) * s[1];
    q[1] = q[1] + (square - q[1]) * s[2];
    w = w - (q[0] * s[0]) / (square_root(q[1]) + s[3]);
  }
};

struct AdamAmsgrad {  // slots: momentum, velocity, velocity_hat
  static constexpr const char* kName = "adam_amsgrad";
  static constexpr int kSlots = 3, kScalars = 4;
  template <typename T>
  TRAINRT_HD static void step(const T* s, T g, T& w, T* q) {
    step_apart(s, g, g * g, w, q);
  }
  template <typename T>
  TRAINRT_HD static void step_apart(const T* s, T g, T square, T& w, T* q) {
    q[0] = q[0] + (g - q[0]) * s[1];
    q[1] = q[1] + (square - q[1]) * s[2];
    q[2] = larger(q[2], q[1]);
    w = w - (q[0] * s[0]) / (square_root(q[2]) + s[3]);
  }
};

}  // namespace trainrt
