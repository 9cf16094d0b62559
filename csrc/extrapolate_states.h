// Constant-x0 extrapolation to the steps that come into a window, previous_window[b, 1] <= i < window[b, 1].
//
//   x[i+1] = keep[i] x[i] + x0_gain[i] x0 + n[i] z[i],     last_change[i] = 0
//   x0 = of_x[l] y + of_out[l] e[l],                       l = previous_window[b, 1] - 1, its last step
//   y = x[l] - t last_change[l], implicit: x[l+1] - beta last_change[l]
//
// t is 0 if l was the first step of its window, 1 if it was the second, else beta. Nothing follows an empty window.
#pragma once
#include <cstdint>

#include "state.h"

namespace deqkern {

struct ExtrapolateStates {
  float* x;                        // (S+1, B, D), updated
  float* last_change;              // (S, B, D), updated: that of the states that the model was called at
  const float* e;                  // (S, B, D), the model's output before that change
  const float* z;                  // (S, B, D) or null
  const float* constant_x0;        // (constant_x0::count, S)
  const float* n;                  // (S,), not read when z is null
  const int64_t* previous_window;  // (B, 2), that of the last change
  const int64_t* window;           // (B, 2), the one that follows
  const int64_t* skip;             // (B,): not 0 for a sample that stays as it is
  int64_t S, B, D;
  float beta;
  bool implicit;
  int threads;
};

}  // namespace deqkern
