// From what was folded to what is recorded: clips, the rows of `record.JOINT`, how an optimizer divides. Arithmetic on a
// handful of numbers of each weight, on the CPU and on the device. No TensorFlow header.
#pragma once

#include "moments.h"

namespace trainrt {

enum class Clip : int { kNone = 0, kGlobalNorm = 1, kWeightNorm = 2, kLargestMagnitude = 3 };

// Columns of `record.JOINT`.
enum JointColumn {
  kSteps, kScale, kClipped, kSkipped, kGradientUpdate, kRounded, kDecay, kSlotSteps, kGradientMomentum, kMomentumNorms,
  kNormalizedGradient, kUnderEpsilon, kRates, kLargestRate, kSmallestRate, kJointColumns
};

TRAINRT_HD void fill(double* row, int count, double value) {
  for (int i = 0; i < count; ++i) row[i] = value;
}

// Folds the moments of all gradients, in the order of the weights, for a clip by their global norm.
struct GradientNorm {
  double squares = 0;
  bool broken = false;
  TRAINRT_HD void add(const double* row) {
    if (is_nan(row[0])) return;  // no gradient
    squares += row[kSumsq];
    broken = broken || row[kNonfinite] > 0;
  }
};

TRAINRT_HD double clip_scale(Clip how, double threshold, const GradientNorm& norm, const double* row) {
  const bool global = how == Clip::kGlobalNorm;
  if (global ? norm.broken : row[kNonfinite] > 0) return __builtin_nan("");
  const double size = how == Clip::kLargestMagnitude ? row[kAbsmax] : sqrt(global ? norm.squares : row[kSumsq]);
  return size > threshold ? threshold / size : 1.0;
}

// What a step did to one weight besides its sums.
struct Account {
  bool missing = false;    // there is no gradient
  bool skipped = false;    // the optimizer left the step out
  bool slots_seen = false; // the gradient was held against the slots in this step
  bool momentum = false, second = false;  // there is such a slot
  double scale = 1;        // of the clip
  double loss_scale = 1;   // in the gradient, not in its row
  double decay = 0;        // share of the weight that was taken off; NaN: not known
  double momentum_squares = 0, highest = 0;  // of the momentum's row, and of the second moment's
  Division division;
};

// One weight's row of the gradient: `known`, or what was measured with the loss scale divided out; NaN if missing.
TRAINRT_HD void store_gradient(const Moments& measured, bool missing, const double* known, double loss_scale,
                               double* row) {
  if (known) {
    for (int i = 0; i < kMoments; ++i) row[i] = known[i];
  } else if (missing) {
    fill(row, kMoments, __builtin_nan(""));
  } else {
    measured.store(row);
    row[kSumsq - 1] /= loss_scale;
    row[kSumsq] /= loss_scale * loss_scale;
    row[kAbsmax] /= loss_scale;
  }
}

// gradient, weight: [kMoments]; row: [kJointColumns].
TRAINRT_HD void store_joint(const Joint& joint, const Adaptive& adaptive, const Account& a, const double* gradient,
                            const double* weight, double* row) {
  const Division& d = a.division;
  fill(row, kJointColumns, __builtin_nan(""));
  row[kSteps] = 1;
  row[kScale] = a.scale;
  row[kClipped] = a.scale != 1;
  row[kSkipped] = a.skipped;
  row[kDecay] = a.skipped || a.decay == 0 ? 0 : a.decay * a.decay * weight[kSumsq];
  row[kSlotSteps] = a.slots_seen && (a.momentum || a.second);
  if (!a.missing) {
    row[kGradientUpdate] = joint.product / a.loss_scale;
    row[kRounded] = static_cast<double>(joint.rounded);
  }
  if (!a.slots_seen) return;
  if (!a.missing && a.momentum) {
    row[kGradientMomentum] = adaptive.product / a.loss_scale;
    row[kMomentumNorms] = sqrt(gradient[kSumsq]) * sqrt(a.momentum_squares);
  }
  if (!a.second) return;
  const double scale = a.scale / a.loss_scale;
  if (!a.missing) row[kNormalizedGradient] = adaptive.normalized * d.correction * scale * scale;
  row[kUnderEpsilon] = static_cast<double>(adaptive.under);
  row[kRates] = d.rate * adaptive.inverse;
  if (!is_finite(adaptive.lowest)) return;  // no element
  row[kLargestRate] = d.rate / (sqrt(adaptive.lowest + d.inside) + d.outside);
  row[kSmallestRate] = d.rate / (sqrt(a.highest + d.inside) + d.outside);
}

// Whether the slots are held against the gradient in a step: in the first `kSlotsEvery` that are observed and then in
// every kSlotsEvery-th. `every`: how many steps there are to one observed.
constexpr int kSlotsEvery = 8;
TRAINRT_HD bool slots_due(int64_t iterations, int64_t every) {
  const int64_t period = kSlotsEvery * every;
  return iterations < period || iterations % period < every;
}

// How an optimizer divides, in terms of Keras's `update_step`: the twin of `trainrt/update/adaptive.py`.
enum class Divides : int { kNot = 0, kAdam = 1, kNadam = 2, kInside = 3 };

TRAINRT_HD Division division_of(Divides how, int64_t iterations, double rate, double beta_1, double beta_2,
                                double epsilon) {
  Division d;
  if (how == Divides::kInside) {
    d.inside = d.floor = epsilon;
    d.rate = rate;
    d.correction = 1;
  } else if (how != Divides::kNot) {
    const double steps = static_cast<double>(iterations + 1);
    d.correction = 1 - pow(beta_2, steps);
    const double root = sqrt(d.correction);
    d.rate = rate * root;
    d.outside = epsilon;
    if (how == Divides::kAdam) d.rate /= 1 - pow(beta_1, steps);
    if (how == Divides::kNadam) d.outside *= root;
    d.floor = d.outside * d.outside;
  }
  return d;
}

// The numbers that TrainrtUpdate is given as `constants`.
enum Constant { kBeta1, kBeta2, kEpsilon, kWeightDecay, kLossScale, kOwnThreshold, kConstants };

}  // namespace trainrt
