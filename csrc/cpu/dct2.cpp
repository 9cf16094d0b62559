// Two small matrix products per channel with a register-blocked kernel, all intermediates in the cache.
//
//   T = A M,   A (H, W) one channel,   M (W, W) = dct_w^T forward, dct_w inverse
//   Y = L T,   L (H, H) = dct_h forward, dct_h^T inverse
//
// The right operands M and T are kept in panels of P columns, P one or two vectors, the last one padded with zeros:
// element (r, w) of a matrix with R rows lies at (w / P * R + r) * P + w % P.
#include "../dct2.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include "simd.h"

namespace deqkern {
namespace DEQKERN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 8;  // 8 x 2 sums in 32 registers
#else
constexpr int kRows = 4;  // 4 x 2 sums in 16 registers
#endif

// out (kHeight, columns) = left (kHeight, depth) panel (depth, P), columns <= P = kVectors vectors.
template <int kHeight, int kVectors>
void multiply_block(const float* left, const float* panel, int64_t depth, float* out, int64_t out_stride,
                    int64_t columns) {
  vec sums[kHeight][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    vec right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = load(panel + (k * kVectors + v) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kHeight; ++r) {
      const vec factor = splat(left[r * depth + k]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] += factor * right[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kHeight; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left_over = columns - v * kLanes;
      float* place = out + r * out_stride + v * kLanes;
      if (left_over >= kLanes)
        store(place, sums[r][v]);
      else if (left_over > 0)
        store_part(place, sums[r][v], static_cast<int>(left_over));
    }
}

// out (rows, columns) = left (rows, depth) right (depth, columns); left is row-major and dense, right lies in panels.
struct Product {
  const float *left, *right;
  int64_t rows, depth, columns;
  float* out;
  int64_t out_row, out_panel;  // strides
};

template <int kVectors>
void multiply(const Product& product) {
  constexpr int64_t width = kVectors * kLanes;
  for (int64_t w = 0; w < product.columns; w += width) {
    const float* panel = product.right + w * product.depth;
    float* out = product.out + w / width * product.out_panel;
    const int64_t columns = smaller(width, product.columns - w);
    int64_t r = 0;
    for (; r + kRows <= product.rows; r += kRows)
      multiply_block<kRows, kVectors>(product.left + r * product.depth, panel, product.depth,
                                      out + r * product.out_row, product.out_row, columns);
    for (; r < product.rows; ++r)
      multiply_block<1, kVectors>(product.left + r * product.depth, panel, product.depth, out + r * product.out_row,
                                  product.out_row, columns);
  }
}

// What all images share.
struct Plan {
  int64_t C, H, W;
  int64_t padded;  // W rounded up to panels
  float* left;     // (H, H)
  float* right;    // (W, W) in panels
  float* colour;   // (C, C), transposed for the inverse; null when it is the identity
};

// The memory of one thread.
struct Work {
  float* columns;        // T, (H, W) in panels
  float *first, *second;  // (C, H, W)
};

void fill_plan(const Dct2& op, int64_t panel, Plan& plan) {
  const int64_t C = op.C, H = op.H, W = op.W;
  for (int64_t p = 0; p < H; ++p)
    for (int64_t q = 0; q < H; ++q) plan.left[p * H + q] = op.inverse ? op.dct_h[q * H + p] : op.dct_h[p * H + q];
  float* place = plan.right;
  for (int64_t w = 0; w < plan.padded; w += panel)
    for (int64_t p = 0; p < W; ++p)
      for (int64_t q = w; q < w + panel; ++q)
        *place++ = q >= W ? 0.0f : op.inverse ? op.dct_w[p * W + q] : op.dct_w[q * W + p];
  bool identity = true;
  for (int64_t p = 0; p < C; ++p)
    for (int64_t q = 0; q < C; ++q) {
      plan.colour[p * C + q] = op.inverse ? op.colour[q * C + p] : op.colour[p * C + q];
      identity = identity && op.colour[p * C + q] == (p == q ? 1.0f : 0.0f);
    }
  if (identity) plan.colour = nullptr;
}

// to[c] = sum_d colour[c, d] from[d]
void mix_colours(const Plan& plan, const float* from, float* to) {
  const int64_t pixels = plan.H * plan.W;
  for (int64_t c = 0; c < plan.C; ++c)
    for (int64_t d = 0; d < plan.C; ++d) {
      const float weight = plan.colour[c * plan.C + d];
      const float* source = from + d * pixels;
      float* target = to + c * pixels;
      if (d == 0)
        for (int64_t j = 0; j < pixels; ++j) target[j] = weight * source[j];
      else
        for (int64_t j = 0; j < pixels; ++j) target[j] += weight * source[j];
    }
}

template <int kVectors>
void transform_channels(const Plan& plan, const float* from, float* columns, float* to) {
  const int64_t H = plan.H, W = plan.W, P = kVectors * kLanes;
  for (int64_t c = 0; c < plan.C; ++c) {
    multiply<kVectors>({from + c * H * W, plan.right, H, W, plan.padded, columns, P, H * P});
    multiply<kVectors>({plan.left, columns, H, H, W, to + c * H * W, W, P});
  }
}

template <int kVectors>
void forward(const Dct2& op, const Plan& plan, const float* image, float* spectrum, const Work& work) {
  transform_channels<kVectors>(plan, image, work.columns, work.first);
  const float* coefficients = work.first;
  if (plan.colour != nullptr) {
    mix_colours(plan, work.first, work.second);
    coefficients = work.second;
  }
  const int64_t size = op.C * op.H * op.W;
  for (int64_t k = 0; k < size; ++k) spectrum[k] = coefficients[op.order[k]];
}

template <int kVectors>
void backward(const Dct2& op, const Plan& plan, const float* spectrum, float* image, const Work& work) {
  const int64_t size = op.C * op.H * op.W;
  for (int64_t k = 0; k < size; ++k) work.first[op.order[k]] = spectrum[k];
  const float* coefficients = work.first;
  if (plan.colour != nullptr) {
    mix_colours(plan, work.first, work.second);
    coefficients = work.second;
  }
  transform_channels<kVectors>(plan, coefficients, work.columns, image);
}

template <int kVectors>
void transform_images(const Dct2& op) {
  constexpr int64_t panel = kVectors * kLanes, line = 16;  // floats in a panel's row and in a cache line
  const int64_t size = op.C * op.H * op.W, padded = ceil_div(op.W, panel) * panel;
  const auto whole_lines = [](int64_t floats) { return ceil_div(floats, line) * line; };
  const int64_t left = whole_lines(op.H * op.H), right = whole_lines(op.W * padded), colour = whole_lines(op.C * op.C);
  const int64_t columns = whole_lines(op.H * padded), image_length = whole_lines(size);
  const int64_t per_thread = columns + 2 * image_length;
  const int team = team_size(op.threads, op.N, 8 * op.N * size);
  float* memory =
      static_cast<float*>(scratch(static_cast<size_t>(left + right + colour + team * per_thread) * sizeof(float)));
  Plan plan{op.C, op.H, op.W, padded, memory, memory + left, memory + left + right};
  memory += left + right + colour;
  fill_plan(op, panel, plan);
#pragma omp parallel num_threads(team) if (team > 1)
  {
    int thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    float* mine = memory + thread * per_thread;
    const Work work{mine, mine + columns, mine + columns + image_length};
#pragma omp for schedule(static)
    for (int64_t n = 0; n < op.N; ++n) {
      float *image = op.image + n * size, *spectrum = op.spectrum + op.rows[n] * size;
      if (op.inverse)
        backward<kVectors>(op, plan, spectrum, image, work);
      else
        forward<kVectors>(op, plan, image, spectrum, work);
    }
  }
}

}  // namespace

void dct2(const Dct2& op) {
  if (op.W % (2 * kLanes) == 0 || op.W > 8 * kLanes)
    transform_images<2>(op);
  else
    transform_images<1>(op);
}

}  // namespace DEQKERN_ISA
}  // namespace deqkern
