// Runs the device's code on a host: for tests of the launch geometry, the reduction tree and its barriers where there is
// no GPU. A block's threads are fibers that take turns; each runs until a barrier, so that none passes one before all
// have reached it, and threads that disagree on which barrier comes next are found out.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "device.h"

namespace trainrt {
namespace shim {

enum class Stop { kDone, kBlock, kWarp };

class Block {
 public:
  explicit Block(std::function<void(int thread)> body) : body_(std::move(body)) {
    for (Fiber& fiber : fibers_) fiber.stack.resize(1 << 16);
  }

  void run() {
    for (Fiber& fiber : fibers_) fiber.started = false;
    running() = this;
    do {
      for (current_ = 0; current_ < device::kThreads; ++current_) resume(fibers_[current_]);
      for (const Fiber& fiber : fibers_) {
        if (fiber.stop == fibers_[0].stop) continue;
        fprintf(stderr, "threads of a block stop at different barriers\n");
        abort();
      }
    } while (fibers_[0].stop != Stop::kDone);
  }

  void stop(Stop at) {
    Fiber& fiber = fibers_[current_];
    fiber.stop = at;
    if (_setjmp(fiber.at) == 0) _longjmp(main_, 1);
  }

  double lanes[device::kThreads];

 private:
  struct Fiber {
    ucontext_t context;  // to begin on its own stack; jumps do the rest, which ask nothing of the system
    jmp_buf at;
    std::vector<char> stack;
    Stop stop;
    bool started;
  };
  std::function<void(int)> body_;
  Fiber fibers_[device::kThreads];
  jmp_buf main_;
  int current_ = 0;

  void resume(Fiber& fiber) {
    if (_setjmp(main_) != 0) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
    setcontext(&fiber.context);
  }

  static Block*& running() {
    static thread_local Block* block = nullptr;
    return block;
  }
  static void enter() {
    Block& block = *running();
    block.body_(block.current_);
    block.stop(Stop::kDone);
  }
};

// What the device's code asks of its thread.
class Thread {
 public:
  Thread(Block& shared, int block, int index) : shared_(shared), block_(block), index_(index) {}
  int block() const { return block_; }
  int index() const { return index_; }
  void sync() { shared_.stop(Stop::kBlock); }
  // The value of the thread `delta` further on in the warp; the own one past its end. As __shfl_down_sync.
  template <typename V>
  V from_below(V value, int delta) {
    shared_.lanes[index_] = static_cast<double>(value);
    shared_.stop(Stop::kWarp);
    const bool inside = index_ % device::kWarp + delta < device::kWarp;
    const V other = static_cast<V>(shared_.lanes[inside ? index_ + delta : index_]);
    shared_.stop(Stop::kWarp);
    return other;
  }

 private:
  Block& shared_;
  int block_, index_;
};

// body(thread, shared memory of a block), for each of `blocks` blocks.
template <typename Body>
void launch(int blocks, Body body) {
  device::Shared shared;
  int block = 0;
  Block fibers([&](int index) {
    Thread me(fibers, block, index);
    body(me, shared);
  });
  for (; block < blocks; ++block) fibers.run();
}

}  // namespace shim
}  // namespace trainrt
