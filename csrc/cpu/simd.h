// One vector type per instruction set: every kernel source is compiled once for each, in its own namespace.
// All of it is static and always inlined, and no inline function of the standard library is used beside it: such a
// function would be emitted with the widest instruction set and could be linked into the narrower ones.
#pragma once
#include <cstdint>
#if defined(__SSE__)
#include <immintrin.h>
#endif

#include "parallel.h"

#define DEQKERN_INLINE static inline __attribute__((always_inline))

namespace deqkern {
namespace DEQKERN_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vec __attribute__((vector_size(4 * kLanes)));
typedef float unaligned_vec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

DEQKERN_INLINE vec load(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }
DEQKERN_INLINE void store(float* p, vec v) { *reinterpret_cast<unaligned_vec*>(p) = v; }
DEQKERN_INLINE vec splat(float value) { return value - vec{}; }

// p[0], p[1], p[0], p[1], ..
DEQKERN_INLINE vec splat_pair(const float* p) {
  typedef int64_t pairs __attribute__((vector_size(sizeof(vec))));
  int64_t pair;
  __builtin_memcpy(&pair, p, sizeof(pair));
  return reinterpret_cast<vec>(pair - pairs{});
}

// The first `count` lanes, 0 < count <= kLanes; memory beyond them is not touched and reads as zero.
#if defined(__AVX512F__)
DEQKERN_INLINE __mmask16 lane_mask(int count) { return static_cast<__mmask16>((1u << count) - 1u); }
DEQKERN_INLINE vec load_part(const float* p, int count) { return _mm512_maskz_loadu_ps(lane_mask(count), p); }
DEQKERN_INLINE void store_part(float* p, vec v, int count) { _mm512_mask_storeu_ps(p, lane_mask(count), v); }
#elif defined(__AVX2__)
DEQKERN_INLINE __m256i lane_mask(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
DEQKERN_INLINE vec load_part(const float* p, int count) { return _mm256_maskload_ps(p, lane_mask(count)); }
DEQKERN_INLINE void store_part(float* p, vec v, int count) { _mm256_maskstore_ps(p, lane_mask(count), v); }
#else
DEQKERN_INLINE vec load_part(const float* p, int count) {
  vec v{};
  for (int l = 0; l < kLanes; ++l)
    if (l < count) v[l] = p[l];
  return v;
}
DEQKERN_INLINE void store_part(float* p, vec v, int count) {
  for (int l = 0; l < kLanes; ++l)
    if (l < count) p[l] = v[l];
}
#endif

// Loads and stores for whole vectors and for the last, partial one, so that a loop body is written once.
template <bool kWhole>
DEQKERN_INLINE vec load_lanes(const float* p, int count) {
  return kWhole ? load(p) : load_part(p, count);
}
template <bool kWhole>
DEQKERN_INLINE void store_lanes(float* p, vec v, int count) {
  if (kWhole)
    store(p, v);
  else
    store_part(p, v, count);
}

// A hint only: it may lie beyond the array. Many short streams outrun what the hardware foresees, stores above all.
template <bool kWrite>
DEQKERN_INLINE void prefetch(const float* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p), kWrite);
}

// Stores that go past the cache, for arrays that leave it before they are read again: they save the read of what is
// overwritten. The threshold was measured on a whole iteration; below it the next op finds its input in the cache.
constexpr int64_t kStreamBytes = 8 << 20;

DEQKERN_INLINE bool can_stream(const float* p, int64_t floats_in_all) {
  return floats_in_all * 4 >= kStreamBytes && reinterpret_cast<uintptr_t>(p) % sizeof(vec) == 0;
}
#if defined(__AVX512F__)
DEQKERN_INLINE void stream(float* p, vec v) { _mm512_stream_ps(p, v); }
#elif defined(__AVX2__)
DEQKERN_INLINE void stream(float* p, vec v) { _mm256_stream_ps(p, v); }
#elif defined(__SSE__)
DEQKERN_INLINE void stream(float* p, vec v) { _mm_stream_ps(p, v); }
#else
DEQKERN_INLINE void stream(float* p, vec v) { store(p, v); }
#endif
DEQKERN_INLINE void finish_streams() {  // before another thread reads
#if defined(__SSE__)
  _mm_sfence();
#endif
}

template <bool kWhole>
DEQKERN_INLINE void put_lanes(float* p, vec v, int count, bool streams) {
  if (kWhole && streams)
    stream(p, v);
  else
    store_lanes<kWhole>(p, v, count);
}

// The sum of all lanes, in double, in a fixed order.
DEQKERN_INLINE double lane_sum(vec v) {
  double lanes[kLanes];
  for (int l = 0; l < kLanes; ++l) lanes[l] = v[l];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}

DEQKERN_INLINE int64_t smaller(int64_t p, int64_t q) { return p < q ? p : q; }
DEQKERN_INLINE int64_t larger(int64_t p, int64_t q) { return p > q ? p : q; }
DEQKERN_INLINE int64_t ceil_div(int64_t p, int64_t q) { return (p + q - 1) / q; }

// The active steps of sample b, begin <= i < end, cut to 0 .. S.
struct Window {
  int64_t begin, end;
};
DEQKERN_INLINE Window window_of(const int64_t* window, int64_t b, int64_t S) {
  const auto within = [S](int64_t step) { return smaller(larger(step, 0), S); };
  return {within(window[2 * b]), within(window[2 * b + 1])};
}

}  // namespace DEQKERN_ISA
}  // namespace deqkern
