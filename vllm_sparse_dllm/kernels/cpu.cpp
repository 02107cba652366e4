// SPDX-License-Identifier: Apache-2.0
// The costliest parts of a pass on a CPU that PyTorch and vLLM run as several passes over memory.
// bfloat16 in and out, float32 between. Plain C interface: compiled for the machine at hand.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include <sys/syscall.h>
#include <unistd.h>

namespace {

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

// 2^x, within 4e-6 of it; NaN stays NaN.
inline __m512 exp2(__m512 x) {
  // x - floor(x); scalef takes the floor by itself.
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(1.3697664e-2f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.1690346e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4163878e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9296569e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0000037f));
  return _mm512_scalef_ps(p, x);
}

constexpr float kLog2E = 1.44269504f;

// Queries and keys at a time; numbers of a tile, 16 rows of 16 pairs.
constexpr int kQueries = 32, kKeys = 256, kTile = 512;

#ifdef __AMX_BF16__

// The processor's tiles, for as long as this lives.
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

const Tiles::Config Tiles::kConfig;

// c += a b, where a is 32 x (32 `steps`) and b, of two tiles a step, is (32 `steps`) x 32.
inline void multiply(const bf16* a, int a_stride, const bf16* b, int step, int beside, float* c,
                     int c_stride, int steps, bool add) {
  float* corners[] = {c, c + 16, c + 16 * c_stride, c + 16 * c_stride + 16};
  // The compiler does not know that tile loads read memory: all that was written comes first.
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
  for (int index = 0; index < steps; ++index, a += 32, b += step) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(5, a + 16 * a_stride, a_bytes);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + beside, 64);
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

template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count = 0) { reserve(count); }

  void reserve(size_t count) {
    if (count > count_) {
      data_.reset(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
      count_ = count;
    }
  }

  T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
  size_t count_ = 0;
};

struct Strided {
  bf16* data;
  int64_t stride;
  bf16* row(int64_t index) const { return data + index * stride; }
};

// A 16 x 16 transpose of pairs: `rows` are 16 keys, the tile's rows 16 pairs of channels.
void transpose_pairs(const __m512i rows[16], bf16* tile) {
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

// Keys as tiles of 16 keys by 32 channels, one group of keys after the other.
void pack_keys(Strided keys, int64_t count, int64_t padded, int size, bf16* packed) {
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

// Values as tiles of 32 keys by 16 channels, one group of keys after the other.
void pack_values(Strided values, int64_t count, int64_t padded, int size, bf16* packed) {
  const auto part = [&](int64_t key, int channel) {
    if (key >= count) return _mm512_setzero_si512();
    return _mm512_cvtepu16_epi32(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values.row(key) + channel)));
  };
  for (int64_t first = 0; first < padded; first += 32) {
    for (int channel = 0; channel < size; channel += 16, packed += kTile) {
      for (int pair = 0; pair < 16; ++pair) {
        const __m512i even = part(first + 2 * pair, channel);
        const __m512i odd = part(first + 2 * pair + 1, channel);
        _mm512_storeu_si512(packed + 32 * pair, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
    }
  }
}

class Attention {
 public:
  Attention(int size, float scale)
      : size_(size),
        scale_(scale * kLog2E),
        queries_(kQueries * size),
        weights_(kQueries * kKeys),
        scores_(kQueries * kKeys),
        output_(kQueries * size) {}

  void take(Strided keys, Strided values, int64_t count) {
    count_ = count;
    padded_ = (count + 31) / 32 * 32;
    keys_.reserve(padded_ * size_);
    values_.reserve(padded_ * size_);
    pack_keys(keys, count, padded_, size_, keys_.data());
    pack_values(values, count, padded_, size_, values_.data());
  }

  // Up to kQueries queries.
  void attend(Strided queries, Strided output, int count) {
    bf16* q = queries_.data();
    float* o = output_.data();
    for (int row = 0; row < count; ++row) {
      std::memcpy(q + row * size_, queries.row(row), size_ * sizeof(bf16));
    }
    std::memset(q + count * size_, 0, (kQueries - count) * size_ * sizeof(bf16));
    std::memset(o, 0, kQueries * size_ * sizeof(float));
    std::fill_n(maximum_, kQueries, -std::numeric_limits<float>::infinity());
    std::fill_n(sum_, kQueries, 0.0f);
    for (int64_t first = 0; first < padded_; first += kKeys) {
      const int num_keys = std::min<int64_t>(kKeys, padded_ - first);
      multiply_keys(q, first, num_keys);
      for (int row = 0; row < count; ++row) {
        soften(row, num_keys, std::min<int64_t>(num_keys, count_ - first), o + row * size_);
      }
      multiply_values(o, first, num_keys);
    }
    for (int row = 0; row < count; ++row) {
      const __m512 factor = _mm512_set1_ps(1.0f / sum_[row]);
      for (int channel = 0; channel < size_; channel += 16) {
        const __m512 value = _mm512_load_ps(o + row * size_ + channel);
        store(output.row(row) + channel, _mm512_mul_ps(value, factor));
      }
    }
  }

 private:
  void multiply_keys(const bf16* q, int64_t first, int num_keys) {
    const int steps = size_ / 32;
    const bf16* packed = keys_.data() + first * size_;
    for (int key = 0; key < num_keys; key += 32, packed += 32 * size_) {
      multiply(q, size_, packed, kTile, steps * kTile, scores_.data() + key, kKeys, steps, false);
    }
  }

  // One row of scores to weights, relative to the row's maximum so far.
  void soften(int row, int num_keys, int num_valid, float* o) {
    float* scores = scores_.data() + row * kKeys;
    bf16* weights = weights_.data() + row * kKeys;
    for (int key = num_valid; key < num_keys; ++key) {
      scores[key] = -std::numeric_limits<float>::infinity();
    }
    __m512 most = _mm512_load_ps(scores), more = _mm512_load_ps(scores + 16);
#pragma GCC unroll 4
    for (int key = 32; key < num_keys; key += 32) {
      most = _mm512_max_ps(most, _mm512_load_ps(scores + key));
      more = _mm512_max_ps(more, _mm512_load_ps(scores + key + 16));
    }
    const float before = maximum_[row];
    const float maximum =
        std::max(before, _mm512_reduce_max_ps(_mm512_max_ps(most, more)) * scale_);
    const __m512 scale = _mm512_set1_ps(scale_), base = _mm512_set1_ps(maximum);
    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int key = 0; key < num_keys; key += 32) {
      const __m512 low = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + key), scale, base));
      const __m512 high = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + key + 16), scale, base));
      sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
      _mm512_store_si512(weights + key, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    float total = _mm512_reduce_add_ps(sum);
    if (sum_[row] != 0.0f) {
      const __m512 factor = exp2(_mm512_set1_ps(before - maximum));
      total += sum_[row] * _mm512_cvtss_f32(factor);
      for (int channel = 0; channel < size_; channel += 16) {
        _mm512_store_ps(o + channel, _mm512_mul_ps(_mm512_load_ps(o + channel), factor));
      }
    }
    maximum_[row] = maximum;
    sum_[row] = total;
  }

  void multiply_values(float* o, int64_t first, int num_keys) {
    const int groups = size_ / 16;
    for (int group = 0; group < groups; group += 2) {
      const bf16* packed = values_.data() + first * size_ + group * kTile;
      multiply(weights_.data(), kKeys, packed, groups * kTile, kTile, o + group * 16, size_,
               num_keys / 32, true);
    }
  }

  const int size_;
  const float scale_;
  int64_t count_ = 0, padded_ = 0;
  Buffer<bf16> keys_, values_, queries_, weights_;
  Buffer<float> scores_, output_;
  float maximum_[kQueries], sum_[kQueries];
};

struct Task {
  int64_t sequence, kv_head, first, end;
};

#endif

}  // namespace

extern "C" {

// Whether attend() can run: the kernel lets this process use tiles.
int can_attend() {
#ifdef __AMX_BF16__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return 0;
#endif
}

// In place; a row of the table has the cosines of a position, then the sines.
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

#ifdef __AMX_BF16__

// The starts have one number more than there are sequences. `threads` are those of OpenMP.
void attend(bf16* queries, int64_t query_stride, bf16* keys, int64_t key_stride, bf16* values,
            int64_t value_stride, bf16* output, int64_t output_stride, int64_t heads,
            int64_t kv_heads, int64_t size, int64_t sequences, const int64_t* query_starts,
            const int64_t* key_starts, float scale, int64_t threads) {
  const int64_t group = heads / kv_heads;
  std::vector<Task> tasks;
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    const int64_t first = query_starts[sequence], end = query_starts[sequence + 1];
    // Parts of a head's queries where there are not heads enough for all threads.
    const int64_t parts = std::max<int64_t>(
        1, std::min((2 * threads + kv_heads - 1) / kv_heads, (end - first) / 128));
    const int64_t length = ((end - first + parts - 1) / parts + 31) / 32 * 32;
    for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
      for (int64_t start = first; start < end; start += length) {
        tasks.push_back({sequence, kv_head, start, std::min(start + length, end)});
      }
    }
  }
#pragma omp parallel
  {
    const Tiles tiles;
    Attention attention(size, scale);
#pragma omp for schedule(dynamic)
    for (size_t index = 0; index < tasks.size(); ++index) {
      const Task& task = tasks[index];
      const int64_t first_key = key_starts[task.sequence];
      const Strided k{keys + first_key * key_stride + task.kv_head * size, key_stride};
      const Strided v{values + first_key * value_stride + task.kv_head * size, value_stride};
      attention.take(k, v, key_starts[task.sequence + 1] - first_key);
      for (int64_t head = task.kv_head * group; head < (task.kv_head + 1) * group; ++head) {
        for (int64_t start = task.first; start < task.end; start += kQueries) {
          attention.attend({queries + start * query_stride + head * size, query_stride},
                           {output + start * output_stride + head * size, output_stride},
                           std::min<int64_t>(kQueries, task.end - start));
        }
      }
    }
  }
}

#endif

}  // extern "C"
