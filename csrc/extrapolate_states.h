// A guess of where the steps lead that come into a window, before[b, 1] <= i < window[b, 1]: x0 is held.
//
//   x[i+1] = keep[i] x[i] + pull[i] x0 + n[i] z[i],     moved[i] = 0
//   x0 = of_x[l] y + of_out[l] e[l],                    l = before[b, 1] - 1, the last step of the window before
//   y = x[l] - t moved[l], implicit: x[l+1] - beta moved[l]
//
// t is 0 if l was the first step of its window, 1 if it was the second, else beta. Nothing is done if l < 0.
#pragma once
#include <cstdint>

namespace deqkern {

struct ExtrapolateStates {
  float* x;               // (S+1, B, D), updated
  float* moved;           // (S, B, D), updated: the last correction of the states that the model was called at
  const float* e;         // (S, B, D), the model's output before that correction
  const float* z;         // (S, B, D) or null
  const float* held;      // (4, S): keep, pull, of_x, of_out
  const float* n;         // (S,), unused without z
  const int64_t* before;  // (B, 2), the window of that correction
  const int64_t* window;  // (B, 2), the window that follows
  const int64_t* skip;    // (B,): 1 for a sample that stays as it is
  int64_t S, B, D;
  float beta;
  bool implicit;
  int threads;
};

}  // namespace deqkern
