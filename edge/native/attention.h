// Causal attention, a block of queries at a time: no [S, S] matrix is kept, the backward pass computes it again.
//
// Letters: S tokens, H query heads, G key and value heads (H a multiple of G), D width of a query, V width of a value.
// Scores are kept as [key][query], so that queries fill the vector lanes.
#pragma once

#include <cmath>

#include "activation.h"
#include "product.h"

namespace expertfleet {

struct Attention {
  long B, H, G, S, D, V;
  float scale;
  long window; // a query sees its last `window` keys; 0: all before it

  static constexpr long BLOCK = 64;

  long first_key(long query) const { return window ? std::max<long>(0, query - window + 1) : 0; }

  // into[d][n] = x[q0 + n][d] with zeros up to N columns; rows of x are `stride` apart.
  static void transpose(const float* x, long stride, long count, long N, long width, float* into) {
    for (long d = 0; d < width; ++d) {
      for (long n = 0; n < count; ++n) into[d * N + n] = x[n * stride + d];
      for (long n = count; n < N; ++n) into[d * N + n] = 0;
    }
  }

  // Probabilities [keys][N] of the queries q0.. over keys k0.., from their transposed rows. `lse` [count]: log of the sum of
  // exponentials, written when `fresh`, else read.
  void probabilities(const float* k, const float* qt, long q0, long count, long N, long k0, long keys, bool fresh,
                     float* lse, float* p) const {
    std::memset(p, 0, sizeof(float) * keys * N);
    multiply(k + k0 * D, 1, D, qt, N, p, N, keys, D, N);
    float top[BLOCK + LANES], sum[BLOCK + LANES] = {};
    std::fill(top, top + N, -INFINITY);
    for (long j = 0; j < keys; ++j)
      for (long n = 0; n < N; ++n) {
        const bool seen = k0 + j <= q0 + n && k0 + j >= first_key(q0 + n);
        const float score = seen ? p[j * N + n] * scale : -INFINITY;
        p[j * N + n] = score;
        top[n] = std::max(top[n], score);
      }
    if (!fresh) std::copy(lse, lse + count, top);
    for (long j = 0; j < keys; ++j)
      for (long n = 0; n < N; ++n) {
        const float e = p[j * N + n] == -INFINITY ? 0.0f : fast_exp(p[j * N + n] - top[n]);
        p[j * N + n] = e;
        sum[n] += e;
      }
    if (!fresh) return;
    for (long n = 0; n < count; ++n) lse[n] = top[n] + std::log(sum[n]);
    for (long n = 0; n < N; ++n) sum[n] = sum[n] > 0 ? 1.0f / sum[n] : 0.0f;
    for (long j = 0; j < keys; ++j)
      for (long n = 0; n < N; ++n) p[j * N + n] *= sum[n];
  }

  // q [B, H, S, D], k [B, G, S, D], v [B, G, S, V] -> y [B, S, H, V], lse [B, H, S].
  void forward(const float* q, const float* k, const float* v, float* y, float* lse) const {
    executorch::extension::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
      Scope mine;
      float *qt = mine.floats(D * BLOCK), *p = mine.floats(S * BLOCK), *yt = mine.floats(V * BLOCK);
      for (long head = begin; head < end; ++head) {
        const long b = head / H, h = head % H, g = b * G + h / (H / G);
        for (long q0 = 0; q0 < S; q0 += BLOCK) {
          const long count = std::min(BLOCK, S - q0), N = padded(count), k0 = first_key(q0), keys = q0 + count - k0;
          transpose(q + (head * S + q0) * D, D, count, N, D, qt);
          probabilities(k + g * S * D, qt, q0, count, N, k0, keys, true, lse + head * S + q0, p);
          std::memset(yt, 0, sizeof(float) * V * N);
          multiply(v + (g * S + k0) * V, V, 1, p, N, yt, N, V, keys, N);
          for (long n = 0; n < count; ++n) {
            float* to = y + ((b * S + q0 + n) * H + h) * V;
            for (long d = 0; d < V; ++d) to[d] = yt[d * N + n];
          }
        }
      }
    });
  }

  // Gradients of q, k and v, shaped like them, from dy [B, S, H, V].
  void backward(const float* dy, const float* q, const float* k, const float* v, const float* y, const float* lse,
                float* dq, float* dk, float* dv) const {
    const long Dp = padded(D), Vp = padded(V);
    executorch::extension::parallel_for(0, B * G, 1, [&](int64_t begin, int64_t end) {
      Scope mine;
      float *qt = mine.floats(D * BLOCK), *p = mine.floats(S * BLOCK), *dp = mine.floats(S * BLOCK);
      float *dyt = mine.floats(V * BLOCK), *dqt = mine.floats(D * BLOCK);
      float *rows_q = mine.floats(BLOCK * Dp), *rows_dy = mine.floats(BLOCK * Vp);
      float *sum_k = mine.floats(S * Dp), *sum_v = mine.floats(S * Vp);
      for (long g = begin; g < end; ++g) {
        const long b = g / G;
        std::memset(sum_k, 0, sizeof(float) * S * Dp);
        std::memset(sum_v, 0, sizeof(float) * S * Vp);
        for (long i = 0; i < H / G; ++i) {
          const long h = (g % G) * (H / G) + i, head = b * H + h;
          for (long q0 = 0; q0 < S; q0 += BLOCK) {
            const long count = std::min(BLOCK, S - q0), N = padded(count), k0 = first_key(q0), keys = q0 + count - k0;
            const float* from = dy + ((b * S + q0) * H + h) * V;
            transpose(q + (head * S + q0) * D, D, count, N, D, qt);
            transpose(from, H * V, count, N, V, dyt);
            std::memset(rows_q, 0, sizeof(float) * BLOCK * Dp);
            std::memset(rows_dy, 0, sizeof(float) * BLOCK * Vp);
            float delta[BLOCK + LANES] = {}, total[BLOCK + LANES] = {};
            std::copy(lse + head * S + q0, lse + head * S + q0 + count, total);
            for (long n = 0; n < count; ++n) {
              std::memcpy(rows_q + n * Dp, q + (head * S + q0 + n) * D, sizeof(float) * D);
              std::memcpy(rows_dy + n * Vp, from + n * H * V, sizeof(float) * V);
              const float* out = y + ((b * S + q0 + n) * H + h) * V;
              for (long d = 0; d < V; ++d) delta[n] += out[d] * from[n * H * V + d];
            }
            probabilities(k + g * S * D, qt, q0, count, N, k0, keys, false, total, p);
            std::memset(dp, 0, sizeof(float) * keys * N);
            multiply(v + (g * S + k0) * V, 1, V, dyt, N, dp, N, keys, V, N);
            // Columns beyond `count` meet rows of zeros below.
            multiply(p, 1, N, rows_dy, Vp, sum_v + k0 * Vp, Vp, keys, count, Vp);
            for (long j = 0; j < keys; ++j)
              for (long n = 0; n < N; ++n) dp[j * N + n] = p[j * N + n] * (dp[j * N + n] - delta[n]) * scale;
            std::memset(dqt, 0, sizeof(float) * D * N);
            multiply(k + (g * S + k0) * D, D, 1, dp, N, dqt, N, D, keys, N);
            multiply(dp, 1, N, rows_q, Dp, sum_k + k0 * Dp, Dp, keys, count, Dp);
            for (long n = 0; n < count; ++n)
              for (long d = 0; d < D; ++d) dq[(head * S + q0 + n) * D + d] = dqt[d * N + n];
          }
        }
        for (long j = 0; j < S; ++j) {
          std::memcpy(dk + (g * S + j) * D, sum_k + j * Dp, sizeof(float) * D);
          std::memcpy(dv + (g * S + j) * V, sum_v + j * Vp, sizeof(float) * V);
        }
      }
    });
  }
};

} // namespace expertfleet
