// One pass over the new states of each sample; a task is a piece of one sample.
#include "../extrapolate_states.h"

#include "simd.h"

namespace deqkern {
namespace DEQKERN_ISA {
namespace {

constexpr int64_t kPiece = 2048;  // elements

struct Steps {
  int64_t begin, end;
  float share;  // of its correction by which the last state changed
};

DEQKERN_INLINE const float* row_of(const ExtrapolateStates& op, constant_x0::Place place) {
  return op.constant_x0 + place * op.S;
}

DEQKERN_INLINE Steps new_steps(const ExtrapolateStates& op, int64_t b) {
  const Window before = window_of(op.previous_window, b, op.S), window = window_of(op.window, b, op.S);
  const bool none = op.skip[b] != 0 || before.begin >= before.end;
  const int64_t place = before.end - before.begin;
  const float explicit_share = place == 1 ? 0.f : place == 2 ? 1.f : op.beta;
  return {before.end, none ? 0 : window.end, op.implicit ? op.beta : explicit_share};
}

template <bool kWhole>
DEQKERN_INLINE vec predict_x0(const ExtrapolateStates& op, const Steps& steps, int64_t at, int lanes) {
  const int64_t row = op.B * op.D, last = steps.begin - 1;
  vec y = load_lanes<kWhole>(op.x + (op.implicit ? steps.begin : last) * row + at, lanes);
  if (steps.share != 0.f) y -= steps.share * load_lanes<kWhole>(op.last_change + last * row + at, lanes);
  const float of_x = row_of(op, constant_x0::of_x)[last], of_out = row_of(op, constant_x0::of_out)[last];
  return of_x * y + of_out * load_lanes<kWhole>(op.e + last * row + at, lanes);
}

template <bool kWhole>
DEQKERN_INLINE void step_lanes(const ExtrapolateStates& op, int64_t i, vec x0, int64_t at, int lanes) {
  const int64_t row = op.B * op.D;
  const float keep = row_of(op, constant_x0::keep)[i], x0_gain = row_of(op, constant_x0::x0_gain)[i];
  vec x = keep * load_lanes<kWhole>(op.x + i * row + at, lanes) + x0_gain * x0;
  if (op.z) x += op.n[i] * load_lanes<kWhole>(op.z + i * row + at, lanes);
  store_lanes<kWhole>(op.x + (i + 1) * row + at, x, lanes);
  store_lanes<kWhole>(op.last_change + i * row + at, vec{}, lanes);
}

// Step by step over one piece, whose x0 and last state stay in the first cache.
void extrapolate_piece(const ExtrapolateStates& op, const Steps& steps, int64_t first, int64_t count) {
  alignas(64) float x0[kPiece];
  const int64_t whole = count / kLanes * kLanes;
  const int rest = static_cast<int>(count - whole);
  for (int64_t d = 0; d < whole; d += kLanes) store(x0 + d, predict_x0<true>(op, steps, first + d, 0));
  if (rest) store_part(x0 + whole, predict_x0<false>(op, steps, first + whole, rest), rest);
  for (int64_t i = steps.begin; i < steps.end; ++i) {
    for (int64_t d = 0; d < whole; d += kLanes) step_lanes<true>(op, i, load(x0 + d), first + d, 0);
    if (rest) step_lanes<false>(op, i, load_part(x0 + whole, rest), first + whole, rest);
  }
}

}  // namespace

void extrapolate_states(const ExtrapolateStates& op) {
  const int64_t pieces = ceil_div(op.D, kPiece), tasks = op.B * pieces;
  int64_t rows = 0;
  for (int64_t b = 0; b < op.B; ++b) {
    const Steps steps = new_steps(op, b);
    rows += larger(steps.end - steps.begin, 0);
  }
  if (rows == 0) return;
  const int team = team_size(op.threads, tasks, 3 * rows * op.D);
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t b = task / pieces, first = task % pieces * kPiece;
    const Steps steps = new_steps(op, b);
    if (steps.end <= steps.begin) continue;
    extrapolate_piece(op, steps, b * op.D + first, smaller(kPiece, op.D - first));
  }
}

}  // namespace DEQKERN_ISA
}  // namespace deqkern
