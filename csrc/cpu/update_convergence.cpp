// One pass over numbers that are few: one thread.
#include "../update_convergence.h"

#include <float.h>
#include <math.h>

#include "simd.h"

namespace deqkern {
namespace DEQKERN_ISA {
namespace {

DEQKERN_INLINE bool finite(double value) { return __builtin_fabs(value) <= DBL_MAX; }
DEQKERN_INLINE double clamp(double value, double low, double high) {
  return value < low ? low : value > high ? high : value;
}

struct Chain {
  double change = 0.0;    // the largest relative correction
  double unsolved = 0.0;  // the largest relative residual of an active step that is not exact now
  double last = 0.0;      // |g[S]|
  double allowed = 0.0;   // the sum of all tolerances
  int64_t frontier;       // the first step that has not converged
  bool is_finite = true;
};

Chain look(const UpdateConvergence& op, int64_t b, Window window, int64_t exact, int64_t known) {
  Chain chain;
  chain.frontier = window.begin;
  for (int64_t i = 0; i < op.S; ++i) {
    const double* norms = op.norms + (i * op.B + b) * norm::count;
    chain.is_finite = chain.is_finite && finite(norms[norm::residual]) && finite(norms[norm::correction]) &&
                      finite(norms[norm::state]);
    const double residual = sqrt(norms[norm::residual]), correction = sqrt(norms[norm::correction]);
    const double state = sqrt(norms[norm::state]);
    // A state that is larger than the noise is taken for an overshoot, not for the scale of the data.
    const double relative = correction / (state < op.scale[b] ? state : op.scale[b]);
    if (relative > chain.change) chain.change = relative;  // 0 / 0 is not
    if (i >= exact && i < window.end && residual / state > chain.unsolved) chain.unsolved = residual / state;
    if (i == chain.frontier && i < known && residual <= op.tolerance[i] * state) ++chain.frontier;
    chain.last = correction;
    chain.allowed += op.tolerance[i];
  }
  return chain;
}

void advance(const UpdateConvergence& op, int64_t b, Window window) {
  double* now = op.convergence + convergence::count * b;
  double& smallest = now[convergence::smallest_correction];
  const bool whole = window.end == op.S;
  const int64_t exact = op.implicit ? window.begin : smaller(window.begin + 1, window.end);
  const int64_t known = op.first_interpolated ? smaller(op.first_interpolated[b], window.end) : window.end;
  const Chain chain = look(op, b, window, exact, known);
  const double change = known == op.S ? chain.change : INFINITY;
  const double before = clamp(now[convergence::last_correction], kSmallestChange, 1.0);
  const double ratio = clamp(change / before, op.best_contraction, 1.0);
  const double square = ratio * now[convergence::contraction];  // rho^2
  double left = change * sqrt(square) / (1.0 - square > kLeastLeft ? 1.0 - square : kLeastLeft);
  if (!op.implicit && chain.unsolved > left) left = chain.unsolved;
  const bool diverged = !chain.is_finite || (whole && chain.last > op.growth * smallest);
  const int64_t frontier = diverged ? exact : larger(chain.frontier, exact);
  if (frontier >= op.S && left > chain.allowed) left = chain.allowed;
  const bool converged = frontier >= op.S || (!diverged && op.rtol > 0.0 && left <= op.rtol);
  now[convergence::estimate] = left;
  now[convergence::last_correction] = change;
  now[convergence::contraction] = ratio;
  if (whole && !(chain.last >= smallest) && chain.last == chain.last) smallest = chain.last;
  now[convergence::residual] = chain.is_finite ? chain.unsolved : INFINITY;
  op.window[2 * b] = converged ? op.S : frontier;
  op.window[2 * b + 1] = smaller(op.window[2 * b] + op.window_size, op.S);
  op.diverged[b] = diverged;
}

}  // namespace

void update_convergence(const UpdateConvergence& op) {
  for (int64_t b = 0; b < op.B; ++b) {
    const Window window = window_of(op.window, b, op.S);
    if (window.begin < op.S)
      advance(op, b, window);
    else
      op.diverged[b] = 0;
  }
}

}  // namespace DEQKERN_ISA
}  // namespace deqkern
