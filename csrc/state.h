// The names of what the ops keep side by side in one array, in the order of their places there, and the limits that
// every language knows. deqkern/ops/state.py explains them; tests/ops/test_state.py compares.
#pragma once

namespace deqkern {

constexpr int kMaxHistory = 16;

#define DEQKERN_PLACES(space, ...)            \
  namespace space {                           \
  enum Place : int { __VA_ARGS__, count };    \
  constexpr const char* names = #__VA_ARGS__; \
  }

DEQKERN_PLACES(norm, residual, correction, state)  // norms (S, B, count)
DEQKERN_PLACES(moment, cross, square)              // moments (S, B, K, count)
// convergence (B, count)
DEQKERN_PLACES(convergence, estimate, last_correction, contraction, smallest_correction, residual)
DEQKERN_PLACES(constant_x0, keep, x0_gain, of_x, of_out)                   // constant_x0 (count, S)
DEQKERN_PLACES(output_path, scale, gain, gain_level, level, of_x, of_out)  // path (count, S)
DEQKERN_PLACES(scope, row, causal, joint)                                  // whose rows a system sums

}  // namespace deqkern
