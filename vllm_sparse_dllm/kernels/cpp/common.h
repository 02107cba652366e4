// SPDX-License-Identifier: Apache-2.0
// bfloat16 in memory, float32 in registers.

#pragma once

#include <immintrin.h>

#include <cstdint>

using bf16 = uint16_t;

inline __m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

inline __m512 load(const bf16* x) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

inline void store(bf16* x, __m512 value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), (__m256i)_mm512_cvtneps_pbh(value));
}

// 2^x with a relative error of at most 4e-6; NaN stays NaN.
inline __m512 exp2(__m512 x) {
  // x - floor(x); scalef takes the floor of x itself.
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(1.3697664e-2f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.1690346e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4163878e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9296569e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0000037f));
  return _mm512_scalef_ps(p, x);
}

constexpr float kLog2E = 1.44269504f;
