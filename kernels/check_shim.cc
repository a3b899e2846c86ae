// Runs the device's code on this host and compares it with the CPU kernels. Exits 1 on a difference. Built with
// `shim_launch.cc` and run by tests/test_kernels.py.
#include <cstdlib>
#include <memory>

#include "device_launch.h"
#include "trial.h"

namespace trainrt {
namespace {

void require(const char* error) {
  if (!error) return;
  printf("%s\n", error);
  exit(1);
}

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
    require(device::launch_update(rule.name.c_str(), dtype, a, chunks, rows, nullptr));
  }
  void look(const device::Looks& a, int chunks, device::Row* rows) { device::launch_look(a, chunks, rows, nullptr); }
  void fold(const device::Totals& a, int tensors) { device::launch_fold(a, tensors, nullptr); }
  void finish(const device::Measured& a) { device::launch_finish(a, nullptr); }
  void finish(const device::Finish& a) { device::launch_finish(a, nullptr); }

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
