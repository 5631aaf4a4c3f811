// The late device for torch: a PrivateUse1 backend over host memory whose streams run late.
// This file has its operators, its registration, and what tests turn (build.py calls it by ctypes).
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "backend.h"

namespace late {
namespace {

// The memory of a tensor as one of the CPU, which a worker may use after the tensor is gone. It
// does so below the dispatch that is for users: an alias may be made in inference mode, and a
// worker is in none.
struct Alias {
  void* data;
  std::vector<int64_t> sizes, strides;
  at::TensorOptions options;
  BlockPtr block;  // null if it is plain host memory

  explicit Alias(const at::Tensor& tensor)
      : data(const_cast<void*>(tensor.const_data_ptr())),
        sizes(tensor.sizes().vec()),
        strides(tensor.strides().vec()),
        options(at::TensorOptions(at::kCPU).dtype(tensor.scalar_type())),
        block(memory().find(data)) {
    TORCH_CHECK(!tensor.is_conj() && !tensor.is_neg(), "the late device copies no lazy views");
  }
  at::Tensor tensor() const {
    return at::from_blob(data, sizes, strides, options);
  }
};

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device> device,
                 std::optional<bool> pinned, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pinned.value_or(false), "only memory of the CPU can be pinned");
  c10::DeviceGuard guard(c10::Device(LATE, index_of(c10::device_or_default(device))));
  return at::detail::empty_generic(size, device_allocator,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(c10::Device(LATE, index_of(c10::device_or_default(device))));
  return at::detail::empty_strided_generic(size, stride, device_allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

// Asynchronous where CUDA's is: between device memory, and from or to pinned memory if asked to.
at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  auto& ours = source.is_privateuseone() ? source : target;
  auto& other = source.is_privateuseone() ? target : source;
  TORCH_CHECK(other.is_cpu() || other.device() == ours.device(),
              "the late device copies within one device, and from and to the CPU");
  Alias from(source.expand(target.sizes())), to(target);
  if (target.numel() == 0) {
    return target;
  }
  auto* stream = current_stream(ours.device().index());
  auto ticket = streams().push(stream, {[from, to] {
    at::AutoDispatchBelowADInplaceOrView guard;
    to.tensor().copy_(from.tensor());
  }});
  if (other.is_cpu() && !(non_blocking && memory().is_pinned(other.const_data_ptr()))) {
    streams().wait(ticket);
  }
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  at::native::resize_(target, source.sizes());
  return copy_from(source, target, false);
}

at::Tensor& fill(at::Tensor& self, const at::Scalar& value) {
  Alias to(self);
  if (self.numel() != 0) {
    streams().push(current_stream(self.device().index()), {[to, value] {
      at::AutoDispatchBelowADInplaceOrView guard;
      to.tensor().fill_(value);
    }});
  }
  return self;
}

at::Tensor& zero(at::Tensor& self) {
  return fill(self, 0);
}

void record_stream(at::Tensor& self, c10::Stream stream) {
  memory().note_use(self.storage().data(), stream_of(stream));
}

// All else: in the order of the current stream, and done when it returns.
void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

struct Registration {
  Registration() {
    c10::SetAllocator(LATE, device_allocator);
    at::RegisterPrivateUse1HooksInterface(new Hooks);
  }
} registration;

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("fill_.Scalar", fill);
  m.impl("zero_", zero);
  m.impl("record_stream", record_stream);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

}  // namespace
}  // namespace late

extern "C" {
void late_set_allowance(int64_t stream_id, int64_t items) {
  late::streams().set_allowance(stream_id, items);
}
void late_fail_allocations(int64_t device, int64_t pinned) {
  late::memory().failing = device;
  late::memory().failing_pinned = pinned;
}
void late_set_lost(bool lost) {
  late::streams().set_lost(lost);
}
void late_end() {
  late::streams().end();
}
int64_t late_pending() {
  return late::streams().pending();
}
}
