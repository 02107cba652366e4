// SPDX-License-Identifier: Apache-2.0
// Elementwise parts of a layer, each in one pass over memory.

#include <cmath>

#include "common.h"

extern "C" {

// Rotates heads in place; a row of the table has the cosines of a position, then the sines.
void rotate(bf16* x, int64_t stride, int64_t rows, int64_t heads, int64_t size,
            const int64_t* positions, const float* table) {
  const int64_t half = size / 2;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float* cos = table + positions[row] * size;
    const float* sin = cos + half;
    bf16* head = x + row * stride;
    for (int64_t index = 0; index < heads; ++index, head += size) {
      for (int64_t i = 0; i < half; i += 16) {
        const __m512 c = _mm512_loadu_ps(cos + i), s = _mm512_loadu_ps(sin + i);
        const __m512 a = load(head + i), b = load(head + half + i);
        store(head + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        store(head + half + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
      }
    }
  }
}

// residual += x, then x = norm(residual) * weight.
void add_norm(bf16* x, bf16* residual, const bf16* weight, int64_t rows, int64_t width,
              float epsilon) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    bf16* own = x + row * width;
    bf16* sum = residual + row * width;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
      store(sum + i, _mm512_add_ps(load(own + i), load(sum + i)));
      // The sum as rounded to bfloat16.
      const __m512 value = load(sum + i);
      squares = _mm512_fmadd_ps(value, value, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(width);
    const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + epsilon));
    for (int64_t i = 0; i < width; i += 16) {
      const __m512 value = _mm512_mul_ps(load(sum + i), factor);
      store(own + i, _mm512_mul_ps(value, load(weight + i)));
    }
  }
}

void silu_and_mul(const bf16* gate_up, bf16* output, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const bf16* gate = gate_up + row * 2 * width;
    const bf16* up = gate + width;
    bf16* target = output + row * width;
    for (int64_t i = 0; i < width; i += 16) {
      const __m512 g = load(gate + i);
      const __m512 e = exp2(_mm512_mul_ps(g, _mm512_set1_ps(-kLog2E)));
      const __m512 silu = _mm512_div_ps(g, _mm512_add_ps(e, _mm512_set1_ps(1.0f)));
      store(target + i, _mm512_mul_ps(silu, load(up + i)));
    }
  }
}

}  // extern "C"
