// What torch asks of a backend that is not about tensors: devices, streams, events, allocators.
#pragma once

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "memory.h"

namespace late {
constexpr auto LATE = c10::DeviceType::PrivateUse1;

inline thread_local int current_device = 0;
inline thread_local std::array<int64_t, DEVICES> current_stream_ids{};

inline Stream* current_stream(int device) {
  return streams().get(device, current_stream_ids.at(device));
}

inline Stream* stream_of(const c10::Stream& stream) {
  return streams().get(stream.device_index(), stream.id());
}

inline c10::Stream stream_for_torch(int device, int64_t id) {
  c10::Device where(LATE, static_cast<c10::DeviceIndex>(device));
  return c10::Stream(c10::Stream::UNSAFE, where, id);
}

inline int index_of(c10::Device device) {
  auto index = device.has_index() ? device.index() : current_device;
  TORCH_CHECK(0 <= index && index < DEVICES, "there is no device late:", int(index));
  return index;
}

// What one `record` asked for; a new record replaces the ticket, and who waited keeps the old one.
struct Event {
  std::mutex mutex;
  TicketPtr ticket;

  static TicketPtr ticket_of(void* event) {
    auto* self = static_cast<Event*>(event);
    std::lock_guard lock(self->mutex);
    return self->ticket;
  }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return LATE;
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return DEVICES;
  }
  c10::Device getDevice() const override {
    return {LATE, static_cast<c10::DeviceIndex>(current_device)};
  }
  void setDevice(c10::Device device) const override {
    current_device = index_of(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current_device = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }

  c10::Stream getStream(c10::Device device) const override {
    auto index = index_of(device);
    return stream_for_torch(index, current_stream_ids.at(index));
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return stream_for_torch(index_of(device), 0);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    auto index = index_of(device);
    return stream_for_torch(index, streams().add(index)->id);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = getStream(stream.device());
    current_stream_ids.at(stream.device_index()) = stream.id();
    return before;
  }
  bool queryStream(const c10::Stream& stream) const override {
    return streams().is_idle(stream_of(stream));
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    streams().wait_idle(stream_of(stream));
  }
  void synchronizeDevice(c10::DeviceIndex device) const override {
    streams().wait_device(device);
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    memory().note_use(data.get(), stream_of(stream));
  }

  // torch itself answers for an event that was never recorded: done, and nothing to wait for.
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    auto ticket = streams().push(stream_of(stream), {});
    if (!*event) {
      *event = new Event;
    }
    auto* self = static_cast<Event*>(*event);
    std::lock_guard lock(self->mutex);
    self->ticket = std::move(ticket);
  }
  void block(void* event, const c10::Stream& stream) const override {
    streams().push(stream_of(stream), {{}, Event::ticket_of(event)});
  }
  bool queryEvent(void* event) const override {
    return streams().is_done(Event::ticket_of(event));
  }
  void synchronizeEvent(void* event) const override {
    streams().wait(Event::ticket_of(event));
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
};

inline void free_block(void* context) {
  std::unique_ptr<BlockPtr> block(static_cast<BlockPtr*>(context));
  memory().release(*block);
}

inline c10::DataPtr give(size_t nbytes, Stream* home, c10::Device device) {
  if (nbytes == 0) {
    return {nullptr, device};
  }
  auto block = memory().allocate(nbytes, home);
  return {block->data, new BlockPtr(block), free_block, device};
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    return give(nbytes, current_stream(current_device), Guard().getDevice());
  }
  void copy_data(void* target, const void* source, size_t nbytes) const override {
    default_copy_data(target, source, nbytes);
  }
};

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t nbytes) override {
    return give(nbytes, nullptr, c10::kCPU);
  }
  void copy_data(void* target, const void* source, size_t nbytes) const override {
    default_copy_data(target, source, nbytes);
  }
};

// Never destroyed, as tensors may be freed after everything else.
inline auto* const device_allocator = new DeviceAllocator;
inline auto* const pinned_allocator = new PinnedAllocator;

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return DEVICES;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return static_cast<c10::DeviceIndex>(current_device);
  }
  void setCurrentDevice(c10::DeviceIndex device) const override {
    Guard().setDevice({LATE, device});
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return Guard().exchangeDevice({LATE, device}).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return device < 0 ? getCurrentDevice() : exchangeDevice(device);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return pinned_allocator;
  }
  bool isPinnedPtr(const void* data) const override {
    return memory().is_pinned(data);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    auto data = device_allocator->allocate(nbytes);
    streams().wait_idle(current_stream(current_device));
    std::memcpy(data.get(), storage.data(), std::min(nbytes, storage.nbytes()));
    storage.set_data_ptr(std::move(data));
    storage.set_nbytes(nbytes);
  }
};

}  // namespace late
