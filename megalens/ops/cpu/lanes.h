// Arithmetic and iteration that gumbel.h, few.h, kl.h and log_prob.h share. io: the type of tiles (float, double, bf16 bits); real: of arithmetic.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int kLanes = 16, kChunk = 64;

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

// Derivative of the soft-cap, from capped logits.
template <class real>
inline real cap_slope(real z, real cap) { return cap > 0 ? 1 - (z / cap) * (z / cap) : real(1); }

// What the log-sum-exp and the entropy of a soft-max send into a logit, from its log-probability.
template <class real>
inline real softmax_gradient(real log_p, real entropy, real grad_lse, real grad_entropy) {
  return exp_(log_p) * (grad_lse - grad_entropy * (log_p + entropy));
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

// Logits (or gradients times embeddings) of one chunk of ids: rows of `stride` numbers.
template <class io>
struct Rows {
  const io* first;
  int64_t stride;
  const io* operator[](int64_t i) const { return first + i * stride; }
};

// body(chunk, first id, end) for all chunks, on so many threads.
template <class Body>
void for_chunks(int64_t ids, int threads, Body body) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t chunk = 0; chunk < (ids + kChunk - 1) / kChunk; ++chunk)
    body(chunk, chunk * kChunk, ids < (chunk + 1) * kChunk ? ids : (chunk + 1) * kChunk);
}

// body(block) for all blocks of rows of the batch.
template <class Body>
void for_blocks(int64_t rows, Body body) {
  for (int64_t first = 0; first < rows; first += kLanes) body(Block{first, rows - first < kLanes ? int(rows - first) : kLanes});
}

// Adds a chunk's sums, relative to its maximum, to running sums, relative to theirs, for the rows of a block.
template <class real>
struct Fold {
  const real* top;
  int rows;
  alignas(64) real kept[kLanes], added[kLanes];
  bool more[kLanes];
  Fold(const real* top, double* state, int rows, real sharpness) : top(top), rows(rows) {
    real old[kLanes], fresh[kLanes];
    for (int l = 0; l < kLanes; ++l) old[l] = l < rows ? real(state[l]) : real(0), fresh[l] = l < rows ? top[l] : real(0);
    for (int l = 0; l < kLanes; ++l) {
      more[l] = fresh[l] > old[l];
      real base = more[l] ? fresh[l] : old[l];
      kept[l] = exp_((old[l] - base) * sharpness);
      added[l] = exp_((fresh[l] - base) * sharpness);
    }
    for (int l = 0; l < rows; ++l) state[l] = more[l] ? top[l] : state[l];
  }
  void add(const real* sum, double* state) const {
    for (int l = 0; l < rows; ++l) state[l] = state[l] * kept[l] + double(sum[l]) * added[l];
  }
  // of z itself where the chunk has the sum of e * (z - top)
  void add_moment(const real* moment, const real* mass, double* state) const {
    for (int l = 0; l < rows; ++l) state[l] = state[l] * kept[l] + (moment[l] + double(mass[l]) * top[l]) * added[l];
  }
};

}  // namespace
