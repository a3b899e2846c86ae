// The TensorFlow ops: the only file here that sees a TensorFlow header. It checks shapes, locks variables, finds the
// pointers, and leaves the rest to `kernels.h`.
#include <algorithm>
#include <cmath>
#include <iterator>
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
constexpr int kConstants = 6;

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

Clip clip_of(const std::string& name, tf::OpKernelConstruction* construction) {
  static const char* const kNames[] = {"", "global_norm", "weight_norm", "largest_magnitude"};
  for (int i = 0; i < 4; ++i)
    if (name == kNames[i]) return static_cast<Clip>(i);
  construction->CtxFailure(invalid("A clip is global_norm, weight_norm, largest_magnitude or none. Received: ", name));
  return Clip::kNone;
}

// [count, columns] of float64, or null if it has no elements.
absl::Status table_of(const tf::Tensor& tensor, const char* name, int count, int columns, const double** data) {
  *data = tensor.NumElements() ? tensor.flat<double>().data() : nullptr;
  if (tensor.NumElements() && tensor.NumElements() != int64_t{count} * columns)
    return invalid("`", name, "` has ", columns, " numbers for each of ", count, " weights, or none. Received: ",
                   tensor.NumElements(), ".");
  return absl::OkStatus();
}

class MeasureOp : public tf::OpKernel {
 public:
  explicit MeasureOp(tf::OpKernelConstruction* construction) : OpKernel(construction) {
    std::string name;
    OP_REQUIRES_OK(construction, construction->GetAttr("clip", &name));
    clip_ = clip_of(name, construction);
  }
  void Compute(tf::OpKernelContext* context) override {
    static thread_local std::vector<Span> spans;
    const int count = context->num_inputs() - 1;
    spans.clear();
    for (int i = 0; i < count; ++i) spans.push_back(span_of(context->input(i)));
    tf::Tensor *rows = nullptr, *scale = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, {count, kMoments}, &rows));
    measure(spans.data(), count, rows->flat<double>().data(), parallel_on(context));
    const bool clips = clip_ != Clip::kNone;
    OP_REQUIRES_OK(context, context->allocate_output(1, {clips ? count : 0}, &scale));
    if (clips)
      clip(clip_, context->input(count).scalar<double>()(), rows->flat<double>().data(), count,
           scale->flat<double>().data());
  }

 private:
  Clip clip_ = Clip::kNone;
};

class ObserveOp : public tf::OpKernel {
 public:
  explicit ObserveOp(tf::OpKernelConstruction* construction) : OpKernel(construction) {
    std::vector<tf::DataType> weights, slots;  // two, as an empty list leaves its vector as it was
    OP_REQUIRES_OK(construction, construction->GetAttr("T", &weights));
    OP_REQUIRES_OK(construction, construction->GetAttr("Q", &slots));
    count_ = static_cast<int>(weights.size());
    slots_ = static_cast<int>(slots.size()) / count_;
    OP_REQUIRES_OK(construction, construction->GetAttr("momentum", &momentum_));
    OP_REQUIRES_OK(construction, construction->GetAttr("second", &second_));
    OP_REQUIRES_OK(construction, construction->GetAttr("every", &every_));
    const auto fits = [&](const std::vector<int>& which) {
      return static_cast<int>(which.size()) == count_ && *std::max_element(which.begin(), which.end()) < slots_;
    };
    OP_REQUIRES(construction,
                fits(momentum_) && fits(second_) && static_cast<int>(slots.size()) == slots_ * count_ && every_ >= 1,
                invalid("TrainrtObserve takes as many slots for each weight, and for each weight which of them is the "
                        "momentum and which the second moment."));
  }
  void Compute(tf::OpKernelContext* context) override {
    static thread_local std::vector<Span> spans;
    const int tensors = (3 + slots_) * count_;
    spans.clear();
    for (int i = 0; i < tensors; ++i) {
      spans.push_back(span_of(context->input(i)));
      if (spans.back().size == 0) spans.back().data = nullptr;
    }
    Observe o = {};
    o.count = count_;
    o.slots = slots_;
    o.before = spans.data();
    o.after = o.before + count_;
    o.gradients = o.after + count_;
    o.slot = o.gradients + count_;
    for (int i = 0; i < count_; ++i) {
      OP_REQUIRES(context, o.before[i].size == o.after[i].size && o.before[i].dtype == o.after[i].dtype,
                  invalid("TrainrtObserve: weight ", i, " has ", o.before[i].size, " elements before and ",
                          o.after[i].size, " after."));
      const Span* known = nullptr;  // what meets element by element has one size and, but for the weight, one dtype
      for (const int slot : {-1, momentum_[i], second_[i]}) {
        const Span* one = slot < 0 ? o.gradients + i : o.slot + slot * count_ + i;
        if (!one->data) continue;
        OP_REQUIRES(context, one->size == o.after[i].size,
                    invalid("TrainrtObserve: weight ", i, " has ", o.after[i].size, " elements, and its gradient, "
                            "momentum or second moment ", one->size, "."));
        OP_REQUIRES(context, !known || known->dtype == one->dtype,
                    invalid("TrainrtObserve: gradient, momentum and second moment of weight ", i, " differ in dtype."));
        if (slot >= 0 || momentum_[i] >= 0 || second_[i] >= 0) known = one;
      }
    }
    OP_REQUIRES_OK(context, table_of(context->input(tensors), "measured", count_, kMoments, &o.measured));
    OP_REQUIRES_OK(context, table_of(context->input(tensors + 1), "scale", count_, 1, &o.scale));
    OP_REQUIRES_OK(context, table_of(context->input(tensors + 2), "table", count_, 6, &o.table));
    OP_REQUIRES(context, o.table, invalid("TrainrtObserve: `table` is [", count_, ", 6]."));
    o.loss_scale = context->input(tensors + 3).scalar<double>()();
    o.slots_due = slots_due(context->input(tensors + 4).scalar<tf::int64>()(), every_);
    o.skipped = context->input(tensors + 5).scalar<bool>()();
    o.momentum = momentum_.data();
    o.second = second_.data();
    tf::Tensor *cube = nullptr, *joint = nullptr;
    OP_REQUIRES_OK(context, context->allocate_output(0, {count_, 3 + slots_, kMoments}, &cube));
    OP_REQUIRES_OK(context, context->allocate_output(1, {count_, kJointColumns}, &joint));
    o.cube = cube->flat<double>().data();
    o.joint = joint->flat<double>().data();
    observe(o, parallel_on(context));
  }

 private:
  int count_ = 0, slots_ = 0;
  tf::int64 every_ = 1;
  std::vector<int> momentum_, second_;
};

// How an optimizer divides, in terms of Keras's `update_step`: the twin of `trainrt/adaptive.py`.
enum class Divides : int { kNot = 0, kAdam = 1, kNadam = 2, kInside = 3 };

Division division_of(Divides how, int64_t iterations, double rate, double beta_1, double beta_2, double epsilon) {
  Division d;
  if (how == Divides::kInside) {
    d.inside = d.floor = epsilon;
    d.rate = rate;
    d.correction = 1;
  } else if (how != Divides::kNot) {
    const double steps = static_cast<double>(iterations + 1);
    d.correction = 1 - std::pow(beta_2, steps);
    const double root = std::sqrt(d.correction);
    d.rate = rate * root;
    d.outside = epsilon;
    if (how == Divides::kAdam) d.rate /= 1 - std::pow(beta_1, steps);
    if (how == Divides::kNadam) d.outside *= root;
    d.floor = d.outside * d.outside;
  }
  return d;
}

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
    OP_REQUIRES_OK(construction, construction->GetAttr("prepare", &prepare));
    OP_REQUIRES_OK(construction, construction->GetAttr("decay", &decay_));
    OP_REQUIRES_OK(construction, construction->GetAttr("graph", &graph_));
    OP_REQUIRES_OK(construction, construction->GetAttr("observe", &observe_));
    OP_REQUIRES_OK(construction, construction->GetAttr("every", &every_));
    std::string own_clip, divides;
    OP_REQUIRES_OK(construction, construction->GetAttr("own_clip", &own_clip));
    own_clip_ = clip_of(own_clip, construction);
    OP_REQUIRES_OK(construction, construction->GetAttr("divides", &divides));
    static const char* const kDivides[] = {"", "adam", "nadam", "inside"};
    const auto* at = std::find(std::begin(kDivides), std::end(kDivides), divides);
    OP_REQUIRES(construction, at != std::end(kDivides),
                invalid("TrainrtUpdate divides as adam, nadam, inside or not. Received: ", divides));
    divides_ = static_cast<Divides>(at - std::begin(kDivides));
    OP_REQUIRES_OK(construction, construction->GetAttr("momentum", &momentum_));
    OP_REQUIRES_OK(construction, construction->GetAttr("second", &second_));
    rule_ = find_rule(name);
    OP_REQUIRES(construction, rule_ != nullptr,
                invalid("TrainrtUpdate knows the rules ", rule_names(), ". Received: ", name));
    OP_REQUIRES(construction, momentum_ < rule_->slots && second_ < rule_->slots,
                invalid("TrainrtUpdate: rule ", name, " has ", rule_->slots, " slots. Received: momentum=", momentum_,
                        ", second=", second_, "."));
    bool decays = false;
    for (const int one : decay_) decays = decays || one != static_cast<int>(Decay::kNone);
    OP_REQUIRES(construction,
                slot_count_ == count_ * rule_->slots &&
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
  int momentum_ = -1, second_ = -1;
  int count_ = 0, slot_count_ = 0, factor_count_ = 0, scalar_count_ = 0;
  std::vector<Prepare> prepare_;
  std::vector<int> decay_;
  bool graph_ = true, observe_ = false;
  tf::int64 every_ = 1;
  Clip own_clip_ = Clip::kNone;
  Divides divides_ = Divides::kNot;
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
    TF_RETURN_IF_ERROR(table_of(context->input(input++), "measured", count_, kMoments, &u.measured));
    TF_RETURN_IF_ERROR(table_of(context->input(input++), "scale", count_, 1, &u.scale));
    const int64_t iterations = context->input(input++).scalar<tf::int64>()();
    const double rate = context->input(input++).scalar<double>()();
    const double* constants = nullptr;
    TF_RETURN_IF_ERROR(table_of(context->input(input), "constants", 1, kConstants, &constants));
    if (!constants) return invalid("TrainrtUpdate: `constants` are ", kConstants, " numbers.");
    u.division = division_of(divides_, iterations, rate, constants[0], constants[1], constants[2]);
    u.decay = rate * constants[3];
    u.loss_scale = constants[4];
    u.own_clip = own_clip_;
    u.own_threshold = constants[5];
    u.momentum = momentum_;
    u.second = second_;
    u.slots_due = observe_ && slots_due(iterations, every_);
    u.graph = graph_;
    u.observe = observe_;
    const int seen = observe_ ? count_ : 0;
    tf::Tensor *cube = nullptr, *joint = nullptr, *correction = nullptr;
    TF_RETURN_IF_ERROR(context->allocate_output(0, {seen, 3 + rule_->slots, kMoments}, &cube));
    TF_RETURN_IF_ERROR(context->allocate_output(1, {seen, kJointColumns}, &joint));
    TF_RETURN_IF_ERROR(context->allocate_output(2, {}, &correction));
    u.cube = cube->flat<double>().data();
    u.joint = joint->flat<double>().data();
    correction->scalar<double>()() = u.division.correction;
    trainrt::update(*rule_, dtype_of(dtype_), u, parallel_on(context));
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

REGISTER_OP("TrainrtMeasure")
    .Input("tensors: T")
    .Input("threshold: double")
    .Output("moments: double")
    .Output("scale: double")
    .Attr("T: list({float, double, bfloat16, half}) >= 1")
    .Attr("clip: string")
    .SetShapeFn([](tf::shape_inference::InferenceContext* c) {
      const int64_t count = c->num_inputs() - 1;
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
    .Attr("F: int >= 0")
    .Attr("S: int >= 0")
    .Attr("rule: string")
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
