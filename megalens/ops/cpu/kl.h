// From both sides' logits of a tile to the sums of the divergences, and to the gradients of the logits (kl_tile.py).
#pragma once
#include "lanes.h"

namespace {

// p and q share nothing but the vocabulary. Sums of e_p, e_p * z_p, e_p * z_q, and of e_q, e_q * z_q, e_q * z_p.
template <class io, class real>
void kl_statistics(const io* p_raw, int64_t p_stride, const io* p_bias, const io* q_raw, int64_t q_stride, const io* q_bias, real cap,
                   int64_t ids, int64_t rows, int threads, double* state) {
  int64_t chunks = (ids + kChunk - 1) / kChunk;
  std::vector<real> partial(chunks * 8 * rows);
  for_chunks(ids, threads, [&](int64_t chunk, int64_t begin, int64_t end) {
   for_blocks(rows, [&](const Block& block) {
    alignas(64) real z[2][kChunk][kLanes], sums[8][kLanes];
    for (int l = 0; l < kLanes; ++l) {
      sums[0][l] = sums[4][l] = -std::numeric_limits<real>::infinity();
      sums[1][l] = sums[2][l] = sums[3][l] = sums[5][l] = sums[6][l] = sums[7][l] = 0;
    }
    for (int64_t i = begin; i < end; ++i) {
      real *zp = z[0][i - begin], *zq = z[1][i - begin];
      logits(p_raw + i * p_stride, block, p_bias ? real(load(p_bias[i])) : real(0), cap, zp);
      logits(q_raw + i * q_stride, block, q_bias ? real(load(q_bias[i])) : real(0), cap, zq);
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        sums[0][l] = zp[l] > sums[0][l] ? zp[l] : sums[0][l];
        sums[4][l] = zq[l] > sums[4][l] ? zq[l] : sums[4][l];
      }
    }
    for (int64_t i = 0; i < end - begin; ++i) {
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        real p_below = z[0][i][l] - sums[0][l], q_below = z[1][i][l] - sums[4][l], p = exp_(p_below), q = exp_(q_below);
        sums[1][l] += p;
        sums[2][l] += p * p_below;
        sums[3][l] += p * q_below;
        sums[5][l] += q;
        sums[6][l] += q * q_below;
        sums[7][l] += q * p_below;
      }
    }
    for (int s = 0; s < 8; ++s) put(partial.data() + (chunk * 8 + s) * rows, block, sums[s]);
   });
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int side = 0; side < 2; ++side) {
      const real *from = partial.data() + (chunk * 8 + side * 4) * rows, *other = partial.data() + (chunk * 8 + (1 - side) * 4) * rows;
      double* to = state + side * 4 * rows;
      for_blocks(rows, [&](const Block& block) {
        int64_t b = block.first;
        Fold<real> fold(from + b, to + b, block.rows, real(1));
        fold.add(from + b + rows, to + b + rows);
        fold.add_moment(from + b + 2 * rows, from + b + rows, to + b + 2 * rows);
        fold.top = other + b;
        fold.add_moment(from + b + 3 * rows, from + b + rows, to + b + 3 * rows);
      });
    }
  }
}

template <class io, class real>
void kl_gradient(const io* p_raw, int64_t p_stride, const io* p_bias, const io* q_raw, int64_t q_stride, const io* q_bias, real cap, int64_t ids,
                 int64_t rows, const real* per_row, int threads, io* p_out, io* q_out) {
  for_chunks(ids, threads, [&](int64_t, int64_t begin, int64_t end) {
   for_blocks(rows, [&](const Block& block) {
    alignas(64) real zp[kLanes], zq[kLanes], p_grad[kLanes], q_grad[kLanes], row[10][kLanes];
    for (int s = 0; s < 10; ++s) block.read(per_row + s * rows, row[s]);
    const real *p_lse = row[0], *q_lse = row[1], *kl = row[2], *reverse = row[3], *p_entropy = row[4], *q_entropy = row[5];
    const real *grad_kl = row[6], *grad_reverse = row[7], *grad_p_entropy = row[8], *grad_q_entropy = row[9];
    for (int64_t i = begin; i < end; ++i) {
      logits(p_raw + i * p_stride, block, p_bias ? real(load(p_bias[i])) : real(0), cap, zp);
      logits(q_raw + i * q_stride, block, q_bias ? real(load(q_bias[i])) : real(0), cap, zq);
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        real log_p = zp[l] - p_lse[l], log_q = zq[l] - q_lse[l], p = exp_(log_p), q = exp_(log_q);
        real p_slope = cap_slope(zp[l], cap), q_slope = cap_slope(zq[l], cap);
        p_grad[l] = (p * (grad_kl[l] * (log_p - log_q - kl[l]) - grad_p_entropy[l] * (log_p + p_entropy[l])) + grad_reverse[l] * (p - q)) * p_slope;
        q_grad[l] = (q * (grad_reverse[l] * (log_q - log_p - reverse[l]) - grad_q_entropy[l] * (log_q + q_entropy[l])) + grad_kl[l] * (q - p)) * q_slope;
      }
      if (p_out) put(p_out + i * rows, block, p_grad);
      if (q_out) put(q_out + i * rows, block, q_grad);
    }
   });
  });
}

}  // namespace
