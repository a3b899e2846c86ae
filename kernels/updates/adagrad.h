// keras.optimizers.Adagrad and Adadelta.
#pragma once

#include "../types.h"

namespace trainrt {

struct Adagrad {  // scalars: learning rate, epsilon. Slots: accumulator
  static constexpr const char* kName = "adagrad";
  static constexpr int kSlots = 1, kScalars = 2;
  template <typename T>
  TRAINRT_HD static T radicand(const T* s, T g, T* q) {
    q[0] = q[0] + g * g;
    return q[0] + s[1];
  }
  template <typename T, typename OverRoot>
  TRAINRT_HD static void step(const T* s, T g, T& w, T*, OverRoot over_root) {
    w = w - over_root(s[0] * g);
  }
};

struct Adadelta {  // scalars: learning rate, rho, 1 - rho, epsilon. Slots: accumulated_grad, accumulated_delta_var
  static constexpr const char* kName = "adadelta";
  static constexpr int kSlots = 2, kScalars = 4;
  template <typename T>
  TRAINRT_HD static T radicand(const T* s, T g, T* q) {
    q[0] = s[1] * q[0] + s[2] * (g * g);
    return q[0] + s[3];
  }
  template <typename T, typename OverRoot>
  TRAINRT_HD static void step(const T* s, T g, T& w, T* q, OverRoot over_root) {
    const T delta = negative(over_root(square_root(q[1] + s[3]) * g));
    q[1] = s[1] * q[1] + s[2] * (delta * delta);
    w = w + s[0] * delta;
  }
};

}  // namespace trainrt
