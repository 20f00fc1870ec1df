// From the logits of a tile to the sums that give log-probability and entropy, and to the gradient of the logits (log_prob_tile.py).
#pragma once
#include "lanes.h"

namespace {

// state: top, sum of e, sum of e * z, and z of each row's token, which is left as it was where the token lies in another tile.
template <class io, class real>
void log_prob_statistics(Rows<io> raw, const io* bias, real cap, const int64_t* token, int64_t first_id, int64_t ids, int64_t rows, int threads,
                         double* state) {
  int64_t chunks = (ids + kChunk - 1) / kChunk;
  std::vector<real> partial(chunks * 3 * rows);
  for_chunks(ids, threads, [&](int64_t chunk, int64_t begin, int64_t end) {
    for_blocks(rows, [&](const Block& block) {
      alignas(64) real z[kChunk][kLanes], sums[3][kLanes];
      real *top = sums[0], *mass = sums[1], *moment = sums[2];
      for (int l = 0; l < kLanes; ++l) top[l] = -std::numeric_limits<real>::infinity(), mass[l] = moment[l] = 0;
      for (int64_t i = begin; i < end; ++i) {
        real* zi = z[i - begin];
        logits(raw[i], block, bias ? real(load(bias[i])) : real(0), cap, zi);
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) top[l] = zi[l] > top[l] ? zi[l] : top[l];
      }
      for (int64_t i = 0; i < end - begin; ++i) {
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) {
          real below = z[i][l] - top[l], e = exp_(below);
          mass[l] += e;
          moment[l] += e * below;
        }
      }
      for (int s = 0; s < 3; ++s) put(partial.data() + (chunk * 3 + s) * rows, block, sums[s]);
      for (int l = 0; l < block.rows; ++l) {
        int64_t at = token[block.first + l] - first_id;
        if (begin <= at && at < end) state[3 * rows + block.first + l] = z[at - begin][l];
      }
    });
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const real* from = partial.data() + chunk * 3 * rows;
    for_blocks(rows, [&](const Block& block) {
      int64_t b = block.first;
      Fold<real> fold(from + b, state + b, block.rows, real(1));
      fold.add(from + b + rows, state + b + rows);
      fold.add_moment(from + b + 2 * rows, from + b + rows, state + b + 2 * rows);
    });
  }
}

// per_row: lse, entropy, and the gradients of log-probability and entropy. out may be raw itself.
template <class io, class real>
void log_prob_gradient(Rows<io> raw, const io* bias, real cap, const int64_t* token, int64_t first_id, int64_t ids, int64_t rows,
                       const real* per_row, int threads, io* out) {
  for_chunks(ids, threads, [&](int64_t, int64_t begin, int64_t end) {
    for_blocks(rows, [&](const Block& block) {
      alignas(64) real z[kLanes], gradient[kLanes], row[4][kLanes];
      alignas(64) uint32_t chosen[kLanes];
      for (int s = 0; s < 4; ++s) block.read(per_row + s * rows, row[s]);
      block.read(token, chosen);
      const real *lse = row[0], *entropy = row[1], *grad_log_prob = row[2], *grad_entropy = row[3];
      for (int64_t i = begin; i < end; ++i) {
        logits(raw[i], block, bias ? real(load(bias[i])) : real(0), cap, z);
        uint32_t id = uint32_t(first_id + i);
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) {
          real of_softmax = softmax_gradient(z[l] - lse[l], entropy[l], -grad_log_prob[l], grad_entropy[l]);
          gradient[l] = (of_softmax + (id == chosen[l] ? grad_log_prob[l] : real(0))) * cap_slope(z[l], cap);
        }
        put(out + i * rows, block, gradient);
      }
    });
  });
}

}  // namespace
