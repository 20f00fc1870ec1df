// Both directions for a batch of few rows, products included. The embedding is read once per direction, chunk by chunk; a general
// matrix product is far slower than that for so few rows.
#pragma once
#include "gumbel.h"

namespace {

// Vectors of sixteen floats along the width.
typedef float Vector __attribute__((vector_size(64)));

inline Vector read_vector(const float* from) {
  Vector v;
  std::memcpy(&v, from, 64);
  return v;
}
inline float sum_of(Vector v) {
  typedef float Half __attribute__((vector_size(32)));
  typedef float Quarter __attribute__((vector_size(16)));
  Half h[2];
  std::memcpy(h, &v, 64);
  h[0] += h[1];
  Quarter q[2];
  std::memcpy(q, h, 32);
  q[0] += q[1];
  return (q[0][0] + q[0][1]) + (q[0][2] + q[0][3]);
}

// out[i, m] = weight[i] . left[m] for all ids of a chunk; out has `stride` columns.
void dots(const float* weight, int64_t weight_stride, int64_t ids, const float* left, int64_t rows, int64_t width, float* out, int64_t stride) {
  constexpr int kIds = 4, kRows = 4;
  for (int64_t i = 0; i < ids; i += kIds) {
    for (int64_t m = 0; m < rows; m += kRows) {
      Vector sum[kIds][kRows] = {};
      float tail[kIds][kRows] = {};
      const float* w[kIds];
      const float* x[kRows];
      for (int a = 0; a < kIds; ++a) w[a] = weight + (i + a < ids ? i + a : ids - 1) * weight_stride;
      for (int b = 0; b < kRows; ++b) x[b] = left + (m + b < rows ? m + b : rows - 1) * width;
      int64_t d = 0;
      for (; d + 16 <= width; d += 16) {
        Vector own[kRows];
#pragma GCC unroll 4
        for (int b = 0; b < kRows; ++b) own[b] = read_vector(x[b] + d);
#pragma GCC unroll 4
        for (int a = 0; a < kIds; ++a) {
          Vector wide = read_vector(w[a] + d);
#pragma GCC unroll 4
          for (int b = 0; b < kRows; ++b) sum[a][b] += wide * own[b];
        }
      }
      for (; d < width; ++d)
        for (int a = 0; a < kIds; ++a)
          for (int b = 0; b < kRows; ++b) tail[a][b] += w[a][d] * x[b][d];
      for (int a = 0; a < kIds && i + a < ids; ++a)
        for (int b = 0; b < kRows && m + b < rows; ++b) {
          out[(i + a) * stride + m + b] = tail[a][b] + sum_of(sum[a][b]);
        }
    }
  }
}

// total[m] += sum over ids of factors[i, m] * weight[i].
void add_product(const float* weight, int64_t weight_stride, int64_t ids, const float* factors, int64_t rows, int64_t width, float* total) {
  constexpr int kIds = 8;
  for (int64_t i = 0; i < ids; i += kIds) {
    const float* w[kIds];
    const float* f[kIds];
    static const float none[64] = {};
    for (int a = 0; a < kIds; ++a) {
      w[a] = weight + (i + a < ids ? i + a : ids - 1) * weight_stride;
      f[a] = i + a < ids ? factors + (i + a) * rows : none;
    }
    int64_t d = 0;
    for (; d + 16 <= width; d += 16) {
      Vector wide[kIds];
#pragma GCC unroll 8
      for (int a = 0; a < kIds; ++a) wide[a] = read_vector(w[a] + d);
      for (int64_t m = 0; m < rows; ++m) {
        Vector sum = read_vector(total + m * width + d);
#pragma GCC unroll 8
        for (int a = 0; a < kIds; ++a) sum += wide[a] * f[a][m];
        std::memcpy(total + m * width + d, &sum, 64);
      }
    }
    for (; d < width; ++d)
      for (int64_t m = 0; m < rows; ++m)
        for (int a = 0; a < kIds; ++a) total[m * width + d] += w[a][d] * f[a][m];
  }
}

// A chunk of the embedding as float: as it lies, or widened into `scratch`.
inline const float* widened(const float* weight, int64_t, int64_t, int64_t, float*) { return weight; }
inline const float* widened(const bf16* weight, int64_t stride, int64_t ids, int64_t width, float* scratch) {
  for (int64_t i = 0; i < ids; ++i)
    for (int64_t d = 0; d < width; ++d) scratch[i * width + d] = load(weight[i * stride + d]);
  return scratch;
}
template <class weight_t>
constexpr bool is_narrow = sizeof(weight_t) < sizeof(float);
constexpr int kFewIds = 16;  // of the embedding, widened at a time

template <class weight_t>
void gumbel_few_forward(const weight_t* weight, int64_t stride, const float* hidden, int64_t width, const float* bias, float cap,
                        const int32_t* keys, int64_t ids, int64_t rows, float noise, float sharpness, int threads, double* state, int64_t* arg) {
  auto tile = [=](int64_t begin, int64_t end) {
    static thread_local std::vector<float> products, scratch;
    products.resize(kChunk * rows);
    scratch.resize(is_narrow<weight_t> ? kFewIds * width : 0);
    for (int64_t first = begin; first < end; first += kFewIds) {
      int64_t count = end - first < kFewIds ? end - first : kFewIds;
      const float* some = widened(weight + first * stride, stride, count, width, scratch.data());
      dots(some, is_narrow<weight_t> ? width : stride, count, hidden, rows, width, products.data() + (first - begin) * rows, rows);
    }
    return Rows<float>{products.data(), rows};
  };
  gumbel_statistics<float, float>(tile, bias, cap, keys, 0, ids, rows, noise, sharpness, threads, state, arg);
}

// total [2 * rows, width]: both factors times the embedding. mean [rows]. Each thread sums a share of the ids; the shares are added in
// their order, so that the same number of threads gives the same bits.
template <class weight_t>
void gumbel_few_backward(const weight_t* out_weight, int64_t out_stride, const float* hidden, int64_t width, const weight_t* in_weight,
                         int64_t in_stride, const float* grad, int64_t in_width, const float* bias, float cap, const int32_t* keys, int64_t ids,
                         int64_t rows, float noise, float sharpness, const float* per_row, const int64_t* token, int threads, float* total,
                         double* mean) {
  std::vector<std::vector<double>> sums(threads, std::vector<double>(2 * rows * width)), means(threads, std::vector<double>(rows));
  int64_t pieces = (ids + kFewIds - 1) / kFewIds;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int share = 0; share < threads; ++share) {
    double *sum = sums[share].data(), *own_mean = means[share].data();
    std::vector<float> raw(kFewIds * rows), q(kFewIds * rows), factors(2 * kFewIds * rows), own(2 * rows * width), part(rows);
    int filled = 0;
    auto empty = [&] {  // often: a float sum over a whole vocabulary is rounded too often
      for (size_t at = 0; at < own.size(); ++at) sum[at] += own[at], own[at] = 0;
      filled = 0;
    };
    std::vector<float> out_scratch(is_narrow<weight_t> ? kFewIds * width : 0), in_scratch(is_narrow<weight_t> ? kFewIds * in_width : 0);
    bool tied = out_weight == in_weight;
    int64_t end = pieces * (share + 1) / threads * kFewIds;
    for (int64_t begin = pieces * share / threads * kFewIds; begin < end; begin += kFewIds) {
      int64_t count = ids - begin < kFewIds ? ids - begin : kFewIds;
      const float* out = widened(out_weight + begin * out_stride, out_stride, count, width, out_scratch.data());
      const float* in = tied ? out : widened(in_weight + begin * in_stride, in_stride, count, in_width, in_scratch.data());
      int64_t out_step = is_narrow<weight_t> ? width : out_stride, in_step = is_narrow<weight_t> ? in_width : in_stride;
      dots(out, out_step, count, hidden, rows, width, raw.data(), rows);
      dots(in, in_step, count, grad, rows, in_width, q.data(), rows);
      gumbel_factors<float, float>({raw.data(), rows}, {q.data(), rows}, bias ? bias + begin : nullptr, cap, keys, begin, count, rows, noise,
                                   sharpness, per_row, token, factors.data(), part.data());
      add_product(out, out_step, count, factors.data(), 2 * rows, width, own.data());
      for (int64_t b = 0; b < rows; ++b) own_mean[b] += part[b];
      if (++filled == 32) empty();
    }
    empty();
  }
  for (int share = 0; share < threads; ++share) {
    for (int64_t at = 0; at < 2 * rows * width; ++at) total[at] += sums[share][at];
    for (int64_t b = 0; b < rows; ++b) mean[b] += means[share][b];
  }
}

}  // namespace
