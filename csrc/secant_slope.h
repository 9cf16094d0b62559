// The next slopes from the moments of the last change.
//
//   slope = (<dx, de> / <dx, dx> + prior_weight slope) / (1 + prior_weight)
//
// Where <dx, dx> is zero, or the quotient not finite, the slope stays what it was. All are clamped to low .. high.
#pragma once
#include <cstdint>

#include "state.h"

namespace deqkern {

struct SecantSlope {
  const double* moments;  // (S, B, K, 2)
  const double* low;      // (S,)
  const double* high;     // (S,)
  float* slope;           // (S, B, K), updated
  int64_t S, B, K;
  double prior_weight;
  int threads;  // one is enough
};

}  // namespace deqkern
