// The next slopes from what band_moments measured.
//
//   slope = (<dx, de> / <dx, dx> + pull slope) / (1 + pull), held within low .. high
//
// Where <dx, dx> is zero, or the quotient not finite, the slope stays what it was, held within low .. high.
#pragma once
#include <cstdint>

namespace deqkern {

struct SecantSlope {
  const double* moments;  // (S, B, K, 2)
  const double* low;      // (S,)
  const double* high;     // (S,)
  float* slope;           // (S, B, K), updated
  int64_t S, B, K;
  double pull;
};

}  // namespace deqkern
