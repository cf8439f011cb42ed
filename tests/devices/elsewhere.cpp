// A device "elsewhere" whose memory is the host's: every operation falls back to the CPU's kernel. For the tests.
//
// As on a GPU, tensors of the CPU and of the device do not mix, a copy to the host that does not block has no values
// before somebody waits for the device, and the device draws from a generator of its own. Each wait is counted.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <functional>
#include <limits>
#include <set>
#include <vector>

using at::Tensor;
using Sizes = c10::IntArrayRef;
using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Where = std::optional<at::Device>;
using Flag = std::optional<bool>;

namespace at::autocast {
TORCH_API Tensor cached_cast(at::ScalarType to_type, const Tensor& arg, DeviceType device_type);
TORCH_API at::ScalarType get_autocast_dtype(at::DeviceType device_type);
} // namespace at::autocast

namespace {

const at::Device HERE(at::DeviceType::PrivateUse1, 0);

bool is_here(const Tensor& t) { return t.defined() && t.device().type() == HERE.type(); }

// ---- memory ----

struct Allocator final : at::Allocator {
  static void release(void* p) { free(p); }
  at::DataPtr allocate(size_t n) override {
    void* p = n ? aligned_alloc(64, (n + 63) / 64 * 64) : nullptr;
    return {p, p, &release, HERE};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t n) const override { default_copy_data(to, from, n); }
};
Allocator allocator;
REGISTER_ALLOCATOR(at::DeviceType::PrivateUse1, &allocator);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr at::DeviceType static_type = at::DeviceType::PrivateUse1;
  at::DeviceType type() const override { return static_type; }
  at::Device exchangeDevice(at::Device) const override { return HERE; }
  at::Device getDevice() const override { return HERE; }
  void setDevice(at::Device) const override {}
  void uncheckedSetDevice(at::Device) const noexcept override {}
  c10::Stream getStream(at::Device) const override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  c10::Stream getDefaultStream(at::Device d) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---- random numbers ----

struct Draws : at::CPUGeneratorImpl {
  Draws() {
    device_ = HERE;
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};
at::Generator own_draws = at::make_generator<Draws>();

struct Hooks : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(at::DeviceType::CPU); }
  at::Device getDeviceFromPtr(void*) const override { return HERE; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return own_draws; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Draws>(); }
  void resizePrivateUse1Bytes(const at::Storage& storage, size_t n) const override {
    auto* impl = storage.unsafeGetStorageImpl();
    at::DataPtr data = allocator.allocate(n);
    if (impl->data() && n) memcpy(data.get(), impl->data(), std::min(n, (size_t)impl->nbytes()));
    impl->set_data_ptr_noswap(std::move(data));
    impl->set_nbytes(n);
  }
};
Hooks hooks;
const bool is_registered = [] { at::RegisterPrivateUse1HooksInterface(&hooks); return true; }();

// ---- waiting ----

int64_t waits = 0;
thread_local bool is_computing = false; // what the fallback copies is no copy of the program's
std::vector<std::function<void()>> on_their_way; // copies to the host that nobody has waited for

void arrive() {
  for (auto& copy : on_their_way) copy();
  on_their_way.clear();
}
void wait() {
  if (is_computing) return;
  waits++;
  arrive();
}

// the same memory, seen by the CPU
Tensor on_cpu(const Tensor& t) {
  if (!is_here(t)) return t;
  return at::from_blob(t.data_ptr(), t.sizes(), t.strides(), [t](void*) {}, at::TensorOptions().dtype(t.dtype()));
}

Tensor copy_from(const Tensor& self, const Tensor& dst, bool non_blocking) {
  if (is_here(self) && !is_here(dst) && non_blocking && !is_computing) {
    Tensor values = on_cpu(self).clone();
    on_their_way.push_back([values, dst] { Tensor d = dst; d.copy_(values); });
    Tensor d = dst;
    if (d.is_floating_point()) d.fill_(std::numeric_limits<double>::quiet_NaN());
    else d.zero_();
    return dst;
  }
  if (is_here(self) != is_here(dst)) non_blocking ? arrive() : wait();
  Tensor d = on_cpu(dst);
  d.copy_(on_cpu(self));
  return dst;
}
Tensor copy_from_and_resize(const Tensor& self, const Tensor& dst) {
  dst.resize_(self.sizes());
  return copy_from(self, dst, false);
}
at::Scalar local_scalar(const Tensor& t) {
  wait();
  return on_cpu(t).item();
}

// ---- operations ----

// their results' sizes, or what they return, are values of the device
const std::set<std::string> WAITING = {
    "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave"};
// these take indices from the CPU too
const std::set<std::string> INDEXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"};

void check(const Tensor& t, bool in_list, const std::string& name) {
  bool is_number = t.defined() && t.is_cpu() && t.dim() == 0 && !in_list;
  TORCH_CHECK(!t.defined() || is_here(t) || is_number,
      "Expected all tensors to be on the same device, but ", name, " found one on ", t.device(), " and ", HERE);
}

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const std::string& name = op.schema().name();
  const size_t first = stack->size() - arguments.size();
  if (WAITING.count(name)) wait();
  at::Generator drawing, lent;
  for (size_t i = 0; i < arguments.size(); i++) {
    c10::IValue& value = (*stack)[first + i];
    if (value.isTensor() && !INDEXING.count(name)) check(value.toTensor(), false, name);
    if (value.isTensorList()) for (const Tensor& t : value.toTensorVector()) check(t, true, name);
    if (value.isOptionalTensorList())
      for (const auto& t : value.toOptionalTensorVector())
        if (t && is_here(*t) && (t->scalar_type() == at::kBool || t->scalar_type() == at::kByte)) wait();
    if (arguments[i].name() == "generator" && (value.isNone() || value.toGenerator().device() == HERE)) {
      drawing = value.isNone() ? own_draws : value.toGenerator();
      lent = at::detail::createCPUGenerator();
      lent.set_state(drawing.get_state());
      value = c10::IValue(lent);
    }
  }
  is_computing = true;
  try {
    at::native::cpu_fallback(op, stack);
  } catch (...) {
    is_computing = false;
    throw;
  }
  is_computing = false;
  if (lent.defined()) drawing.set_state(lent.get_state());
}

std::tuple<Tensor, Tensor> dropout(const Tensor& input, double p, Flag is_training) {
  if (!is_training.value_or(true)) return {input.clone(), at::empty_like(input, at::kBool).fill_(1)};
  Tensor mask = at::empty_like(input, at::kBool).bernoulli_(1 - p);
  return {input.mul(mask).mul(p == 1 ? 0. : 1 / (1 - p)), mask};
}
Tensor dropout_backward(const Tensor& gradient, const Tensor& mask, double scale) {
  return gradient.mul(mask).mul(scale);
}

// its schema does not say that it writes the running statistics
std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& input, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& mean, const std::optional<Tensor>& variance,
    bool is_training, double momentum, double eps) {
  auto seen = [](const std::optional<Tensor>& t) { return t && t->defined() ? std::make_optional(on_cpu(*t)) : t; };
  auto [a, b, c] = at::native_batch_norm(on_cpu(input), seen(weight), seen(bias), seen(mean), seen(variance),
      is_training, momentum, eps);
  return {a.to(HERE, true), b.to(HERE, true), c.to(HERE, true)};
}
Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Sizes stride,
    Sizes padding, Sizes dilation, bool transposed, Sizes output_padding, int64_t groups) {
  std::optional<Tensor> b = bias && bias->defined() ? std::make_optional(on_cpu(*bias)) : std::nullopt;
  return at::convolution(on_cpu(input), on_cpu(weight), b, stride, padding, dilation, transposed, output_padding,
      groups).to(HERE, true);
}
std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& gradient, const Tensor& input,
    const Tensor& weight, Sizes stride, Sizes padding, Sizes dilation, bool transposed, Sizes output_padding,
    int64_t groups, std::array<bool, 3> mask) {
  auto [a, b, c] = at::convolution_backward(on_cpu(gradient), on_cpu(input), on_cpu(weight),
      at::OptionalIntArrayRef(c10::IntArrayRef({weight.size(transposed ? 1 : 0)})), stride, padding, dilation,
      transposed, output_padding, groups, mask);
  auto back = [](const Tensor& t) { return t.defined() ? t.to(HERE, true) : t; };
  return {back(a), back(b), back(c)};
}

Tensor empty(Sizes size, Dtype dtype, Layout, Where, Flag, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(Sizes size, Sizes stride, Dtype dtype, Layout, Where, Flag) {
  return at::detail::empty_strided_generic(size, stride, &allocator,
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

// ---- autocast: casts float32, and keeps the casts of leaves, as the built-in devices do ----

void in_precision(at::ScalarType dtype, const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard once(c10::DispatchKey::AutocastPrivateUse1);
  const size_t first = stack->size() - op.schema().arguments().size();
  for (size_t i = first; i < stack->size(); i++) {
    c10::IValue& value = (*stack)[i];
    if (value.isTensor() && value.toTensor().defined())
      value = at::autocast::cached_cast(dtype, value.toTensor(), HERE.type());
  }
  op.callBoxed(stack);
}
void in_lower_precision(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  in_precision(at::autocast::get_autocast_dtype(HERE.type()), op, stack);
}
void in_float(const c10::OperatorHandle& op, torch::jit::Stack* stack) { in_precision(at::kFloat, op, stack); }

} // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("native_dropout", &dropout);
  m.impl("native_dropout_backward", &dropout_backward);
  m.impl("native_batch_norm", &batch_norm);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  // for who asks whether the device has it
  m.impl("_fused_sgd_.tensor_lr", torch::CppFunction::makeFromBoxedFunction<&compute>());
  m.impl("as_strided", [](const Tensor& t, Sizes size, Sizes stride, std::optional<int64_t> offset) {
    return at::native::as_strided_tensorimpl(t, size, stride, offset);
  });
  m.impl("view", [](const Tensor& t, Sizes size) { return at::native::view(t, size); });
  m.impl("_reshape_alias", [](const Tensor& t, Sizes size, Sizes stride) {
    return at::native::_reshape_alias(t, size, stride);
  });
  m.impl("unfold", [](const Tensor& t, int64_t dim, int64_t size, int64_t step) {
    return at::native::unfold(t, dim, size, step);
  });
  m.impl("set_.source_Storage", [](Tensor& t, at::Storage s) -> Tensor& { return at::native::set_(t, s); });
  m.impl("set_.source_Storage_storage_offset",
      [](Tensor& t, at::Storage s, int64_t offset, Sizes size, Sizes stride) -> Tensor& {
        return at::native::set_storage_cpu_(t, s, offset, size, stride);
      });
  m.impl("resize_", [](const Tensor& t, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) -> const Tensor& {
    auto* impl = t.unsafeGetTensorImpl();
    impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
    size_t n = (impl->numel() + impl->storage_offset()) * impl->itemsize();
    if (n > impl->storage().nbytes()) hooks.resizePrivateUse1Bytes(impl->storage(), n);
    return t;
  });
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  for (const char* name : {"matmul", "linear", "addmm", "mm", "bmm", "conv2d", "scaled_dot_product_attention"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&in_lower_precision>());
  m.impl("layer_norm", torch::CppFunction::makeFromBoxedFunction<&in_float>());
}

TORCH_LIBRARY(elsewhere, m) {
  m.def("waits() -> int", [] { return waits; });
  m.def("synchronize() -> ()", [] { arrive(); });
  m.def("rng_state() -> Tensor", [] { return own_draws.get_state(); });
  m.def("set_rng_state(Tensor state) -> ()", [](const Tensor& state) { own_draws.set_state(state); });
  m.def("seed(int seed) -> ()", [](int64_t seed) { own_draws.set_current_seed(seed); });
}
