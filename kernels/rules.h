// Every rule there is.
#pragma once

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
