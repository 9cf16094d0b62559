// One pass over the five rows of each step that is filled; a task is one of these steps.
#include "../interpolate_outputs.h"

#include "simd.h"

namespace deqkern {
namespace DEQKERN_ISA {
namespace {

struct Gap {
  const float *x_l, *e_l, *x_r, *e_r;
  float of_x_l, of_out_l, of_x_r, of_out_r;  // x0 at both ends
  float q_l, q_r;                            // x0 at the step itself
  float ratio, pull_l, pull_r;               // its state
  float of_x, of_out;                        // its output
};

DEQKERN_INLINE Gap gap_of(const InterpolateOutputs& op, int64_t n) {
  const int64_t S = op.S, left = op.rows[op.N + n], right = op.rows[2 * op.N + n];
  const int64_t i = op.rows[n] / op.B, l = left / op.B, r = right / op.B;
  const double *scale = op.path, *pulls = scale + S, *lifts = pulls + S, *level = lifts + S, *of_x = level + S,
               *of_out = of_x + S;
  const double per = level[r] == level[l] ? 0. : 1. / (level[r] - level[l]);
  const double q = (level[i] - level[l]) * per, p = pulls[i] - pulls[l];
  const double p_r = (lifts[i] - lifts[l] - level[l] * p) * per;
  return {op.x + left * op.D,
          op.e + left * op.D,
          op.x + right * op.D,
          op.e + right * op.D,
          static_cast<float>(of_x[l]),
          static_cast<float>(of_out[l]),
          static_cast<float>(of_x[r]),
          static_cast<float>(of_out[r]),
          static_cast<float>(1. - q),
          static_cast<float>(q),
          static_cast<float>(scale[i] / scale[l]),
          static_cast<float>(scale[i] * (p - p_r)),
          static_cast<float>(scale[i] * p_r),
          static_cast<float>(of_x[i]),
          static_cast<float>(of_out[i])};
}

template <bool kWhole>
DEQKERN_INLINE void fill(const Gap& gap, float slope, const float* x, float* e, int64_t d, int lanes) {
  const vec x_l = load_lanes<kWhole>(gap.x_l + d, lanes);
  const vec x0_l = gap.of_x_l * x_l + gap.of_out_l * load_lanes<kWhole>(gap.e_l + d, lanes);
  const vec x0_r = gap.of_x_r * load_lanes<kWhole>(gap.x_r + d, lanes) +
                   gap.of_out_r * load_lanes<kWhole>(gap.e_r + d, lanes);
  const vec y = gap.ratio * x_l + gap.pull_l * x0_l + gap.pull_r * x0_r;
  const vec output = (gap.q_l * x0_l + gap.q_r * x0_r - gap.of_x * y) / gap.of_out;
  store_lanes<kWhole>(e + d, output + slope * (load_lanes<kWhole>(x + d, lanes) - y), lanes);
}

}  // namespace

void interpolate_outputs(const InterpolateOutputs& op) {
  const int team = team_size(op.threads, op.N, 6 * op.N * op.D);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t task = 0; task < op.N; ++task) {
    const int64_t row = op.rows[task];
    const Gap gap = gap_of(op, task);
    const float* x = op.x + row * op.D;
    float* e = op.e + row * op.D;
    for (int64_t k = 0; k < op.K; ++k) {
      const float slope = op.slope[row * op.K + k];
      int64_t d = op.bands[k];
      for (; d + kLanes <= op.bands[k + 1]; d += kLanes) fill<true>(gap, slope, x, e, d, 0);
      if (d < op.bands[k + 1]) fill<false>(gap, slope, x, e, d, static_cast<int>(op.bands[k + 1] - d));
    }
  }
}

}  // namespace DEQKERN_ISA
}  // namespace deqkern
