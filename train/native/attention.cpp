// The attention core of train/model/attention.py for bf16 on CPUs with AVX512-BF16. Called by ctypes.
//
// A job is one head of one span of positions. A block of its queries meets all earlier keys at once: scores in fp32,
// softmax over whole rows, probabilities rounded to bf16, as in the plain form. Tiles above the diagonal are skipped.
// Backward computes the probabilities again, so that nothing is kept, and sums the gradients of keys and values in fp32.

#include <cmath>
#include <vector>

#include "tiles.h"

namespace {

using namespace tiles;

constexpr i64 QUERIES = 96;  // of a block

// Of one head: element (position, channel) at data[position * stride + channel].
struct Matrix {
  u16* data;
  i64 stride;
};

inline Matrix matrix(const Heads& x, i64 b, i64 h, i64 t) { return {x.at(b, h, t), x.position}; }

struct Span {
  i64 sequence, start, end;
};

// Scores of one row become probabilities in bf16, zero behind its `keys` keys up to `end`.
void softmax(float* s, u16* p, i64 keys, i64 end, float scale) {
  __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
  for (i64 j = 0; j < keys; j += 16)
    most = _mm512_mask_max_ps(most, first_of(keys - j), most, _mm512_loadu_ps(s + j));
  const __m512 factor = _mm512_set1_ps(scale), top = _mm512_set1_ps(_mm512_reduce_max_ps(most) * scale);
  for (i64 j = 0; j < keys; j += 16) {
    const __m512 e = exp(_mm512_fmsub_ps(_mm512_loadu_ps(s + j), factor, top));
    _mm512_storeu_ps(s + j, e);
    sum = _mm512_mask_add_ps(sum, first_of(keys - j), sum, e);
  }
  const __m512 share = _mm512_set1_ps(1 / _mm512_reduce_add_ps(sum));
  for (i64 j = 0; j < end; j += 16) {
    const __m512 e = _mm512_maskz_mov_ps(first_of(keys - j), _mm512_loadu_ps(s + j));
    _mm256_storeu_si256((__m256i*)(p + j), narrow(_mm512_mul_ps(e, share)));
  }
}

// Gradients of the probabilities of one row become those of its scores, scaled, in bf16.
void softmax_backward(const float* dp, const u16* p, u16* ds, i64 end, float scale) {
  __m512 sum = _mm512_setzero_ps();
  for (i64 j = 0; j < end; j += 16) sum = _mm512_fmadd_ps(_mm512_loadu_ps(dp + j), widen(p + j), sum);
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum)), factor = _mm512_set1_ps(scale);
  for (i64 j = 0; j < end; j += 16) {
    const __m512 d = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(dp + j), mean), widen(p + j));
    _mm256_storeu_si256((__m256i*)(ds + j), narrow(_mm512_mul_ps(d, factor)));
  }
}

// Room of one thread, of a size for the longest span. Zeros at first; padding is never written.
struct Room {
  std::vector<u32> keys_by_channel, values_by_channel, keys, values, some, turned;
  std::vector<float> scores, out, dk, dv;
  std::vector<u16> p, ds;
};

struct Problem {
  Heads q, k, v, out, dout, dq, dk, dv;
  i64 heads, qk, width, longest;
  float scale;

  i64 columns() const { return up(longest, PANEL); }

  static Pairs pairs(const u16* data, i64 stride) { return {(const u32*)data, stride / 2, 1}; }

  // (last - first) x (last - start) products of rows of a and columns of the panels, but for tiles above the diagonal.
  void below(Pairs a, const u32* panels, i64 pairs, float* c, i64 rows, i64 before) const {
    for (i64 n = 0; n < before + rows; n += PANEL)
      for (i64 m = 0; m < rows; m += ROWS) {
        const i64 count = std::min(ROWS, rows - m);
        if (n < before + m + count) tile(count, a.from(m), panels + n * pairs, c + m * columns() + n, columns(), 0, pairs, false);
      }
  }

  // rows x channels: probabilities or the like (rows, keys) times panels of (keys, channels), up to the diagonal.
  void along_keys(const u16* p, const u32* panels, i64 pairs_of_panel, i64 channels, float* c, i64 rows, i64 before) const {
    const Pairs a = pairs(p, columns());
    for (i64 n = 0; n < channels; n += PANEL)
      for (i64 m = 0; m < rows; m += ROWS) {
        const i64 count = std::min(ROWS, rows - m), end = (before + m + count + 1) / 2;
        tile(count, a.from(m), panels + n * pairs_of_panel, c + m * up(channels, PANEL) + n, up(channels, PANEL), 0, end, false);
      }
  }

  // keys x channels, added: the transpose of (rows, keys) in `turned` pairs of rows, times panels of (rows, channels).
  void along_queries(const std::vector<u32>& turned, const u32* panels, i64 channels, float* c, i64 rows, i64 before) const {
    const i64 all = (rows + 1) / 2, ldc = up(channels, PANEL);
    const Pairs a{turned.data(), 1, columns()};
    for (i64 n = 0; n < channels; n += PANEL)
      for (i64 m = 0; m < before + rows; m += ROWS) {
        const i64 count = std::min(ROWS, before + rows - m), begin = std::max<i64>(0, m - before) / 2;
        tile(count, a.from(m), panels + n * all, c + m * ldc + n, ldc, begin, all, true);
      }
  }

  // Pairs of rows of x (rows, keys).
  void turn(const std::vector<u16>& x, std::vector<u32>& turned, i64 rows, i64 keys) const {
    const i64 row = columns();
    for (i64 r = 0; r < rows; r += 2) {
      const u16 *low = x.data() + r * row, *high = low + row;
      u32* to = turned.data() + r / 2 * row;
      if (r + 1 < rows) for (i64 j = 0; j < keys; ++j) to[j] = u32(low[j]) | u32(high[j]) << 16;
      else for (i64 j = 0; j < keys; ++j) to[j] = low[j];
    }
  }

  void probabilities(Room& room, Matrix query, i64 rows, i64 before) const {
    below(pairs(query.data, query.stride), room.keys_by_channel.data(), qk / 2, room.scores.data(), rows, before);
    for (i64 m = 0; m < rows; ++m)
      softmax(room.scores.data() + m * columns(), room.p.data() + m * columns(), before + m + 1, up(before + rows, PANEL), scale);
  }

  void make_room(Room& room, bool backward) const {
    room.keys_by_channel.resize(panel_words(qk / 2, longest));
    room.scores.resize(QUERIES * columns());
    room.p.resize(QUERIES * columns());
    room.out.resize(QUERIES * up(std::max(qk, width), PANEL));
    if (!backward) {
      room.values.resize(panel_words((longest + 1) / 2, width));
      return;
    }
    room.values_by_channel.resize(panel_words(width / 2, longest));
    room.keys.resize(panel_words((longest + 1) / 2, qk));
    room.some.resize(panel_words(QUERIES / 2, std::max(qk, width)));
    room.turned.resize(QUERIES / 2 * columns());
    room.ds.resize(QUERIES * columns());
    room.dk.resize(longest * up(qk, PANEL));
    room.dv.resize(longest * up(width, PANEL));
  }

  void forward(Room& room, Span span, i64 head) const {
    const i64 length = span.end - span.start;
    const Matrix key = matrix(k, span.sequence, head, span.start), value = matrix(v, span.sequence, head, span.start);
    pack_transposed(key.data, key.stride, length, qk, room.keys_by_channel.data());
    pack(value.data, value.stride, length, width, room.values.data());
    for (i64 first = 0; first < length; first += QUERIES) {
      const i64 rows = std::min(QUERIES, length - first), t = span.start + first;
      probabilities(room, matrix(q, span.sequence, head, t), rows, first);
      along_keys(room.p.data(), room.values.data(), (length + 1) / 2, width, room.out.data(), rows, first);
      write(room.out.data(), matrix(out, span.sequence, head, t), rows, width);
    }
  }

  void backward(Room& room, Span span, i64 head) const {
    const i64 length = span.end - span.start, b = span.sequence;
    const Matrix key = matrix(k, b, head, span.start), value = matrix(v, b, head, span.start);
    pack_transposed(key.data, key.stride, length, qk, room.keys_by_channel.data());
    pack_transposed(value.data, value.stride, length, width, room.values_by_channel.data());
    pack(key.data, key.stride, length, qk, room.keys.data());
    std::fill_n(room.dk.data(), length * up(qk, PANEL), 0.f);
    std::fill_n(room.dv.data(), length * up(width, PANEL), 0.f);
    for (i64 first = 0; first < length; first += QUERIES) {
      const i64 rows = std::min(QUERIES, length - first), keys = first + rows, t = span.start + first;
      const Matrix query = matrix(q, b, head, t), gradient = matrix(dout, b, head, t);
      probabilities(room, query, rows, first);
      turn(room.p, room.turned, rows, keys);
      pack(gradient.data, gradient.stride, rows, width, room.some.data());
      along_queries(room.turned, room.some.data(), width, room.dv.data(), rows, first);

      below(pairs(gradient.data, gradient.stride), room.values_by_channel.data(), width / 2, room.scores.data(), rows, first);
      for (i64 m = 0, row = 0; m < rows; ++m, row += columns()) {
        // Behind its own keys a row has no gradients yet: what its probabilities, zero there, are multiplied with.
        std::fill(room.scores.data() + row + first + m + 1, room.scores.data() + row + up(keys, PANEL), 0.f);
        softmax_backward(room.scores.data() + row, room.p.data() + row, room.ds.data() + row, up(keys, PANEL), scale);
      }
      along_keys(room.ds.data(), room.keys.data(), (length + 1) / 2, qk, room.out.data(), rows, first);
      write(room.out.data(), matrix(dq, b, head, t), rows, qk);
      turn(room.ds, room.turned, rows, keys);
      pack(query.data, query.stride, rows, qk, room.some.data());
      along_queries(room.turned, room.some.data(), qk, room.dk.data(), rows, first);
    }
    write(room.dk.data(), matrix(dk, b, head, span.start), length, qk);
    write(room.dv.data(), matrix(dv, b, head, span.start), length, width);
  }

  static void write(const float* from, Matrix to, i64 rows, i64 channels) {
    for (i64 m = 0; m < rows; ++m) narrow(from + m * up(channels, PANEL), to.data + m * to.stride, channels);
  }

  template <class Job>
  void each(const Span* spans, i64 count, i64 threads, bool backward, const Job& job) const {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      Room room;
      make_room(room, backward);
#pragma omp for schedule(dynamic)
      for (i64 work = 0; work < count * heads; ++work) job(room, spans[work / heads], work % heads);
    }
  }
};

}  // namespace

extern "C" {

void attention_forward(const Problem* problem, const Span* spans, i64 count, i64 threads) {
  problem->each(spans, count, threads, false, [=](Room& room, Span span, i64 head) { problem->forward(room, span, head); });
}

void attention_backward(const Problem* problem, const Span* spans, i64 count, i64 threads) {
  problem->each(spans, count, threads, true, [=](Room& room, Span span, i64 head) { problem->backward(room, span, head); });
}

}
