// What a secant slope per band is made of.
//
//   moments[i, b, k] = <dx, e - e_prev>, <dx, dx> over band k, zero outside the window
#pragma once
#include <cstdint>

#include "state.h"

namespace deqkern {

struct BandMoments {
  const float* dx;        // (S, B, D)
  const float* e;         // (S, B, D)
  const float* e_prev;    // (S, B, D)
  const int64_t* bands;   // (K+1,), from 0 to D, not decreasing
  const int64_t* window;  // (B, 2)
  double* moments;        // (S, B, K, moment::count), written
  int64_t S, B, D, K;
  int threads;
};

}  // namespace deqkern
