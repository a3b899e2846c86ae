// Every rule there is.
#pragma once

#include <string>

#include "updates/adagrad.h"
#include "updates/adam.h"
#include "updates/adamax.h"
#include "updates/lion.h"
#include "updates/nadam.h"
#include "updates/rmsprop.h"
#include "updates/sgd.h"

#define TRAINRT_RULES(X)                                                                                     \
  X(Sgd) X(SgdMomentum) X(SgdNesterov) X(Adam) X(AdamAmsgrad) X(Rmsprop) X(RmspropMomentum) X(RmspropCentered) \
  X(RmspropCenteredMomentum) X(Adagrad) X(Adadelta) X(Adamax) X(Nadam) X(Lion)

namespace trainrt {

// A rule by its name, for whoever does not run it.
struct Facts {
  const char* name;
  int slots, scalars;
};

inline const Facts* find_facts(const std::string& name, std::string* known = nullptr) {
#define TRAINRT_FACTS(R) {R::kName, R::kSlots, R::kScalars},
  static const Facts all[] = {TRAINRT_RULES(TRAINRT_FACTS)};
#undef TRAINRT_FACTS
  for (const Facts& one : all) {
    if (name == one.name) return &one;
    if (known) *known += (known->empty() ? "" : ", ") + std::string(one.name);
  }
  return nullptr;
}

}  // namespace trainrt
