// What the library computes, without TensorFlow: `bind.cc` is its only caller that knows TensorFlow.
#pragma once

#include <array>
#include <string>

#include "chunks.h"
#include "elements.h"

namespace trainrt {

struct Span {
  Dtype dtype = Dtype::kFloat32;
  const void* data = nullptr;
  int64_t size = 0;
};

// rows: [tensors, kMoments].
void measure(const Span* tensors, int count, double* rows, const Parallel& parallel);

// update = after - before, rounded to their dtype and never stored. A gradient without data is missing: NaN in `joint`.
// rows: [count, kMoments] of the update; joint: [count, kJoint].
void measure_update(const Span* before, const Span* after, const Span* gradients, int count, double* rows,
                    double* joint, const Parallel& parallel);

constexpr int kMaxSlots = 3, kMaxScalars = 12, kMaxFactors = 4;

// One weight of a fused update. All pointers are of the weight's dtype; a null gradient is missing: the weight and its
// slots are only measured.
struct Weight {
  const void* gradient;
  void* weight;
  void* slots[kMaxSlots];
  int64_t size;
  Decay decay;
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
  bool observe, gradient_moments;
  double* gradient;  // [count, kMoments], as are update, weight and slots; null unless asked for
  double* update;
  double* weight;
  double* slots[kMaxSlots];
  double* joint;  // [count, kJoint]
};

// One block of a weight: scalars, elements, gradient, weight, kMaxSlots slots (null past the rule's own).
using Step = void (*)(const void*, int, const void*, void*, void* const*);
using Steps = std::array<Step, kDtypes>;
struct Rule {
  std::string name;
  int slots, scalars;
  Steps graph, eager;
};
const Rule* find_rule(const std::string& name);
std::string rule_names();

void update(const Rule& rule, Dtype dtype, const Update& what, const Parallel& parallel);

}  // namespace trainrt
