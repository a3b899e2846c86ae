// Runs the device's code on this host and compares it with the CPU kernels. Exits 1 on a difference. Built and run by
// tests/test_kernels.py.
#include <memory>

#include "shim.h"
#include "trial.h"

namespace trainrt {
namespace {

// The device is this host: a copy is a copy, a launch runs at once.
class Host {
 public:
  template <typename V>
  V* put(const std::vector<V>& from) {
    V* data = static_cast<V*>(aligned_alloc(16, (from.size() * sizeof(V) + 31) / 16 * 16));
    memcpy(static_cast<void*>(data), from.data(), from.size() * sizeof(V));
    held_.emplace_back(data, free);
    return data;
  }
  template <typename V>
  void get(const V* from, std::vector<V>& to) {
    memcpy(static_cast<void*>(to.data()), from, to.size() * sizeof(V));
  }
  void clear() { held_.clear(); }

  void update(const Rule& rule, Dtype dtype, const device::Arguments& a, int chunks, device::Row* rows) {
#define TRAINRT_RUN(R)                                                                                               \
  if (rule.name == R::kName)                                                                                         \
    device::with_type(dtype, [&](auto* type) {                                                                       \
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;                                          \
      if constexpr (std::is_same_v<T, float> || std::is_same_v<R, Adam>)                                             \
        shim::launch(chunks, [&](auto& me, auto& shared) { device::update_chunk<R, T>(me, a, rows, shared); });      \
    });
    TRAINRT_RULES(TRAINRT_RUN)
#undef TRAINRT_RUN
  }
  void look(const device::Looks& a, int chunks, device::Row* rows) {
    shim::launch(chunks, [&](auto& me, auto& shared) { device::look_chunk(me, a, rows, shared); });
  }
  void fold(const device::Totals& a, int tensors) {
    shim::launch(tensors, [&](auto& me, auto& shared) { device::fold_chunks(me, a, shared); });
  }
  void finish(const device::Measured& a) {
    shim::launch(1, [&](auto& me, auto& shared) { device::finish_measure(me, a, shared); });
  }
  void finish(const device::Finish& a) {
    shim::launch(1, [&](auto& me, auto& shared) { device::finish(me, a, shared); });
  }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> held_;
};

}  // namespace
}  // namespace trainrt

int main() {
  trainrt::Host host;
  const bool good = trainrt::trial::check_all(host, false);
  if (good) printf("the device's code agrees with the CPU kernels\n");
  return good ? 0 : 1;
}
