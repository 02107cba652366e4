// SPDX-License-Identifier: Apache-2.0
// Bidirectional attention of bfloat16 heads, and pages in the layout that it reads.
//
// The scores of some queries and keys are computed, turned into weights by one pass over them, and
// multiplied with the values; the running maximum and sum of each row combine these parts.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include <sys/syscall.h>
#include <unistd.h>

#include "tiles.h"

#ifdef __AMX_BF16__

namespace {

// Queries and keys at a time: their scores and weights stay in the first-level cache.
constexpr int kQueries = 32, kKeys = 256;

// Up to here rounding changes the scaled maximum by at most 1, which multiplies all weights of a
// row by the same factor. With larger errors they could all become 0 or infinite.
constexpr float kRounded = 1 << 24;

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

// A layer's pool: for each page, and each head in it, groups of keys, then groups of values.
struct Pages {
  bf16* pool;
  int64_t page_size, kv_heads, size;

  bf16* keys(int64_t page, int64_t kv_head) const {
    return pool + (page * kv_heads + kv_head) * 2 * page_size * size;
  }
  bf16* values(int64_t page, int64_t kv_head) const {
    return keys(page, kv_head) + page_size * size;
  }

  // Offset of pair `pair` of a key's channels in a head's keys.
  int64_t key_cell(int64_t offset, int64_t pair) const {
    return (offset / 16 * (size / 32) + pair / 16) * kTile + pair % 16 * 32 + offset % 16 * 2;
  }
  // Offset of a value's channel in a head's values.
  int64_t value_cell(int64_t offset, int64_t channel) const {
    return (offset / kGroup * (size / 16) + channel / 16) * kTile + offset % kGroup / 2 * 32 +
           channel % 16 * 2 + offset % 2;
  }
};

class Attention {
 public:
  Attention(int size, float scale)
      : size_(size),
        scale_(scale * kLog2E),
        steps_(size / 32),
        queries_(kQueries * size),
        weights_(kQueries * kKeys),
        scores_(kQueries * kKeys),
        output_(kQueries * size) {}

  // Take keys and values in rows as those to attend to.
  void take(Strided keys, Strided values, int64_t count) {
    resize(count);
    keys_.reserve(padded_ * size_);
    values_.reserve(padded_ * size_);
    pack_keys(keys, count, padded_, size_, keys_.data());
    pack_values(values, count, padded_, size_, values_.data());
    for (size_t group = 0; group < key_groups_.size(); ++group) {
      key_groups_[group] = keys_.data() + group * kGroup * size_;
      value_groups_[group] = values_.data() + group * kGroup * size_;
    }
  }

  // Take the first `count` slots of pages as those to attend to. `attend` prefetches the next
  // head's: pages are scattered in memory, and reading them takes as long as computing with them.
  void take(const Pages& pages, const int32_t* page_ids, int64_t kv_head, int64_t count) {
    resize(count);
    ahead_ = kv_head + 1 < pages.kv_heads ? pages.keys(0, 1) - pages.keys(0, 0) : 0;
    const int64_t groups_of_page = pages.page_size / kGroup;
    for (size_t group = 0; group < key_groups_.size(); ++group) {
      const int64_t page = page_ids[group / groups_of_page];
      const int64_t number = group % groups_of_page;
      key_groups_[group] = pages.keys(page, kv_head) + number * kGroup * size_;
      value_groups_[group] = pages.values(page, kv_head) + number * kGroup * size_;
    }
  }

  // Attend with up to kQueries queries.
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
        if (ahead_) fetch(first / kGroup, num_keys / kGroup, row);
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
  void resize(int64_t count) {
    count_ = count;
    padded_ = (count + kGroup - 1) / kGroup * kGroup;
    key_groups_.resize(padded_ / kGroup);
    value_groups_.resize(padded_ / kGroup);
  }

  // Prefetch row `row`'s share of what is `ahead_` numbers after some groups to the second-level
  // cache.
  void fetch(int64_t first, int num_groups, int row) const {
    const int share = kGroup * size_ / kQueries;
    for (int group = 0; group < num_groups; ++group) {
      const bf16* keys = key_groups_[first + group] + ahead_ + row * share;
      const bf16* values = value_groups_[first + group] + ahead_ + row * share;
      for (int number = 0; number < share; number += 32) {
        _mm_prefetch(keys + number, _MM_HINT_T1);
        _mm_prefetch(values + number, _MM_HINT_T1);
      }
    }
  }

  void multiply_keys(const bf16* q, int64_t first, int num_keys) {
    const int steps = size_ / 32;
    for (int key = 0; key < num_keys; key += kGroup) {
      const bf16* group = key_groups_[(first + key) / kGroup];
      for (int step = 0; step < steps; ++step) steps_[step] = group + step * kTile;
      multiply(q, size_, steps_.data(), 0, steps * kTile, scores_.data() + key, kKeys, steps,
               false);
    }
  }

  // Turn one row of scores into weights, relative to the row's maximum so far.
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
    const float own = _mm512_reduce_max_ps(_mm512_max_ps(most, more)) * scale_;
    // A branch, not std::max: it is predicted, and what follows does not wait for the reduction.
    if (own > before) maximum_[row] = own;
    const float maximum = maximum_[row];
    float remaining = scale_;
    if (std::fabs(maximum) > kRounded) {
      // Round the scores as the maximum was rounded, so that the largest is 0 relative to it.
      for (int key = 0; key < num_keys; ++key) scores[key] *= scale_;
      remaining = 1.0f;
    }
    const __m512 scale = _mm512_set1_ps(remaining), base = _mm512_set1_ps(maximum);
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
    sum_[row] = total;
  }

  void multiply_values(float* o, int64_t first, int num_keys) {
    const bf16* const* groups = value_groups_.data() + first / kGroup;
    for (int channel = 0; channel < size_; channel += 32) {
      multiply(weights_.data(), kKeys, groups, channel / 16 * kTile, kTile, o + channel, size_,
               num_keys / kGroup, true);
    }
  }

  const int size_;
  const float scale_;
  int64_t count_ = 0, padded_ = 0;
  int64_t ahead_ = 0;
  std::vector<const bf16*> steps_, key_groups_, value_groups_;
  Buffer<bf16> keys_, values_, queries_, weights_;
  Buffer<float> scores_, output_;
  float maximum_[kQueries], sum_[kQueries];
};

// Queries of a sequence, in the heads that share a key/value head.
struct Task {
  int64_t sequence, kv_head, first, end;
};

// Attend to the keys that were taken with a task's queries, in each of its `group` heads.
void attend_heads(Attention& attention, const Task& task, int64_t group, int64_t size,
                  Strided queries, Strided output) {
  for (int64_t head = task.kv_head * group; head < (task.kv_head + 1) * group; ++head) {
    for (int64_t first = task.first; first < task.end; first += kQueries) {
      attention.attend({queries.row(first) + head * size, queries.stride},
                       {output.row(first) + head * size, output.stride},
                       std::min<int64_t>(kQueries, task.end - first));
    }
  }
}

}  // namespace

#endif

extern "C" {

// Whether the functions below can run: they were compiled for a processor with tiles, and the
// operating system permits their use.
int has_tiles() {
#ifdef __AMX_BF16__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return 0;
#endif
}

#ifdef __AMX_BF16__

// Attention over keys of the same pass. The starts have one number more than there are sequences;
// `threads` is the number of OpenMP's threads.
void attend(bf16* queries, int64_t query_stride, bf16* keys, int64_t key_stride, bf16* values,
            int64_t value_stride, bf16* output, int64_t output_stride, int64_t heads,
            int64_t kv_heads, int64_t size, int64_t sequences, const int64_t* query_starts,
            const int64_t* key_starts, float scale, int64_t threads) {
  const int64_t group = heads / kv_heads;
  std::vector<Task> tasks;
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    const int64_t first = query_starts[sequence], end = query_starts[sequence + 1];
    // Split a head's queries where there are too few heads for all threads.
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
      attend_heads(attention, task, group, size, {queries, query_stride}, {output, output_stride});
    }
  }
}

// Attention over the first `key_lengths` slots of the pages in each sequence's row of the table.
void attend_pages(bf16* pool, int64_t page_size, const int32_t* table, int64_t width,
                  const int64_t* key_lengths, bf16* queries, int64_t query_stride, bf16* output,
                  int64_t output_stride, int64_t heads, int64_t kv_heads, int64_t size,
                  int64_t sequences, const int64_t* query_starts, float scale) {
  const Pages pages{pool, page_size, kv_heads, size};
  const int64_t group = heads / kv_heads;
  std::vector<Task> tasks;
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    const int64_t end = query_starts[sequence + 1];
    for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
      for (int64_t first = query_starts[sequence]; first < end; first += kQueries) {
        tasks.push_back({sequence, kv_head, first, std::min(first + kQueries, end)});
      }
    }
  }
#pragma omp parallel
  {
    const Tiles tiles;
    Attention attention(size, scale);
    // Static, so that a thread takes heads of a sequence one after the other and prefetching helps.
#pragma omp for schedule(static)
    for (size_t index = 0; index < tasks.size(); ++index) {
      const Task& task = tasks[index];
      attention.take(pages, table + task.sequence * width, task.kv_head,
                     key_lengths[task.sequence]);
      attend_heads(attention, task, group, size, {queries, query_stride}, {output, output_stride});
    }
  }
}

// Write keys and values to slots.
void write_pages(bf16* pool, int64_t page_size, int64_t kv_heads, int64_t size, const bf16* keys,
                 int64_t key_stride, const bf16* values, int64_t value_stride,
                 const int64_t* slots, int64_t count) {
  const Pages pages{pool, page_size, kv_heads, size};
  // Head by head: adjacent slots share most of their cache lines.
#pragma omp parallel for schedule(static) collapse(2)
  for (int64_t head = 0; head < kv_heads; ++head) {
    for (int64_t row = 0; row < count; ++row) {
      const int64_t page = slots[row] / page_size, offset = slots[row] % page_size;
      const bf16* key = keys + row * key_stride + head * size;
      const bf16* value = values + row * value_stride + head * size;
      // Slots of a pair share their pairs of values: if both are written, the first writes both.
      const bool first = offset % 2 == 0 && row + 1 < count && slots[row + 1] == slots[row] + 1;
      const bool second = offset % 2 == 1 && row > 0 && slots[row - 1] == slots[row] - 1;
      bf16* key_target = pages.keys(page, head) + pages.key_cell(offset, 0);
      bf16* value_target = pages.values(page, head) + pages.value_cell(offset, 0);
      for (int64_t tile = 0; tile < size / 32; ++tile, key_target += kTile, key += 32) {
        for (int64_t pair = 0; pair < 16; ++pair) {
          std::memcpy(key_target + pair * 32, key + 2 * pair, 2 * sizeof(bf16));
        }
      }
      if (second) continue;
      for (int64_t tile = 0; tile < size / 16; ++tile, value_target += kTile, value += 16) {
        if (first) {
          _mm512_storeu_si512(value_target, pair_up(value, value + value_stride));
          continue;
        }
        for (int64_t channel = 0; channel < 16; ++channel) {
          value_target[2 * channel] = value[channel];
        }
      }
    }
  }
}

// Read keys, or values, from slots: [count, kv_heads, size].
void read_pages(bf16* pool, int64_t page_size, int64_t kv_heads, int64_t size,
                const int64_t* slots, int64_t count, int64_t values, bf16* output) {
  const Pages pages{pool, page_size, kv_heads, size};
#pragma omp parallel for schedule(static) collapse(2)
  for (int64_t head = 0; head < kv_heads; ++head) {
    for (int64_t row = 0; row < count; ++row) {
      const int64_t page = slots[row] / page_size, offset = slots[row] % page_size;
      bf16* target = output + (row * kv_heads + head) * size;
      if (values) {
        const bf16* source = pages.values(page, head);
        for (int64_t channel = 0; channel < size; ++channel) {
          target[channel] = source[pages.value_cell(offset, channel)];
        }
      } else {
        const bf16* source = pages.keys(page, head);
        for (int64_t pair = 0; pair < size / 2; ++pair) {
          std::memcpy(target + 2 * pair, source + pages.key_cell(offset, pair), 2 * sizeof(bf16));
        }
      }
    }
  }
}

#endif

}  // extern "C"
