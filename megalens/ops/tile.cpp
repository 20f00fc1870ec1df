// What lies between the matrix products of the CPU tile versions (gumbel_tile.py, kl_tile.py): one pass over a tile [T, B]
// per direction. Sixteen rows of the batch are the lanes of a vector, so sums over the vocabulary need no shuffle.
// Statistics are folded per chunk of ids in a fixed order: the result does not depend on the number of threads.
// Plain C++ that a compiler vectorises. io: the type of tiles (float, double, bf16 bits); real: the type of arithmetic.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int kLanes = 16, kChunk = 128;

struct bf16 { uint16_t bits; };

inline float as_float(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline uint32_t as_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(bf16 x) { return as_float(uint32_t(x.bits) << 16); }
inline void store(float* to, float x) { *to = x; }
inline void store(double* to, double x) { *to = x; }
inline void store(bf16* to, float x) {  // to nearest, ties to even
  uint32_t bits = as_bits(x);
  to->bits = x == x ? uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) : 0x7FC0;
}

// Polynomials of the Cephes library (S. Moshier), about an ulp, without branches.
inline float exp_(float x) {
  x = x > 88.0f ? 88.0f : x;
  float n = std::nearbyint(x * 1.44269504088896341f);
  n = n < -126.0f ? -126.0f : n;
  float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float y = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r + 1.6666665459e-1f) * r + 5.0000001201e-1f;
  y = (y * r * r + r + 1.0f) * as_float(uint32_t(int32_t(n) + 127) << 23);
  return x < -87.0f ? 0.0f : y;
}
inline double exp_(double x) { return std::exp(x); }

inline float tanh_(float x) {
  float a = std::fabs(x), z = x * x;
  float near = x + x * z * ((((-5.70498872745e-3f * z + 2.06390887954e-2f) * z - 5.37397155531e-2f) * z + 1.33314422036e-1f) * z - 3.33332819422e-1f);
  float far = std::copysign(1.0f - 2.0f / (exp_(2.0f * a) + 1.0f), x);
  return a < 0.625f ? near : far;
}
inline double tanh_(double x) { return std::tanh(x); }

// log(1 + m) * 1 + exponent * log(2) for m in [1/sqrt(2) - 1, sqrt(2) - 1]
inline float log_of(float m, float exponent) {
  float s = 7.0376836292e-2f * m - 1.1514610310e-1f;
  s = s * m + 1.1676998740e-1f;
  s = s * m - 1.2420140846e-1f;
  s = s * m + 1.4249322787e-1f;
  s = s * m - 1.6668057665e-1f;
  s = s * m + 2.0000714765e-1f;
  s = s * m - 2.4999993993e-1f;
  s = s * m + 3.3333331174e-1f;
  return exponent * 0.693147180559945f + (m + m * m * (m * s - 0.5f));
}

// noise.py's gumbel: the same hash and uniform w to the bit, then -log(-log(1 - w))
inline float gumbel(uint32_t low, uint32_t high, uint32_t id) {
  uint32_t x = id + low;
  x = (x ^ (x >> 17)) * 0xED5AD4BBu + high;
  x = (x ^ (x >> 11)) * 0xAC4C1B51u;
  x = (x ^ (x >> 15)) * 0x31848BABu;
  x = (x ^ (x >> 14)) & 0x7FFFFFFFu;
  float w = (float(int32_t(x)) + 0.5f) * 4.656612873077393e-10f;
  w = w < 0.99999994f ? w : 0.99999994f;
  int32_t b = int32_t(as_bits(1.0f - w)) - 0x3F3504F3;
  float m = as_float(uint32_t((b & 0x7FFFFF) + 0x3F3504F3)) - 1.0f;
  float e = -log_of((b >> 23) == 0 ? -w : m, float(b >> 23));  // near w = 0 the mantissa of 1 - w has lost digits that w still has
  b = int32_t(as_bits(e)) - 0x3F3504F3;
  m = as_float(uint32_t((b & 0x7FFFFF) + 0x3F3504F3)) - 1.0f;
  return -log_of(m, float(b >> 23));
}

// Sixteen rows of the batch. In the last block, lanes beyond the batch hold some number and are never stored.
struct Block {
  int64_t first;
  int rows;
  int64_t row(int lane) const { return first + (lane < rows ? lane : rows - 1); }
  template <class real, class T>
  void read(const T* from, real* lanes) const {
    for (int l = 0; l < kLanes; ++l) lanes[l] = real(from[row(l)]);
  }
};

// Logits of one id for the lanes: bias, then soft-cap (none at 0).
template <class io, class real>
inline void logits(const io* raw, const Block& block, real bias, real cap, real* z) {
  raw += block.first;
  if (block.rows == kLanes) {
    for (int l = 0; l < kLanes; ++l) z[l] = load(raw[l]) + bias;
  } else {
    for (int l = 0; l < kLanes; ++l) z[l] = 0;
    for (int l = 0; l < block.rows; ++l) z[l] = load(raw[l]) + bias;
  }
  if (cap > 0) {
    for (int l = 0; l < kLanes; ++l) z[l] = cap * tanh_(z[l] / cap);
  }
}

template <class io, class real>
inline void put(io* to, const Block& block, const real* lanes) {
  to += block.first;
  if (block.rows == kLanes) {
    for (int l = 0; l < kLanes; ++l) store(to + l, lanes[l]);
  } else {
    for (int l = 0; l < block.rows; ++l) store(to + l, lanes[l]);
  }
}

// body(chunk, first id, end, block) for all chunks of ids and blocks of rows.
template <class Body>
void for_chunks(int64_t ids, int64_t rows, int threads, Body body) {
  int64_t chunks = (ids + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    int64_t begin = chunk * kChunk, end = begin + kChunk < ids ? begin + kChunk : ids;
    for (int64_t first = 0; first < rows; first += kLanes)
      body(chunk, begin, end, Block{first, rows - first < kLanes ? int(rows - first) : kLanes});
  }
}

template <class io, class real>
void gumbel_statistics(const io* raw, int64_t stride, const io* bias, real cap, const int32_t* keys, int64_t first_id, int64_t ids,
                       int64_t rows, real noise, real sharpness, int threads, double* state, int64_t* arg) {
  int64_t chunks = (ids + kChunk - 1) / kChunk;
  std::vector<real> partial(chunks * 6 * rows);  // top, sum e, sum e * (z - top), noisy top, sum of noisy e, z of the arg-max
  std::vector<int64_t> best(chunks * rows);
  for_chunks(ids, rows, threads, [&](int64_t chunk, int64_t begin, int64_t end, const Block& block) {
    alignas(64) real z[kChunk][kLanes], noisy[kChunk][kLanes], sums[6][kLanes];
    alignas(64) uint32_t low[kLanes], high[kLanes], at[kLanes];
    block.read(keys, low);
    block.read(keys + rows, high);
    real *top = sums[0], *mass = sums[1], *moment = sums[2], *noisy_top = sums[3], *noisy_mass = sums[4], *z_at = sums[5];
    for (int l = 0; l < kLanes; ++l) {
      top[l] = noisy_top[l] = -std::numeric_limits<real>::infinity();
      mass[l] = moment[l] = noisy_mass[l] = z_at[l] = 0;
      at[l] = begin;
    }
    for (int64_t i = begin; i < end; ++i) {
      real* zi = z[i - begin];
      logits(raw + i * stride, block, bias ? real(load(bias[i])) : real(0), cap, zi);
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        real y = zi[l] + noise * real(gumbel(low[l], high[l], uint32_t(first_id + i)));
        noisy[i - begin][l] = y;
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
    for (int l = 0; l < block.rows; ++l) best[chunk * rows + block.first + l] = first_id + at[l];
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const real* p = partial.data() + chunk * 6 * rows;
    for (int64_t b = 0; b < rows; ++b) {
      double *top = state + b, *mass = top + rows, *moment = mass + rows, *noisy_top = moment + rows, *noisy_mass = noisy_top + rows;
      double base = p[b] > *top ? p[b] : *top, kept = exp_(real(*top - base)), added = exp_(real(p[b] - base));
      *mass = *mass * kept + p[rows + b] * added;
      *moment = *moment * kept + (p[2 * rows + b] + double(p[rows + b]) * p[b]) * added;  // of z itself, not of z - top
      *top = base;
      bool more = p[3 * rows + b] > *noisy_top;
      base = more ? p[3 * rows + b] : *noisy_top;
      *noisy_mass = *noisy_mass * exp_(real((*noisy_top - base) * sharpness)) + p[4 * rows + b] * exp_(real((p[3 * rows + b] - base) * sharpness));
      *noisy_top = base;
      noisy_mass[rows] = more ? p[5 * rows + b] : noisy_mass[rows];
      arg[b] = more ? best[chunk * rows + b] : arg[b];
    }
  }
}

template <class io, class real>
void gumbel_gradient(const io* raw, int64_t stride, const io* q, int64_t q_stride, const io* bias, real cap, const int32_t* keys, int64_t first_id, int64_t ids,
                     int64_t rows, real noise, real sharpness, const real* per_row, const int64_t* token, int threads, io* out, double* mean) {
  std::vector<real> partial((ids + kChunk - 1) / kChunk * rows);
  for_chunks(ids, rows, threads, [&](int64_t chunk, int64_t begin, int64_t end, const Block& block) {
    alignas(64) real z[kLanes], grad[kLanes], q_lanes[kLanes], factor[kLanes], per_mean[kLanes], sum[kLanes] = {};
    alignas(64) real q_token[kLanes], lse[kLanes], noisy_lse[kLanes], entropy[kLanes], grad_log_prob[kLanes], grad_lse[kLanes], grad_entropy[kLanes];
    alignas(64) uint32_t low[kLanes], high[kLanes], chosen[kLanes];
    block.read(keys, low);
    block.read(keys + rows, high);
    block.read(token, chosen);
    real* lanes[] = {q_token, lse, noisy_lse, entropy, grad_log_prob, grad_lse, grad_entropy};
    for (int s = 0; s < 7; ++s) block.read(per_row + s * rows, lanes[s]);
    for (int64_t i = begin; i < end; ++i) {
      logits(raw + i * stride, block, bias ? real(load(bias[i])) : real(0), cap, z);
      logits(q + i * q_stride, block, real(0), real(0), q_lanes);
      uint32_t id = uint32_t(first_id + i);
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        real p = exp_((z[l] + noise * real(gumbel(low[l], high[l], id))) * sharpness - noisy_lse[l]);
        real pq = p * (q_lanes[l] - q_token[l]), log_plain = z[l] - lse[l];
        real plain = exp_(log_plain) * (grad_lse[l] - grad_log_prob[l] - grad_entropy[l] * (log_plain + entropy[l]));
        real slope = cap > 0 ? 1 - (z[l] / cap) * (z[l] / cap) : real(1);
        factor[l] = (pq * sharpness + plain + (id == chosen[l] ? grad_log_prob[l] : real(0))) * slope;
        per_mean[l] = p * sharpness * slope;
        sum[l] += pq;
      }
      put(out + i * 2 * rows, block, factor);
      put(out + (i * 2 + 1) * rows, block, per_mean);
    }
    put(partial.data() + chunk * rows, block, sum);
  });
  for (size_t at = 0; at < partial.size(); ++at) mean[at % rows] += partial[at];
}

// p and q share nothing but the vocabulary. Sums of e_p, e_p * z_p, e_p * z_q, and of e_q, e_q * z_q, e_q * z_p.
template <class io, class real>
void kl_statistics(const io* p_raw, int64_t p_stride, const io* p_bias, const io* q_raw, int64_t q_stride, const io* q_bias, real cap,
                   int64_t ids, int64_t rows, int threads, double* state) {
  int64_t chunks = (ids + kChunk - 1) / kChunk;
  std::vector<real> partial(chunks * 8 * rows);
  for_chunks(ids, rows, threads, [&](int64_t chunk, int64_t begin, int64_t end, const Block& block) {
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
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int side = 0; side < 2; ++side) {
      const real *from = partial.data() + (chunk * 8 + side * 4) * rows, *other = partial.data() + (chunk * 8 + (1 - side) * 4) * rows;
      for (int64_t b = 0; b < rows; ++b) {
        double* to = state + side * 4 * rows + b;
        double top = from[b], mass = from[rows + b], base = top > to[0] ? top : to[0], kept = exp_(real(to[0] - base)), added = exp_(real(top - base));
        to[0] = base;
        to[rows] = to[rows] * kept + mass * added;
        to[2 * rows] = to[2 * rows] * kept + (from[2 * rows + b] + mass * top) * added;
        to[3 * rows] = to[3 * rows] * kept + (from[3 * rows + b] + mass * other[b]) * added;
      }
    }
  }
}

template <class io, class real>
void kl_gradient(const io* p_raw, int64_t p_stride, const io* p_bias, const io* q_raw, int64_t q_stride, const io* q_bias, real cap, int64_t ids,
                 int64_t rows, const real* per_row, int threads, io* p_out, io* q_out) {
  for_chunks(ids, rows, threads, [&](int64_t, int64_t begin, int64_t end, const Block& block) {
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
        real p_slope = cap > 0 ? 1 - (zp[l] / cap) * (zp[l] / cap) : real(1), q_slope = cap > 0 ? 1 - (zq[l] / cap) * (zq[l] / cap) : real(1);
        p_grad[l] = (p * (grad_kl[l] * (log_p - log_q - kl[l]) - grad_p_entropy[l] * (log_p + p_entropy[l])) + grad_reverse[l] * (p - q)) * p_slope;
        q_grad[l] = (q * (grad_reverse[l] * (log_q - log_p - reverse[l]) - grad_q_entropy[l] * (log_q + q_entropy[l])) + grad_kl[l] * (q - p)) * q_slope;
      }
      if (p_out) put(p_out + i * rows, block, p_grad);
      if (q_out) put(q_out + i * rows, block, q_grad);
    }
  });
}

}  // namespace

#define EXPORT(suffix, io, real)                                                                                                               \
  extern "C" void gumbel_statistics_##suffix(const io* raw, int64_t stride, const io* bias, double cap, const int32_t* keys, int64_t first_id,  \
                                             int64_t ids, int64_t rows, double noise, double sharpness, int threads, double* state,           \
                                             int64_t* arg) {                                                                                   \
    gumbel_statistics<io, real>(raw, stride, bias, cap, keys, first_id, ids, rows, noise, sharpness, threads, state, arg);                    \
  }                                                                                                                                            \
  extern "C" void gumbel_gradient_##suffix(const io* raw, int64_t stride, const io* q, int64_t q_stride, const io* bias, double cap,           \
                                           const int32_t* keys, int64_t first_id, int64_t ids, int64_t rows, double noise,                    \
                                           double sharpness, const real* per_row, const int64_t* token, int threads, io* out, double* mean) {  \
    gumbel_gradient<io, real>(raw, stride, q, q_stride, bias, cap, keys, first_id, ids, rows, noise, sharpness, per_row, token, threads, out,  \
                              mean);                                                                                                          \
  }                                                                                                                                            \
  extern "C" void kl_statistics_##suffix(const io* p, int64_t p_stride, const io* p_bias, const io* q, int64_t q_stride, const io* q_bias,     \
                                         double cap, int64_t ids, int64_t rows, int threads, double* state) {                                  \
    kl_statistics<io, real>(p, p_stride, p_bias, q, q_stride, q_bias, cap, ids, rows, threads, state);                                         \
  }                                                                                                                                            \
  extern "C" void kl_gradient_##suffix(const io* p, int64_t p_stride, const io* p_bias, const io* q, int64_t q_stride, const io* q_bias,       \
                                       double cap, int64_t ids, int64_t rows, const real* per_row, int threads, io* p_out, io* q_out) {        \
    kl_gradient<io, real>(p, p_stride, p_bias, q, q_stride, q_bias, cap, ids, rows, per_row, threads, p_out, q_out);                           \
  }
EXPORT(float32, float, float)
EXPORT(float64, double, double)
EXPORT(bfloat16, bf16, float)
