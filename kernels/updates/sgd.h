// keras.optimizers.SGD: without momentum, with it, and Nesterov's.
#pragma once

#include "../types.h"

namespace trainrt {

struct Sgd {  // scalars: learning rate
  static constexpr const char* kName = "sgd";
  static constexpr int kSlots = 0, kScalars = 1;
  template <typename T>
  TRAINRT_HD static void step(const T* s, T g, T& w, T*) {
    w = w - g * s[0];
  }
};

struct SgdMomentum {  // scalars: learning rate, momentum. Slots: momentum
  static constexpr const char* kName = "sgd_momentum";
  static constexpr int kSlots = 1, kScalars = 2;
  template <typename T>
  TRAINRT_HD static void step(const T* s, T g, T& w, T* q) {
    q[0] = q[0] * s[1] - g * s[0];
    w = w + q[0];
  }
};

struct SgdNesterov {  // as SgdMomentum
  static constexpr const char* kName = "sgd_nesterov";
  static constexpr int kSlots = 1, kScalars = 2;
  template <typename T>
  TRAINRT_HD static void step(const T* s, T g, T& w, T* q) {
    const T push = g * s[0];
    q[0] = q[0] * s[1] - push;
    w = w + (q[0] * s[1] - push);
  }
};

}  // namespace trainrt
