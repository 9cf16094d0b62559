// Type-II Anderson mixing of all steps in one pass.
//
//   out = f_ring[head] - sum_j gamma[j] dF_j,   dF_j = f_ring[head-j] - f_ring[head-j-1] around the ring, j < count
//
// Rows outside the window are not written.
#pragma once
#include <cstdint>

#include "state.h"

namespace deqkern {

struct AndersonMix {
  const float* f_ring;    // (m+1, S, B, D)
  const float* gamma;     // (S, B, m), index j counts ages
  const int64_t* window;  // (B, 2)
  float* out;             // (S, B, D), written
  int64_t S, B, D;
  int m, head, count;  // 1 <= m <= kMaxHistory, 0 <= head <= m, 0 <= count <= m
  int threads;
};

}  // namespace deqkern
