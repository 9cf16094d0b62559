// What an iteration reached: the error that is left in each sample, and the steps that are still open.
//
//   change = max_i |g[i+1]| / min(|x[i+1]|, |x[0]|)             inf while gap or window do not reach the end
//   ratio = change / min(last change, 1), held within contraction .. 1
//   residual = max_i |r[i+1]| / |x[i+1]|                        of steps that are not exact now; inf if a norm is not finite
//   rho = sqrt(ratio last_ratio),        left = change rho / max(1 - rho^2, 0.1), explicit: and no less than residual
//
// 0 / 0 is 0, and anything else over 0 is inf; |x[0]| may be inf.
// The new window begins at the first step that is not settled, |r[i+1]| > tolerance[i] |x[i+1]|, but past the first active
// step of an explicit chain, which is exact. A sample has converged when its window is empty, then with no more left than
// all tolerances together, or left <= rtol, rtol > 0.
// It diverged if a norm is not finite, or |g[S]| > growth times the smallest one before; it then keeps what is exact.
// Samples that had converged keep everything. From the gap on no step settles.
#pragma once
#include <cstdint>

namespace deqkern {

struct UpdateConvergence {
  const double* norms;      // (S, B, 3): |r|^2, |g|^2, |x|^2
  const double* scale;      // (B,): |x[0]|
  const int64_t* gap;       // (B,), the first active step whose output was filled in, never the first; null: none
  const double* tolerance;  // (S,)
  double* errors;           // (B, 5), updated: left, change, ratio, smallest |g[S]|, residual
  int64_t* window;          // (B, 2), updated
  int64_t* diverged;        // (B,), written
  int64_t S, B;
  double rtol, contraction, growth;
  int64_t size;  // steps in a window
  bool implicit;
};

}  // namespace deqkern
