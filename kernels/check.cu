// Checks and times every kernel on a real GPU, without TensorFlow:
//
//   g++ -std=c++17 -O3 -fno-math-errno -ffp-contract=off -c cpu.cc blocks.cc
//   nvcc -std=c++17 -O3 -fmad=false -arch=native -x cu check.cu device.cu.cc -x none cpu.o blocks.o -o check && ./check
//
// Weights and slots must equal the CPU kernels' to the last bit, moments to 1e-6, and be the same from run to run. Then
// every rule is timed on 64 M parameters, and its GB/s stand beside those of a device-to-device copy. Exits 0 if all
// agrees, 1 on a difference or an error, 2 without a GPU.
#include <cuda_runtime.h>

#include "device_launch.h"
#include "trial.h"

namespace trainrt {
namespace {

void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  printf("%s: %s\n", what, cudaGetErrorString(error));
  exit(1);
}

void require(const char* error, const char* what) {
  if (!error) return;
  printf("%s: %s\n", what, error);
  exit(1);
}

class Gpu {
 public:
  ~Gpu() { clear(); }
  template <typename V>
  V* room(size_t count) {
    void* data = nullptr;
    require(cudaMalloc(&data, count * sizeof(V) + 16), "cudaMalloc");
    require(cudaMemset(data, 0, count * sizeof(V)), "cudaMemset");
    held_.push_back(data);
    return static_cast<V*>(data);
  }
  template <typename V>
  V* put(const std::vector<V>& from) {
    V* data = room<V>(from.size());
    require(cudaMemcpy(data, from.data(), from.size() * sizeof(V), cudaMemcpyHostToDevice), "copy to the device");
    return data;
  }
  template <typename V>
  void get(const V* from, std::vector<V>& to) {
    require(cudaMemcpy(static_cast<void*>(to.data()), from, to.size() * sizeof(V), cudaMemcpyDeviceToHost),
            "copy from the device");
  }
  void clear() {
    require(cudaDeviceSynchronize(), "the device");
    for (void* data : held_) cudaFree(data);
    held_.clear();
  }
  void update(const Rule& rule, Dtype dtype, const device::Arguments& a, int chunks, device::Row* rows) {
    require(device::launch_update(rule.name.c_str(), dtype, a, chunks, rows, nullptr), rule.name.c_str());
  }
  void look(const device::Looks& a, int chunks, device::Row* rows) {
    require(device::launch_look(a, chunks, rows, nullptr), "look");
  }
  void fold(const device::Totals& a, int tensors) { require(device::launch_fold(a, tensors, nullptr), "fold"); }
  void finish(const device::Measured& a) { require(device::launch_finish(a, nullptr), "finish"); }
  void finish(const device::Finish& a) { require(device::launch_finish(a, nullptr), "finish"); }

 private:
  std::vector<void*> held_;
};

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

// The whole of a step: its launches one after the other. Useful traffic is what has to be read and written once.
void time_all(Gpu& gpu) {
  const int64_t size = 64 << 20;
  const auto room = [&] { return gpu.room<float>(static_cast<size_t>(size)); };
  float *gradient = room(), *weight = room(), *slots[] = {room(), room(), room()};
  const float* scalars = gpu.put(std::vector<float>(16, 0.5f));
  std::vector<device::Chunk> list;
  for (int64_t at = 0; at < size; at += kChunk) list.push_back({0, at});
  const int chunks = static_cast<int>(list.size());
  device::Row *rows = gpu.room<device::Row>(list.size()), *totals = gpu.room<device::Row>(1);
  const device::Totals fold = {rows, gpu.put(std::vector<int64_t>{0, chunks}), totals};
  device::Arguments a = {};
  a.weights = gpu.put(std::vector<device::Weight>{{gradient, weight, {slots[0], slots[1], slots[2]}, size, Decay::kNone}});
  a.chunks = gpu.put(list);
  for (int i = 0; i < device::kScalarsMost; ++i) a.scalars[i] = scalars + i;
  a.clock = {gpu.put(std::vector<int64_t>{0}), gpu.put(std::vector<double>{0.01}),
             gpu.put(std::vector<double>{0.9, 0.999, 1e-7, 0, 1, 0}), Divides::kAdam, 1};
  device::Finish finish = {};
  finish.totals = totals;
  finish.weights = a.weights;
  finish.clock = a.clock;
  finish.correction = gpu.room<double>(1);
  finish.cube = gpu.room<double>(device::kSubjects * kMoments);
  finish.joint = gpu.room<double>(kJointColumns);
  const double copy = 8.0 * size / median_s([&] {
    cudaMemcpyAsync(slots[0], slots[1], size * sizeof(float), cudaMemcpyDeviceToDevice);
  });
  printf("\n%-28s %8.0f GB/s\n", "device copy", copy * 1e-9);
  const auto say = [&](const char* name, double rate, const char* more) {
    printf("%-28s %8.0f GB/s  %.2f of the copy%s\n", name, rate * 1e-9, rate / copy, more);
  };
#define TRAINRT_TIME(R)                                                                                     \
  for (const bool observe : {false, true}) {                                                                \
    const Rule& rule = *find_rule(R::kName);                                                                \
    a.observe = observe;                                                                                    \
    finish.count = observe;                                                                                 \
    finish.slots = rule.slots;                                                                              \
    finish.momentum = a.momentum = rule.slots > 0 ? 0 : -1;                                                 \
    finish.second = a.second = rule.slots > 1 ? 1 : -1;                                                     \
    const double bytes = 4.0 * size * (3 + 2 * rule.slots);                                                 \
    say(R::kName, bytes / median_s([&] {                                                                    \
          gpu.update(rule, Dtype::kFloat32, a, chunks, rows);                                               \
          if (observe) gpu.fold(fold, 1);                                                                   \
          gpu.finish(finish);                                                                               \
        }),                                                                                                 \
        observe ? ", observed, slots held against gradients" : "");                                         \
  }
  TRAINRT_RULES(TRAINRT_TIME)
#undef TRAINRT_TIME
  device::Subject one = {};
  one.after = gradient;
  one.size = size;
  const device::Looks looks = {gpu.put(std::vector<device::Subject>{one}), a.chunks, nullptr, {}};
  const device::Measured measured = {totals, 1, finish.cube, Clip::kNone, nullptr, nullptr};
  say("measure", 4.0 * size / median_s([&] {
        gpu.look(looks, chunks, rows);
        gpu.fold(fold, 1);
        gpu.finish(measured);
      }),
      "");
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
  cudaDeviceProp device;
  require(cudaGetDeviceProperties(&device, 0), "the device's name");
  printf("%s, compute capability %d.%d\n\n", device.name, device.major, device.minor);
  Gpu gpu;
  const bool good = trial::check_all(gpu, true);
  time_all(gpu);
  return good ? 0 : 1;
}
