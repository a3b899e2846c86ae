// The TensorFlow ops: the only file here that sees a TensorFlow header. It checks shapes, locks variables, finds the
// pointers, and leaves the rest to `kernels.h`.
#include <algorithm>
#include <optional>
#include <vector>

#include "absl/strings/str_cat.h"
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

template <typename... Parts>
absl::Status invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

Span span_of(const tf::Tensor& tensor) {
  return {dtype_of(tensor.dtype()), tensor.tensor_data().data(), tensor.NumElements()};
}

Parallel parallel_on(tf::OpKernelContext* context) {
  return [context](int64_t tasks, int64_t elements, const Shard& shard) {
    const auto* workers = context->device()->tensorflow_cpu_worker_threads();
    if (tasks <= 1 || elements <= kSerial || workers->num_threads <= 1) return shard(0, tasks);
    using Params = tsl::thread::ThreadPool::SchedulingParams;
    workers->workers->ParallelFor(
        tasks, Params(tsl::thread::ThreadPool::SchedulingStrategy::kAdaptive, kChunk * 4, std::nullopt), shard);
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
                  invalid("TrainrtMeasureUpdate: weight ", i, " has ", before[i].size,
                                              " elements before and ", after[i].size, " after."));
      if (gradients[i].size == 0) gradients[i].data = nullptr;
      OP_REQUIRES(context, gradients[i].size == 0 || gradients[i].size == after[i].size,
                  invalid("TrainrtMeasureUpdate: weight ", i, " has ", after[i].size,
                                              " elements and its gradient ", gradients[i].size, "."));
    }
    tf::Tensor *rows = nullptr, *joint = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, {count, kMoments}, &rows));
    OP_REQUIRES_OK(context, context->allocate_output(1, {count, kJoint}, &joint));
    measure_update(before, after, gradients, count, rows->flat<double>().data(), joint->flat<double>().data(),
                   parallel_on(context));
  }
};

// Holds variables locked and referenced. Locks are taken in the order of their addresses, as TensorFlow's own ops do.
class Locked {
 public:
  ~Locked() {
    for (auto* mutex : held_) mutex->unlock();
  }
  // The vectors are kept by the thread, so that a step allocates nothing.
  static Locked& on_this_thread() {
    static thread_local Locked locked;
    return locked;
  }
  absl::Status take(tf::OpKernelContext* context, int count) {
    for (int i = 0; i < count; ++i) {
      variables_.emplace_back();
      TF_RETURN_IF_ERROR(tf::LookupResource(context, tf::HandleFromInput(context, i), &variables_.back()));
      order_.push_back(variables_.back()->mu());
    }
    std::sort(order_.begin(), order_.end());
    for (size_t i = 0; i < order_.size(); ++i) {
      if (i && order_[i] == order_[i - 1]) return invalid("TrainrtUpdate: a variable came twice.");
      order_[i]->lock();
      held_.push_back(order_[i]);
    }
    return absl::OkStatus();
  }
  void release() {
    for (auto* mutex : held_) mutex->unlock();
    held_.clear();
    order_.clear();
    variables_.clear();
  }
  tf::Var* operator[](int i) const { return variables_[i].get(); }

 private:
  std::vector<tf::core::RefCountPtr<tf::Var>> variables_;
  std::vector<tf::mutex*> order_, held_;
};

class UpdateOp : public tf::OpKernel {
 public:
  explicit UpdateOp(tf::OpKernelConstruction* construction) : OpKernel(construction) {
    std::string name;
    std::vector<std::string> prepare;
    OP_REQUIRES_OK(construction, construction->GetAttr("rule", &name));
    OP_REQUIRES_OK(construction, construction->GetAttr("T", &dtype_));
    OP_REQUIRES_OK(construction, construction->GetAttr("N", &count_));
    OP_REQUIRES_OK(construction, construction->GetAttr("M", &slot_count_));
    OP_REQUIRES_OK(construction, construction->GetAttr("F", &factor_count_));
    OP_REQUIRES_OK(construction, construction->GetAttr("S", &scalar_count_));
    OP_REQUIRES_OK(construction, construction->GetAttr("K", &kinds_));
    OP_REQUIRES_OK(construction, construction->GetAttr("prepare", &prepare));
    OP_REQUIRES_OK(construction, construction->GetAttr("decay", &decay_));
    OP_REQUIRES_OK(construction, construction->GetAttr("graph", &graph_));
    OP_REQUIRES_OK(construction, construction->GetAttr("observe", &observe_));
    OP_REQUIRES_OK(construction, construction->GetAttr("gradient_moments", &gradient_moments_));
    rule_ = find_rule(name);
    OP_REQUIRES(construction, rule_ != nullptr,
                invalid("TrainrtUpdate knows the rules ", rule_names(), ". Received: ", name));
    bool decays = false;
    for (const int one : decay_) decays = decays || one != static_cast<int>(Decay::kNone);
    OP_REQUIRES(construction,
                slot_count_ == count_ * rule_->slots && kinds_ == rule_->slots &&
                    static_cast<int>(prepare.size()) == factor_count_ && factor_count_ <= kMaxFactors &&
                    static_cast<int>(decay_.size()) == count_ && scalar_count_ == rule_->scalars + (decays ? kDecayScalars : 0),
                invalid("TrainrtUpdate: rule ", name, " takes ", rule_->slots,
                                            " slots a weight and ", rule_->scalars,
                                            " scalars, three more if a weight decays, one `decay` a weight, and one "
                                            "`prepare` a factor. Received: N=", count_, ", M=", slot_count_,
                                            ", S=", scalar_count_, ", F=", factor_count_, "."));
    for (const std::string& how : prepare) {
      OP_REQUIRES(construction, how == "multiply" || how == "divide" || how == "clip",
                  invalid("TrainrtUpdate prepares by multiply, divide or clip. Received: ", how));
      prepare_.push_back(how == "multiply" ? Prepare::kMultiply : how == "divide" ? Prepare::kDivide : Prepare::kClip);
    }
  }

  void Compute(tf::OpKernelContext* context) override {
    Locked& variables = Locked::on_this_thread();
    const absl::Status status = update(context, variables);
    variables.release();
    OP_REQUIRES_OK(context, status);
  }

 private:
  tf::DataType dtype_;
  int count_ = 0, slot_count_ = 0, factor_count_ = 0, scalar_count_ = 0, kinds_ = 0;
  std::vector<Prepare> prepare_;
  std::vector<int> decay_;
  bool graph_ = true, observe_ = false, gradient_moments_ = false;
  const Rule* rule_ = nullptr;

  absl::Status update(tf::OpKernelContext* context, Locked& variables) {
    static thread_local std::vector<Weight> weights;
    TF_RETURN_IF_ERROR(variables.take(context, count_ + slot_count_));
    weights.resize(count_);
    for (int i = 0; i < count_; ++i) {
      Weight& weight = weights[i];
      const tf::Tensor& gradient = context->input(count_ + slot_count_ + i);
      TF_RETURN_IF_ERROR(writable(context, variables[i], &weight.weight));
      weight.size = variables[i]->tensor()->NumElements();
      weight.decay = static_cast<Decay>(decay_[i]);
      weight.gradient = gradient.NumElements() ? gradient.tensor_data().data() : nullptr;
      if (weight.gradient && gradient.NumElements() != weight.size) {
        return invalid("TrainrtUpdate: weight ", i, " has ", weight.size,
                                           " elements and its gradient ", gradient.NumElements(), ".");
      }
      for (int k = 0; k < rule_->slots; ++k) {
        tf::Var* slot = variables[count_ + k * count_ + i];
        TF_RETURN_IF_ERROR(writable(context, slot, &weight.slots[k]));
        if (slot->tensor()->NumElements() != weight.size) {
          return invalid("TrainrtUpdate: weight ", i, " has ", weight.size,
                                             " elements and its slot ", k, " ", slot->tensor()->NumElements(), ".");
        }
      }
    }
    Update u = {};
    u.weights = weights.data();
    u.count = count_;
    Factor factors[kMaxFactors];
    u.factors = factors;
    u.factor_count = factor_count_;
    int input = 2 * count_ + slot_count_;
    for (int f = 0; f < factor_count_; ++f, ++input) {
      const tf::Tensor& values = context->input(input);
      if (values.NumElements() != 1 && values.NumElements() != count_) {
        return invalid("TrainrtUpdate: a factor is one number, or one for each of ", count_,
                                           " weights. Received: ", values.NumElements(), ".");
      }
      factors[f] = {prepare_[f], values.tensor_data().data(), values.NumElements() == count_};
    }
    for (int i = 0; i < scalar_count_; ++i, ++input) {
      if (context->input(input).NumElements() != 1) {
        return invalid("TrainrtUpdate: scalar ", i, " has ", context->input(input).NumElements(),
                                           " elements.");
      }
      u.scalars[i] = context->input(input).tensor_data().data();
    }
    u.graph = graph_;
    u.observe = observe_;
    u.gradient_moments = observe_ && gradient_moments_;
    TF_RETURN_IF_ERROR(rows(context, 0, u.gradient_moments, kMoments, &u.gradient));
    TF_RETURN_IF_ERROR(rows(context, 1, observe_, kMoments, &u.update));
    TF_RETURN_IF_ERROR(rows(context, 2, observe_, kMoments, &u.weight));
    TF_RETURN_IF_ERROR(rows(context, 3, observe_, kJoint, &u.joint));
    for (int k = 0; k < rule_->slots; ++k) TF_RETURN_IF_ERROR(rows(context, 4 + k, observe_, kMoments, &u.slots[k]));
    trainrt::update(*rule_, dtype_of(dtype_), u, parallel_on(context));
    return absl::OkStatus();
  }

  absl::Status rows(tf::OpKernelContext* context, int output, bool wanted, int columns, double** data) {
    tf::Tensor* tensor = nullptr;
    TF_RETURN_IF_ERROR(context->allocate_output(output, {wanted ? count_ : 0, columns}, &tensor));
    *data = tensor->flat<double>().data();
    return absl::OkStatus();
  }

  // The buffer of a locked variable; a new one with the same values if somebody still reads the old one.
  absl::Status writable(tf::OpKernelContext* context, tf::Var* variable, void** data) {
    tf::Tensor* tensor = variable->tensor();
    if (!variable->is_initialized || tensor->dtype() != dtype_) {
      return invalid("TrainrtUpdate: a variable is not initialized, or is ",
                                            tf::DataTypeString(tensor->dtype()), " and not ",
                                            tf::DataTypeString(dtype_), ".");
    }
    if (!variable->copy_on_read_mode.load() && !tensor->RefCountIsOne()) {
      tf::Tensor copy;
      TF_RETURN_IF_ERROR(context->allocate_temp(dtype_, tensor->shape(), &copy));
      memcpy(const_cast<char*>(copy.tensor_data().data()), tensor->tensor_data().data(), tensor->TotalBytes());
      *tensor = copy;
    }
    *data = const_cast<char*>(tensor->tensor_data().data());
    return absl::OkStatus();
  }
};

absl::Status rows_of(tf::shape_inference::InferenceContext* c, const char* attr, int columns, int output) {
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

REGISTER_OP("TrainrtUpdate")
    .Input("weights: N * resource")
    .Input("slots: M * resource")
    .Input("gradients: N * T")
    .Input("factors: F * T")
    .Input("scalars: S * T")
    .Output("gradient: double")
    .Output("update: double")
    .Output("weight: double")
    .Output("joint: double")
    .Output("slot: K * double")
    .Attr("T: {float, double, bfloat16, half}")
    .Attr("N: int >= 1")
    .Attr("M: int >= 0")
    .Attr("F: int >= 0")
    .Attr("S: int >= 0")
    .Attr("K: int >= 0")
    .Attr("rule: string")
    .Attr("prepare: list(string)")
    .Attr("decay: list(int)")
    .Attr("graph: bool")
    .Attr("observe: bool")
    .Attr("gradient_moments: bool")
    .SetIsStateful()
    .SetShapeFn([](tf::shape_inference::InferenceContext* c) {
      int count = 0, kinds = 0;
      bool observe = false, gradient_moments = false;
      TF_RETURN_IF_ERROR(c->GetAttr("N", &count));
      TF_RETURN_IF_ERROR(c->GetAttr("K", &kinds));
      TF_RETURN_IF_ERROR(c->GetAttr("observe", &observe));
      TF_RETURN_IF_ERROR(c->GetAttr("gradient_moments", &gradient_moments));
      c->set_output(0, c->Matrix(observe && gradient_moments ? count : 0, kMoments));
      for (int output = 1; output < 4 + kinds; ++output)
        c->set_output(output, c->Matrix(observe ? count : 0, output == 3 ? kJoint : kMoments));
      return absl::OkStatus();
    });
REGISTER_KERNEL_BUILDER(Name("TrainrtUpdate").Device(tf::DEVICE_CPU), UpdateOp);

}  // namespace
}  // namespace trainrt
