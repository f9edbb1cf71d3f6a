// The operators of export/ops.py for the ExecuTorch runtime.
//
// Letters: T tokens, P slots, k experts a token, d hidden, f expert width, u rows of the first projection (2f gated, else
// f), R rank of a slot. LoRA factors of the slots lie one after the other: A [R, in], B [out, R].
#include <cmath>

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>

#include "activation.h"
#include "attention.h"
#include "product.h"

namespace expertfleet {
namespace {

using executorch::aten::ArrayRef;
using executorch::aten::Tensor;
using executorch::runtime::KernelRuntimeContext;
using Ints = ArrayRef<int64_t>;

constexpr float LORA_SCALE = 2.0f; // protocol/lora.py

const _Float16* halves(const Tensor& t) { return reinterpret_cast<const _Float16*>(t.const_data_ptr()); }
const float* floats(const Tensor& t) { return t.const_data_ptr<float>(); }

Packed matrix(const Tensor& bytes, const Tensor& scale, int64_t format, long out, long in) {
  return {bytes.const_data_ptr<uint8_t>(), halves(scale), format, out, in};
}

// y[n] = W x[n] (or W^T x[n]) for every row n of x.
void product_rows(const Packed& w, bool transposed, const float* x, long T, float* y) {
  const long in = transposed ? w.out : w.in, out = transposed ? w.in : w.out;
  Scope scope;
  float* columns = scope.floats(in * std::min(COLUMNS, padded(T)));
  for (long t0 = 0; t0 < T; t0 += COLUMNS) {
    const long count = std::min(COLUMNS, T - t0), N = padded(count);
    gather_transposed([&](long n) { return x + (t0 + n) * in; }, count, N, in, columns);
    product(w, transposed, columns, N, count, LowRank{}, [&](long j0, long rows, const float* tile) {
      for (long n = 0; n < count; ++n) {
        float* to = y + (t0 + n) * out + j0;
        for (long j = 0; j < rows; ++j) to[j] = tile[j * N + n];
      }
    });
  }
}

Tensor& packed_linear(KernelRuntimeContext& ctx, const Tensor& x, const Tensor& bytes, const Tensor& scale, int64_t format,
                      int64_t out, Tensor& y) {
  const long in = x.size(1);
  product_rows(matrix(bytes, scale, format, out, in), false, floats(x), x.size(0), y.mutable_data_ptr<float>());
  return y;
}

Tensor& packed_linear_backward(KernelRuntimeContext& ctx, const Tensor& dy, const Tensor& bytes, const Tensor& scale,
                               int64_t format, int64_t in, Tensor& dx) {
  const long out = dy.size(1);
  product_rows(matrix(bytes, scale, format, out, in), true, floats(dy), dy.size(0), dx.mutable_data_ptr<float>());
  return dx;
}

Tensor& packed_embedding(KernelRuntimeContext& ctx, const Tensor& ids, const Tensor& bytes, const Tensor& scale,
                         int64_t format, int64_t d, Tensor& y) {
  const long rows = scale.numel() * GROUP / d;
  const Packed table = matrix(bytes, scale, format, rows, d);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  for (long n = 0; n < ids.numel(); ++n) {
    ET_KERNEL_CHECK_MSG(ctx, 0 <= id[n] && id[n] < rows, InvalidArgument, y, "token %ld of %ld", long(id[n]), rows);
    table.tile(id[n], id[n] + 1, 0, d, y.mutable_data_ptr<float>() + n * d);
  }
  return y;
}

// The weights of one layer's slots, and which assignments (token t, place k) each slot gets.
struct Layer {
  long T, k, d, f, u, P, largest_rank = 0;
  std::vector<Packed> up, down;
  std::vector<const float*> up_a, up_b, down_a, down_b;
  std::vector<long> factors[4]; // offset of each slot's factor in up_a, up_b, down_a, down_b
  std::vector<long> start, assigned;
  Ints ranks;
  int64_t activation;

  Layer(const Tensor& x, const Tensor& slot, const Tensor& up_bytes, const Tensor& up_scale, const Tensor& down_bytes,
        const Tensor& down_scale, const Tensor& ua, const Tensor& ub, const Tensor& da, const Tensor& db, Ints formats,
        Ints ranks, int64_t activation, int64_t width, bool gated)
      : T(x.size(0)), k(slot.size(1)), d(x.size(1)), f(width), u(gated ? 2 * width : width), P(formats.size()),
        ranks(ranks), activation(activation) {
    long at[6] = {};
    const uint8_t *up_at = up_bytes.const_data_ptr<uint8_t>(), *down_at = down_bytes.const_data_ptr<uint8_t>();
    for (long p = 0; p < P; ++p) {
      up.push_back({up_at, halves(up_scale) + at[0], formats[p], u, d});
      down.push_back({down_at, halves(down_scale) + at[1], formats[p], d, f});
      up_at += up[p].row_bytes() * u;
      down_at += down[p].row_bytes() * d;
      at[0] += u * (d / GROUP);
      at[1] += d * (f / GROUP);
      const long R = ranks[p], sizes[4] = {R * d, u * R, R * f, d * R};
      up_a.push_back(floats(ua) + at[2]);
      up_b.push_back(floats(ub) + at[3]);
      down_a.push_back(floats(da) + at[4]);
      down_b.push_back(floats(db) + at[5]);
      for (int i = 0; i < 4; ++i) {
        factors[i].push_back(at[2 + i]);
        at[2 + i] += sizes[i];
      }
      largest_rank = std::max(largest_rank, R);
    }
    const int64_t* id = slot.const_data_ptr<int64_t>();
    start.assign(P + 1, 0);
    for (long i = 0; i < T * k; ++i) ++start[id[i] + 1];
    for (long p = 0; p < P; ++p) start[p + 1] += start[p];
    assigned.resize(T * k);
    std::vector<long> next(start.begin(), start.end() - 1);
    for (long i = 0; i < T * k; ++i) assigned[next[id[i]]++] = i;
  }

  bool gated() const { return u != f; }
  const long* chunk(long at) const { return assigned.data() + at; }
};

// s * A x, [R, N].
void lower_rank(const float* a, long R, long in, const float* x, long N, float* t) {
  std::memset(t, 0, sizeof(float) * R * N);
  multiply(a, 1, in, x, N, t, N, R, in, N);
  for (long i = 0; i < R * N; ++i) t[i] *= LORA_SCALE;
}

// s * B^T y, [R, N].
void lower_rank_back(const float* b, long R, long out, const float* y, long N, float* t) {
  std::memset(t, 0, sizeof(float) * R * N);
  multiply(b, R, 1, y, N, t, N, R, out, N);
  for (long i = 0; i < R * N; ++i) t[i] *= LORA_SCALE;
}

template <class Call>
void rows_parallel(long rows, Call call) {
  executorch::extension::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) call(row);
  });
}

void apply_activation(const Layer& l, const float* h, float* a, long N) {
  rows_parallel(l.f, [&](long j) {
    const float *gate = h + j * N, *up = l.gated() ? h + (l.f + j) * N : nullptr;
    switch (l.activation) {
      case SILU: return forward_row<SILU>(gate, up, a + j * N, N);
      case GELU: return forward_row<GELU>(gate, up, a + j * N, N);
      case GELU_TANH: return forward_row<GELU_TANH>(gate, up, a + j * N, N);
      default: return forward_row<RELU>(gate, up, a + j * N, N);
    }
  });
}

void apply_activation_backward(const Layer& l, float* h, const float* da, long N) {
  rows_parallel(l.f, [&](long j) {
    float *gate = h + j * N, *up = l.gated() ? h + (l.f + j) * N : nullptr;
    switch (l.activation) {
      case SILU: return backward_row<SILU>(gate, up, da + j * N, N);
      case GELU: return backward_row<GELU>(gate, up, da + j * N, N);
      case GELU_TANH: return backward_row<GELU_TANH>(gate, up, da + j * N, N);
      default: return backward_row<RELU>(gate, up, da + j * N, N);
    }
  });
}

// y[t] += weight * column n of yt, for the tokens of a chunk (each at most once).
void scatter_add(const Layer& l, const long* ids, long count, const float* weight, const float* yt, long N, float* y) {
  executorch::extension::parallel_for(0, (l.d + 15) / 16, 8, [&](int64_t begin, int64_t end) {
    const long j1 = std::min<long>(end * 16, l.d);
    for (long n = 0; n < count; ++n) {
      const float share = weight ? weight[ids[n]] : 1.0f;
      float* to = y + ids[n] / l.k * l.d;
      for (long j = begin * 16; j < j1; ++j) to[j] += share * yt[j * N + n];
    }
  });
}

// Forward of all slots. `saved` [T*k*u] takes the first projection's result, `norms` [T*k] the norm of each expert's
// output; either may be null.
void forward(const Layer& l, const float* x, const float* weight, float* y, float* saved, float* norms) {
  std::memset(y, 0, sizeof(float) * l.T * l.d);
  Scope scope;
  const long most = std::min(COLUMNS, padded(l.T));
  float *xt = scope.floats(l.d * most), *h = scope.floats(l.u * most), *a = scope.floats(l.f * most);
  float *yt = scope.floats(l.d * most), *t = scope.floats(l.largest_rank * most);
  for (long p = 0; p < l.P; ++p) {
    const long R = l.ranks[p];
    for (long at = l.start[p]; at < l.start[p + 1]; at += COLUMNS) {
      const long count = std::min(COLUMNS, l.start[p + 1] - at), N = padded(count);
      const long* ids = l.chunk(at);
      gather_transposed([&](long n) { return x + ids[n] / l.k * l.d; }, count, N, l.d, xt);
      if (R) lower_rank(l.up_a[p], R, l.d, xt, N, t);
      product(l.up[p], false, xt, N, count, LowRank{l.up_b[p], 1, R, t, R}, [&](long j0, long rows, const float* tile) {
        std::memcpy(h + j0 * N, tile, sizeof(float) * rows * N);
        if (saved)
          for (long j = 0; j < rows; ++j)
            std::memcpy(saved + at * l.u + (j0 + j) * count, tile + j * N, sizeof(float) * count);
      });
      apply_activation(l, h, a, N);
      if (R) lower_rank(l.down_a[p], R, l.f, a, N, t);
      product(l.down[p], false, a, N, count, LowRank{l.down_b[p], 1, R, t, R}, [&](long j0, long rows, const float* tile) {
        std::memcpy(yt + j0 * N, tile, sizeof(float) * rows * N);
      });
      scatter_add(l, ids, count, weight, yt, N, y);
      if (norms) {
        for (long n = 0; n < count; ++n) {
          double square = 0;
          for (long j = 0; j < l.d; ++j) square += double(yt[j * N + n]) * yt[j * N + n];
          norms[ids[n]] = static_cast<float>(std::sqrt(square));
        }
      }
    }
  }
}

struct Gradients {
  float *x, *weight, *factors[4]; // of up_a, up_b, down_a, down_b
};

void backward(const Layer& l, const float* dy, const float* x, const float* weight, const float* saved, Gradients into) {
  std::memset(into.x, 0, sizeof(float) * l.T * l.d);
  Scope scope;
  const long most = std::min(COLUMNS, padded(l.T)), R_most = l.largest_rank * most;
  float *xt = scope.floats(l.d * most), *yt = scope.floats(l.d * most);
  float *h = scope.floats(l.u * most), *a = scope.floats(l.f * most), *da = scope.floats(l.f * most);
  float *t = scope.floats(R_most), *back = scope.floats(R_most);
  for (long p = 0; p < l.P; ++p) {
    const long R = l.ranks[p];
    float* gradient[4];
    const long sizes[4] = {R * l.d, l.u * R, R * l.f, l.d * R};
    for (int i = 0; i < 4; ++i) {
      gradient[i] = into.factors[i] + l.factors[i][p];
      std::memset(gradient[i], 0, sizeof(float) * sizes[i]);
    }
    for (long at = l.start[p]; at < l.start[p + 1]; at += COLUMNS) {
      const long count = std::min(COLUMNS, l.start[p + 1] - at), N = padded(count);
      const long* ids = l.chunk(at);
      gather_transposed([&](long n) { return dy + ids[n] / l.k * l.d; }, count, N, l.d, yt);
      gather_transposed([&](long n) { return x + ids[n] / l.k * l.d; }, count, N, l.d, xt);
      rows_parallel(l.u, [&](long j) {
        std::memcpy(h + j * N, saved + at * l.u + j * count, sizeof(float) * count);
        std::memset(h + j * N + count, 0, sizeof(float) * (N - count));
      });
      apply_activation(l, h, a, N);
      // Through the second projection, before the routing weight: its product with `a` is the weight's gradient.
      if (R) lower_rank_back(l.down_b[p], R, l.d, yt, N, back);
      product(l.down[p], true, yt, N, count, LowRank{l.down_a[p], l.f, 1, back, R}, [&](long j0, long rows, const float* tile) {
        std::memcpy(da + j0 * N, tile, sizeof(float) * rows * N);
      });
      float share[COLUMNS] = {}, dot[COLUMNS] = {};
      for (long n = 0; n < count; ++n) share[n] = weight[ids[n]];
      for (long j = 0; j < l.f; ++j)
        for (long n = 0; n < N; ++n) dot[n] += a[j * N + n] * da[j * N + n];
      for (long n = 0; n < count; ++n) into.weight[ids[n]] = dot[n];
      if (R) {
        lower_rank(l.down_a[p], R, l.f, a, N, t);
        for (long r = 0; r < R; ++r)
          for (long n = 0; n < N; ++n) t[r * N + n] *= share[n], back[r * N + n] *= share[n];
        outer(a, back, N, gradient[2], 1, l.f, l.f, R, N);
        outer(yt, t, N, gradient[3], R, 1, l.d, R, N);
      }
      rows_parallel(l.f, [&](long j) {
        for (long n = 0; n < N; ++n) da[j * N + n] *= share[n];
      });
      apply_activation_backward(l, h, da, N);
      if (R) {
        lower_rank(l.up_a[p], R, l.d, xt, N, t);
        lower_rank_back(l.up_b[p], R, l.u, h, N, back);
        outer(xt, back, N, gradient[0], 1, l.d, l.d, R, N);
        outer(h, t, N, gradient[1], R, 1, l.u, R, N);
      }
      product(l.up[p], true, h, N, count, LowRank{l.up_a[p], l.d, 1, back, R}, [&](long j0, long rows, const float* tile) {
        std::memcpy(yt + j0 * N, tile, sizeof(float) * rows * N);
      });
      scatter_add(l, ids, count, nullptr, yt, N, into.x);
    }
  }
}

// The SDK's wrapper takes operators with one output only; these read their arguments from the stack themselves.
using Stack = executorch::runtime::Span<executorch::runtime::EValue*>;

float* written(Stack stack, size_t i) { return stack[i]->toTensor().mutable_data_ptr<float>(); }

// Arguments from `first` on: up_bytes, up_scale, down_bytes, down_scale, up_a, up_b, down_a, down_b, formats, ranks,
// activation, width, gated.
Layer layer_of(const Tensor& x, const Tensor& slot, Stack stack, size_t first) {
  const auto tensor = [&](size_t i) -> const Tensor& { return stack[first + i]->toTensor(); };
  return Layer(x, slot, tensor(0), tensor(1), tensor(2), tensor(3), tensor(4), tensor(5), tensor(6), tensor(7),
               stack[first + 8]->toIntList(), stack[first + 9]->toIntList(), stack[first + 10]->toInt(),
               stack[first + 11]->toInt(), stack[first + 12]->toBool());
}

constexpr size_t LAYER_ARGUMENTS = 13;

// Buffers hold as many columns as there are tokens: a token that comes to a slot twice would not fit.
bool slots_exist_and_differ(const Tensor& slot, Stack stack, size_t first) {
  const int64_t slots = stack[first + 8]->toIntList().size();
  const int64_t* id = slot.const_data_ptr<int64_t>();
  const long k = slot.size(1);
  for (long i = 0; i < slot.numel(); ++i)
    if (id[i] < 0 || id[i] >= slots || std::find(id + i / k * k, id + i, id[i]) != id + i) return false;
  return true;
}

// (x, weight, slot, layer...) -> y, and saved or norms.
template <bool NORMS>
void routed_experts(KernelRuntimeContext& ctx, Stack stack) {
  const Tensor &x = stack[0]->toTensor(), &weight = stack[1]->toTensor(), &slot = stack[2]->toTensor();
  ET_KERNEL_CHECK(ctx, slots_exist_and_differ(slot, stack, 3), InvalidArgument, );
  const size_t out = 3 + LAYER_ARGUMENTS;
  float* second = written(stack, out + 1);
  forward(layer_of(x, slot, stack, 3), floats(x), floats(weight), written(stack, out), NORMS ? nullptr : second,
          NORMS ? second : nullptr);
}

// (dy, x, weight, slot, saved, layer...) -> dx, dweight, and the gradients of up_a, up_b, down_a, down_b.
void routed_experts_backward(KernelRuntimeContext& ctx, Stack stack) {
  const Tensor &dy = stack[0]->toTensor(), &x = stack[1]->toTensor(), &weight = stack[2]->toTensor();
  const Tensor &slot = stack[3]->toTensor(), &saved = stack[4]->toTensor();
  ET_KERNEL_CHECK(ctx, slots_exist_and_differ(slot, stack, 5), InvalidArgument, );
  const size_t out = 5 + LAYER_ARGUMENTS;
  Gradients into{written(stack, out), written(stack, out + 1),
                 {written(stack, out + 2), written(stack, out + 3), written(stack, out + 4), written(stack, out + 5)}};
  backward(layer_of(x, slot, stack, 5), floats(dy), floats(x), floats(weight), floats(saved), into);
}

Attention attention_of(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t window) {
  return {q.size(0), q.size(1), k.size(1), q.size(2), q.size(3), v.size(3), static_cast<float>(scale), window};
}

// (q, k, v, scale, window) -> y, lse.
void causal_attention(KernelRuntimeContext& ctx, Stack stack) {
  const Tensor &q = stack[0]->toTensor(), &k = stack[1]->toTensor(), &v = stack[2]->toTensor();
  attention_of(q, k, v, stack[3]->toDouble(), stack[4]->toInt())
      .forward(floats(q), floats(k), floats(v), written(stack, 5), written(stack, 6));
}

// (dy, q, k, v, y, lse, scale, window) -> dq, dk, dv.
void causal_attention_backward(KernelRuntimeContext& ctx, Stack stack) {
  const auto in = [&](size_t i) -> const Tensor& { return stack[i]->toTensor(); };
  attention_of(in(1), in(2), in(3), stack[6]->toDouble(), stack[7]->toInt())
      .backward(floats(in(0)), floats(in(1)), floats(in(2)), floats(in(3)), floats(in(4)), floats(in(5)),
                written(stack, 8), written(stack, 9), written(stack, 10));
}

} // namespace

EXECUTORCH_LIBRARY(expertfleet, "packed_linear.out", packed_linear);
EXECUTORCH_LIBRARY(expertfleet, "packed_linear_backward.out", packed_linear_backward);
EXECUTORCH_LIBRARY(expertfleet, "packed_embedding.out", packed_embedding);
static const executorch::runtime::Kernel KERNELS[] = {
    executorch::runtime::Kernel("expertfleet::routed_experts.out", routed_experts<false>),
    executorch::runtime::Kernel("expertfleet::routed_experts_norms.out", routed_experts<true>),
    executorch::runtime::Kernel("expertfleet::routed_experts_backward.out", routed_experts_backward),
    executorch::runtime::Kernel("expertfleet::causal_attention.out", causal_attention),
    executorch::runtime::Kernel("expertfleet::causal_attention_backward.out", causal_attention_backward),
};
static const auto registered = executorch::runtime::register_kernels({KERNELS, std::size(KERNELS)});

} // namespace expertfleet
