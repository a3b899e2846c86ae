// The rows of a sparse gradient as blocks of the dense one that they stand for, which nobody has to hold.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "elements.h"

namespace trainrt {

// Where each row goes: rows of the same index one after the other, in the order in which they came.
struct Rows {
  std::vector<int64_t> first;  // of each index, and one more
  std::vector<int64_t> from;   // which row
  int64_t width = 0;

  // False if an index is too large; a negative one is left out, as TensorFlow's unsorted_segment_sum does. Allocates
  // nothing once it has been as large.
  bool sort(const int64_t* indices, int64_t count, int64_t height, int64_t row_width) {
    width = row_width;
    first.assign(height + 2, 0);
    from.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      if (indices[i] >= height) return false;
      if (indices[i] >= 0) ++first[indices[i] + 2];
    }
    for (int64_t i = 2; i < height + 2; ++i) first[i] += first[i - 1];
    for (int64_t i = 0; i < count; ++i)
      if (indices[i] >= 0) from[first[indices[i] + 1]++] = i;
    return true;
  }
};

// What a step makes of a block of rows: the gradient; the same of scaled rows, where there is a scale; and the sum of
// their squares. Each null unless it is wanted.
template <typename T>
struct Gathered {
  T *sum = nullptr, *scaled = nullptr, *square = nullptr;
};

// Elements [begin, begin + size) of the dense gradient, each sum in the order of the rows, as TensorFlow adds them up.
template <typename T>
inline void gather(const Rows& rows, const T* values, T scale, int64_t begin, int size, const Gathered<T>& to) {
  T* const parts[] = {to.sum, to.scaled, to.square};
  for (T* const part : parts)
    if (part) std::memset(static_cast<void*>(part), 0, size * sizeof(T));
  int64_t row = begin / rows.width, column = begin % rows.width;
  for (int done = 0; done < size; ++row, column = 0) {
    const int n = static_cast<int>(std::min<int64_t>(rows.width - column, size - done));
    for (int64_t k = rows.first[row]; k < rows.first[row + 1]; ++k) {
      const T* __restrict value = values + rows.from[k] * rows.width + column;
      T* __restrict sum = to.sum + done;
      for (int i = 0; i < n; ++i) sum[i] = sum[i] + value[i];
      if (!to.square) continue;
      T* __restrict square = to.square + done;
      if (to.scaled) {
        T* __restrict scaled = to.scaled + done;
        for (int i = 0; i < n; ++i) {
          const T one = value[i] * scale;
          scaled[i] = scaled[i] + one;
          square[i] = square[i] + one * one;
        }
      } else {
        for (int i = 0; i < n; ++i) square[i] = square[i] + value[i] * value[i];
      }
    }
    done += n;
  }
}

}  // namespace trainrt
