#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <new>

namespace deqkern {
namespace {

constexpr int64_t kSmallestShare = 1 << 14;  // floats per thread; starting a team costs some microseconds

std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffer;

}  // namespace

int team_size(int requested, int64_t tasks, int64_t work) {
  if (forked || registered != 0) return 1;
  int64_t threads = requested;
  if (threads > tasks) threads = tasks;
  if (threads > work / kSmallestShare) threads = work / kSmallestShare;
  return threads < 1 ? 1 : static_cast<int>(threads);
}

void* scratch(size_t bytes) {
  if (bytes > buffer.bytes) {
    std::free(buffer.data);
    buffer.bytes = 0;
    const size_t rounded = (bytes + 63) / 64 * 64;
    buffer.data = std::aligned_alloc(64, rounded);
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.data;
}

}  // namespace deqkern
