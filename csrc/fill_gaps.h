// The outputs of steps that were not evaluated, between those of two evaluated steps of the same sample.
//
//   y = w0 x[left] + w1 e[left] + w2 x[right] + w3 e[right]
//   e[row] = w4 x[left] + w5 e[left] + w6 x[right] + w7 e[right] + slope[row] (x[row] - y)
//
// No row is among the left or right ones.
#pragma once
#include <cstdint>

namespace deqkern {

struct FillGaps {
  const float* x;         // (S+1, B, D)
  const float* slope;     // (S, B, K)
  const int64_t* bands;   // (K+1,), from 0 to D, not decreasing
  const int64_t* rows;    // (3, N), i * B + b: row, left, right
  const float* weights;   // (N, 8)
  float* e;               // (S, B, D), updated
  int64_t S, B, D, K, N;
  int threads;
};

}  // namespace deqkern
