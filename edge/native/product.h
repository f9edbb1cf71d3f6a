// Products of packed weights with a few columns, on vector registers.
//
// Activations are kept transposed, [features][tokens], so that tokens fill the vector lanes and a weight is one
// broadcast. Frozen weights are dequantised a tile at a time, next to their use, and never stored whole.
// Letters: J output rows of a product, K its contraction, N columns (tokens), padded to a multiple of LANES with zeros.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <executorch/runtime/kernel/thread_parallel_interface.h>

namespace expertfleet {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8, MAX_VECS = 3;
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 4, MAX_VECS = 3;
#else
constexpr int LANES = 4, ROWS = 8, MAX_VECS = 3; // NEON
#endif
using Vec = float __attribute__((vector_size(LANES * sizeof(float))));
using Bytes = uint8_t __attribute__((vector_size(16)));

template <class T>
inline T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

constexpr long TILE = 64;     // output rows of a tile
constexpr long DEPTH = 256;   // contraction of a tile
constexpr long COLUMNS = 256; // most tokens at a time, which bounds the scratch memory

inline long padded(long n) { return (n + LANES - 1) / LANES * LANES; }

// Scratch of one thread, kept from call to call.
class Scratch {
 public:
  float* take(long count) {
    used_.emplace_back();
    size_t slot = used_.size() - 1;
    if (slot == pool_.size()) pool_.emplace_back();
    if (static_cast<long>(pool_[slot].size()) < count + LINE) pool_[slot].resize(count + LINE);
    auto address = reinterpret_cast<uintptr_t>(pool_[slot].data());
    return reinterpret_cast<float*>((address + 63) / 64 * 64);
  }
  size_t mark() const { return used_.size(); }
  void release(size_t mark) { used_.resize(mark); }

 private:
  static constexpr long LINE = 16; // floats of a cache line, to which buffers are aligned
  std::vector<std::vector<float>> pool_;
  std::vector<char> used_;
};

inline Scratch& scratch() {
  static thread_local Scratch mine;
  return mine;
}

// Gives the buffers taken in a scope back to the thread's pool.
class Scope {
 public:
  Scope() : mark_(scratch().mark()) {}
  ~Scope() { scratch().release(mark_); }
  float* floats(long count) { return scratch().take(count); }

 private:
  size_t mark_;
};

// c[j][n] += sum_k w[k * sk + j * sj] * x[k][n] for NJ rows and NV vectors of columns.
template <int NJ, int NV>
inline void micro(const float* w, long sk, long sj, const float* x, long ldx, float* c, long ldc, long K) {
  Vec sum[NJ][NV];
  for (int j = 0; j < NJ; ++j)
    for (int v = 0; v < NV; ++v) sum[j][v] = load<Vec>(c + j * ldc + v * LANES);
  for (long k = 0; k < K; ++k) {
    Vec xs[NV];
    for (int v = 0; v < NV; ++v) xs[v] = load<Vec>(x + k * ldx + v * LANES);
#pragma GCC unroll 8
    for (int j = 0; j < NJ; ++j) {
      const float b = w[k * sk + j * sj];
      for (int v = 0; v < NV; ++v) sum[j][v] += xs[v] * b;
    }
  }
  for (int j = 0; j < NJ; ++j)
    for (int v = 0; v < NV; ++v) store(c + j * ldc + v * LANES, sum[j][v]);
}

template <int NV>
inline void strip(const float* w, long sk, long sj, const float* x, long ldx, float* c, long ldc, long J, long K) {
  long j = 0;
  for (; j + ROWS <= J; j += ROWS) micro<ROWS, NV>(w + j * sj, sk, sj, x, ldx, c + j * ldc, ldc, K);
  for (; j < J; ++j) micro<1, NV>(w + j * sj, sk, sj, x, ldx, c + j * ldc, ldc, K);
}

// c[j][n] += sum_k w[k * sk + j * sj] * x[k][n]; N a multiple of LANES.
inline void multiply(const float* w, long sk, long sj, const float* x, long ldx, float* c, long ldc, long J, long K,
                     long N) {
  long n = 0;
  while (n < N) {
    const long left = (N - n) / LANES;
    // Even strips: 4 vectors are 2 + 2, not 3 + 1.
    const long take = left <= MAX_VECS ? left : (left < 2 * MAX_VECS ? (left + 1) / 2 : MAX_VECS);
    if (MAX_VECS >= 3 && take == 3) strip<MAX_VECS >= 3 ? 3 : 1>(w, sk, sj, x + n, ldx, c + n, ldc, J, K);
    else if (MAX_VECS >= 2 && take == 2) strip<MAX_VECS >= 2 ? 2 : 1>(w, sk, sj, x + n, ldx, c + n, ldc, J, K);
    else strip<1>(w, sk, sj, x + n, ldx, c + n, ldc, J, K);
    n += take * LANES;
  }
}

inline float sum_lanes(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  float lanes[LANES];
  store(lanes, v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
#endif
}

// c[j * sj + r * sr] += sum_n x[j][n] * t[r][n] for RS values of r from r0.
template <int RS>
inline void outer_rows(const float* x, const float* t, long ld, float* c, long sj, long sr, long J, long N) {
  for (long j = 0; j < J; ++j) {
    Vec sum[RS] = {};
    for (long n = 0; n < N; n += LANES) {
      const Vec xs = load<Vec>(x + j * ld + n);
#pragma GCC unroll 8
      for (int r = 0; r < RS; ++r) sum[r] += xs * load<Vec>(t + r * ld + n);
    }
    for (int r = 0; r < RS; ++r) c[j * sj + r * sr] += sum_lanes(sum[r]);
  }
}

// c[j * sj + r * sr] += sum_n x[j][n] * t[r][n]: the gradient of a LoRA factor.
inline void outer(const float* x, const float* t, long ld, float* c, long sj, long sr, long J, long R, long N) {
  executorch::extension::parallel_for(0, J, 128, [&](int64_t begin, int64_t end) {
    const float* from = x + begin * ld;
    float* to = c + begin * sj;
    long r = 0;
    for (; r + 8 <= R; r += 8) outer_rows<8>(from, t + r * ld, ld, to + r * sr, sj, sr, end - begin, N);
    for (; r < R; ++r) outer_rows<1>(from, t + r * ld, ld, to + r * sr, sj, sr, end - begin, N);
  });
}

// Formats as in protocol/packing.py.
enum Format : int64_t { INT4 = 0, NF4 = 1, INT8 = 2 };
constexpr long GROUP = 32;
constexpr float NF4_LEVELS[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171229224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// A frozen weight [out, in] as its blob holds it.
struct Packed {
  const uint8_t* bytes;
  const _Float16* scale;
  int64_t format;
  long out, in;

  long row_bytes() const { return format == INT8 ? in : in / 2; }

  // 32 weights of one row, from column `column` (a multiple of 32).
  void group(long row, long column, float* into) const {
    const float s = static_cast<float>(scale[row * (in / GROUP) + column / GROUP]);
    const uint8_t* at = bytes + row * row_bytes() + (format == INT8 ? column : column / 2);
    Bytes low, high; // codes of the first and the last 16 columns
    if (format == INT8) {
      low = load<Bytes>(at);
      high = load<Bytes>(at + 16);
    } else {
      const Bytes pair = load<Bytes>(at);
      const Bytes even = pair >> 4, odd = pair & 15;
      low = __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      high = __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
#if defined(__AVX512F__)
    const auto wide = [](Bytes codes) { return _mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(codes)); };
    if (format == NF4) {
      const __m512 levels = _mm512_loadu_ps(NF4_LEVELS), factor = _mm512_set1_ps(s);
      _mm512_storeu_ps(into, _mm512_mul_ps(_mm512_permutexvar_ps(wide(low), levels), factor));
      _mm512_storeu_ps(into + 16, _mm512_mul_ps(_mm512_permutexvar_ps(wide(high), levels), factor));
      return;
    }
    const __m512 factor = _mm512_set1_ps(s), zero = _mm512_set1_ps((format == INT8 ? -128.0f : -8.0f) * s);
    _mm512_storeu_ps(into, _mm512_fmadd_ps(_mm512_cvtepi32_ps(wide(low)), factor, zero));
    _mm512_storeu_ps(into + 16, _mm512_fmadd_ps(_mm512_cvtepi32_ps(wide(high)), factor, zero));
#else
    uint8_t codes[GROUP];
    std::memcpy(codes, &low, 16);
    std::memcpy(codes + 16, &high, 16);
    if (format == NF4) {
      for (long i = 0; i < GROUP; ++i) into[i] = NF4_LEVELS[codes[i]] * s;
      return;
    }
    const float zero = (format == INT8 ? -128.0f : -8.0f) * s;
    for (long i = 0; i < GROUP; ++i) into[i] = static_cast<float>(codes[i]) * s + zero;
#endif
  }

  // Rows [r0, r1) and columns [c0, c1), multiples of 32, as floats.
  void tile(long r0, long r1, long c0, long c1, float* into) const {
    for (long r = r0; r < r1; ++r)
      for (long c = c0; c < c1; c += GROUP) group(r, c, into + (r - r0) * (c1 - c0) + (c - c0));
  }
};

// What LoRA adds to a product: c[j][n] += sum_r w[r * sr + j * sj] * t[r][n].
struct LowRank {
  const float* w;
  long sr, sj;
  const float* t;
  long rank;
};

// y[j * ldy] += sum_k w[j][k] * x[k] for J rows; K a multiple of GROUP.
inline void dot_rows(const float* w, const float* x, float* y, long ldy, long J, long K) {
  long j = 0;
  for (; j + 4 <= J; j += 4) {
    Vec sum[4] = {};
    for (long k = 0; k < K; k += LANES) {
      const Vec xs = load<Vec>(x + k);
      for (int i = 0; i < 4; ++i) sum[i] += load<Vec>(w + (j + i) * K + k) * xs;
    }
    for (int i = 0; i < 4; ++i) y[(j + i) * ldy] += sum_lanes(sum[i]);
  }
  for (; j < J; ++j) {
    Vec sum = {};
    for (long k = 0; k < K; k += LANES) sum += load<Vec>(w + j * K + k) * load<Vec>(x + k);
    y[j * ldy] += sum_lanes(sum);
  }
}

// For each tile of rows of y = W x (or W^T x when `transposed`), plus the low-rank part: sink(row, rows, tile [rows][N]).
// Only the first `used` columns of x are tokens. A single one fills the lanes along the contraction instead.
template <class Sink>
void product(const Packed& w, bool transposed, const float* x, long N, long used, const LowRank& lora, Sink sink) {
  const long J = transposed ? w.in : w.out, K = transposed ? w.out : w.in;
  const long tiles = (J + TILE - 1) / TILE;
  const bool single = used == 1 && !transposed;
  Scope scope;
  float* column = single ? scope.floats(K) : nullptr;
  for (long k = 0; single && k < K; ++k) column[k] = x[k * N];
  executorch::extension::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    Scope mine;
    float* weights = mine.floats(TILE * DEPTH);
    float* y = mine.floats(TILE * N);
    for (long tile = begin; tile < end; ++tile) {
      const long j0 = tile * TILE, rows = std::min(TILE, J - j0);
      std::memset(y, 0, sizeof(float) * rows * N);
      if (lora.rank) multiply(lora.w + j0 * lora.sj, lora.sr, lora.sj, lora.t, N, y, N, rows, lora.rank, N);
      for (long k0 = 0; k0 < K; k0 += DEPTH) {
        const long depth = std::min(DEPTH, K - k0);
        if (transposed) {
          w.tile(k0, k0 + depth, j0, j0 + rows, weights);
          multiply(weights, rows, 1, x + k0 * N, N, y, N, rows, depth, N);
        } else {
          w.tile(j0, j0 + rows, k0, k0 + depth, weights);
          if (single) dot_rows(weights, column + k0, y, N, rows, depth);
          else multiply(weights, 1, depth, x + k0 * N, N, y, N, rows, depth, N);
        }
      }
      sink(j0, rows, y);
    }
  });
}

// into[f][n] = rows[n][f] for n < count; the columns up to N become zero.
template <class Row>
void gather_transposed(Row row, long count, long N, long features, float* into) {
  constexpr long SIDE = 16;
  executorch::extension::parallel_for(0, (features + SIDE - 1) / SIDE, 8, [&](int64_t begin, int64_t end) {
    for (long n = 0; n < N; n += SIDE) {
      const float* from[SIDE];
      const long there = std::clamp<long>(count - n, 0, SIDE), room = std::min(SIDE, N - n);
      for (long i = 0; i < there; ++i) from[i] = row(n + i);
      for (long f = begin * SIDE; f < std::min<long>(end * SIDE, features); ++f) {
        float* to = into + f * N + n;
        for (long i = 0; i < there; ++i) to[i] = from[i][f];
        for (long i = there; i < room; ++i) to[i] = 0;
      }
    }
  });
}

} // namespace expertfleet
