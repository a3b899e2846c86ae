// A trial of every rule and dtype: the device's code, however it is run, against the CPU kernels. Shared by
// `check_shim.cc` (threads of a host) and `check.cu` (a GPU).
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "device.h"
#include "kernels.h"

namespace trainrt {
namespace trial {

// Sizes around a pack, a warp, a block of threads and a chunk.
inline std::vector<int64_t> sizes() { return {1, 3, 4, 31, 129, 1023, 1024, kChunk - 1, kChunk, kChunk + 1, 2 * kChunk + 77}; }

// Tensors of one case on the host, one weight after another, each at a multiple of 16 bytes.
template <typename T>
struct Case {
  std::vector<int64_t> size = sizes(), start, first = {0};
  std::vector<T> gradient, weight, slots[device::kSlotsMost];
  std::vector<device::Chunk> chunks;
  std::vector<T> scalars, factor;
  int missing = 5;

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
    gradient[start[9] + 100] = T(INFINITY);
    gradient[start[9] + 200] = T(NAN);
    for (int i = 0; i < scalar_count + kDecayScalars; ++i) scalars.push_back(T(0.01f + 0.11f * i));
    for (size_t i = 0; i < size.size(); ++i) factor.push_back(T(1.0f / (1.0f + i)));
  }

  Decay decay(int i) const { return static_cast<Decay>(i % 3); }
};

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (memcmp(&a[i], &b[i], sizeof(T)) != 0 && !(is_nan(a[i]) && is_nan(b[i]))) return false;
  return true;
}

inline bool close(double a, double b, double scale) {
  return (std::isnan(a) && std::isnan(b)) || std::fabs(a - b) <= 1e-6 * scale;
}

// The same case on the CPU kernels: weights and slots are updated in place; returns the rows of each weight.
template <typename T>
std::vector<device::Row> on_cpu(const Rule& rule, Case<T>& c) {
  const int count = static_cast<int>(c.size.size());
  std::vector<Weight> weights(count);
  for (int i = 0; i < count; ++i) {
    weights[i] = {i == c.missing ? nullptr : &c.gradient[c.start[i]], &c.weight[c.start[i]], {}, c.size[i], c.decay(i)};
    for (int k = 0; k < kMaxSlots; ++k) weights[i].slots[k] = &c.slots[k][c.start[i]];
  }
  const Factor factor = {Prepare::kMultiply, c.factor.data(), true};
  const int subjects = 3 + rule.slots;
  std::vector<double> cube(count * subjects * kMoments), joint(count * kJointColumns);
  Update u = {};
  u.weights = weights.data();
  u.count = count;
  u.factors = &factor;
  u.factor_count = 1;
  for (size_t i = 0; i < c.scalars.size(); ++i) u.scalars[i] = &c.scalars[i];
  u.observe = true;
  u.loss_scale = 1;
  u.momentum = u.second = -1;
  u.cube = cube.data();
  u.joint = joint.data();
  update(rule, DtypeOf<T>::value, u, [](int64_t tasks, int64_t, const Shard& shard) { shard(0, tasks); });
  std::vector<device::Row> result(count);
  for (int i = 0; i < count; ++i) {
    for (int s = 0; s < 3 + rule.slots; ++s) {
      const double* r = &cube[(i * subjects + s) * kMoments];
      Moments& m = result[i].moments[s];
      m.count = static_cast<int64_t>(r[0]);
      m.sum = r[1];
      m.sumsq = r[2];
      m.absmax = r[3];
      m.zeros = static_cast<int64_t>(r[4]);
      m.nonfinite = static_cast<int64_t>(r[5]);
    }
    result[i].joint.product = joint[i * kJointColumns + kGradientUpdate];
    result[i].joint.rounded = static_cast<int64_t>(joint[i * kJointColumns + kRounded]);
  }
  return result;
}

// What differs between the two, in words; empty if nothing does.
template <typename T>
std::string difference(const Rule& rule, const Case<T>& a, const std::vector<device::Row>& rows_a, const Case<T>& b,
                       const std::vector<device::Row>& rows_b) {
  if (!same_bits(a.weight, b.weight)) return "weights";
  for (int k = 0; k < rule.slots; ++k)
    if (!same_bits(a.slots[k], b.slots[k])) return "slot " + std::to_string(k);
  for (size_t i = 0; i < a.size.size(); ++i) {
    const bool missing = static_cast<int>(i) == a.missing;
    const std::string where = " of weight " + std::to_string(i);
    for (int s = missing ? 1 : 0; s < 3 + rule.slots; ++s) {
      const Moments &x = rows_a[i].moments[s], &y = rows_b[i].moments[s];
      const double scale = std::sqrt(x.sumsq * static_cast<double>(x.count));
      if (x.count != y.count || x.zeros != y.zeros || x.nonfinite != y.nonfinite || !close(x.sum, y.sum, scale) ||
          !close(x.sumsq, y.sumsq, x.sumsq) || !close(x.absmax, y.absmax, x.absmax))
        return "moments " + std::to_string(s) + where;
    }
    const Joint &x = rows_a[i].joint, &y = rows_b[i].joint;
    const double scale = std::sqrt(rows_a[i].moments[0].sumsq * rows_a[i].moments[1].sumsq);
    if (!missing && (!close(x.product, y.product, scale) || x.rounded != y.rounded)) return "joint" + where;
  }
  return "";
}

}  // namespace trial
}  // namespace trainrt
