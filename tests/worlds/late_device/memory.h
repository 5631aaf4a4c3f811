// Device memory and pinned host memory, which are both ordinary memory.
#pragma once

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>

#include "streams.h"

namespace late {

// What memory holds before it is written and after it is freed: as a number of any type far from
// all that a test computes, and no sentinel such as -1.
constexpr int POISON = 0xFB;
constexpr size_t PAGE = 4096;
// More in one allocation is refused: the machine would promise it, and fail when it is poisoned.
constexpr size_t LARGEST = size_t{1} << 30;

// Lives as long as the tensors, and the work, that use it.
struct Block {
  char* data;
  size_t nbytes;
  Stream* home;  // the current one when it was allocated; null for pinned host memory
  std::vector<Stream*> used_on;

  ~Block() {
    std::free(data);
  }
};
using BlockPtr = std::shared_ptr<Block>;

class Memory {
 public:
  std::atomic<int64_t> failing{0}, failing_pinned{0};  // allocations still to fail

  BlockPtr allocate(size_t nbytes, Stream* home) {
    auto refused = nbytes > LARGEST || take(home ? failing : failing_pinned);
    auto* data = refused ? nullptr : std::aligned_alloc(PAGE, (nbytes + PAGE - 1) / PAGE * PAGE);
    if (!data && !home) {  // CUDA's pinned allocator raises the driver's error, not torch's own
      fail(OUT_OF_MEMORY, "late device error: out of memory (pinned)");
    }
    TORCH_CHECK_WITH(OutOfMemoryError, data, "late device out of memory. Tried to allocate ",
                     nbytes, " bytes.");
    std::memset(data, POISON, nbytes);
    auto block = std::make_shared<Block>();
    block->data = static_cast<char*>(data);
    block->nbytes = nbytes;
    block->home = home;
    std::lock_guard lock(mutex_);
    blocks_[block->data] = block;
    return block;
  }

  // Whose memory an address is in; null if it is not ours.
  BlockPtr find(const void* address) {
    std::lock_guard lock(mutex_);
    auto next = blocks_.upper_bound(static_cast<const char*>(address));
    if (next == blocks_.begin()) {
      return nullptr;
    }
    auto block = std::prev(next)->second;
    return address < block->data + block->nbytes ? block : nullptr;
  }

  bool is_pinned(const void* address) {
    auto block = find(address);
    return block && !block->home;
  }

  void note_use(const void* address, Stream* stream) {
    if (auto block = find(address)) {
      std::lock_guard lock(mutex_);
      block->used_on.push_back(stream);
    }
  }

  // As CUDA's caching allocators have it. Pinned memory outlives the copies that were asked for.
  // Device memory goes to others in the order of its own stream, whatever another stream still
  // does with it, unless `record_stream` told of that one: poison shows who relied on more.
  void release(const BlockPtr& block) {
    {
      std::lock_guard lock(mutex_);
      blocks_.erase(block->data);
    }
    if (!block->home) {
      return;
    }
    auto spoil = std::shared_ptr<void>(nullptr, [block](void*) {
      std::memset(block->data, POISON, block->nbytes);
    });
    block->used_on.push_back(block->home);
    for (auto* stream : block->used_on) {
      streams().keep_until_done(stream, spoil);
    }
  }

 private:
  static bool take(std::atomic<int64_t>& left) {
    auto before = left.load();
    while (before > 0 && !left.compare_exchange_weak(before, before - 1)) {
    }
    return before > 0;
  }

  std::mutex mutex_;
  std::map<const char*, BlockPtr> blocks_;
};

inline Memory& memory() {
  static auto* all = new Memory;
  return *all;
}

}  // namespace late
