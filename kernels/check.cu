// Checks and times every kernel on a real GPU, without TensorFlow:
//
//   g++ -std=c++17 -O3 -fno-math-errno -ffp-contract=off -c cpu.cc blocks.cc
//   nvcc -std=c++17 -O3 -fmad=false -arch=native -x cu check.cu device.cu.cc -x none cpu.o blocks.o -o check && ./check
//
// Weights and slots must equal the CPU kernels' to the last bit, moments to 1e-6, and be the same from run to run. Then
// every rule is timed on 64 M parameters, and its GB/s stand beside those of a device-to-device copy.
#include "device_launch.h"
#include "rules.h"
#include "trial.h"

namespace trainrt {
namespace {

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  printf("%s: %s\n", what, cudaGetErrorString(error));
  exit(1);
}

// A copy on the device of what a vector holds.
template <typename V>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<V>& from) : size_(from.size()) {
    require(cudaMalloc(&data_, size_ * sizeof(V) + 16), "cudaMalloc");
    require(cudaMemcpy(data_, from.data(), size_ * sizeof(V), cudaMemcpyHostToDevice), "copy to the device");
  }
  explicit OnDevice(size_t size) : size_(size) {
    require(cudaMalloc(&data_, size_ * sizeof(V) + 16), "cudaMalloc");
    require(cudaMemset(data_, 0, size_ * sizeof(V)), "cudaMemset");
  }
  ~OnDevice() { cudaFree(data_); }
  V* get() const { return data_; }
  std::vector<V> host() const {
    std::vector<V> to(size_);
    require(cudaMemcpy(to.data(), data_, size_ * sizeof(V), cudaMemcpyDeviceToHost), "copy from the device");
    return to;
  }

 private:
  V* data_ = nullptr;
  size_t size_;
};

template <typename T>
std::vector<device::Row> on_gpu(const Rule& rule, trial::Case<T>& c) {
  const int count = static_cast<int>(c.size.size());
  OnDevice<T> gradient(c.gradient), weight(c.weight), s0(c.slots[0]), s1(c.slots[1]), s2(c.slots[2]);
  OnDevice<T> scalars(c.scalars), factor(c.factor);
  OnDevice<T>* slots[] = {&s0, &s1, &s2};
  std::vector<device::Weight> weights(count);
  for (int i = 0; i < count; ++i) {
    const int64_t at = c.start[i];
    weights[i] = {i == c.missing ? nullptr : gradient.get() + at, weight.get() + at, {}, c.size[i], c.decay(i)};
    for (int k = 0; k < rule.slots; ++k) weights[i].slots[k] = slots[k]->get() + at;
  }
  OnDevice<device::Weight> table(weights);
  OnDevice<device::Chunk> chunks(c.chunks);
  OnDevice<int64_t> first(c.first);
  OnDevice<device::Row> rows(c.chunks.size()), totals(static_cast<size_t>(count));
  device::Arguments a = {};
  a.weights = table.get();
  a.chunks = chunks.get();
  a.factors[0] = factor.get();
  a.each[0] = true;
  a.factor_count = 1;
  for (size_t i = 0; i < c.scalars.size(); ++i) a.scalars[i] = scalars.get() + i;
  a.observe = true;
  require(device::launch_update(rule.name.c_str(), DtypeOf<T>::value, a, static_cast<int>(c.chunks.size()), rows.get(),
                                nullptr),
          rule.name.c_str());
  require(device::launch_fold(rows.get(), first.get(), count, totals.get(), nullptr), "fold");
  require(cudaDeviceSynchronize(), rule.name.c_str());
  c.weight = weight.host();
  for (int k = 0; k < rule.slots; ++k) c.slots[k] = slots[k]->host();
  return totals.host();
}

template <typename T>
bool check(const Rule& rule, const char* dtype) {
  trial::Case<T> once(rule.scalars), again(rule.scalars), twin(rule.scalars);
  const auto rows = on_gpu(rule, once), rows_again = on_gpu(rule, again), expected = trial::on_cpu(rule, twin);
  std::string what = trial::difference(rule, twin, expected, once, rows);
  if (what.empty())
    for (size_t i = 0; i < rows.size(); ++i)
      for (int s = 0; s < 3 + rule.slots; ++s)
        if (rows[i].moments[s].sum != rows_again[i].moments[s].sum) what = "the bits of a sum, from run to run";
  printf("%-28s %-9s %s\n", rule.name.c_str(), dtype, what.empty() ? "ok" : what.c_str());
  return what.empty();
}

// Median seconds of a launch.
template <typename Launch>
double median_s(Launch launch) {
  std::vector<float> times;
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  for (int i = 0; i < 15; ++i) {
    cudaEventRecord(begin);
    launch();
    cudaEventRecord(end);
    require(cudaEventSynchronize(end), "timing");
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    if (i >= 3) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] * 1e-3;
}

void time_all(const std::vector<const Rule*>& rules) {
  const int64_t size = 64 << 20;
  OnDevice<float> gradient(static_cast<size_t>(size)), weight(static_cast<size_t>(size));
  OnDevice<float> s0(static_cast<size_t>(size)), s1(static_cast<size_t>(size)), s2(static_cast<size_t>(size));
  std::vector<float> values(16, 0.5f);
  OnDevice<float> scalars(values);
  std::vector<device::Chunk> list;
  for (int64_t at = 0; at < size; at += kChunk) list.push_back({0, at});
  OnDevice<device::Chunk> chunks(list);
  OnDevice<device::Row> rows(list.size());
  OnDevice<device::Weight> table(std::vector<device::Weight>{
      {gradient.get(), weight.get(), {s0.get(), s1.get(), s2.get()}, size, Decay::kNone}});
  device::Arguments a = {};
  a.weights = table.get();
  a.chunks = chunks.get();
  for (int i = 0; i < 12; ++i) a.scalars[i] = scalars.get() + i;
  const double copy = 8.0 * size / median_s([&] {
    cudaMemcpyAsync(s0.get(), s1.get(), size * sizeof(float), cudaMemcpyDeviceToDevice);
  });
  printf("\n%-28s %8.0f GB/s\n", "device copy", copy * 1e-9);
  for (const Rule* rule : rules)
    for (const bool observe : {false, true}) {
      a.observe = observe;
      const double bytes = 4.0 * size * (3 + 2 * rule->slots);
      const double rate = bytes / median_s([&] {
        device::launch_update(rule->name.c_str(), Dtype::kFloat32, a, static_cast<int>(list.size()), rows.get(), nullptr);
      });
      printf("%-28s %8.0f GB/s  %.2f of the copy%s\n", rule->name.c_str(), rate * 1e-9, rate / copy,
             observe ? ", observed" : "");
    }
  const double rate = 4.0 * size / median_s([&] {
    device::launch_measure(Dtype::kFloat32, a, static_cast<int>(list.size()), rows.get(), nullptr);
  });
  printf("%-28s %8.0f GB/s  %.2f of the copy\n", "measure", rate * 1e-9, rate / copy);
}

}  // namespace
}  // namespace trainrt

int main() {
  using namespace trainrt;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    printf("no GPU here\n");
    return 2;
  }
  std::vector<const Rule*> rules;
#define TRAINRT_FIND(R) rules.push_back(find_rule(R::kName));
  TRAINRT_RULES(TRAINRT_FIND)
#undef TRAINRT_FIND
  bool good = true;
  for (const Rule* rule : rules) {
    good = check<float>(*rule, "float32") && good;
    good = check<double>(*rule, "float64") && good;
    good = check<BFloat16>(*rule, "bfloat16") && good;
    good = check<Float16>(*rule, "float16") && good;
  }
  time_all(rules);
  return good ? 0 : 1;
}
