// `device_launch.h` on a host: every launch runs at once, on fibers (`shim.h`), and memory is memory. For tests, of all
// rules in float32 and of Adam in every dtype.
#include "device_launch.h"

#include <cstring>

#include "rules.h"
#include "shim.h"

namespace trainrt {
namespace device {

const char* launch_update(const char* rule, Dtype dtype, const Arguments& a, int chunks, Row* rows, Stream) {
  const char* problem = "not among what the shim runs";
#define TRAINRT_RUN(R)                                                                                            \
  if (strcmp(rule, R::kName) == 0)                                                                                \
    with_type(dtype, [&](auto* type) {                                                                            \
      using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;                                       \
      if constexpr (std::is_same_v<T, float> || std::is_same_v<R, Adam>) {                                        \
        shim::launch(chunks, [&](auto& me, auto& shared) { update_chunk<R, T>(me, a, rows, shared); });           \
        problem = nullptr;                                                                                        \
      }                                                                                                           \
    });
  TRAINRT_RULES(TRAINRT_RUN)
#undef TRAINRT_RUN
  return problem;
}

const char* launch_look(const Looks& a, int chunks, Row* rows, Stream) {
  shim::launch(chunks, [&](auto& me, auto& shared) { look_chunk(me, a, rows, shared); });
  return nullptr;
}

const char* launch_fold(const Totals& a, int tensors, Stream) {
  shim::launch(tensors, [&](auto& me, auto& shared) { fold_chunks(me, a, shared); });
  return nullptr;
}

const char* launch_finish(const Measured& a, Stream) {
  shim::launch(1, [&](auto& me, auto& shared) { finish_measure(me, a, shared); });
  return nullptr;
}

const char* launch_finish(const Finish& a, Stream) {
  shim::launch(1, [&](auto& me, auto& shared) { finish(me, a, shared); });
  return nullptr;
}

const char* send(void* to, const void* from, size_t bytes, Stream) {
  if (bytes) memcpy(to, from, bytes);
  return nullptr;
}

const char* copy(void* to, const void* from, size_t bytes, Stream) { return send(to, from, bytes, nullptr); }

}  // namespace device
}  // namespace trainrt
