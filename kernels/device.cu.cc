// Launches the device's code. No TensorFlow header: `check.cu` calls this without TensorFlow.
#include "device_launch.h"

#include <cuda_runtime.h>

#include <cstring>

#include "rules.h"

namespace trainrt {
namespace device {
namespace {

cudaStream_t on(Stream stream) { return static_cast<cudaStream_t>(stream); }

const char* word(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

class CudaThread {
 public:
  __device__ int block() const { return static_cast<int>(blockIdx.x); }
  __device__ int index() const { return static_cast<int>(threadIdx.x); }
  __device__ void sync() { __syncthreads(); }
  template <typename V>
  __device__ V from_below(V value, int delta) {
    return __shfl_down_sync(0xffffffffu, value, delta);
  }
};

// Shared memory is not constructed: what is in it is written before it is read.
#define TRAINRT_SHARED                                              \
  __shared__ alignas(Shared) unsigned char memory[sizeof(Shared)];  \
  Shared& shared = *reinterpret_cast<Shared*>(memory);              \
  CudaThread me;

template <typename R, typename T>
__global__ void __launch_bounds__(kThreads) update_kernel(Arguments a, Row* rows) {
  TRAINRT_SHARED
  update_chunk<R, T>(me, a, rows, shared);
}

__global__ void __launch_bounds__(kThreads) look_kernel(Looks a, Row* rows) {
  TRAINRT_SHARED
  look_chunk(me, a, rows, shared);
}

__global__ void __launch_bounds__(kThreads) fold_kernel(Totals a) {
  TRAINRT_SHARED
  fold_chunks(me, a, shared);
}

__global__ void __launch_bounds__(kThreads) measured_kernel(Measured a) {
  TRAINRT_SHARED
  finish_measure(me, a, shared);
}

__global__ void __launch_bounds__(kThreads) finish_kernel(Finish a) {
  TRAINRT_SHARED
  finish(me, a, shared);
}

#undef TRAINRT_SHARED

template <typename R>
void launch_rule(Dtype dtype, const Arguments& a, int chunks, Row* rows, Stream stream) {
  switch (dtype) {
    case Dtype::kFloat32: update_kernel<R, float><<<chunks, kThreads, 0, on(stream)>>>(a, rows); break;
    case Dtype::kFloat64: update_kernel<R, double><<<chunks, kThreads, 0, on(stream)>>>(a, rows); break;
    case Dtype::kBFloat16: update_kernel<R, BFloat16><<<chunks, kThreads, 0, on(stream)>>>(a, rows); break;
    case Dtype::kFloat16: update_kernel<R, Float16><<<chunks, kThreads, 0, on(stream)>>>(a, rows); break;
  }
}

}  // namespace

const char* launch_update(const char* rule, Dtype dtype, const Arguments& a, int chunks, Row* rows,
                          Stream stream) {
  if (chunks == 0) return nullptr;
#define TRAINRT_LAUNCH(R)                                  \
  if (strcmp(rule, R::kName) == 0) {                       \
    launch_rule<R>(dtype, a, chunks, rows, stream);        \
    return word(cudaGetLastError());                             \
  }
  TRAINRT_RULES(TRAINRT_LAUNCH)
#undef TRAINRT_LAUNCH
  return "no such rule";
}

const char* launch_look(const Looks& a, int chunks, Row* rows, Stream stream) {
  if (chunks == 0) return nullptr;
  look_kernel<<<chunks, kThreads, 0, on(stream)>>>(a, rows);
  return word(cudaGetLastError());
}

const char* launch_fold(const Totals& a, int tensors, Stream stream) {
  if (tensors == 0) return nullptr;
  fold_kernel<<<tensors, kThreads, 0, on(stream)>>>(a);
  return word(cudaGetLastError());
}

const char* launch_finish(const Measured& a, Stream stream) {
  measured_kernel<<<1, kThreads, 0, on(stream)>>>(a);
  return word(cudaGetLastError());
}

const char* launch_finish(const Finish& a, Stream stream) {
  finish_kernel<<<1, kThreads, 0, on(stream)>>>(a);
  return word(cudaGetLastError());
}

// From memory that is not pinned the runtime copies to a buffer of its own before it returns.
const char* send(void* to, const void* from, size_t bytes, Stream stream) {
  return bytes ? word(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, on(stream))) : nullptr;
}

const char* copy(void* to, const void* from, size_t bytes, Stream stream) {
  return bytes ? word(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, on(stream))) : nullptr;
}

}  // namespace device
}  // namespace trainrt
