// Launches the device's code. No TensorFlow header: `check.cu` calls this without TensorFlow.
#include "device_launch.h"

#include <cstring>

#include "device.h"
#include "rules.h"

namespace trainrt {
namespace device {
namespace {

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

template <typename R, typename T>
__global__ void __launch_bounds__(kThreads) update_kernel(Arguments a, Row* rows) {
  __shared__ double shared[kWarps];
  CudaThread me;
  update_chunk<R, T>(me, a, rows, shared);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) measure_kernel(Arguments a, Row* rows) {
  __shared__ double shared[kWarps];
  CudaThread me;
  measure_chunk<T>(me, a, rows, shared);
}

__global__ void __launch_bounds__(kThreads) fold_kernel(const Row* rows, const int64_t* first, int weights, Row* totals) {
  CudaThread me;
  fold_chunks(me, rows, first, weights, totals);
}

template <typename R>
void launch_rule(Dtype dtype, const Arguments& a, int chunks, Row* rows, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::kFloat32: update_kernel<R, float><<<chunks, kThreads, 0, stream>>>(a, rows); break;
    case Dtype::kFloat64: update_kernel<R, double><<<chunks, kThreads, 0, stream>>>(a, rows); break;
    case Dtype::kBFloat16: update_kernel<R, BFloat16><<<chunks, kThreads, 0, stream>>>(a, rows); break;
    case Dtype::kFloat16: update_kernel<R, Float16><<<chunks, kThreads, 0, stream>>>(a, rows); break;
  }
}

}  // namespace

cudaError_t launch_update(const char* rule, Dtype dtype, const Arguments& a, int chunks, Row* rows,
                          cudaStream_t stream) {
  if (chunks == 0) return cudaSuccess;
#define TRAINRT_LAUNCH(R)                                  \
  if (strcmp(rule, R::kName) == 0) {                       \
    launch_rule<R>(dtype, a, chunks, rows, stream);        \
    return cudaGetLastError();                             \
  }
  TRAINRT_RULES(TRAINRT_LAUNCH)
#undef TRAINRT_LAUNCH
  return cudaErrorInvalidValue;
}

cudaError_t launch_measure(Dtype dtype, const Arguments& a, int chunks, Row* rows, cudaStream_t stream) {
  if (chunks == 0) return cudaSuccess;
  switch (dtype) {
    case Dtype::kFloat32: measure_kernel<float><<<chunks, kThreads, 0, stream>>>(a, rows); break;
    case Dtype::kFloat64: measure_kernel<double><<<chunks, kThreads, 0, stream>>>(a, rows); break;
    case Dtype::kBFloat16: measure_kernel<BFloat16><<<chunks, kThreads, 0, stream>>>(a, rows); break;
    case Dtype::kFloat16: measure_kernel<Float16><<<chunks, kThreads, 0, stream>>>(a, rows); break;
  }
  return cudaGetLastError();
}

cudaError_t launch_fold(const Row* rows, const int64_t* first, int weights, Row* totals, cudaStream_t stream) {
  fold_kernel<<<(weights + kThreads - 1) / kThreads, kThreads, 0, stream>>>(rows, first, weights, totals);
  return cudaGetLastError();
}

}  // namespace device
}  // namespace trainrt
