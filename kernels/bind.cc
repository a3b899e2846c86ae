// The ops and their CPU kernels: what `bind.h` found goes to `kernels.h`.
#include "bind.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>

#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tsl/platform/denormal.h"

namespace trainrt {
namespace {

// Work that one core does faster than it takes to wake another, and work that takes much longer than to wake all.
constexpr int64_t kSerial = 65536, kLong = 3 << 20;

// Tasks for several threads. The one that has them begins at once, and others join as they wake: `ParallelFor` of
// TensorFlow hands all of them over and sleeps, which took 70 us of a step of 500.
class Tasks {
 public:
  Tasks(int64_t count, int threads, const Shard& shard) : count_(count), stretches_(2 * threads), shard_(&shard) {}

  void join() {
    if (enter()) work(), leave();
  }

  // Works too, and returns when all is done; who has not joined by then finds nothing.
  void finish() {
    {
      const tsl::port::ScopedFlushDenormal as_the_others;
      work();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    over_ = true;
    left_.wait(lock, [&] { return inside_ == 0; });
  }

 private:
  bool enter() {
    std::lock_guard<std::mutex> lock(mutex_);
    inside_ += !over_;
    return !over_;
  }

  void leave() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (--inside_ == 0 && over_) left_.notify_one();
  }

  // Long stretches first, as memory likes them; then shorter ones, so that all are done at about the same time.
  void work() {
    for (int64_t begin = next_; begin < count_;) {
      const int64_t end = begin + std::max<int64_t>(1, (count_ - begin) / stretches_);
      if (!next_.compare_exchange_weak(begin, end)) continue;
      (*shard_)(begin, end);
      begin = next_;
    }
  }

  const int64_t count_, stretches_;
  const Shard* const shard_;  // of a thread that waits for who has joined
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::condition_variable left_;
  int inside_ = 0;
  bool over_ = false;
};

Parallel parallel_on(tf::OpKernelContext* context) {
  return [context](int64_t tasks, int64_t elements, const Shard& shard) {
    const auto* workers = context->device()->tensorflow_cpu_worker_threads();
    if (tasks <= 1 || elements <= kSerial || workers->num_threads <= 1) return shard(0, tasks);
    if (elements > kLong) {  // there it is 3 % faster
      using Params = tsl::thread::ThreadPool::SchedulingParams;
      const Params params(tsl::thread::ThreadPool::SchedulingStrategy::kAdaptive, kChunk * 4, std::nullopt);
      return workers->workers->ParallelFor(tasks, params, shard);
    }
    const auto shared = std::make_shared<Tasks>(tasks, workers->num_threads, shard);
    const int64_t others = std::min<int64_t>(workers->num_threads, tasks) - 1;
    for (int64_t i = 0; i < others; ++i) workers->workers->Schedule([shared] { shared->join(); });
    shared->finish();
  };
}

class MeasureOp : public MeasureBase {
 public:
  using MeasureBase::MeasureBase;
  void Compute(tf::OpKernelContext* context) override {
    static thread_local std::vector<Span> spans;
    double *rows = nullptr, *scales = nullptr;
    OP_REQUIRES_OK(context, gather(context, spans, &rows, &scales));
    const int count = static_cast<int>(spans.size());
    measure(spans.data(), count, rows, parallel_on(context));
    if (clip_ != Clip::kNone) clip(clip_, threshold(context), rows, count, scales);
  }
};

class ObserveOp : public ObserveBase {
 public:
  using ObserveBase::ObserveBase;
  void Compute(tf::OpKernelContext* context) override {
    static thread_local std::vector<Span> spans;
    Observe o = {};
    ObservedNumbers numbers = {};
    OP_REQUIRES_OK(context, gather(context, spans, o, numbers));
    o.loss_scale = *numbers.loss_scale;
    o.slots_due = slots_due(*numbers.iterations, every_);
    o.skipped = *numbers.skipped;
    observe(o, parallel_on(context));
  }
};

class UpdateOp : public UpdateBase {
 public:
  explicit UpdateOp(tf::OpKernelConstruction* construction) : UpdateBase(construction) {
    if (!construction->status().ok()) return;
    steps_ = find_rule(rule_->name);
    OP_REQUIRES(construction, sparse_.empty() || steps_->apart[0],
                invalid("TrainrtUpdate: rule ", rule_->name, " takes no sparse gradients."));
  }

 protected:
  absl::Status run(tf::OpKernelContext* context, Update& u, const UpdateNumbers& numbers) override {
    const double rate = *numbers.learning_rate, *constants = numbers.constants;
    const int64_t iterations = *numbers.iterations;
    u.division = division_of(divides_, iterations, rate, constants[kBeta1], constants[kBeta2], constants[kEpsilon]);
    u.decay = rate * constants[kWeightDecay];
    u.loss_scale = constants[kLossScale];
    u.own_threshold = constants[kOwnThreshold];
    u.slots_due = observe_ && slots_due(iterations, every_);
    *numbers.correction = u.division.correction;
    trainrt::update(*steps_, dtype_of(dtype_), u, parallel_on(context));
    return absl::OkStatus();
  }

  absl::Status copy(tf::OpKernelContext*, void* to, const void* from, size_t bytes) override {
    memcpy(to, from, bytes);
    return absl::OkStatus();
  }

 private:
  const Rule* steps_ = nullptr;
};

double seconds_since_1970() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// Numbers of several tensors, one behind the other, as float64: in one op, as each costs a step of a small model half a
// microsecond.
class RowOp : public tf::OpKernel {
 public:
  explicit RowOp(tf::OpKernelConstruction* construction) : OpKernel(construction) {
    OP_REQUIRES_OK(construction, construction->GetAttr("timed", &timed_));
  }
  void Compute(tf::OpKernelContext* context) override {
    int64_t size = timed_;
    for (int i = 0; i < context->num_inputs(); ++i) size += context->input(i).NumElements();
    tf::Tensor* row = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, {size}, &row));
    double* to = row->flat<double>().data();
    for (int i = 0; i < context->num_inputs(); ++i) {
      const tf::Tensor& part = context->input(i);
      switch (part.dtype()) {
        case tf::DT_FLOAT: to = put<float>(part, to); break;
        case tf::DT_DOUBLE: to = put<double>(part, to); break;
        case tf::DT_BFLOAT16: to = put<tf::bfloat16>(part, to); break;
        default: to = put<Eigen::half>(part, to);
      }
    }
    if (timed_) *to = seconds_since_1970();
  }

 private:
  bool timed_ = false;

  template <typename T>
  static double* put(const tf::Tensor& part, double* to) {
    const auto values = part.flat<T>();
    for (int64_t i = 0; i < values.size(); ++i) *to++ = static_cast<double>(values(i));
    return to;
  }
};

class NowOp : public tf::OpKernel {
 public:
  using OpKernel::OpKernel;
  bool IsExpensive() override { return false; }  // else it may be handed to another thread; so no profiler sees it
  void Compute(tf::OpKernelContext* context) override {
    tf::Tensor* seconds = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, {}, &seconds));
    seconds->scalar<double>()() = seconds_since_1970();
  }
};

REGISTER_OP("TrainrtRow")
    .Input("parts: T")
    .Output("row: double")
    .Attr("T: list({float, double, bfloat16, half}) >= 1")
    .Attr("timed: bool")  // whether the last number is when the row was there, in seconds since 1970
    .SetIsStateful()
    .SetShapeFn([](tf::shape_inference::InferenceContext* c) {
      bool timed = false;
      TF_RETURN_IF_ERROR(c->GetAttr("timed", &timed));
      tf::shape_inference::DimensionHandle size = c->MakeDim(timed ? 1 : 0);
      for (int i = 0; i < c->num_inputs(); ++i) TF_RETURN_IF_ERROR(c->Add(size, c->NumElements(c->input(i)), &size));
      c->set_output(0, c->Vector(size));
      return absl::OkStatus();
    });
REGISTER_KERNEL_BUILDER(Name("TrainrtRow").Device(tf::DEVICE_CPU), RowOp);

REGISTER_OP("TrainrtNow")
    .Input("after: T")
    .Output("seconds: double")  // since 1970, when `after` was there
    .Attr("T: type")
    .SetIsStateful()
    .SetShapeFn(tf::shape_inference::ScalarShape);
REGISTER_KERNEL_BUILDER(Name("TrainrtNow").Device(tf::DEVICE_CPU), NowOp);

REGISTER_OP("TrainrtMeasure")
    .Input("tensors: T")
    .Input("indices: A * int64")  // of the tensors that `sparse` names: where the rows go that they are
    .Input("threshold: double")
    .Output("moments: double")
    .Output("scale: double")
    .Attr("T: list({float, double, bfloat16, half}) >= 1")
    .Attr("A: int >= 0")
    .Attr("sparse: list(int)")
    .Attr("heights: list(int)")   // how many rows the dense tensor has
    .Attr("clip: string")
    .SetShapeFn([](tf::shape_inference::InferenceContext* c) {
      int64_t sparse = 0;
      TF_RETURN_IF_ERROR(c->GetAttr("A", &sparse));
      const int64_t count = c->num_inputs() - sparse - 1;
      std::string clip;
      TF_RETURN_IF_ERROR(c->GetAttr("clip", &clip));
      c->set_output(0, c->Matrix(count, kMoments));
      c->set_output(1, c->Vector(clip.empty() ? 0 : count));
      return absl::OkStatus();
    });
REGISTER_KERNEL_BUILDER(Name("TrainrtMeasure").Device(tf::DEVICE_CPU), MeasureOp);

REGISTER_OP("TrainrtObserve")
    .Input("before: T")
    .Input("after: T")
    .Input("gradients: G")
    .Input("slots: Q")
    .Input("measured: double")    // [weights, kMoments] of the gradients, or [0, kMoments]: then they are measured here
    .Input("scale: double")       // [weights] of the clip, or [0]
    .Input("table: double")       // [weights, 6]: `Division`, and the share that decay takes off
    .Input("loss_scale: double")
    .Input("iterations: int64")   // before the step
    .Input("skipped: bool")
    .Output("cube: double")
    .Output("joint: double")
    .Attr("T: list({float, double, bfloat16, half}) >= 1")
    .Attr("G: list({float, double, bfloat16, half}) >= 1")
    .Attr("Q: list({float, double, bfloat16, half}) >= 0")
    .Attr("momentum: list(int)")  // which slot of each weight is; -1: none
    .Attr("second: list(int)")
    .Attr("every: int")           // how many steps there are to one observed
    .SetShapeFn([](tf::shape_inference::InferenceContext* c) {
      std::vector<tf::DataType> weights, slots;
      TF_RETURN_IF_ERROR(c->GetAttr("T", &weights));
      TF_RETURN_IF_ERROR(c->GetAttr("Q", &slots));
      const auto count = static_cast<int64_t>(weights.size()), kinds = static_cast<int64_t>(slots.size()) / count;
      c->set_output(0, c->MakeShape({count, 3 + kinds, int64_t{kMoments}}));
      c->set_output(1, c->Matrix(count, kJointColumns));
      return absl::OkStatus();
    });
REGISTER_KERNEL_BUILDER(Name("TrainrtObserve").Device(tf::DEVICE_CPU), ObserveOp);

REGISTER_OP("TrainrtUpdate")
    .Input("weights: N * resource")
    .Input("slots: M * resource")
    .Input("gradients: N * T")
    .Input("indices: A * int64")    // of the weights that `sparse` names: where the rows go that their gradients are
    .Input("factors: F * T")
    .Input("scalars: S * T")
    .Input("measured: double")      // as `TrainrtObserve` takes it
    .Input("scale: double")         // [weights] of the clip, which comes before the factors; or [0]
    .Input("iterations: int64")     // before the step
    .Input("learning_rate: double")
    .Input("constants: double")     // beta_1, beta_2, epsilon, weight decay, loss scale, threshold of the own clip
    .Output("cube: double")
    .Output("joint: double")
    .Output("correction: double")   // of the second moment's bias; NaN where nothing is divided
    .Attr("T: {float, double, bfloat16, half}")
    .Attr("N: int >= 1")
    .Attr("M: int >= 0")
    .Attr("A: int >= 0")
    .Attr("F: int >= 0")
    .Attr("S: int >= 0")
    .Attr("rule: string")
    .Attr("sparse: list(int)")
    .Attr("prepare: list(string)")
    .Attr("decay: list(int)")
    .Attr("graph: bool")
    .Attr("observe: bool")
    .Attr("every: int")
    .Attr("own_clip: string")
    .Attr("divides: string")
    .Attr("momentum: int")
    .Attr("second: int")
    .SetIsStateful()
    .SetShapeFn([](tf::shape_inference::InferenceContext* c) {
      int64_t count = 0, slots = 0;
      bool observe = false;
      TF_RETURN_IF_ERROR(c->GetAttr("N", &count));
      TF_RETURN_IF_ERROR(c->GetAttr("M", &slots));
      TF_RETURN_IF_ERROR(c->GetAttr("observe", &observe));
      const int64_t seen = observe ? count : 0;
      c->set_output(0, c->MakeShape({seen, 3 + slots / count, int64_t{kMoments}}));
      c->set_output(1, c->Matrix(seen, kJointColumns));
      c->set_output(2, c->Scalar());
      return absl::OkStatus();
    });
REGISTER_KERNEL_BUILDER(Name("TrainrtUpdate").Device(tf::DEVICE_CPU), UpdateOp);

}  // namespace
}  // namespace trainrt
