// Work of many tensors as one list of tasks of at most `kChunk` elements. A tensor's chunks are folded in their order,
// so the result does not depend on which thread took which. No TensorFlow header.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "moments.h"

namespace trainrt {

// Calls its second argument on ranges that cover [0, tasks); `elements` says how much work they are together.
using Shard = std::function<void(int64_t begin, int64_t end)>;
using Parallel = std::function<void(int64_t tasks, int64_t elements, const Shard& shard)>;

struct Chunks {
  std::vector<int64_t> first;  // of each tensor, and one more: the number of chunks
  int64_t elements = 0;

  template <typename SizeOf>
  void plan(int tensors, SizeOf size_of) {
    first.resize(tensors + 1);
    elements = 0;
    int64_t chunk = 0;
    for (int t = 0; t < tensors; ++t) {
      first[t] = chunk;
      const int64_t size = size_of(t);
      elements += size;
      chunk += (size + kChunk - 1) / kChunk;
    }
    first[tensors] = chunk;
  }

  int64_t count() const { return first.back(); }

  // visit(chunk, tensor, offset of its first element) for every chunk in [begin, end).
  template <typename Visit>
  void each(int64_t begin, int64_t end, Visit visit) const {
    int tensor = static_cast<int>(std::upper_bound(first.begin(), first.end(), begin) - first.begin()) - 1;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (chunk >= first[tensor + 1]) ++tensor;
      visit(chunk, tensor, (chunk - first[tensor]) * kChunk);
    }
  }
};

}  // namespace trainrt
