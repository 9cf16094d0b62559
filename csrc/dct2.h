// Orthonormal 2-D DCT-II of every channel, colour transform and band order; or the inverse of all three.
//
//   forward:  y[n, c] = sum_d colour[c, d] dct_h image[n, d] dct_w^T,   spectrum[rows[n], k] = y[n].flat[order[k]]
//   inverse:  the transposed maps in reverse order, writes image
//
// The op asks for the symmetry of a DCT-II, d[k, n-1-p] = (-1)^k d[k, p]. Here any matrices will do; those that have
// it bit for bit, and for dct_h also the first halves of its even rows, while these are of even length, are about twice
// as fast. An `order` that leaves neighbours together is faster there than one at random.
#pragma once
#include <cstdint>

namespace deqkern {

struct Dct2 {
  float* image;          // (N, C, H, W), written by the inverse
  float* spectrum;       // (R, C*H*W), written by the forward transform
  const int64_t* rows;   // (N,), the row of `spectrum` that belongs to each image
  const float* dct_h;    // (H, H) orthonormal
  const float* dct_w;    // (W, W) orthonormal
  const float* colour;   // (C, C) orthonormal; null: none
  const int64_t* order;  // (C*H*W,), a permutation
  const int64_t* place;  // (C*H*W,), its inverse; not read here
  int64_t N, C, H, W, R;
  bool inverse;
  int threads;
};

}  // namespace deqkern
