// One pass over the five rows of each step that is filled; a task is one of these steps.
#include "../fill_gaps.h"

#include "simd.h"

namespace deqkern {
namespace DEQKERN_ISA {
namespace {

struct Ends {
  const float *x_left, *e_left, *x_right, *e_right;
};

template <bool kWhole>
DEQKERN_INLINE void fill(const Ends& ends, const float* weights, float slope, const float* x, float* e, int64_t d,
                         int lanes) {
  const vec values[4] = {load_lanes<kWhole>(ends.x_left + d, lanes), load_lanes<kWhole>(ends.e_left + d, lanes),
                         load_lanes<kWhole>(ends.x_right + d, lanes), load_lanes<kWhole>(ends.e_right + d, lanes)};
  vec state{}, output{};
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    state += weights[j] * values[j];
    output += weights[4 + j] * values[j];
  }
  store_lanes<kWhole>(e + d, output + slope * (load_lanes<kWhole>(x + d, lanes) - state), lanes);
}

}  // namespace

void fill_gaps(const FillGaps& op) {
  const int team = team_size(op.threads, op.N, 6 * op.N * op.D);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t task = 0; task < op.N; ++task) {
    const int64_t row = op.rows[task], left = op.rows[op.N + task], right = op.rows[2 * op.N + task];
    const Ends ends{op.x + left * op.D, op.e + left * op.D, op.x + right * op.D, op.e + right * op.D};
    const float *weights = op.weights + 8 * task, *x = op.x + row * op.D;
    float* e = op.e + row * op.D;
    for (int64_t k = 0; k < op.K; ++k) {
      const float slope = op.slope[row * op.K + k];
      int64_t d = op.bands[k];
      for (; d + kLanes <= op.bands[k + 1]; d += kLanes) fill<true>(ends, weights, slope, x, e, d, 0);
      if (d < op.bands[k + 1])
        fill<false>(ends, weights, slope, x, e, d, static_cast<int>(op.bands[k + 1] - d));
    }
  }
}

}  // namespace DEQKERN_ISA
}  // namespace deqkern
