// The outputs of steps i that were not evaluated, from those of steps l < i < r of the same sample that were.
//
//   x0[j] = of_x[j] x[j] + of_out[j] e[j],                   j = l, r
//   q = (level[i] - level[l]) / (level[r] - level[l]),       0 / 0 is 0
//   x0[i] = (1 - q) x0[l] + q x0[r]
//   p = gain[i] - gain[l],   p_r = (gain_level[i] - gain_level[l] - level[l] p) / (level[r] - level[l])
//   y = scale[i] (x[l] / scale[l] + (p - p_r) x0[l] + p_r x0[r])
//   e[i] = (x0[i] - of_x[i] y) / of_out[i] + slope[i] (x[i] - y)
//
// No i is an l or r.
#pragma once
#include <cstdint>

#include "state.h"

namespace deqkern {

struct InterpolateOutputs {
  const float* x;        // (S+1, B, D)
  const float* slope;    // (S, B, K)
  const int64_t* bands;  // (K+1,), from 0 to D, not decreasing
  const int64_t* rows;   // (3, N), step * B + b: of i, l and r
  const double* path;    // (output_path::count, S)
  float* e;              // (S, B, D), updated
  int64_t S, B, D, K, N;
  int threads;
};

}  // namespace deqkern
