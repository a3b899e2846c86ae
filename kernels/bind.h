// What the ops of every device share: attributes and their checks, variables locked, pointers found. With `bind.cc` and
// `bind_gpu.cc` the only files here that see a TensorFlow header.
#pragma once

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels.h"
#include "rules.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"

namespace trainrt {

namespace tf = ::tensorflow;

inline Dtype dtype_of(tf::DataType dtype) {
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

inline Span span_of(const tf::Tensor& tensor) {
  return {dtype_of(tensor.dtype()), tensor.tensor_data().data(), tensor.NumElements()};
}

inline Clip clip_of(const std::string& name, tf::OpKernelConstruction* construction) {
  static const char* const kNames[] = {"", "global_norm", "weight_norm", "largest_magnitude"};
  for (int i = 0; i < 4; ++i)
    if (name == kNames[i]) return static_cast<Clip>(i);
  construction->CtxFailure(invalid("A clip is global_norm, weight_norm, largest_magnitude or none. Received: ", name));
  return Clip::kNone;
}

// [count, columns] of float64, or null if it has no elements.
inline absl::Status table_of(const tf::Tensor& tensor, const char* name, int count, int columns, const double** data) {
  *data = tensor.NumElements() ? tensor.flat<double>().data() : nullptr;
  if (tensor.NumElements() && tensor.NumElements() != int64_t{count} * columns)
    return invalid("`", name, "` has ", columns, " numbers for each of ", count, " weights, or none. Received: ",
                   tensor.NumElements(), ".");
  return absl::OkStatus();
}

inline absl::Status check_sparse(tf::OpKernelConstruction* construction, const std::vector<int>& sparse, int count) {
  int given = 0;
  TF_RETURN_IF_ERROR(construction->GetAttr("A", &given));
  for (const int one : sparse)
    if (one < 0 || one >= count) return invalid("`sparse` names tensor ", one, " of ", count, ".");
  if (static_cast<int>(sparse.size()) != given) return invalid("`indices` has one tensor for each that is `sparse`.");
  return absl::OkStatus();
}

// The rows of a sparse tensor by where they go.
inline absl::Status sorted(const tf::Tensor& values, const tf::Tensor& indices, int64_t height, Rows& rows) {
  const int64_t count = indices.NumElements();
  int64_t width = 1;
  for (int d = 1; d < values.dims(); ++d) width *= values.dim_size(d);
  if (values.dims() < 1 || values.dim_size(0) != count)
    return invalid("A sparse gradient has a row for each of its ", count, " indices. Received: ",
                   values.shape().DebugString());
  if (!rows.sort(indices.flat<tf::int64>().data(), count, height, width))
    return invalid("An index of a sparse gradient is out of its ", height, " rows.");
  return absl::OkStatus();
}

class MeasureBase : public tf::OpKernel {
 public:
  explicit MeasureBase(tf::OpKernelConstruction* construction) : OpKernel(construction) {
    std::string name;
    OP_REQUIRES_OK(construction, construction->GetAttr("clip", &name));
    clip_ = clip_of(name, construction);
    OP_REQUIRES_OK(construction, construction->GetAttr("sparse", &sparse_));
    OP_REQUIRES_OK(construction, construction->GetAttr("heights", &heights_));
    const int count = construction->num_inputs() - static_cast<int>(sparse_.size()) - 1;
    OP_REQUIRES_OK(construction, check_sparse(construction, sparse_, count));
    OP_REQUIRES(construction, heights_.size() == sparse_.size(),
                invalid("TrainrtMeasure takes a height for each tensor that is sparse."));
  }

 protected:
  Clip clip_ = Clip::kNone;
  std::vector<int> sparse_;
  std::vector<tf::int64> heights_;

  double threshold(tf::OpKernelContext* context) const {
    return context->input(context->num_inputs() - 1).scalar<double>()();
  }

  // The tensors and the outputs.
  absl::Status gather(tf::OpKernelContext* context, std::vector<Span>& spans, double** rows, double** scales) {
    const int count = context->num_inputs() - static_cast<int>(sparse_.size()) - 1;
    static thread_local std::vector<Rows> sparse;
    sparse.resize(std::max(sparse.size(), sparse_.size()));
    spans.clear();
    for (int i = 0; i < count; ++i) spans.push_back(span_of(context->input(i)));
    for (size_t k = 0; k < sparse_.size(); ++k) {
      TF_RETURN_IF_ERROR(sorted(context->input(sparse_[k]), context->input(count + k), heights_[k], sparse[k]));
      spans[sparse_[k]].size = sparse[k].width * heights_[k];
      spans[sparse_[k]].rows = &sparse[k];
    }
    tf::Tensor *moments = nullptr, *scale = nullptr;
    TF_RETURN_IF_ERROR(context->allocate_output(0, {count, kMoments}, &moments));
    TF_RETURN_IF_ERROR(context->allocate_output(1, {clip_ == Clip::kNone ? 0 : count}, &scale));
    *rows = moments->flat<double>().data();
    *scales = scale->flat<double>().data();
    return absl::OkStatus();
  }
};

// The inputs of TrainrtObserve that are one number; where they lie depends on the device.
struct ObservedNumbers {
  const double* loss_scale;
  const tf::int64* iterations;
  const bool* skipped;
};

class ObserveBase : public tf::OpKernel {
 public:
  explicit ObserveBase(tf::OpKernelConstruction* construction) : OpKernel(construction) {
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

 protected:
  int count_ = 0, slots_ = 0;
  tf::int64 every_ = 1;
  std::vector<int> momentum_, second_;

  // All pointers of `o`, which those in `spans` are, and the outputs.
  absl::Status gather(tf::OpKernelContext* context, std::vector<Span>& spans, Observe& o, ObservedNumbers& numbers) {
    const int tensors = (3 + slots_) * count_;
    spans.clear();
    for (int i = 0; i < tensors; ++i) {
      spans.push_back(span_of(context->input(i)));
      if (spans.back().size == 0) spans.back().data = nullptr;
    }
    o.count = count_;
    o.slots = slots_;
    o.before = spans.data();
    o.after = o.before + count_;
    o.gradients = o.after + count_;
    o.slot = o.gradients + count_;
    for (int i = 0; i < count_; ++i) {
      if (o.before[i].size != o.after[i].size || o.before[i].dtype != o.after[i].dtype)
        return invalid("TrainrtObserve: weight ", i, " has ", o.before[i].size, " elements before and ",
                       o.after[i].size, " after.");
      const Span* known = nullptr;  // what meets element by element has one size and, but for the weight, one dtype
      for (const int slot : {-1, momentum_[i], second_[i]}) {
        const Span* one = slot < 0 ? o.gradients + i : o.slot + slot * count_ + i;
        if (!one->data) continue;
        if (one->size != o.after[i].size)
          return invalid("TrainrtObserve: weight ", i, " has ", o.after[i].size, " elements, and its gradient, "
                         "momentum or second moment ", one->size, ".");
        if (known && known->dtype != one->dtype)
          return invalid("TrainrtObserve: gradient, momentum and second moment of weight ", i, " differ in dtype.");
        if (slot >= 0 || momentum_[i] >= 0 || second_[i] >= 0) known = one;
      }
    }
    TF_RETURN_IF_ERROR(table_of(context->input(tensors), "measured", count_, kMoments, &o.measured));
    TF_RETURN_IF_ERROR(table_of(context->input(tensors + 1), "scale", count_, 1, &o.scale));
    TF_RETURN_IF_ERROR(table_of(context->input(tensors + 2), "table", count_, 6, &o.table));
    if (!o.table) return invalid("TrainrtObserve: `table` is [", count_, ", 6].");
    numbers = {context->input(tensors + 3).flat<double>().data(), context->input(tensors + 4).flat<tf::int64>().data(),
               context->input(tensors + 5).flat<bool>().data()};
    o.momentum = momentum_.data();
    o.second = second_.data();
    tf::Tensor *cube = nullptr, *joint = nullptr;
    TF_RETURN_IF_ERROR(context->allocate_output(0, {count_, 3 + slots_, kMoments}, &cube));
    TF_RETURN_IF_ERROR(context->allocate_output(1, {count_, kJointColumns}, &joint));
    o.cube = cube->flat<double>().data();
    o.joint = joint->flat<double>().data();
    return absl::OkStatus();
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

// The inputs of TrainrtUpdate that are numbers; where they lie depends on the device. `correction` is an output.
struct UpdateNumbers {
  const tf::int64* iterations;
  const double *learning_rate, *constants;
  double* correction;
};

class UpdateBase : public tf::OpKernel {
 public:
  explicit UpdateBase(tf::OpKernelConstruction* construction) : OpKernel(construction) {
    std::string name;
    std::vector<std::string> prepare;
    OP_REQUIRES_OK(construction, construction->GetAttr("rule", &name));
    OP_REQUIRES_OK(construction, construction->GetAttr("T", &dtype_));
    OP_REQUIRES_OK(construction, construction->GetAttr("N", &count_));
    OP_REQUIRES_OK(construction, construction->GetAttr("M", &slot_count_));
    OP_REQUIRES_OK(construction, construction->GetAttr("F", &factor_count_));
    OP_REQUIRES_OK(construction, construction->GetAttr("S", &scalar_count_));
    OP_REQUIRES_OK(construction, construction->GetAttr("prepare", &prepare));
    OP_REQUIRES_OK(construction, construction->GetAttr("sparse", &sparse_));
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
    std::string known;
    rule_ = find_facts(name, &known);
    OP_REQUIRES(construction, rule_ != nullptr, invalid("TrainrtUpdate knows the rules ", known, ". Received: ", name));
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
    OP_REQUIRES_OK(construction, check_sparse(construction, sparse_, count_));
    OP_REQUIRES(construction, sparse_.empty() || !factor_count_,
                invalid("TrainrtUpdate takes no factors beside sparse gradients."));
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

 protected:
  tf::DataType dtype_;
  int momentum_ = -1, second_ = -1;
  int count_ = 0, slot_count_ = 0, factor_count_ = 0, scalar_count_ = 0;
  std::vector<Prepare> prepare_;
  std::vector<int> decay_, sparse_;
  bool graph_ = true, observe_ = false;
  tf::int64 every_ = 1;
  Clip own_clip_ = Clip::kNone;
  Divides divides_ = Divides::kNot;
  const Facts* rule_ = nullptr;

  // With the variables locked.
  virtual absl::Status run(tf::OpKernelContext* context, Update& u, const UpdateNumbers& numbers) = 0;
  virtual absl::Status copy(tf::OpKernelContext* context, void* to, const void* from, size_t bytes) = 0;

 private:
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
      weight.rows = nullptr;
      const bool sparse = std::find(sparse_.begin(), sparse_.end(), i) != sparse_.end();
      if (weight.gradient && !sparse && gradient.NumElements() != weight.size) {
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
    int input = 2 * count_ + slot_count_;
    static thread_local std::vector<Rows> rows;
    rows.resize(std::max(rows.size(), sparse_.size()));
    for (size_t k = 0; k < sparse_.size(); ++k, ++input) {
      Weight& weight = weights[sparse_[k]];
      const tf::Tensor& values = context->input(count_ + slot_count_ + sparse_[k]);
      const tf::TensorShape& shape = variables[sparse_[k]]->tensor()->shape();
      TF_RETURN_IF_ERROR(sorted(values, context->input(input), shape.dims() ? shape.dim_size(0) : 0, rows[k]));
      if (rows[k].width * shape.dim_size(0) != weight.size)
        return invalid("TrainrtUpdate: weight ", sparse_[k], " has rows of another width than its gradient.");
      weight.gradient = values.NumElements() ? values.tensor_data().data() : static_cast<const void*>(&rows[k]);
      weight.rows = &rows[k];
    }
    Update u = {};
    u.weights = weights.data();
    u.count = count_;
    Factor factors[kMaxFactors];
    u.factors = factors;
    u.factor_count = factor_count_;
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
    UpdateNumbers numbers = {};
    numbers.iterations = context->input(input++).flat<tf::int64>().data();
    numbers.learning_rate = context->input(input++).flat<double>().data();
    TF_RETURN_IF_ERROR(table_of(context->input(input), "constants", 1, kConstants, &numbers.constants));
    if (!numbers.constants) return invalid("TrainrtUpdate: `constants` are ", static_cast<int>(kConstants), " numbers.");
    u.own_clip = own_clip_;
    u.momentum = momentum_;
    u.second = second_;
    u.graph = graph_;
    u.observe = observe_;
    const int seen = observe_ ? count_ : 0;
    tf::Tensor *cube = nullptr, *joint = nullptr, *correction = nullptr;
    TF_RETURN_IF_ERROR(context->allocate_output(0, {seen, 3 + rule_->slots, kMoments}, &cube));
    TF_RETURN_IF_ERROR(context->allocate_output(1, {seen, kJointColumns}, &joint));
    TF_RETURN_IF_ERROR(context->allocate_output(2, {}, &correction));
    u.cube = cube->flat<double>().data();
    u.joint = joint->flat<double>().data();
    numbers.correction = correction->scalar<double>().data();
    return run(context, u, numbers);
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
      tf::Tensor fresh;
      TF_RETURN_IF_ERROR(context->allocate_temp(dtype_, tensor->shape(), &fresh));
      TF_RETURN_IF_ERROR(copy(context, const_cast<char*>(fresh.tensor_data().data()), tensor->tensor_data().data(),
                              tensor->TotalBytes()));
      *tensor = fresh;
    }
    *data = const_cast<char*>(tensor->tensor_data().data());
    return absl::OkStatus();
  }
};

}  // namespace trainrt
