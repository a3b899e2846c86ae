// Runs the device's code on this host and compares it with the CPU kernels: every rule and dtype. Exits 1 on the first
// difference. Built and run by tests/test_kernels.py.
#include "rules.h"
#include "shim.h"
#include "trial.h"

namespace trainrt {
namespace {

template <typename R, typename T>
std::vector<device::Row> on_shim(trial::Case<T>& c) {
  const int count = static_cast<int>(c.size.size());
  std::vector<device::Weight> weights(count);
  for (int i = 0; i < count; ++i) {
    weights[i] = {i == c.missing ? nullptr : &c.gradient[c.start[i]], &c.weight[c.start[i]], {}, c.size[i], c.decay(i)};
    for (int k = 0; k < R::kSlots; ++k) weights[i].slots[k] = &c.slots[k][c.start[i]];
  }
  device::Arguments a = {};
  a.weights = weights.data();
  a.chunks = c.chunks.data();
  a.factors[0] = c.factor.data();
  a.each[0] = true;
  a.factor_count = 1;
  for (size_t i = 0; i < c.scalars.size(); ++i) a.scalars[i] = &c.scalars[i];
  a.observe = true;
  std::vector<device::Row> rows(c.chunks.size()), totals(count);
  shim::launch(static_cast<int>(rows.size()),
               [&](shim::Thread& me, double* shared) { device::update_chunk<R, T>(me, a, rows.data(), shared); });
  shim::launch((count + device::kThreads - 1) / device::kThreads, [&](shim::Thread& me, double*) {
    device::fold_chunks(me, rows.data(), c.first.data(), count, totals.data());
  });
  return totals;
}

template <typename R, typename T>
bool check(const char* dtype) {
  trial::Case<T> ours(R::kScalars), twin(R::kScalars);
  const Rule& rule = *find_rule(R::kName);
  const auto rows = on_shim<R, T>(ours), expected = trial::on_cpu(rule, twin);
  const std::string what = trial::difference(rule, twin, expected, ours, rows);
  if (!what.empty()) printf("%s in %s: %s\n", R::kName, dtype, what.c_str());
  return what.empty();
}

}  // namespace
}  // namespace trainrt

int main() {
  using namespace trainrt;
  bool good = true;
#define TRAINRT_CHECK(R) good = check<R, float>("float32") && good;
  TRAINRT_RULES(TRAINRT_CHECK)
#undef TRAINRT_CHECK
  good = check<Adam, double>("float64") && good;
  good = check<Adam, BFloat16>("bfloat16") && good;
  good = check<Adam, Float16>("float16") && good;
  if (good) printf("the device's code agrees with the CPU kernels\n");
  return good ? 0 : 1;
}
