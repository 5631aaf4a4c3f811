// Streams that do their work later than it was asked for. Knows nothing of tensors.
#pragma once

#include <c10/util/Exception.h>

#include <array>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace late {

constexpr int DEVICES = 2;
constexpr int32_t OUT_OF_MEMORY = 2, DEVICE_LOST = 719;  // the numbers that CUDA gives them

[[noreturn]] inline void fail(int32_t code, const char* what) {
  throw c10::AcceleratorError({__func__, __FILE__, __LINE__}, code, what);
}

// Stands for one item of work: done once it has run, or was dropped.
struct Ticket {
  bool done = false;
};
using TicketPtr = std::shared_ptr<Ticket>;

struct Item {
  std::function<void()> work;  // empty for an event
  TicketPtr after = {};        // of any stream; the item does not start before it is done
  std::shared_ptr<void> keeps = {};
  TicketPtr ticket = std::make_shared<Ticket>();
};

struct Stream {
  int device;
  int64_t id;
  int64_t allowance;  // items that it may still start; negative is without end
  std::deque<Item> items;
  bool running = false;  // an item was taken and is not done
  bool served = false;   // has a worker thread

  bool idle() const {
    return items.empty() && !running;
  }
};

// One mutex and one condition for all of it: what is tested is order, not speed.
class Streams {
 public:
  Streams() {
    for (int device = 0; device < DEVICES; device++) {
      all_.push_back(new Stream{device, 0, allowance_, {}});
    }
  }

  // Ids are never used twice, and streams never freed: two of them never share a queue by chance,
  // as CUDA's do after 32, which would hide a missing wait.
  Stream* add(int device) {
    std::lock_guard lock(mutex_);
    check_alive();
    auto id = static_cast<int64_t>(all_.size());
    all_.push_back(new Stream{device, id, allowance_, {}});
    return all_.back();
  }

  // Id 0 is the default stream of each device.
  Stream* get(int device, int64_t id) {
    std::lock_guard lock(mutex_);
    return all_.at(id == 0 ? device : id);
  }

  TicketPtr push(Stream* stream, Item item) {
    std::lock_guard lock(mutex_);
    check_alive();
    auto ticket = item.ticket;
    put(stream, std::move(item));
    return ticket;
  }

  // For destructors: never raises. Nothing to do if the stream is idle.
  void keep_until_done(Stream* stream, std::shared_ptr<void> kept) noexcept {
    std::lock_guard lock(mutex_);
    if (!stream->idle() && !lost_ && !ending_) {
      put(stream, {{}, {}, std::move(kept)});
    }
  }

  void wait(const TicketPtr& ticket) {
    wait_until([&] { return ticket->done; });
  }

  void wait_idle(const Stream* stream) {
    wait_until([&] { return stream->idle(); });
  }

  void wait_device(int device) {
    wait_until([&] {
      bool idle = true;
      for (auto* stream : all_) {
        idle = idle && (stream->device != device || stream->idle());
      }
      return idle;
    });
  }

  bool is_done(const TicketPtr& ticket) {
    std::lock_guard lock(mutex_);
    check_alive();
    return ticket->done;
  }

  bool is_idle(const Stream* stream) {
    std::lock_guard lock(mutex_);
    check_alive();
    return stream->idle();
  }

  // Of one stream, or (id < 0) of all that there are and will be.
  void set_allowance(int64_t id, int64_t items) {
    std::lock_guard lock(mutex_);
    for (auto* stream : all_) {
      if (id < 0 || stream->id == id) {
        stream->allowance = items;
      }
    }
    if (id < 0) {
      allowance_ = items;
    }
    changed_.notify_all();
  }

  // What was asked for and has not begun never happens: it counts as done, which wakes whoever
  // waits, who is told then.
  void set_lost(bool lost) {
    std::vector<std::deque<Item>> dropped;  // freed after the lock: they may hold memory
    std::lock_guard lock(mutex_);
    lost_ = lost;
    for (auto* stream : all_) {
      for (auto& item : stream->items) {
        item.ticket->done = true;
      }
      dropped.push_back(std::exchange(stream->items, {}));
    }
    changed_.notify_all();
  }

  int64_t pending() {
    std::lock_guard lock(mutex_);
    int64_t items = 0;
    for (auto* stream : all_) {
      items += static_cast<int64_t>(stream->items.size()) + stream->running;
    }
    return items;
  }

  // At exit: nothing runs after the libraries that it uses are gone. What is queued never runs, and
  // who waits is never woken: a thread that comes back to an interpreter that ended is aborted.
  void end() {
    std::unique_lock lock(mutex_);
    ending_ = true;
    changed_.notify_all();
    changed_.wait(lock, [&] {
      for (auto* stream : all_) {
        if (stream->served) {
          return false;
        }
      }
      return true;
    });
  }

 private:
  void check_alive() const {
    if (lost_) {
      fail(DEVICE_LOST, "late device error: the device was lost");
    }
  }

  template <typename Condition>
  void wait_until(Condition condition) {
    std::unique_lock lock(mutex_);
    if (!ending_) {
      changed_.wait(lock, [&] { return !ending_ && condition(); });
    }
    check_alive();
  }

  // A worker lives while its stream has items: an idle stream costs no thread.
  void put(Stream* stream, Item item) {
    stream->items.push_back(std::move(item));
    if (!stream->served && !ending_) {
      std::thread([this, stream] { serve(stream); }).detach();
      stream->served = true;
    }
    changed_.notify_all();
  }

  void serve(Stream* stream) {
    std::unique_lock lock(mutex_);
    while (!ending_ && !stream->items.empty()) {
      auto& next = stream->items.front();
      if (stream->allowance == 0 || (next.after && !next.after->done)) {
        changed_.wait(lock);
      } else {
        run_next(stream, lock);
      }
    }
    stream->served = false;
    changed_.notify_all();
  }

  void run_next(Stream* stream, std::unique_lock<std::mutex>& lock) {
    auto item = std::move(stream->items.front());
    stream->items.pop_front();
    stream->allowance -= stream->allowance > 0;
    stream->running = true;
    auto dropped = lost_ || ending_;
    lock.unlock();
    if (item.work && !dropped) {
      item.work();
    }
    item.work = nullptr;  // what it holds is let go before anybody is told that it is done
    item.keeps = nullptr;
    lock.lock();
    stream->running = false;
    item.ticket->done = true;
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Stream*> all_;  // the default ones first
  int64_t allowance_ = -1;  // of streams that are made from here on
  bool lost_ = false, ending_ = false;
};

// Never destroyed: tensors may be freed after everything else.
inline Streams& streams() {
  static auto* all = new Streams;
  return *all;
}

}  // namespace late
