// A trial of every rule and dtype, and of what looks on: the device's code, on whatever machine runs it, against the CPU
// kernels. Shared by `check_shim.cc` (threads of a host) and `check.cu` (a GPU).
//
// A machine has `put` and `get` (copies of vectors, to the device and back) and the launches of `device_launch.h`.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "kernels.h"
#include "rules.h"

namespace trainrt {
namespace trial {

// Sizes around a pack, a warp, a block of threads and a chunk.
inline std::vector<int64_t> sizes() { return {1, 3, 31, 129, 1024, kChunk - 1, kChunk + 1, 2 * kChunk + 77}; }
constexpr int kMissing = 4, kBroken = 6;  // the weight without a gradient, and the one whose gradient is not finite

// Tensors of one case on the host, one weight after another, each at a multiple of 16 bytes.
template <typename T>
struct Case {
  std::vector<int64_t> size = sizes(), start, first = {0};
  std::vector<T> gradient, weight, slots[device::kSlotsMost];
  std::vector<device::Chunk> chunks;
  std::vector<T> scalars, factor;

  explicit Case(int scalar_count, unsigned seed = 1) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    int64_t total = 0;
    for (size_t i = 0; i < size.size(); ++i) {
      start.push_back(total);
      total += (size[i] + 15) / 16 * 16;
      for (int64_t at = 0; at < size[i]; at += kChunk) chunks.push_back({static_cast<int>(i), at});
      first.push_back(static_cast<int64_t>(chunks.size()));
    }
    for (int64_t i = 0; i < total; ++i) {
      gradient.push_back(T(i % 7 ? normal(random) * 0.1f : 0.0f));
      weight.push_back(T(normal(random)));
      for (auto& slot : slots) slot.push_back(T(std::fabs(normal(random)) + 0.1f));
    }
    gradient[start[kBroken] + 100] = T(INFINITY);
    gradient[start[kBroken] + 200] = T(NAN);
    for (int i = 0; i < scalar_count + kDecayScalars; ++i) scalars.push_back(T(0.01f + 0.11f * i));
    for (size_t i = 0; i < size.size(); ++i) factor.push_back(T(1.0f / (1.0f + i)));
  }

  int count() const { return static_cast<int>(size.size()); }
  Decay decay(int i) const { return static_cast<Decay>(i % 3); }
};

// What comes out: [count, subjects, kMoments] and [count, kJointColumns].
struct Seen {
  std::vector<double> cube, joint;
  double correction = 0;
};

// Numbers of the step. Where the dtype is not float32 our clip scales, else the optimizer's own does.
struct Numbers {
  std::vector<int64_t> iterations = {3};
  std::vector<double> rate = {0.01}, constants = {0.9, 0.999, 1e-3, 0.004, 2.0, 0.5}, scale;
  int momentum, second;
  Clip own_clip;

  template <typename T>
  static Numbers of(const Rule& rule, const Case<T>& c) {
    Numbers n;
    n.momentum = rule.slots > 0 ? 0 : -1;
    n.second = rule.slots > 1 ? 1 : -1;
    n.own_clip = sizeof(T) == 4 ? Clip::kWeightNorm : Clip::kNone;
    for (int i = 0; i < c.count() && sizeof(T) != 4; ++i) n.scale.push_back(1.0 / (2 + i));
    return n;
  }
};

inline Parallel alone() {
  return [](int64_t tasks, int64_t, const Shard& shard) { shard(0, tasks); };
}

// The case on the CPU kernels: weights and slots are updated in place.
template <typename T>
Seen update_on_cpu(const Rule& rule, Case<T>& c) {
  const Numbers n = Numbers::of(rule, c);
  std::vector<Weight> weights(c.count());
  for (int i = 0; i < c.count(); ++i) {
    weights[i] = {i == kMissing ? nullptr : &c.gradient[c.start[i]], &c.weight[c.start[i]], {}, c.size[i], c.decay(i)};
    for (int k = 0; k < kMaxSlots; ++k) weights[i].slots[k] = &c.slots[k][c.start[i]];
  }
  const Factor factor = {Prepare::kMultiply, c.factor.data(), true};
  Seen seen;
  seen.cube.resize(c.count() * (3 + rule.slots) * kMoments);
  seen.joint.resize(c.count() * kJointColumns);
  Update u = {};
  u.weights = weights.data();
  u.count = c.count();
  u.factors = &factor;
  u.factor_count = 1;
  for (size_t i = 0; i < c.scalars.size(); ++i) u.scalars[i] = &c.scalars[i];
  u.observe = true;
  u.scale = n.scale.empty() ? nullptr : n.scale.data();
  u.loss_scale = n.constants[kLossScale];
  u.own_clip = n.own_clip;
  u.own_threshold = n.constants[kOwnThreshold];
  u.decay = n.rate[0] * n.constants[kWeightDecay];
  u.division = division_of(Divides::kAdam, n.iterations[0], n.rate[0], n.constants[kBeta1], n.constants[kBeta2],
                           n.constants[kEpsilon]);
  u.momentum = n.momentum;
  u.second = n.second;
  u.slots_due = slots_due(n.iterations[0], 1);
  u.cube = seen.cube.data();
  u.joint = seen.joint.data();
  update(rule, DtypeOf<T>::value, u, alone());
  seen.correction = u.division.correction;
  return seen;
}

template <typename T, typename Machine>
Seen update_on(Machine& machine, const Rule& rule, Case<T>& c) {
  const Numbers n = Numbers::of(rule, c);
  const T* gradient = machine.put(c.gradient);
  T* weight = machine.put(c.weight);
  T* slots[device::kSlotsMost];
  for (int k = 0; k < device::kSlotsMost; ++k) slots[k] = machine.put(c.slots[k]);
  std::vector<device::Weight> weights(c.count());
  for (int i = 0; i < c.count(); ++i) {
    const int64_t at = c.start[i];
    weights[i] = {i == kMissing ? nullptr : gradient + at, weight + at, {}, c.size[i], c.decay(i)};
    for (int k = 0; k < rule.slots; ++k) weights[i].slots[k] = slots[k] + at;
  }
  const T* scalars = machine.put(c.scalars);
  device::Arguments a = {};
  a.weights = machine.put(weights);
  a.chunks = machine.put(c.chunks);
  a.scale = n.scale.empty() ? nullptr : machine.put(n.scale);
  a.factors[0] = machine.put(c.factor);
  a.each[0] = true;
  a.factor_count = 1;
  for (size_t i = 0; i < c.scalars.size(); ++i) a.scalars[i] = scalars + i;
  a.observe = true;
  a.momentum = n.momentum;
  a.second = n.second;
  a.clock = {machine.put(n.iterations), machine.put(n.rate), machine.put(n.constants), Divides::kAdam, 1};
  device::Row* rows = machine.put(std::vector<device::Row>(c.chunks.size()));
  device::Row* totals = machine.put(std::vector<device::Row>(c.count()));
  Seen seen;
  seen.cube.resize(c.count() * (3 + rule.slots) * kMoments);
  seen.joint.resize(c.count() * kJointColumns);
  device::Finish f = {};
  f.totals = totals;
  f.count = c.count();
  f.slots = rule.slots;
  f.weights = a.weights;
  f.clock = a.clock;
  f.own_clip = n.own_clip;
  f.own_scale = machine.put(std::vector<double>(c.count()));
  f.correction = machine.put(std::vector<double>(1));
  f.momentum = n.momentum;
  f.second = n.second;
  f.scale = a.scale;
  f.cube = machine.put(seen.cube);
  f.joint = machine.put(seen.joint);
  machine.update(rule, DtypeOf<T>::value, a, static_cast<int>(c.chunks.size()), rows);
  machine.fold({rows, machine.put(c.first), totals}, c.count());
  machine.finish(f);
  machine.get(weight, c.weight);
  for (int k = 0; k < rule.slots; ++k) machine.get(slots[k], c.slots[k]);
  std::vector<double> correction(1);
  machine.get(f.cube, seen.cube);
  machine.get(f.joint, seen.joint);
  machine.get(f.correction, correction);
  seen.correction = correction[0];
  machine.clear();
  return seen;
}

// A step that something else took: weights `c.weight` before and `after` it, gradients and two slots in `g`.
template <typename T, typename G>
Seen observe_on_cpu(Case<T>& c, const std::vector<T>& after, Case<G>& g, const std::vector<double>& table,
                    const std::vector<double>& scale) {
  const int count = c.count(), slots = 2;
  std::vector<Span> before(count), now(count), gradients(count), slot(slots * count);
  for (int i = 0; i < count; ++i) {
    before[i] = {DtypeOf<T>::value, &c.weight[c.start[i]], c.size[i]};
    now[i] = {DtypeOf<T>::value, &after[c.start[i]], c.size[i]};
    gradients[i] = {DtypeOf<G>::value, i == kMissing ? nullptr : &g.gradient[c.start[i]], c.size[i]};
    for (int k = 0; k < slots; ++k) slot[k * count + i] = {DtypeOf<G>::value, &g.slots[k][c.start[i]], c.size[i]};
  }
  const std::vector<int> momentum(count, 0), second(count, 1);
  Seen seen;
  seen.cube.resize(count * (3 + slots) * kMoments);
  seen.joint.resize(count * kJointColumns);
  observe({count, slots, before.data(), now.data(), gradients.data(), slot.data(), nullptr, scale.data(), table.data(),
           momentum.data(), second.data(), 2.0, true, false, seen.cube.data(), seen.joint.data()},
          alone());
  return seen;
}

template <typename T, typename G, typename Machine>
Seen observe_on(Machine& machine, Case<T>& c, const std::vector<T>& after, Case<G>& g, const std::vector<double>& table,
                const std::vector<double>& scale) {
  const int count = c.count(), slots = 2;
  const T *before = machine.put(c.weight), *now = machine.put(after);
  const G *gradient = machine.put(g.gradient), *slot[slots] = {machine.put(g.slots[0]), machine.put(g.slots[1])};
  std::vector<device::Subject> subjects;
  std::vector<device::Chunk> chunks;
  std::vector<int64_t> first = {0};
  const auto add = [&](const device::Subject& one) {
    for (int64_t at = 0; at < one.size; at += kChunk) chunks.push_back({static_cast<int>(subjects.size()), at});
    first.push_back(static_cast<int64_t>(chunks.size()));
    subjects.push_back(one);
  };
  for (int i = 0; i < count; ++i) {
    const int64_t at = c.start[i];
    add({before + at, now + at, i == kMissing ? nullptr : gradient + at, slot[0] + at, slot[1] + at, c.size[i],
         DtypeOf<T>::value, DtypeOf<G>::value, DtypeOf<G>::value, i});
  }
  for (int k = 0; k < slots; ++k)
    for (int i = 0; i < count; ++i)
      add({nullptr, slot[k] + c.start[i], nullptr, nullptr, nullptr, c.size[i], DtypeOf<G>::value});
  Seen seen;
  seen.cube.resize(count * (3 + slots) * kMoments);
  seen.joint.resize(count * kJointColumns);
  device::Finish f = {};
  f.clock.iterations = machine.put(std::vector<int64_t>{3});
  f.clock.every = 1;
  device::Row* rows = machine.put(std::vector<device::Row>(chunks.size()));
  device::Row* totals = machine.put(std::vector<device::Row>(subjects.size()));
  f.totals = totals;
  f.count = count;
  f.slots = slots;
  f.subjects = machine.put(subjects);
  f.table = machine.put(table);
  f.loss_scale = machine.put(std::vector<double>{2.0});
  f.skipped = reinterpret_cast<const bool*>(machine.put(std::vector<char>{0}));
  f.momentums = machine.put(std::vector<int>(count, 0));
  f.seconds = machine.put(std::vector<int>(count, 1));
  f.scale = machine.put(scale);
  f.cube = machine.put(seen.cube);
  f.joint = machine.put(seen.joint);
  machine.look({f.subjects, machine.put(chunks), f.table, f.clock}, static_cast<int>(chunks.size()), rows);
  machine.fold({rows, machine.put(first), totals}, static_cast<int>(subjects.size()));
  machine.finish(f);
  machine.get(f.cube, seen.cube);
  machine.get(f.joint, seen.joint);
  machine.clear();
  return seen;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (memcmp(&a[i], &b[i], sizeof(T)) != 0 && !(is_nan(a[i]) && is_nan(b[i]))) return false;
  return true;
}

inline bool close(double a, double b, double scale) {
  return a == b || (std::isnan(a) && std::isnan(b)) || std::fabs(a - b) <= 1e-6 * std::fabs(scale);
}

inline std::string row_difference(const double* x, const double* y) {
  const double scale = std::sqrt(x[kSumsq] * x[0]);
  for (const int exact : {0, 4, 5})
    if (!close(x[exact], y[exact], 0)) return "count, zeros or nonfinite";
  return close(x[1], y[1], scale) && close(x[2], y[2], x[2]) && close(x[3], y[3], x[3]) ? "" : "a sum";
}

// What differs between two, in words; empty if nothing does.
inline std::string difference(const Seen& a, const Seen& b, int count, int slots) {
  for (int t = 0; t < count; ++t) {
    const std::string where = " of weight " + std::to_string(t);
    const double* cube = &a.cube[t * (3 + slots) * kMoments];
    for (int s = 0; s < 3 + slots; ++s) {
      const std::string what = row_difference(cube + s * kMoments, &b.cube[(t * (3 + slots) + s) * kMoments]);
      if (!what.empty()) return "subject " + std::to_string(s) + where + ": " + what;
    }
    const double *x = &a.joint[t * kJointColumns], *y = &b.joint[t * kJointColumns];
    for (int j = 0; j < kJointColumns; ++j) {
      double scale = x[j];
      if (j == kGradientUpdate) scale = std::sqrt(cube[kSumsq] * cube[kMoments + kSumsq]);
      if (j == kGradientMomentum) scale = x[kMomentumNorms];
      if (!close(x[j], y[j], scale))
        return "joint column " + std::to_string(j) + where + ": " + std::to_string(x[j]) + " and " + std::to_string(y[j]);
    }
  }
  return close(a.correction, b.correction, a.correction) ? "" : "the correction";
}

inline bool same(const Seen& a, const Seen& b) { return same_bits(a.cube, b.cube) && same_bits(a.joint, b.joint); }

inline bool report(const std::string& name, const char* dtype, const std::string& what) {
  printf("%-28s %-9s %s\n", name.c_str(), dtype, what.empty() ? "ok" : what.c_str());
  return what.empty();
}

template <typename T, typename Machine>
bool check_update(Machine& machine, const Rule& rule, const char* dtype, bool twice) {
  Case<T> ours(rule.scalars), twin(rule.scalars);
  const Seen seen = update_on(machine, rule, ours), expected = update_on_cpu(rule, twin);
  std::string what = difference(expected, seen, ours.count(), rule.slots);
  if (!same_bits(ours.weight, twin.weight)) what = "weights";
  for (int k = 0; k < rule.slots; ++k)
    if (!same_bits(ours.slots[k], twin.slots[k])) what = "slot " + std::to_string(k);
  if (twice) {
    Case<T> again(rule.scalars);
    if (!same(seen, update_on(machine, rule, again))) what = "the bits of the statistics, from run to run";
  }
  return report(rule.name, dtype, what);
}

template <typename T, typename G, typename Machine>
bool check_observe(Machine& machine, const char* dtypes) {
  Case<T> c(0);
  Case<G> g(0, 2);
  std::vector<T> after;
  for (size_t i = 0; i < c.weight.size(); ++i) after.push_back(i % 5 ? c.weight[i] + T(0.01f) * c.weight[i] : c.weight[i]);
  std::vector<double> table, scale;
  for (int i = 0; i < c.count(); ++i) {
    for (const double one : {0.0, 1e-3, 1e-6, 0.01, 0.5, i % 2 * 0.1}) table.push_back(one);
    scale.push_back(1.0 / (1 + i));
  }
  const Seen expected = observe_on_cpu(c, after, g, table, scale);
  return report("observe", dtypes, difference(expected, observe_on(machine, c, after, g, table, scale), c.count(), 2));
}

template <typename T, typename Machine>
bool check_measure(Machine& machine, const char* dtype) {
  Case<T> c(0);
  const int count = c.count();
  std::string what;
  for (const Clip how : {Clip::kNone, Clip::kGlobalNorm, Clip::kWeightNorm, Clip::kLargestMagnitude}) {
    const T* x = machine.put(how == Clip::kWeightNorm ? c.gradient : c.weight);
    const std::vector<T>& host = how == Clip::kWeightNorm ? c.gradient : c.weight;
    std::vector<Span> spans;
    std::vector<device::Subject> subjects;
    for (int i = 0; i < count; ++i) {
      spans.push_back({DtypeOf<T>::value, &host[c.start[i]], c.size[i]});
      subjects.push_back({nullptr, x + c.start[i], nullptr, nullptr, nullptr, c.size[i], DtypeOf<T>::value});
    }
    std::vector<double> expected(count * kMoments), scales(count), rows(count * kMoments), ours(count);
    measure(spans.data(), count, expected.data(), alone());
    if (how != Clip::kNone) clip(how, 0.5, expected.data(), count, scales.data());
    device::Row* chunk_rows = machine.put(std::vector<device::Row>(c.chunks.size()));
    device::Row* totals = machine.put(std::vector<device::Row>(count));
    device::Measured m = {totals, count, machine.put(rows), how, machine.put(std::vector<double>{0.5}), machine.put(ours)};
    machine.look({machine.put(subjects), machine.put(c.chunks), nullptr, {}}, static_cast<int>(c.chunks.size()), chunk_rows);
    machine.fold({chunk_rows, machine.put(c.first), totals}, count);
    machine.finish(m);
    machine.get(m.rows, rows);
    machine.get(m.scales, ours);
    machine.clear();
    for (int i = 0; i < count; ++i) {
      const std::string row = row_difference(&expected[i * kMoments], &rows[i * kMoments]);
      if (!row.empty()) what = row;
      if (how != Clip::kNone && !close(scales[i], ours[i], scales[i])) what = "scale of weight " + std::to_string(i);
    }
  }
  return report("measure, clip", dtype, what);
}

// Tensors of more chunks than a block has threads.
template <typename Machine>
bool check_fold(Machine& machine) {
  const std::vector<int64_t> first = {0, 1, 601, 601};
  std::vector<device::Row> rows(601), totals(3), expected(3);
  std::mt19937 random(3);
  std::normal_distribution<double> normal;
  for (size_t t = 0; t < 3; ++t)
    for (int64_t i = first[t]; i < first[t + 1]; ++i) {
      for (Moments& m : rows[i].moments) {
        m.count = kChunk;
        m.sum = normal(random);
        m.sumsq = m.absmax = std::fabs(normal(random));
        m.zeros = i;
      }
      rows[i].adaptive.lowest = normal(random);
      for (int s = 0; s < device::kSubjects; ++s) expected[t].moments[s].merge(rows[i].moments[s]);
      expected[t].adaptive.merge(rows[i].adaptive);
    }
  device::Row* result = machine.put(totals);
  machine.fold({machine.put(rows), machine.put(first), result}, 3);
  machine.get(result, totals);
  machine.clear();
  std::string what;
  for (size_t t = 0; t < 3; ++t) {
    if (totals[t].adaptive.lowest != expected[t].adaptive.lowest) what = "the smallest";
    for (int s = 0; s < device::kSubjects; ++s) {
      double x[kMoments], y[kMoments];
      expected[t].moments[s].store(x);
      totals[t].moments[s].store(y);
      if (!row_difference(x, y).empty()) what = row_difference(x, y);
    }
  }
  return report("fold of 600 chunks", "", what);
}

// every: all rules in all dtypes, and twice; else each rule and each dtype at least once.
template <typename Machine>
bool check_all(Machine& machine, bool every) {
  bool good = check_fold(machine);
#define TRAINRT_TRY(R)                                                                            \
  {                                                                                               \
    const Rule& rule = *find_rule(R::kName);                                                      \
    const bool all = every || rule.name == "adam";                                                \
    good = check_update<float>(machine, rule, "float32", every) && good;                          \
    if (all) good = check_update<double>(machine, rule, "float64", every) && good;                \
    if (all) good = check_update<BFloat16>(machine, rule, "bfloat16", every) && good;             \
    if (all) good = check_update<Float16>(machine, rule, "float16", every) && good;               \
  }
  TRAINRT_RULES(TRAINRT_TRY)
#undef TRAINRT_TRY
  good = check_measure<float>(machine, "float32") && good;
  good = check_measure<double>(machine, "float64") && good;
  good = check_measure<BFloat16>(machine, "bfloat16") && good;
  good = check_measure<Float16>(machine, "float16") && good;
  good = check_observe<float, float>(machine, "float32") && good;
  good = check_observe<float, BFloat16>(machine, "float32, gradient bfloat16") && good;
  good = check_observe<BFloat16, float>(machine, "bfloat16, gradient float32") && good;
  good = check_observe<Float16, Float16>(machine, "float16") && good;
  return check_observe<double, double>(machine, "float64") && good;
}

}  // namespace trial
}  // namespace trainrt
