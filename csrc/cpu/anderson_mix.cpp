// One pass over count + 1 updates; a task is a segment of one row. The differences are formed in registers.
#include "../anderson_mix.h"

#include "simd.h"

namespace deqkern {
namespace DEQKERN_ISA {
namespace {

constexpr int64_t kSegment = 4096;
constexpr int64_t kAhead = 512;  // floats
constexpr int kUnroll = 4;       // vectors in flight, which hides the loads of gamma and of the pointers

template <int kVectors, bool kWhole>
DEQKERN_INLINE void mix(const float* const* ages, const float* gamma, int count, float* out, bool streams, int64_t d,
                        int lanes) {
  vec newer[kVectors], mixed[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    if (!streams) prefetch<true>(out + d + v * kLanes + kAhead);
    prefetch<false>(ages[0] + d + v * kLanes + kAhead);
    newer[v] = mixed[v] = load_lanes<kWhole>(ages[0] + d + v * kLanes, lanes);
  }
  for (int j = 0; j < count; ++j) {
    const vec weight = splat(gamma[j]);
    for (int v = 0; v < kVectors; ++v) {
      prefetch<false>(ages[j + 1] + d + v * kLanes + kAhead);
      const vec older = load_lanes<kWhole>(ages[j + 1] + d + v * kLanes, lanes);
      mixed[v] -= weight * (newer[v] - older);
      newer[v] = older;
    }
  }
  for (int v = 0; v < kVectors; ++v) put_lanes<kWhole>(out + d + v * kLanes, mixed[v], lanes, streams);
}

void mix_segment(const float* const* ages, const float* gamma, int count, float* out, bool streams, int64_t length) {
  int64_t d = 0;
  for (; d + kUnroll * kLanes <= length; d += kUnroll * kLanes)
    mix<kUnroll, true>(ages, gamma, count, out, streams, d, 0);
  for (; d + kLanes <= length; d += kLanes) mix<1, true>(ages, gamma, count, out, streams, d, 0);
  if (d < length) mix<1, false>(ages, gamma, count, out, streams, d, static_cast<int>(length - d));
  finish_streams();
}

}  // namespace

void anderson_mix(const AndersonMix& op) {
  const int64_t rows = op.S * op.B, segments = ceil_div(op.D, kSegment), tasks = rows * segments;
  const int size = op.m + 1;
  const int team = team_size(op.threads, tasks, (op.count + 2) * rows * op.D);
#pragma omp parallel for num_threads(team) if (team > 1) schedule(static)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t row = task / segments, begin = task % segments * kSegment, i = row / op.B;
    const Window window = window_of(op.window, row % op.B, op.S);
    if (i < window.begin || i >= window.end) continue;
    const float* ages[kMaxHistory + 1];
    for (int j = 0; j <= op.count; ++j) ages[j] = op.f_ring + ((op.head - j + size) % size * rows + row) * op.D + begin;
    float* out = op.out + row * op.D + begin;
    mix_segment(ages, op.gamma + row * op.m, op.count, out, can_stream(out, rows * op.D),
                smaller(kSegment, op.D - begin));
  }
}

}  // namespace DEQKERN_ISA
}  // namespace deqkern
