// The TensorFlow ops: the only file here that sees a TensorFlow header. It checks shapes, locks variables, finds the
// pointers, and leaves the rest to `kernels.h`.
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace trainrt {
namespace {

namespace tf = ::tensorflow;

// Work that one core does faster than it takes to wake another.
constexpr int64_t kSerial = 65536;

Dtype dtype_of(tf::DataType dtype) {
  switch (dtype) {
    case tf::DT_DOUBLE: return Dtype::kFloat64;
    case tf::DT_BFLOAT16: return Dtype::kBFloat16;
    case tf::DT_HALF: return Dtype::kFloat16;
    default: return Dtype::kFloat32;
  }
}

Span span_of(const tf::Tensor& tensor) {
  return {dtype_of(tensor.dtype()), tensor.tensor_data().data(), tensor.NumElements()};
}

Parallel parallel_on(tf::OpKernelContext* context) {
  return [context](int64_t tasks, int64_t elements, const Shard& shard) {
    const auto* workers = context->device()->tensorflow_cpu_worker_threads();
    if (tasks <= 1 || elements <= kSerial || workers->num_threads <= 1) return shard(0, tasks);
    workers->workers->ParallelFor(tasks, kChunk * 4, shard);
  };
}

class MeasureOp : public tf::OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(tf::OpKernelContext* context) override {
    static thread_local std::vector<Span> spans;
    const int count = context->num_inputs();
    spans.clear();
    for (int i = 0; i < count; ++i) spans.push_back(span_of(context->input(i)));
    tf::Tensor* rows = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, {count, kMoments}, &rows));
    measure(spans.data(), count, rows->flat<double>().data(), parallel_on(context));
  }
};

class MeasureUpdateOp : public tf::OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(tf::OpKernelContext* context) override {
    static thread_local std::vector<Span> spans;
    const int count = context->num_inputs() / 3;
    spans.clear();
    for (int i = 0; i < 3 * count; ++i) spans.push_back(span_of(context->input(i)));
    const Span *before = spans.data(), *after = before + count;
    Span* gradients = spans.data() + 2 * count;
    for (int i = 0; i < count; ++i) {
      OP_REQUIRES(context, before[i].size == after[i].size && before[i].dtype == after[i].dtype,
                  tf::errors::InvalidArgument("TrainrtMeasureUpdate: weight ", i, " has ", before[i].size,
                                              " elements before and ", after[i].size, " after."));
      if (gradients[i].size == 0) gradients[i].data = nullptr;
      OP_REQUIRES(context, gradients[i].size == 0 || gradients[i].size == after[i].size,
                  tf::errors::InvalidArgument("TrainrtMeasureUpdate: weight ", i, " has ", after[i].size,
                                              " elements and its gradient ", gradients[i].size, "."));
    }
    tf::Tensor *rows = nullptr, *joint = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, {count, kMoments}, &rows));
    OP_REQUIRES_OK(context, context->allocate_output(1, {count, kJoint}, &joint));
    measure_update(before, after, gradients, count, rows->flat<double>().data(), joint->flat<double>().data(),
                   parallel_on(context));
  }
};

tf::Status rows_of(tf::shape_inference::InferenceContext* c, const char* attr, int columns, int output) {
  std::vector<tf::DataType> types;
  TF_RETURN_IF_ERROR(c->GetAttr(attr, &types));
  c->set_output(output, c->Matrix(static_cast<int64_t>(types.size()), columns));
  return absl::OkStatus();
}

REGISTER_OP("TrainrtMeasure")
    .Input("tensors: T")
    .Output("moments: double")
    .Attr("T: list({float, double, bfloat16, half}) >= 1")
    .SetShapeFn([](tf::shape_inference::InferenceContext* c) { return rows_of(c, "T", kMoments, 0); });
REGISTER_KERNEL_BUILDER(Name("TrainrtMeasure").Device(tf::DEVICE_CPU), MeasureOp);

REGISTER_OP("TrainrtMeasureUpdate")
    .Input("before: T")
    .Input("after: T")
    .Input("gradients: G")
    .Output("update: double")
    .Output("joint: double")
    .Attr("T: list({float, double, bfloat16, half}) >= 1")
    .Attr("G: list({float, double, bfloat16, half}) >= 1")
    .SetShapeFn([](tf::shape_inference::InferenceContext* c) {
      TF_RETURN_IF_ERROR(rows_of(c, "T", kMoments, 0));
      return rows_of(c, "T", kJoint, 1);
    });
REGISTER_KERNEL_BUILDER(Name("TrainrtMeasureUpdate").Device(tf::DEVICE_CPU), MeasureUpdateOp);

}  // namespace
}  // namespace trainrt
