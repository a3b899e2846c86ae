// Launches on a stream. All pointers are the device's but for the source of `send`; nothing is allocated, and nothing
// waits for the device. What is returned is null, or CUDA's word for what went wrong. No CUDA header.
#pragma once

#include "device.h"

namespace trainrt {
namespace device {

using Stream = void*;  // a cudaStream_t

// One launch for all chunks of all weights of a dtype: rows[chunk], if `a.observe`.
const char* launch_update(const char* rule, Dtype dtype, const Arguments& a, int chunks, Row* rows, Stream stream);

// Looks at all chunks of all subjects: rows[chunk].
const char* launch_look(const Looks& a, int chunks, Row* rows, Stream stream);

// Folds the rows of each tensor's chunks.
const char* launch_fold(const Totals& a, int tensors, Stream stream);

const char* launch_finish(const Measured& a, Stream stream);
const char* launch_finish(const Finish& a, Stream stream);

// Copies to the device from memory that the caller may write again as soon as this returns; and on the device.
const char* send(void* to, const void* from, size_t bytes, Stream stream);
const char* copy(void* to, const void* from, size_t bytes, Stream stream);

}  // namespace device
}  // namespace trainrt
