// The inner products that a new correction adds. Index j counts ages: dG_0 is the newest difference.
//
//   dG_j = g_ring[head-j] - g_ring[head-j-1] around the ring, j < count
//   gram moves one place down and right, then gram[0, j] = gram[j, 0] = <dG_0, dG_j>;   rhs[j] = <dG_j, g_ring[head]>
//
// Entries of age >= count are zero, and so is everything outside the window.
#pragma once
#include <cstdint>

#include "state.h"

namespace deqkern {

struct AndersonGram {
  const float* g_ring;    // (m+1, S, B, D)
  const int64_t* window;  // (B, 2)
  double* gram;           // (S, B, m, m), updated
  double* rhs;            // (S, B, m), written
  int64_t S, B, D;
  int m, head, count;  // 1 <= m <= kMaxHistory, 0 <= head <= m, 0 <= count <= m
  int threads;
};

}  // namespace deqkern
