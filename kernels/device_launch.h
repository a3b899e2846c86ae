// Launches on a stream. All pointers are the device's; nothing is allocated and nothing waits.
#pragma once

#include <cuda_runtime.h>

#include "device.h"

namespace trainrt {
namespace device {

// One launch for all chunks of all weights of a dtype: rows[chunk], if `a.observe`.
cudaError_t launch_update(const char* rule, Dtype dtype, const Arguments& a, int chunks, Row* rows,
                          cudaStream_t stream);

// The moments of `a.weights[i].weight`: subject 2 of rows[chunk].
cudaError_t launch_measure(Dtype dtype, const Arguments& a, int chunks, Row* rows, cudaStream_t stream);

// Folds the rows of each weight's chunks, `first` being [weights + 1] indices: totals[weight].
cudaError_t launch_fold(const Row* rows, const int64_t* first, int weights, Row* totals, cudaStream_t stream);

}  // namespace device
}  // namespace trainrt
