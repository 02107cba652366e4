// SPDX-License-Identifier: Apache-2.0
// Products of bfloat16 matrices in the processor's tiles (AMX), and the layout that they need.
//
// A tile has 16 rows of 16 pairs of numbers. The right factor of a product has pairs of its rows
// side by side: for keys, pairs of channels (16 keys x 32 channels per tile); for values, pairs of
// keys (32 keys x 16 channels). A group is 32 keys, or their values, with all channels: for keys,
// the tiles of the first 16 keys, then those of the other 16; for values, a tile per 16 channels.

#pragma once

#include <atomic>

#include "common.h"

#ifdef __AMX_BF16__

// Numbers in a tile, keys in a group.
constexpr int kTile = 512, kGroup = 32;

// Configures the processor's tiles for the lifetime of the object.
class Tiles {
 public:
  Tiles() { _tile_loadconfig(&kConfig); }
  ~Tiles() { _tile_release(); }

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static const Config kConfig;
};

inline const Tiles::Config Tiles::kConfig;

// c = a b, or c += a b: a is 32 x (32 `steps`), b is (32 `steps`) x 32. A step's part of b is two
// tiles: the first starts at b[step] + offset, the second `beside` numbers after the first.
inline void multiply(const bf16* a, int a_stride, const bf16* const* b, int64_t offset,
                     int64_t beside, float* c, int c_stride, int steps, bool add) {
  float* corners[] = {c, c + 16, c + 16 * c_stride, c + 16 * c_stride + 16};
  // The compiler does not know that tile loads read memory: keep all earlier writes before them.
  std::atomic_signal_fence(std::memory_order_seq_cst);
  const int a_bytes = a_stride * sizeof(bf16), c_bytes = c_stride * sizeof(float);
  if (add) {
    _tile_loadd(0, corners[0], c_bytes);
    _tile_loadd(1, corners[1], c_bytes);
    _tile_loadd(2, corners[2], c_bytes);
    _tile_loadd(3, corners[3], c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int index = 0; index < steps; ++index, a += 32) {
    const bf16* tile = b[index] + offset;
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(5, a + 16 * a_stride, a_bytes);
    _tile_loadd(6, tile, 64);
    _tile_loadd(7, tile + beside, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, corners[0], c_bytes);
  _tile_stored(1, corners[1], c_bytes);
  _tile_stored(2, corners[2], c_bytes);
  _tile_stored(3, corners[3], c_bytes);
}

// Rows with any distance between their starts.
struct Strided {
  bf16* data;
  int64_t stride;
  bf16* row(int64_t index) const { return data + index * stride; }
};

// A 16 x 16 transpose of pairs: `rows` are 16 keys, the tile's rows are 16 pairs of channels.
inline void transpose_pairs(const __m512i rows[16], bf16* tile) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(tile + 32 * i, _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88));
    _mm512_storeu_si512(tile + 32 * (i + 4), _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88));
    _mm512_storeu_si512(tile + 32 * (i + 8), _mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd));
    _mm512_storeu_si512(tile + 32 * (i + 12), _mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd));
  }
}

// Lay keys out in groups; keys past `count` are 0.
inline void pack_keys(Strided keys, int64_t count, int64_t padded, int size, bf16* packed) {
  for (int64_t first = 0; first < padded; first += 16) {
    for (int channel = 0; channel < size; channel += 32, packed += kTile) {
      __m512i rows[16];
      for (int i = 0; i < 16; ++i) {
        rows[i] = first + i < count ? _mm512_loadu_si512(keys.row(first + i) + channel)
                                    : _mm512_setzero_si512();
      }
      transpose_pairs(rows, packed);
    }
  }
}

// Interleave 16 channels of two values as pairs; a null pointer stands for zeros.
inline __m512i pair_up(const bf16* even, const bf16* odd) {
  const auto widen = [](const bf16* x) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  };
  const __m512i high = odd ? _mm512_slli_epi32(widen(odd), 16) : _mm512_setzero_si512();
  return even ? _mm512_or_si512(widen(even), high) : high;
}

// Lay values out in groups; values past `count` are 0.
inline void pack_values(Strided values, int64_t count, int64_t padded, int size, bf16* packed) {
  const auto row = [&](int64_t key, int channel) {
    return key < count ? values.row(key) + channel : nullptr;
  };
  for (int64_t first = 0; first < padded; first += kGroup) {
    for (int channel = 0; channel < size; channel += 16, packed += kTile) {
      for (int64_t key = 0; key < kGroup; key += 2) {
        const __m512i pairs = pair_up(row(first + key, channel), row(first + key + 1, channel));
        _mm512_storeu_si512(packed + 16 * key, pairs);
      }
    }
  }
}

#endif
