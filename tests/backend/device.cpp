// A device that is not the CPU, on host memory: what a vendor's package brings to torch, without a vendor.
//
// It registers with torch as PrivateUse1, the type that is left for devices torch does not know; the Python beside it
// gives it a vendor's name. Tensors on it have memory of their own, which CPU code never sees: every operator copies
// its operands to the CPU, runs there and copies the results back. What is asked of the device is counted.
//
// Work is done when a call returns: streams and events keep what they were told, and nothing runs beside anything.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

namespace {

constexpr c10::DeviceIndex kDevices = 2;
constexpr size_t kMemory = size_t{1} << 31;  // bytes of each
constexpr auto kType = c10::DeviceType::PrivateUse1;

// --- what is counted

struct Counters {
  std::atomic<int64_t> allocations{0}, frees{0}, synchronisations{0}, cache_clears{0}, seeds{0}, fallbacks{0};
  std::atomic<int64_t> streams{0}, events{0}, to_device{0}, from_device{0}, pinned{0}, inits{0};
} counters;

// --- which device is current

thread_local c10::DeviceIndex current = 0;

void set_current(c10::DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < kDevices, "there is no device ", int(index), "; there are ", int(kDevices));
  current = index;
}

c10::DeviceIndex exchange_current(c10::DeviceIndex index) {
  const auto before = current;
  if (index >= 0) {
    set_current(index);
  }
  return before;
}

// --- memory

// Every byte that is lent, by address, with what torch wants to know of a device's memory.
class Ledger {
 public:
  void* take(size_t bytes, c10::DeviceIndex device) {
    const std::lock_guard<std::mutex> hold(lock_);
    auto& stats = stats_[device];
    const auto used = static_cast<size_t>(stats.allocated_bytes[0].current);
    TORCH_CHECK_WITH(
        OutOfMemoryError, used + bytes <= kMemory, "device ", int(device), " has ", kMemory - used, " bytes free, and ",
        bytes, " are asked for");
    void* memory = bytes ? std::malloc(bytes) : nullptr;
    if (memory) {
      std::memset(memory, 0xFF, bytes);  // NaN, for whoever reads what nobody wrote
      lent_[memory] = {bytes, device};
      stats.allocation[0].increase(1);
      for (auto* each : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes}) {
        (*each)[0].increase(bytes);
      }
      ++counters.allocations;
    }
    return memory;
  }

  void give(void* memory) {
    const std::lock_guard<std::mutex> hold(lock_);
    const auto found = lent_.find(memory);
    if (found == lent_.end()) {
      return;
    }
    const auto [bytes, device] = found->second;
    auto& stats = stats_[device];
    stats.allocation[0].decrease(1);
    for (auto* each : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes}) {
      (*each)[0].decrease(bytes);
    }
    ++counters.frees;
    lent_.erase(found);
    std::free(memory);
  }

  c10::CachingDeviceAllocator::DeviceStats stats(c10::DeviceIndex device) {
    const std::lock_guard<std::mutex> hold(lock_);
    return stats_.at(device);
  }

  void reset(c10::DeviceIndex device, bool peak) {
    const std::lock_guard<std::mutex> hold(lock_);
    auto& stats = stats_.at(device);
    for (auto* each : {&stats.allocation, &stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes}) {
      peak ? (*each)[0].reset_peak() : (*each)[0].reset_accumulated();
    }
  }

 private:
  std::mutex lock_;
  std::unordered_map<void*, std::pair<size_t, c10::DeviceIndex>> lent_;
  std::array<c10::CachingDeviceAllocator::DeviceStats, kDevices> stats_;
};

Ledger& ledger() {
  static auto* all = new Ledger();  // never destroyed: tensors may outlive everything
  return *all;
}

void give_back(void* memory) {
  ledger().give(memory);
}

c10::DataPtr lend(size_t bytes) {
  void* memory = ledger().take(bytes, current);
  return {memory, memory, &give_back, c10::Device(kType, current)};
}

// As torch wants it today: torch.accelerator asks it everything.
struct FullAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    return lend(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &give_back;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  bool initialized() override {
    return true;
  }
  void emptyCache(c10::MempoolId_t /*pool*/) override {
    ++counters.cache_clears;
  }
  void recordStream(const c10::DataPtr& /*memory*/, c10::Stream /*stream*/) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    return ledger().stats(device);
  }
  void resetAccumulatedStats(c10::DeviceIndex device) override {
    ledger().reset(device, false);
  }
  void resetPeakStats(c10::DeviceIndex device) override {
    ledger().reset(device, true);
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    return {kMemory - ledger().stats(device).allocated_bytes[0].current, kMemory};
  }
};

// As torch wanted it before: memory and nothing else, so that torch.accelerator's questions about memory raise.
struct BareAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    return lend(bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &give_back;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

c10::Allocator* allocator = nullptr;

// Host memory that the device could copy by itself, if it were one.
class PinnedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? std::malloc(bytes) : nullptr;
    if (memory) {
      const std::lock_guard<std::mutex> hold(lock_);
      lent_[memory] = bytes;
      ++counters.pinned;
    }
    return {memory, memory, &give, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &give;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  bool holds(const void* address) {
    const std::lock_guard<std::mutex> hold(lock_);
    auto after = lent_.upper_bound(const_cast<void*>(address));
    if (after == lent_.begin()) {
      return false;
    }
    --after;
    return address < static_cast<char*>(after->first) + after->second;
  }
  static PinnedAllocator& get() {
    static auto* all = new PinnedAllocator();
    return *all;
  }

 private:
  static void give(void* memory) {
    auto& all = get();
    const std::lock_guard<std::mutex> hold(all.lock_);
    all.lent_.erase(memory);
    std::free(memory);
  }
  std::mutex lock_;
  std::map<void*, size_t> lent_;
};

// --- streams and events

thread_local std::array<c10::StreamId, kDevices> current_stream{};

struct Event {
  std::chrono::steady_clock::time_point at;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return kType;
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    return {kType, exchange_current(device.index())};
  }
  c10::Device getDevice() const override {
    return {kType, current};
  }
  void setDevice(c10::Device device) const override {
    set_current(device.index());
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current = device.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return kDevices;
  }

  c10::Stream getStream(c10::Device device) const override {
    const auto index = device.has_index() ? device.index() : current;
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kType, index), current_stream.at(index));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getNewStream(c10::Device device, int /*priority*/) const override {
    const auto index = device.has_index() ? device.index() : current;
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(kType, index), ++counters.streams);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool /*urgent*/) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto before = getStream(stream.device());
    current_stream.at(stream.device_index()) = stream.id();
    return before;
  }
  bool queryStream(const c10::Stream& /*stream*/) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream& /*stream*/) const override {
    ++counters.synchronisations;
  }
  void synchronizeDevice(const c10::DeviceIndex /*device*/) const override {
    ++counters.synchronisations;
  }

  void record(void** event, const c10::Stream& /*stream*/, const c10::DeviceIndex /*device*/, const c10::EventFlag)
      const override {
    if (!*event) {
      *event = new Event();
      ++counters.events;
    }
    static_cast<Event*>(*event)->at = std::chrono::steady_clock::now();
  }
  void block(void* /*event*/, const c10::Stream& /*stream*/) const override {}
  bool queryEvent(void* /*event*/) const override {
    return true;
  }
  void synchronizeEvent(void* /*event*/) const override {
    ++counters.synchronisations;
  }
  double elapsedTime(void* begin, void* end, const c10::DeviceIndex /*device*/) const override {
    return std::chrono::duration<double, std::milli>(static_cast<Event*>(end)->at - static_cast<Event*>(begin)->at)
        .count();
  }
  void destroyEvent(void* event, const c10::DeviceIndex /*device*/) const noexcept override {
    delete static_cast<Event*>(event);
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// --- random numbers

// Draws as the CPU's generator does; its seed is the device's own.
struct DeviceGenerator final : at::CPUGeneratorImpl {
  explicit DeviceGenerator(c10::DeviceIndex index) {
    device_ = c10::Device(kType, index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
  void set_current_seed(uint64_t seed) override {
    ++counters.seeds;
    at::CPUGeneratorImpl::set_current_seed(seed);
  }
};

at::Generator& default_generator(c10::DeviceIndex index) {
  static auto* all = new std::array<at::Generator, kDevices>{
      at::make_generator<DeviceGenerator>(c10::DeviceIndex{0}), at::make_generator<DeviceGenerator>(c10::DeviceIndex{1})};
  return all->at(index < 0 ? current : index);
}

// --- what torch asks of a device

struct Hooks final : at::PrivateUse1HooksInterface {
  void init() const override {
    ++counters.inits;
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex /*device*/) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return kDevices;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return current;
  }
  void setCurrentDevice(c10::DeviceIndex device) const override {
    set_current(device);
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return exchange_current(device);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return exchange_current(device);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override {
    return default_generator(device);
  }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return at::make_generator<DeviceGenerator>(device < 0 ? current : device);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &PinnedAllocator::get();
  }
  bool isPinnedPtr(const void* address) const override {
    return PinnedAllocator::get().holds(address);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    const c10::Device device = storage.device();
    const auto before = exchange_current(device.index());
    auto fresh = lend(bytes);
    if (storage.data() && fresh.get()) {
      std::memcpy(fresh.get(), storage.data(), std::min(bytes, storage.nbytes()));
    }
    storage.unsafeGetStorageImpl()->set_data_ptr(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
    exchange_current(before);
  }
};

// --- operators that are the device's own: memory, views and copies

struct OnDevice {
  explicit OnDevice(std::optional<c10::Device> device)
      : before(exchange_current(device && device->has_index() ? device->index() : c10::DeviceIndex{-1})) {}
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() {
    current = before;
  }
  c10::DeviceIndex before;
};

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

at::Tensor empty(
    c10::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout> /*layout*/,
    std::optional<c10::Device> device, std::optional<bool> /*pin*/, std::optional<at::MemoryFormat> format) {
  const OnDevice on(device);
  return at::detail::empty_generic(sizes, allocator, kKeys, dtype.value_or(at::kFloat), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> /*layout*/, std::optional<c10::Device> device, std::optional<bool> /*pin*/) {
  const OnDevice on(device);
  return at::detail::empty_strided_generic(sizes, strides, allocator, kKeys, dtype.value_or(at::kFloat));
}

// The same bytes as a tensor of the CPU's: only copies look at the device's memory so.
at::Tensor bytes_of(const at::Tensor& tensor) {
  if (tensor.is_cpu()) {
    return tensor;
  }
  return at::from_blob(
      tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU).requires_grad(false));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool /*non_blocking*/) {
  ++(to.is_cpu() ? counters.from_device : counters.to_device);
  at::NoGradGuard no_grad;
  auto target = bytes_of(to);
  auto source = bytes_of(from);
  if (from.is_conj() != to.is_conj()) {
    source = source.conj_physical();
  }
  if (from.is_neg() != to.is_neg()) {
    source = source.neg();
  }
  target.copy_(source);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  const_cast<at::Tensor&>(to).resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Tensor as_strided(
    const at::Tensor& self, c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, sizes, strides, offset);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef sizes) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(sizes));
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
}

const at::Tensor& resize(
    const at::Tensor& self, c10::SymIntArrayRef sizes, std::optional<at::MemoryFormat> /*format*/) {
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(sizes));
  const auto bytes = (tensor->numel() + tensor->storage_offset()) * tensor->itemsize();
  if (bytes > tensor->storage().nbytes()) {
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(tensor->storage(), bytes);
  }
  return self;
}

at::Tensor& set_storage(
    at::Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  return at::native::set_storage_cpu_(self, std::move(storage), offset, sizes, strides);
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  const auto count = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return at::native::set_storage_cpu_(self, std::move(storage), 0, {count}, {});
}

// Operands of an operator that runs on the CPU, with their strides: kernels for other strides may round otherwise.
std::vector<at::Tensor> to_cpu(at::TensorList tensors) {
  std::vector<at::Tensor> copies;
  for (const auto& tensor : tensors) {
    if (!tensor.defined() || tensor.is_cpu()) {
      copies.push_back(tensor);
      continue;
    }
    ++counters.from_device;
    auto copy = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
    std::memcpy(copy.data_ptr(), tensor.data_ptr(), copy.storage().nbytes());
    copies.push_back(copy);
  }
  return copies;
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("_to_cpu", to_cpu);
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("resize_", resize);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Storage", set_whole_storage);
}

// --- all others, on the CPU

// The CPU's kernels draw from the CPU's generators only: one in the state of the device's draws for it.
void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  ++counters.fallbacks;
  at::Generator own;
  at::Generator drawing;
  for (auto& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (argument.isGenerator() && argument.toGenerator().device().type() == kType) {
      own = argument.toGenerator();
      drawing = at::detail::createCPUGenerator();
      drawing.set_state(own.get_state());
      const_cast<c10::IValue&>(argument) = drawing;
    }
  }
  at::native::cpu_fallback(op, stack);
  if (own.defined()) {
    own.set_state(drawing.get_state());
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  // Which torch, for a device without a kernel, takes apart into others that round otherwise.
  library.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}

// --- autocast, of the products that a transformer has

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {  // the macro's name for it
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
}

std::map<std::string, int64_t> counted() {
  return {
      {"allocations", counters.allocations},
      {"cache_clears", counters.cache_clears},
      {"events", counters.events},
      {"fallbacks", counters.fallbacks},
      {"frees", counters.frees},
      {"from_device", counters.from_device},
      {"inits", counters.inits},
      {"pinned", counters.pinned},
      {"seeds", counters.seeds},
      {"streams", counters.streams},
      {"synchronisations", counters.synchronisations},
      {"to_device", counters.to_device},
  };
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  // `full`: whether the allocator answers torch.accelerator's questions too.
  module.def("start", [](bool full) {
    allocator = full ? static_cast<c10::Allocator*>(new FullAllocator()) : new BareAllocator();
    c10::SetAllocator(kType, allocator);
    at::RegisterPrivateUse1HooksInterface(new Hooks());
  });
  module.def("counted", &counted);
  module.def("count", [] { return int(kDevices); });
  module.def("current", [] { return int(current); });
  module.def("set_current", [](int index) { set_current(static_cast<c10::DeviceIndex>(index)); });
  module.def("exchange_current", [](int index) { return int(exchange_current(static_cast<c10::DeviceIndex>(index))); });
  module.def("synchronize", [] { ++counters.synchronisations; });
  module.def("empty_cache", [] { ++counters.cache_clears; });
  module.def("init", [] { ++counters.inits; });
  module.def("allocated", [](int device) { return ledger().stats(device).allocated_bytes[0].current; });
  module.def("peak", [](int device) { return ledger().stats(device).allocated_bytes[0].peak; });
  module.def("reset_peak", [](int device) { ledger().reset(static_cast<c10::DeviceIndex>(device), true); });
  module.def("memory", [] { return kMemory; });
  module.def("random_state", [](int device) {
    return default_generator(static_cast<c10::DeviceIndex>(device)).get_state();
  });
  module.def("set_random_state", [](int device, const at::Tensor& state) {
    default_generator(static_cast<c10::DeviceIndex>(device)).set_state(state);
  });
  module.def("seed", [](int device, uint64_t seed) {
    default_generator(static_cast<c10::DeviceIndex>(device)).set_current_seed(seed);
  });
}
