// Activations of an expert and their derivatives.
#pragma once

#include <cmath>
#include <cstdint>

namespace expertfleet {

// In the order of ACTIVATIONS in export/ops.py.
enum Activation : int64_t { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

// e^x to about 2 ulp, in plain arithmetic so that loops over it become vector code.
inline float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float shifted = x * 1.44269504f + 12582912.0f; // rounds to the nearest integer
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return p * power;
}

// Value and derivative at x.
template <int64_t KIND>
inline void activate(float x, float& value, float& slope) {
  if constexpr (KIND == SILU) {
    const float s = 1.0f / (1.0f + fast_exp(-x));
    value = x * s;
    slope = s * (1.0f + x * (1.0f - s));
  } else if constexpr (KIND == GELU) {
    const float half = 0.5f * (1.0f + std::erf(x * 0.70710678f));
    value = x * half;
    slope = half + x * 0.39894228f * fast_exp(-0.5f * x * x);
  } else if constexpr (KIND == GELU_TANH) {
    const float inner = 0.79788456f * (x + 0.044715f * x * x * x);
    const float t = 1.0f - 2.0f / (1.0f + fast_exp(2.0f * inner));
    value = 0.5f * x * (1.0f + t);
    slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.79788456f * (1.0f + 0.134145f * x * x);
  } else {
    value = x > 0 ? x : 0.0f;
    slope = x > 0 ? 1.0f : 0.0f;
  }
}

// a[n] = act(gate[n]) * up[n]; `up` is null for an expert without a gate.
template <int64_t KIND>
inline void forward_row(const float* gate, const float* up, float* a, long N) {
  for (long n = 0; n < N; ++n) {
    float value, slope;
    activate<KIND>(gate[n], value, slope);
    a[n] = up ? value * up[n] : value;
  }
}

// From da[n], the gradient of a[n]: the gradients of gate and up, written over them.
template <int64_t KIND>
inline void backward_row(float* gate, float* up, const float* da, long N) {
  for (long n = 0; n < N; ++n) {
    float value, slope;
    activate<KIND>(gate[n], value, slope);
    gate[n] = up ? da[n] * up[n] * slope : da[n] * slope;
    if (up) up[n] = da[n] * value;
  }
}

} // namespace expertfleet
