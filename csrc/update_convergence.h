// What an iteration reached: the error that is left in each sample, and the steps that stay in its window.
//
//   change = max_i |g[i+1]| / min(|x[i+1]|, |x[0]|)             inf while not all of the chain was evaluated
//   ratio = change / min(last change, 1), clamped to best_contraction .. 1
//   residual = max_i |r[i+1]| / |x[i+1]|                        of steps that are not exact now; inf if not finite
//   rho = sqrt(ratio last_ratio),        left = change rho / max(1 - rho^2, 0.1), explicit: and no less than residual
//
// 0 / 0 is 0, and anything else over 0 is inf; |x[0]| may be inf.
// The new window begins at the first step that has not converged, |r[i+1]| > tolerance[i] |x[i+1]|, but past the first
// active step of an explicit chain, which is exact. A sample has converged when its window is empty, then with no more
// left than all tolerances together, or left <= rtol, rtol > 0. It diverged if a norm is not finite, or |g[S]| > growth
// times the smallest one before; it then keeps what is exact. Samples that had converged keep everything. From the
// first interpolated step on no step converges.
#pragma once
#include <cstdint>

#include "state.h"

namespace deqkern {

constexpr double kSmallestChange = 1e-300;  // no last change is taken to be smaller
constexpr double kLeastLeft = 0.1;          // no contraction is taken to leave less of the error

struct UpdateConvergence {
  const double* norms;                // (S, B, norm::count)
  const double* scale;                // (B,): |x[0]|
  const int64_t* first_interpolated;  // (B,), a step that is never the first of its window; null: none
  const double* tolerance;            // (S,)
  double* convergence;                // (B, convergence::count), updated
  int64_t* window;                    // (B, 2), updated
  int64_t* diverged;                  // (B,), written: 1 or 0
  int64_t S, B;
  double rtol, best_contraction, growth;
  int64_t window_size;  // in steps
  bool implicit;
  int threads;  // one is enough
};

}  // namespace deqkern
