// The ops' GPU kernels: what `bind.h` found goes to `device_launch.h`, on TensorFlow's own stream.
//
// Everything but the resource handles, which TensorFlow keeps on the host, lies in the device's memory: gradients,
// scalars, the step's number and its learning rate, and the small statistics that come out. Nothing is waited for, so a
// step costs the host a few launches and, when gradients come to lie elsewhere, one small copy of pointers. Statistics
// reach the host with the recorder's own copy, once for many steps.
//
// A library of its own beside that of `bind.cc`, which registers the ops: a machine without a CUDA compiler lacks this
// one and nothing else. The CUDA runtime is linked in and looks for the driver when first called, not when loaded.
#include "bind.h"
#include "device_launch.h"
#include "tensorflow/core/framework/types.h"
#include "xla/stream_executor/stream.h"

namespace trainrt {
namespace {

absl::Status checked(const char* error) {
  return error ? absl::InternalError(absl::StrCat("CUDA: ", error)) : absl::OkStatus();
}

device::Stream stream_of(tf::OpKernelContext* context) {
  if (!context->op_device_context()) return nullptr;  // the host's, in tests
  return context->op_device_context()->stream()->platform_specific_handle().stream;
}

// Memory of one step: given back when the op returns, and from then on the stream's order keeps it from its next user
// until the kernels are done.
class Scratch {
 public:
  explicit Scratch(tf::OpKernelContext* context) : context_(context) {}
  template <typename V>
  absl::Status take(int64_t count, V** data) {
    held_.emplace_back();
    const tf::TensorShape bytes({std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(V))});
    TF_RETURN_IF_ERROR(context_->allocate_temp(tf::DT_UINT8, bytes, &held_.back()));
    *data = reinterpret_cast<V*>(held_.back().flat<tf::uint8>().data());
    return absl::OkStatus();
  }

 private:
  tf::OpKernelContext* context_;
  std::vector<tf::Tensor> held_;
};

// A table that stays on the device and is sent anew when it changes.
class Table {
 public:
  template <typename V>
  absl::Status send(tf::OpKernelContext* context, const std::vector<V>& rows, const V** data) {
    const size_t bytes = rows.size() * sizeof(V);
    if (bytes != sent_.size() || memcmp(rows.data(), sent_.data(), bytes) != 0) {
      if (!device_.IsInitialized() || device_.TotalBytes() < bytes)
        TF_RETURN_IF_ERROR(
            context->allocate_temp(tf::DT_UINT8, tf::TensorShape({static_cast<int64_t>(bytes)}), &device_));
      TF_RETURN_IF_ERROR(
          checked(device::send(device_.flat<tf::uint8>().data(), rows.data(), bytes, stream_of(context))));
      sent_.assign(reinterpret_cast<const char*>(rows.data()), reinterpret_cast<const char*>(rows.data()) + bytes);
    }
    *data = bytes ? reinterpret_cast<const V*>(device_.flat<tf::uint8>().data()) : nullptr;
    return absl::OkStatus();
  }

 private:
  std::vector<char> sent_;
  tf::Tensor device_;
};

// The chunks of tensors of these sizes. What runs is one launch over them, and one that folds each tensor's.
class Plan {
 public:
  absl::Status make(tf::OpKernelContext* context, const std::vector<int64_t>& sizes, Scratch& scratch) {
    if (sizes != sizes_ || !chunks) {
      std::vector<device::Chunk> list;
      std::vector<int64_t> begin = {0};
      for (size_t t = 0; t < sizes.size(); ++t) {
        for (int64_t at = 0; at < sizes[t]; at += kChunk) list.push_back({static_cast<int>(t), at});
        begin.push_back(static_cast<int64_t>(list.size()));
      }
      sizes_.clear();  // until both are there
      TF_RETURN_IF_ERROR(chunk_table_.send(context, list, &chunks));
      TF_RETURN_IF_ERROR(first_table_.send(context, begin, &first));
      count = static_cast<int>(list.size());
      sizes_ = sizes;
    }
    TF_RETURN_IF_ERROR(scratch.take(count, &rows));
    return scratch.take(static_cast<int64_t>(sizes.size()), &totals);
  }

  absl::Status fold(tf::OpKernelContext* context) const {
    return checked(device::launch_fold({rows, first, totals}, static_cast<int>(sizes_.size()), stream_of(context)));
  }

  const device::Chunk* chunks = nullptr;
  const int64_t* first = nullptr;
  int count = 0;
  device::Row *rows = nullptr, *totals = nullptr;

 private:
  std::vector<int64_t> sizes_;
  Table chunk_table_, first_table_;
};

// Of TrainrtMeasure and TrainrtObserve. Kept by the op, and used by one step at a time.
class Sight {
 public:
  absl::Status look(tf::OpKernelContext* context, const std::vector<device::Subject>& subjects, const double* table,
                    const device::Clock& clock, Scratch& scratch) {
    std::vector<int64_t> sizes;
    for (const device::Subject& one : subjects) sizes.push_back(one.size);
    TF_RETURN_IF_ERROR(plan.make(context, sizes, scratch));
    TF_RETURN_IF_ERROR(subjects_.send(context, subjects, &on_device));
    const device::Looks looks = {on_device, plan.chunks, table, clock};
    TF_RETURN_IF_ERROR(checked(device::launch_look(looks, plan.count, plan.rows, stream_of(context))));
    return plan.fold(context);
  }

  tf::mutex mutex;
  Plan plan;
  const device::Subject* on_device = nullptr;

 private:
  Table subjects_;
};

device::Subject subject_of(const Span& span) {
  device::Subject one;
  memset(static_cast<void*>(&one), 0, sizeof(one));  // gaps too: tables are compared as bytes
  one.after = span.data;
  one.size = span.size;
  one.dtype = span.dtype;
  return one;
}

class MeasureGpuOp : public MeasureBase {
 public:
  using MeasureBase::MeasureBase;
  void Compute(tf::OpKernelContext* context) override { OP_REQUIRES_OK(context, run(context)); }

 private:
  Sight sight_;

  absl::Status run(tf::OpKernelContext* context) {
    static thread_local std::vector<Span> spans;
    static thread_local std::vector<device::Subject> subjects;
    device::Measured measured = {};
    if (!sparse_.empty()) return invalid("TrainrtMeasure takes dense tensors on a GPU.");
    TF_RETURN_IF_ERROR(gather(context, spans, &measured.rows, &measured.scales));
    subjects.clear();
    for (const Span& span : spans) subjects.push_back(subject_of(span));
    Scratch scratch(context);
    tf::mutex_lock lock(sight_.mutex);
    TF_RETURN_IF_ERROR(sight_.look(context, subjects, nullptr, {}, scratch));
    measured.totals = sight_.plan.totals;
    measured.count = static_cast<int>(spans.size());
    measured.clip = clip_;
    measured.threshold = context->input(measured.count).flat<double>().data();
    return checked(device::launch_finish(measured, stream_of(context)));
  }
};

class ObserveGpuOp : public ObserveBase {
 public:
  using ObserveBase::ObserveBase;
  void Compute(tf::OpKernelContext* context) override { OP_REQUIRES_OK(context, run(context)); }

 private:
  Sight sight_;
  Table momentums_, seconds_;

  absl::Status run(tf::OpKernelContext* context) {
    static thread_local std::vector<Span> spans;
    static thread_local std::vector<device::Subject> subjects;
    Observe o = {};
    ObservedNumbers numbers = {};
    TF_RETURN_IF_ERROR(gather(context, spans, o, numbers));
    subjects.clear();
    const auto slot_of = [&](const std::vector<int>& which, int t) -> const Span* {
      if (which[t] < 0) return nullptr;
      const Span* span = o.slot + which[t] * count_ + t;
      return span->data && span->size == o.after[t].size ? span : nullptr;
    };
    for (int t = 0; t < count_; ++t) {
      device::Subject one = subject_of(o.after[t]);
      const Span *momentum = slot_of(momentum_, t), *second = slot_of(second_, t);
      one.before = o.before[t].data;
      one.gradient = o.gradients[t].data;
      one.gradient_dtype = o.gradients[t].dtype;
      one.momentum = momentum ? momentum->data : nullptr;
      one.second = second ? second->data : nullptr;
      one.slot_dtype = momentum ? momentum->dtype : second ? second->dtype : one.dtype;
      one.weight = t;
      subjects.push_back(one);
    }
    for (int i = 0; i < slots_ * count_; ++i) subjects.push_back(subject_of(o.slot[i]));
    Scratch scratch(context);
    tf::mutex_lock lock(sight_.mutex);
    device::Finish finish = {};
    finish.clock.iterations = numbers.iterations;
    finish.clock.every = every_;
    TF_RETURN_IF_ERROR(sight_.look(context, subjects, o.table, finish.clock, scratch));
    finish.totals = sight_.plan.totals;
    finish.count = count_;
    finish.slots = slots_;
    finish.subjects = sight_.on_device;
    finish.table = o.table;
    finish.loss_scale = numbers.loss_scale;
    finish.skipped = numbers.skipped;
    TF_RETURN_IF_ERROR(momentums_.send(context, momentum_, &finish.momentums));
    TF_RETURN_IF_ERROR(seconds_.send(context, second_, &finish.seconds));
    finish.measured = o.measured;
    finish.scale = o.scale;
    finish.cube = o.cube;
    finish.joint = o.joint;
    return checked(device::launch_finish(finish, stream_of(context)));
  }
};

class UpdateGpuOp : public UpdateBase {
 public:
  using UpdateBase::UpdateBase;

 protected:
  absl::Status run(tf::OpKernelContext* context, Update& u, const UpdateNumbers& numbers) override {
    static thread_local std::vector<device::Weight> weights;
    if (!sparse_.empty()) return invalid("TrainrtUpdate takes dense gradients on a GPU.");
    std::vector<int64_t> sizes;
    weights.clear();
    for (int i = 0; i < count_; ++i) {
      const Weight& from = u.weights[i];
      device::Weight to;
      memset(static_cast<void*>(&to), 0, sizeof(to));
      to.gradient = from.gradient;
      to.weight = from.weight;
      for (int k = 0; k < rule_->slots; ++k) to.slots[k] = from.slots[k];
      to.size = from.size;
      to.decay = from.decay;
      weights.push_back(to);
      sizes.push_back(from.gradient || observe_ ? from.size : 0);
    }
    Scratch scratch(context);
    tf::mutex_lock lock(mutex_);
    TF_RETURN_IF_ERROR(plan_.make(context, sizes, scratch));
    device::Arguments a = {};
    TF_RETURN_IF_ERROR(weights_.send(context, weights, &a.weights));
    a.chunks = plan_.chunks;
    a.scale = u.scale;
    a.factor_count = factor_count_;
    for (int f = 0; f < factor_count_; ++f) {
      a.factors[f] = u.factors[f].values;
      a.prepare[f] = u.factors[f].how;
      a.each[f] = u.factors[f].each;
    }
    for (int i = 0; i < scalar_count_; ++i) a.scalars[i] = u.scalars[i];
    a.graph = graph_;
    a.observe = observe_;
    a.measured = u.measured != nullptr;
    a.momentum = momentum_;
    a.second = second_;
    a.clock = {numbers.iterations, numbers.learning_rate, numbers.constants, divides_, every_};
    const device::Stream stream = stream_of(context);
    TF_RETURN_IF_ERROR(
        checked(device::launch_update(rule_->name, dtype_of(dtype_), a, plan_.count, plan_.rows, stream)));
    if (observe_) TF_RETURN_IF_ERROR(plan_.fold(context));
    device::Finish finish = {};
    finish.totals = plan_.totals;
    finish.count = observe_ ? count_ : 0;
    finish.slots = rule_->slots;
    finish.weights = a.weights;
    finish.clock = a.clock;
    finish.own_clip = own_clip_;
    if (own_clip_ != Clip::kNone) TF_RETURN_IF_ERROR(scratch.take(count_, &finish.own_scale));
    finish.correction = numbers.correction;
    finish.momentum = momentum_;
    finish.second = second_;
    finish.measured = u.measured;
    finish.scale = u.scale;
    finish.cube = u.cube;
    finish.joint = u.joint;
    return checked(device::launch_finish(finish, stream));
  }

  absl::Status copy(tf::OpKernelContext* context, void* to, const void* from, size_t bytes) override {
    return checked(device::copy(to, from, bytes, stream_of(context)));
  }

 private:
  tf::mutex mutex_;
  Plan plan_;
  Table weights_;
};

#if defined(TRAINRT_SHIM)
// For tests/test_shim.py: the same over `shim_launch.cc`, for who asks for kernels of that label.
#define TRAINRT_KERNEL(op) Name(op).Device(tf::DEVICE_CPU).Label("shim")
#else
#define TRAINRT_KERNEL(op) Name(op).Device(tf::DEVICE_GPU)
#endif
REGISTER_KERNEL_BUILDER(TRAINRT_KERNEL("TrainrtMeasure"), MeasureGpuOp);
REGISTER_KERNEL_BUILDER(TRAINRT_KERNEL("TrainrtObserve"), ObserveGpuOp);
REGISTER_KERNEL_BUILDER(TRAINRT_KERNEL("TrainrtUpdate").HostMemory("weights").HostMemory("slots"), UpdateGpuOp);

}  // namespace
}  // namespace trainrt
