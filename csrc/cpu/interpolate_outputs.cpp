// One pass over the five rows of each step that is interpolated; a task is one of these steps.
#include "../interpolate_outputs.h"

#include "simd.h"

namespace deqkern {
namespace DEQKERN_ISA {
namespace {

struct Coefficients {
  const float *x_l, *e_l, *x_r, *e_r;
  float of_x_l, of_out_l, of_x_r, of_out_r;  // x0 at both ends
  float q_l, q_r;                            // x0 at the step itself
  float ratio, gain_l, gain_r;               // its state
  float of_x, of_out;                        // its output
};

DEQKERN_INLINE Coefficients coefficients_of(const InterpolateOutputs& op, int64_t n) {
  const int64_t S = op.S, left = op.rows[op.N + n], right = op.rows[2 * op.N + n];
  const int64_t i = op.rows[n] / op.B, l = left / op.B, r = right / op.B;
  const double *scale = op.path + output_path::scale * S, *gain = op.path + output_path::gain * S,
               *gain_level = op.path + output_path::gain_level * S, *level = op.path + output_path::level * S,
               *of_x = op.path + output_path::of_x * S, *of_out = op.path + output_path::of_out * S;
  const double per = level[r] == level[l] ? 0. : 1. / (level[r] - level[l]);
  const double q = (level[i] - level[l]) * per, p = gain[i] - gain[l];
  const double p_r = (gain_level[i] - gain_level[l] - level[l] * p) * per;
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
DEQKERN_INLINE void interpolate(const Coefficients& c, float slope, const float* x, float* e, int64_t d, int lanes) {
  const vec x_l = load_lanes<kWhole>(c.x_l + d, lanes);
  const vec x0_l = c.of_x_l * x_l + c.of_out_l * load_lanes<kWhole>(c.e_l + d, lanes);
  const vec x0_r = c.of_x_r * load_lanes<kWhole>(c.x_r + d, lanes) + c.of_out_r * load_lanes<kWhole>(c.e_r + d, lanes);
  const vec y = c.ratio * x_l + c.gain_l * x0_l + c.gain_r * x0_r;
  const vec output = (c.q_l * x0_l + c.q_r * x0_r - c.of_x * y) / c.of_out;
  store_lanes<kWhole>(e + d, output + slope * (load_lanes<kWhole>(x + d, lanes) - y), lanes);
}

}  // namespace

void interpolate_outputs(const InterpolateOutputs& op) {
  const int team = team_size(op.threads, op.N, 6 * op.N * op.D);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t task = 0; task < op.N; ++task) {
    const int64_t row = op.rows[task];
    const Coefficients c = coefficients_of(op, task);
    const float* x = op.x + row * op.D;
    float* e = op.e + row * op.D;
    for (int64_t k = 0; k < op.K; ++k) {
      const float slope = op.slope[row * op.K + k];
      int64_t d = op.bands[k];
      for (; d + kLanes <= op.bands[k + 1]; d += kLanes) interpolate<true>(c, slope, x, e, d, 0);
      if (d < op.bands[k + 1]) interpolate<false>(c, slope, x, e, d, static_cast<int>(op.bands[k + 1] - d));
    }
  }
}

}  // namespace DEQKERN_ISA
}  // namespace deqkern
