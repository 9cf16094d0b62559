// One pass over numbers that are few: one thread.
#include "../update_convergence.h"

#include <float.h>
#include <math.h>

#include "simd.h"

namespace deqkern {
namespace DEQKERN_ISA {
namespace {

DEQKERN_INLINE bool finite(double value) { return __builtin_fabs(value) <= DBL_MAX; }

struct Chain {
  double change = 0.0;    // the largest relative correction
  double unsolved = 0.0;  // the largest relative residual of an active step that is not exact now
  double last = 0.0;      // |g[S]|
  double allowed = 0.0;   // the sum of all tolerances
  int64_t frontier;       // the first step that is not settled
  bool is_finite = true;
};

Chain look(const UpdateConvergence& op, int64_t b, Window window, int64_t exact, int64_t known) {
  Chain chain;
  chain.frontier = window.begin;
  for (int64_t i = 0; i < op.S; ++i) {
    const double* norms = op.norms + (i * op.B + b) * 3;
    chain.is_finite = chain.is_finite && finite(norms[0]) && finite(norms[1]) && finite(norms[2]);
    const double residual = sqrt(norms[0]), correction = sqrt(norms[1]), state = sqrt(norms[2]);
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
  double* errors = op.errors + 5 * b;
  const bool whole = window.end == op.S;
  const int64_t exact = op.implicit ? window.begin : smaller(window.begin + 1, window.end);
  const int64_t known = op.gap ? smaller(op.gap[b], window.end) : window.end;
  const Chain chain = look(op, b, window, exact, known);
  const double change = known == op.S ? chain.change : INFINITY;
  const double before = errors[1] < 1e-300 ? 1e-300 : errors[1] > 1.0 ? 1.0 : errors[1];
  double ratio = change / before;
  ratio = ratio < op.contraction ? op.contraction : ratio > 1.0 ? 1.0 : ratio;
  const double square = ratio * errors[2];  // rho^2
  double left = change * sqrt(square) / (square < 0.9 ? 1.0 - square : 0.1);
  if (!op.implicit && chain.unsolved > left) left = chain.unsolved;
  const bool diverged = !chain.is_finite || (whole && chain.last > op.growth * errors[3]);
  const int64_t frontier = diverged ? exact : larger(chain.frontier, exact);
  if (frontier >= op.S && left > chain.allowed) left = chain.allowed;
  const bool converged = frontier >= op.S || (!diverged && op.rtol > 0.0 && left <= op.rtol);
  errors[0] = left;
  errors[1] = change;
  errors[2] = ratio;
  if (whole && !(chain.last >= errors[3])) errors[3] = chain.last == chain.last ? chain.last : errors[3];
  errors[4] = chain.is_finite ? chain.unsolved : INFINITY;
  op.window[2 * b] = converged ? op.S : frontier;
  op.window[2 * b + 1] = smaller(op.window[2 * b] + op.size, op.S);
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
