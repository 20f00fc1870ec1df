// What lies between the matrix products of the CPU tile versions (gumbel_tile.py, kl_tile.py, log_prob_tile.py): one pass over a tile [T, B]
// per direction. Sixteen rows of the batch are the lanes of a vector, so sums over the vocabulary need no shuffle.
// Statistics are folded per chunk of ids in a fixed order: the result does not depend on the number of threads.
// Plain C++ that a compiler vectorises. The exported functions have one name per type of tile.
#include "few.h"
#include "gumbel.h"
#include "kl.h"
#include "log_prob.h"

#define EXPORT(suffix, io, real)                                                                                                           \
  extern "C" void gumbel_statistics_##suffix(const io* raw, int64_t stride, const io* bias, double cap, const int32_t* keys,               \
                                             int64_t first_id, int64_t ids, int64_t rows, double noise, double sharpness, int threads,     \
                                             double* state, int64_t* arg) {                                                                \
    auto tile = [=](int64_t begin, int64_t) { return Rows<io>{raw + begin * stride, stride}; };                                            \
    gumbel_statistics<io, real>(tile, bias, cap, keys, first_id, ids, rows, noise, sharpness, threads, state, arg);                        \
  }                                                                                                                                        \
  extern "C" void gumbel_gradient_##suffix(const io* raw, int64_t stride, const io* q, int64_t q_stride, const io* bias, double cap,       \
                                           const int32_t* keys, int64_t first_id, int64_t ids, int64_t rows, double noise,                 \
                                           double sharpness, const real* per_row, const int64_t* token, int threads, io* out,              \
                                           double* mean) {                                                                                 \
    std::vector<real> partial((ids + kChunk - 1) / kChunk * rows);                                                                         \
    for_chunks(ids, threads, [&](int64_t chunk, int64_t begin, int64_t end) {                                                              \
      gumbel_factors<io, real>({raw + begin * stride, stride}, {q + begin * q_stride, q_stride}, bias ? bias + begin : nullptr, cap, keys, \
                               first_id + begin, end - begin, rows, noise, sharpness, per_row, token, out + begin * 2 * rows,              \
                               partial.data() + chunk * rows);                                                                             \
    });                                                                                                                                    \
    for (size_t at = 0; at < partial.size(); ++at) mean[at % rows] += partial[at];                                                         \
  }                                                                                                                                        \
  extern "C" void kl_statistics_##suffix(const io* p, int64_t p_stride, const io* p_bias, const io* q, int64_t q_stride, const io* q_bias, \
                                         double cap, int64_t ids, int64_t rows, int threads, double* state) {                              \
    kl_statistics<io, real>(p, p_stride, p_bias, q, q_stride, q_bias, cap, ids, rows, threads, state);                                     \
  }                                                                                                                                        \
  extern "C" void kl_gradient_##suffix(const io* p, int64_t p_stride, const io* p_bias, const io* q, int64_t q_stride, const io* q_bias,   \
                                       double cap, int64_t ids, int64_t rows, const real* per_row, int threads, io* p_out, io* q_out) {    \
    kl_gradient<io, real>(p, p_stride, p_bias, q, q_stride, q_bias, cap, ids, rows, per_row, threads, p_out, q_out);                       \
  }                                                                                                                                        \
  extern "C" void log_prob_statistics_##suffix(const io* raw, int64_t stride, const io* bias, double cap, const int64_t* token,            \
                                               int64_t first_id, int64_t ids, int64_t rows, int threads, double* state) {                  \
    log_prob_statistics<io, real>({raw, stride}, bias, cap, token, first_id, ids, rows, threads, state);                                   \
  }                                                                                                                                        \
  extern "C" void log_prob_gradient_##suffix(const io* raw, int64_t stride, const io* bias, double cap, const int64_t* token,              \
                                             int64_t first_id, int64_t ids, int64_t rows, const real* per_row, int threads, io* out) {     \
    log_prob_gradient<io, real>({raw, stride}, bias, cap, token, first_id, ids, rows, per_row, threads, out);                              \
  }

#define EXPORT_FEW(suffix, weight_t)                                                                                                       \
  extern "C" void gumbel_few_forward_##suffix(const weight_t* weight, int64_t stride, const float* hidden, int64_t width,                  \
                                              const float* bias, double cap, const int32_t* keys, int64_t ids, int64_t rows, double noise, \
                                              double sharpness, int threads, double* state, int64_t* arg) {                                \
    gumbel_few_forward(weight, stride, hidden, width, bias, cap, keys, ids, rows, noise, sharpness, threads, state, arg);                  \
  }                                                                                                                                        \
  extern "C" void gumbel_few_backward_##suffix(const weight_t* out_weight, int64_t out_stride, const float* hidden, int64_t width,         \
                                               const weight_t* in_weight, int64_t in_stride, const float* grad, int64_t in_width,          \
                                               const float* bias, double cap, const int32_t* keys, int64_t ids, int64_t rows,              \
                                               double noise, double sharpness, const float* per_row, const int64_t* token, int threads,    \
                                               float* total, double* mean) {                                                               \
    gumbel_few_backward(out_weight, out_stride, hidden, width, in_weight, in_stride, grad, in_width, bias, cap, keys, ids, rows, noise,    \
                        sharpness, per_row, token, threads, total, mean);                                                                  \
  }

// One type of tile per build: what is not asked for is not compiled.
#if defined(TILES_float32)
EXPORT(float32, float, float)
EXPORT_FEW(float32, float)
EXPORT_FEW(bfloat16, bf16)
#elif defined(TILES_float64)
EXPORT(float64, double, double)
#elif defined(TILES_bfloat16)
EXPORT(bfloat16, bf16, float)
#endif
