// From the logits of a tile to the statistics of the forward pass, and to the factors of the backward pass (gumbel_tile.py).
#pragma once
#include "lanes.h"

namespace {

// tile(begin, end): the logits of ids begin..end of this part of the vocabulary, which starts at first_id.
template <class io, class real, class Tile>
void gumbel_statistics(Tile tile, const io* bias, real cap, const int32_t* keys, int64_t first_id, int64_t ids, int64_t rows, real noise,
                       real sharpness, int threads, double* state, int64_t* arg) {
  int64_t chunks = (ids + kChunk - 1) / kChunk;
  std::vector<real> partial(chunks * 6 * rows);  // top, sum e, sum e * (z - top), noisy top, sum of noisy e, z of the arg-max
  std::vector<int64_t> best(chunks * rows);
  for_chunks(ids, threads, [&](int64_t chunk, int64_t begin, int64_t end) {
    Rows<io> raw = tile(begin, end);
    for_blocks(rows, [&](const Block& block) {
      alignas(64) real z[kChunk][kLanes], noisy[kChunk][kLanes], sums[6][kLanes];
      alignas(64) uint32_t low[kLanes], high[kLanes], at[kLanes];
      block.read(keys, low);
      block.read(keys + rows, high);
      real *top = sums[0], *mass = sums[1], *moment = sums[2], *noisy_top = sums[3], *noisy_mass = sums[4], *z_at = sums[5];
      for (int l = 0; l < kLanes; ++l) {
        top[l] = noisy_top[l] = -std::numeric_limits<real>::infinity();
        mass[l] = moment[l] = noisy_mass[l] = z_at[l] = 0;
        at[l] = 0;
      }
      for (int64_t i = 0; i < end - begin; ++i) {
        real* zi = z[i];
        logits(raw[i], block, bias ? real(load(bias[begin + i])) : real(0), cap, zi);
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) {
          real y = zi[l] + noise * real(gumbel(low[l], high[l], uint32_t(first_id + begin + i)));
          noisy[i][l] = y;
          top[l] = zi[l] > top[l] ? zi[l] : top[l];
          bool more = y > noisy_top[l];
          noisy_top[l] = more ? y : noisy_top[l];
          z_at[l] = more ? zi[l] : z_at[l];
          at[l] = more ? uint32_t(i) : at[l];
        }
      }
      for (int64_t i = 0; i < end - begin; ++i) {
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) {
          real below = z[i][l] - top[l], e = exp_(below);
          mass[l] += e;
          moment[l] += e * below;
          noisy_mass[l] += exp_((noisy[i][l] - noisy_top[l]) * sharpness);
        }
      }
      for (int s = 0; s < 6; ++s) put(partial.data() + (chunk * 6 + s) * rows, block, sums[s]);
      for (int l = 0; l < block.rows; ++l) best[chunk * rows + block.first + l] = first_id + begin + at[l];
    });
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const real* from = partial.data() + chunk * 6 * rows;
    for_blocks(rows, [&](const Block& block) {
      Fold<real> plain(from + block.first, state + block.first, block.rows, real(1));
      plain.add(from + block.first + rows, state + block.first + rows);
      plain.add_moment(from + block.first + 2 * rows, from + block.first + rows, state + block.first + 2 * rows);
      Fold<real> noisy(from + block.first + 3 * rows, state + block.first + 3 * rows, block.rows, sharpness);
      noisy.add(from + block.first + 4 * rows, state + block.first + 4 * rows);
      for (int l = 0; l < block.rows; ++l) {
        int64_t b = block.first + l;
        if (noisy.more[l]) state[5 * rows + b] = from[5 * rows + b], arg[b] = best[chunk * rows + b];
      }
    });
  }
}

// Both factors of one chunk, [ids, 2, rows], and its part of the mean of q.
template <class io, class real>
void gumbel_factors(Rows<io> raw, Rows<io> q, const io* bias, real cap, const int32_t* keys, int64_t first_id, int64_t ids, int64_t rows,
                    real noise, real sharpness, const real* per_row, const int64_t* token, io* out, real* mean) {
  for_blocks(rows, [&](const Block& block) {
    alignas(64) real z[kLanes], grad[kLanes], factor[kLanes], per_mean[kLanes], sum[kLanes] = {};
    alignas(64) real q_token[kLanes], lse[kLanes], noisy_lse[kLanes], entropy[kLanes], grad_log_prob[kLanes], grad_lse[kLanes], grad_entropy[kLanes];
    alignas(64) uint32_t low[kLanes], high[kLanes], chosen[kLanes];
    block.read(keys, low);
    block.read(keys + rows, high);
    block.read(token, chosen);
    real* lanes[] = {q_token, lse, noisy_lse, entropy, grad_log_prob, grad_lse, grad_entropy};
    for (int s = 0; s < 7; ++s) block.read(per_row + s * rows, lanes[s]);
    for (int64_t i = 0; i < ids; ++i) {
      logits(raw[i], block, bias ? real(load(bias[i])) : real(0), cap, z);
      logits(q[i], block, real(0), real(0), grad);
      uint32_t id = uint32_t(first_id + i);
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        real p = exp_((z[l] + noise * real(gumbel(low[l], high[l], id))) * sharpness - noisy_lse[l]);
        real pq = p * (grad[l] - q_token[l]), slope = cap_slope(z[l], cap);
        real plain = softmax_gradient(z[l] - lse[l], entropy[l], grad_lse[l] - grad_log_prob[l], grad_entropy[l]);
        factor[l] = (pq * sharpness + plain + (id == chosen[l] ? grad_log_prob[l] : real(0))) * slope;
        per_mean[l] = p * sharpness * slope;
        sum[l] += pq;
      }
      put(out + i * 2 * rows, block, factor);
      put(out + (i * 2 + 1) * rows, block, per_mean);
    }
    put(mean, block, sum);
  });
}

}  // namespace
