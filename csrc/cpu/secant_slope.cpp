// One pass over numbers that are few: one thread.
#include "../secant_slope.h"

#include <float.h>

#include "simd.h"

namespace deqkern {
namespace DEQKERN_ISA {

void secant_slope(const SecantSlope& op) {
  const int64_t row = op.B * op.K;
  for (int64_t i = 0; i < op.S; ++i)
    for (int64_t j = i * row; j < (i + 1) * row; ++j) {
      const double cross = op.moments[j * moment::count + moment::cross];
      const double square = op.moments[j * moment::count + moment::square];
      double slope = op.slope[j];
      const double measured = (cross / square + op.prior_weight * slope) / (1.0 + op.prior_weight);
      if (square > 0.0 && __builtin_fabs(measured) <= DBL_MAX) slope = measured;
      slope = slope < op.low[i] ? op.low[i] : slope;
      op.slope[j] = static_cast<float>(slope > op.high[i] ? op.high[i] : slope);
    }
}

}  // namespace DEQKERN_ISA
}  // namespace deqkern
