// What the library computes, without TensorFlow: `bind.cc` is its only caller that knows TensorFlow.
#pragma once

#include <array>
#include <string>

#include "account.h"
#include "chunks.h"
#include "elements.h"
#include "rows.h"

namespace trainrt {

struct Span {
  Dtype dtype = Dtype::kFloat32;
  const void* data = nullptr;
  int64_t size = 0;            // of the dense tensor
  const Rows* rows = nullptr;  // of a sparse one, whose `data` are its rows
};

// rows: [tensors, kMoments].
void measure(const Span* tensors, int count, double* rows, const Parallel& parallel);

// As in `trainrt/clip.py`, from the moments of the gradients to a scale for each.
void clip(Clip how, double threshold, const double* rows, int count, double* scales);

// What an optimizer of any kind did, in one pass. Rows of `cube`: gradient, update = after - before (rounded to their
// dtype and never stored), after, then the slots.
struct Observe {
  int count, slots;
  const Span *before, *after, *gradients;  // [count]; a gradient without data is missing
  const Span* slot;                        // [slots * count], of any size; without data: not there
  const double* measured;                  // [count, kMoments] of the gradients; null: measured here
  const double* scale;                     // [count]; null: 1
  const double* table;                     // [count, 6]: inside, outside, floor, rate, correction, decay
  const int *momentum, *second;            // [count] which slot is; -1: none
  double loss_scale;
  bool slots_due, skipped;
  double *cube, *joint;  // [count, 3 + slots, kMoments], [count, kJointColumns]
};
void observe(const Observe& what, const Parallel& parallel);

constexpr int kMaxSlots = 3, kMaxScalars = 12, kMaxFactors = 3;

// One weight of a fused update. All pointers are of the weight's dtype; a null gradient is missing: the weight and its
// slots are only measured.
struct Weight {
  const void* gradient;
  void* weight;
  void* slots[kMaxSlots];
  int64_t size;
  Decay decay;
  const Rows* rows = nullptr;  // of a sparse gradient, for a rule that has a step of its own for it
};

struct Factor {
  Prepare how;
  const void* values;  // of the weight's dtype: one for each weight, or one for all
  bool each;
};

struct Update {
  const Weight* weights;
  int count;
  const Factor* factors;
  int factor_count;
  const void* scalars[kMaxScalars];  // the rule's, then kDecayScalars if any weight decays
  bool graph;                        // Keras's ops would have gone through Grappler
  bool observe;
  const double* measured;  // [count, kMoments] of the gradients, known already; null: measured here
  const double* scale;     // [count] of the clip, before any factor; null: none
  double loss_scale;       // in the gradients
  Clip own_clip;           // the optimizer's own, which the factors apply
  double own_threshold;
  double decay;            // share of a decaying weight that is taken off
  Division division;
  int momentum, second;    // which slot is; -1: none
  bool slots_due;
  double *cube, *joint;    // as of `Observe`; null unless observed
};

// One block of a weight: scalars, elements, gradient, its square if the step takes that apart, weight, kMaxSlots slots
// (null past the rule's own).
using Step = void (*)(const void*, int, const void*, const void*, void*, void* const*);
using Steps = std::array<Step, kDtypes>;

// The same of whole strides of float32, with what is folded meanwhile; the gradient is left out if its clip, whose scale
// is applied here, has measured it.
enum class Folding : int { kNone = 0, kAllButGradient = 1, kAll = 2 };
struct Strides;  // `strides.h`
using Folds = std::array<void (*)(const float* scalars, const Strides&), 3>;

struct Rule {
  std::string name;
  int slots, scalars;
  Steps graph, eager, apart;  // `apart` is null where the rule has no such step
  Folds graph_folds, eager_folds;
};
const Rule* find_rule(const std::string& name);

void update(const Rule& rule, Dtype dtype, const Update& what, const Parallel& parallel);

}  // namespace trainrt
