// Implements the attention core of train/model/attention.py for bf16, on CPUs with AVX-512 or AVX2. Python calls the
// functions with ctypes.
//
// A job is one head of one span. A span is an interval of positions that attend to each other. A job processes one
// block of queries after another, each with all earlier keys of the span: scores, softmax over complete rows, matmul
// with the values, all in fp32. It skips tiles above the diagonal. Backward uses the probabilities that forward saved
// in bf16, or recomputes them from the log-sum-exp of the scores. It sums the gradients of keys and values in fp32.

#include <cmath>
#include <vector>

#include "tiles.h"

namespace {

using namespace tiles;

constexpr i64 QUERIES = 96;  // number of queries in a block, a multiple of ROWS
constexpr i64 DEPTH = 256;   // number of keys that a matmul sums over before the next panel of channels, so that a panel stays in the cache

// A matrix of one head: element (position, channel) is data[position * stride + channel].
struct Matrix {
  u16* data;
  i64 stride;
};

inline Matrix matrix(const Heads& x, i64 b, i64 h, i64 t) { return {x.at(b, h, t), x.position}; }

struct Span {
  i64 sequence, start, end;
  i64 kept;  // number of saved values before the span's first head; -1 if nothing is saved for the span
};

// Returns the number of saved probabilities of a head before row m. A row has complete panels of keys, up to its
// diagonal.
i64 kept_before(i64 m) { return PANEL * (m / PANEL + 1) * (m / PANEL * PANEL / 2 + m % PANEL); }

// The largest scaled score of a row, and the log-sum-exp of all its scores.
struct Sums {
  float largest, lse;
};

// Replaces the scores of one row by probabilities. The probabilities of keys from index `keys` to `end` become zero.
Sums softmax(float* s, i64 keys, i64 end, float scale) {
  Vector most = all(-INFINITY), sum{};
  for (i64 j = 0; j < keys; j += LANES)
    most = where(Some{first_of(keys - j)}, max(most, load(s + j, All{})), most);
  const float largest = largest_of(most) * scale;
  const Vector factor = all(scale), top = all(largest);
  for (i64 j = 0; j < keys; j += LANES) {
    const Vector e = exp(fmsub(load(s + j, All{}), factor, top));
    store(s + j, e, All{});
    sum = where(Some{first_of(keys - j)}, sum + e, sum);
  }
  const float total = sum_of(sum);
  const Vector share = all(1 / total);
  for (i64 j = 0; j < end; j += LANES) {
    const Vector e = load(s + j, Some{first_of(keys - j)});
    store(s + j, e * share, All{});
  }
  return {largest, largest + std::log(total)};
}

// Replaces the scores of one row by probabilities, as `softmax` does, but uses the known log-sum-exp `lse`.
void probabilities_of(float* s, i64 keys, i64 end, float scale, float lse) {
  const Vector factor = all(scale), top = all(lse), zero{};
  for (i64 j = 0; j < end; j += LANES) {
    const Some some{first_of(keys - j)};
    store(s + j, where(some, exp(fmsub(load(s + j, some), factor, top)), zero), All{});
  }
}

template <class T>
float dot(const T* a, const T* b, i64 n) {
  Vector sum{};
  for (i64 j = 0; j < n; j += LANES) sum = fmadd(load(a + j, Some{first_of(n - j)}), load(b + j, Some{first_of(n - j)}), sum);
  return sum_of(sum);
}

// Replaces the gradients of one row's probabilities by the scaled gradients of the row's scores. The gradients of keys
// from index `keys` to `end` become zero. mean: mean of the probabilities' gradients, weighted by the probabilities.
void softmax_backward(float* dp, const float* p, i64 keys, i64 end, float scale, float mean) {
  const Vector weighted = all(mean), factor = all(scale);
  for (i64 j = 0; j < end; j += LANES) {
    const Some some{first_of(keys - j)};
    const Vector d = (load(dp + j, some) - weighted) * load(p + j, All{});
    store(dp + j, d * factor, All{});
  }
}

using Floats = std::vector<float>;

// Buffers of one thread, sized for the longest span.
struct Room {
  Floats keys_by_channel, values_by_channel, keys, values;  // panels
  Floats left, some;  // a block of queries or of output gradients, as left operand and as panels
  Floats p, dp, out, dk, dv;
};

struct Problem {
  Heads q, k, v, out, dout, dq, dk, dv;
  u16* kept;
  float *lse, *largest;  // largest may be null
  i64 heads, length, qk, width, longest;
  float scale;

  // Returns the row length of p and dp: complete panels of keys, plus 16 so that it is not a power of two. A power of
  // two would cause cache conflicts.
  i64 columns() const { return up(longest, PANEL) + 16; }

  // Computes c (rows, before + rows): the matmul of the packed rows `a` and the columns of `panels`. Skips tiles above
  // the diagonal.
  void below(const float* a, const float* panels, i64 channels, float* c, i64 rows, i64 before) const {
    for (i64 n = 0; n < before + rows; n += PANEL)
      for (i64 m = 0; m < rows; m += ROWS) {
        const i64 count = std::min(ROWS, rows - m);
        if (n < before + m + count)
          tile<true>(count, {a + m * channels, 1, ROWS}, panels + n * channels, channels, c + m * columns() + n, columns(), false);
      }
  }

  // Computes c (rows, channels): the matmul of probabilities or their gradients (rows, keys) and panels of (keys,
  // channels). Skips keys after the diagonal.
  void along_keys(const float* p, const float* panels, i64 length, i64 channels, float* c, i64 rows, i64 before) const {
    const i64 ldc = up(channels, PANEL);
    for (i64 k = 0; k < before + rows; k += DEPTH)
      for (i64 n = 0; n < channels; n += PANEL)
        for (i64 m = 0; m < rows; m += ROWS) {
          const i64 count = std::min(ROWS, rows - m), depth = std::min(DEPTH, before + m + count - k);
          if (depth > 0)
            tile<false>(count, {p + m * columns() + k, columns(), 1}, panels + n * length + k * PANEL, depth, c + m * ldc + n, ldc, k > 0);
        }
  }

  // Adds to c (keys, channels) the matmul of the transpose of p (rows, keys) and panels of (rows, channels).
  void along_queries(const float* p, const float* panels, i64 channels, float* c, i64 rows, i64 before) const {
    const i64 ldc = up(channels, PANEL);
    for (i64 m = 0; m < before + rows; m += ROWS) {
      const i64 count = std::min(ROWS, before + rows - m), begin = std::max<i64>(0, m - before);
      for (i64 n = 0; n < channels; n += PANEL)
        tile<true>(count, {p + m + begin * columns(), 1, columns()}, panels + n * rows + begin * PANEL, rows - begin, c + m * ldc + n, ldc, true);
    }
  }

  i64 place(Span span, i64 head, i64 first) const { return (span.sequence * heads + head) * length + span.start + first; }

  u16* kept_of(Span span, i64 head) const { return span.kept < 0 ? nullptr : kept + span.kept + head * kept_before(span.end - span.start); }

  void keep(const float* p, u16* kept, i64 rows, i64 before) const {
    for (i64 m = before; m < before + rows; ++m, p += columns()) narrow(p, kept + kept_before(m), up(m + 1, PANEL));
  }

  void take(const u16* kept, float* p, i64 rows, i64 before) const {
    for (i64 m = before; m < before + rows; ++m, p += columns()) {
      const i64 own = up(m + 1, PANEL);
      for (i64 j = 0; j < own; j += LANES) store(p + j, load(kept + kept_before(m) + j, All{}), All{});
      std::fill(p + own, p + up(before + rows, PANEL), 0.f);
    }
  }

  // Computes the scores of a block of queries, and calls `one` for each row to replace the scores by probabilities.
  // Arguments of `one`: the scores of the row, the number of keys that the row sees, the padded number of keys, and the
  // index of the row.
  template <class One>
  void probabilities(Room& room, Matrix query, i64 rows, i64 before, const One& one) const {
    pack_transposed<ROWS>(query.data, query.stride, rows, qk, room.left.data());
    below(room.left.data(), room.keys_by_channel.data(), qk, room.p.data(), rows, before);
    for (i64 m = 0; m < rows; ++m) one(room.p.data() + m * columns(), before + m + 1, up(before + rows, PANEL), m);
  }

  void make_room(Room& room, bool backward) const {
    const i64 widest = std::max(qk, width);
    room.keys_by_channel.resize(panel_values<PANEL>(qk, longest));
    room.left.resize(panel_values<ROWS>(widest, QUERIES));
    room.p.resize(QUERIES * columns());
    room.out.resize(QUERIES * up(widest, PANEL));
    if (!backward) {
      room.values.resize(panel_values<PANEL>(longest, width));
      return;
    }
    room.values_by_channel.resize(panel_values<PANEL>(width, longest));
    room.keys.resize(panel_values<PANEL>(longest, qk));
    room.some.resize(panel_values<PANEL>(QUERIES, widest));
    room.dp.resize(QUERIES * columns());
    room.dk.resize(longest * up(qk, PANEL));
    room.dv.resize(longest * up(width, PANEL));
  }

  void forward(Room& room, Span span, i64 head) const {
    const i64 length = span.end - span.start;
    const Matrix key = matrix(k, span.sequence, head, span.start), value = matrix(v, span.sequence, head, span.start);
    u16* const kept = kept_of(span, head);
    pack_transposed<PANEL>(key.data, key.stride, length, qk, room.keys_by_channel.data());
    pack<PANEL>(value.data, value.stride, length, width, room.values.data());
    for (i64 first = 0; first < length; first += QUERIES) {
      const i64 rows = std::min(QUERIES, length - first), t = span.start + first, row = place(span, head, first);
      probabilities(room, matrix(q, span.sequence, head, t), rows, first, [=](float* s, i64 keys, i64 end, i64 m) {
        const Sums sums = softmax(s, keys, end, scale);
        lse[row + m] = sums.lse;
        if (largest) largest[row + m] = sums.largest;
      });
      if (kept) keep(room.p.data(), kept, rows, first);
      along_keys(room.p.data(), room.values.data(), length, width, room.out.data(), rows, first);
      write(room.out.data(), matrix(out, span.sequence, head, t), rows, width);
    }
  }

  void backward(Room& room, Span span, i64 head) const {
    const i64 length = span.end - span.start, b = span.sequence;
    const Matrix key = matrix(k, b, head, span.start), value = matrix(v, b, head, span.start);
    const float* const sums = lse + place(span, head, 0);
    const u16* const kept = kept_of(span, head);
    if (!kept) pack_transposed<PANEL>(key.data, key.stride, length, qk, room.keys_by_channel.data());
    pack_transposed<PANEL>(value.data, value.stride, length, width, room.values_by_channel.data());
    pack<PANEL>(key.data, key.stride, length, qk, room.keys.data());
    std::fill_n(room.dk.data(), length * up(qk, PANEL), 0.f);
    std::fill_n(room.dv.data(), length * up(width, PANEL), 0.f);
    for (i64 first = 0; first < length; first += QUERIES) {
      const i64 rows = std::min(QUERIES, length - first), end = up(first + rows, PANEL), t = span.start + first;
      const Matrix query = matrix(q, b, head, t), gradient = matrix(dout, b, head, t), output = matrix(out, b, head, t);
      if (kept) take(kept, room.p.data(), rows, first);
      else probabilities(room, query, rows, first, [=](float* s, i64 keys, i64 end, i64 m) { probabilities_of(s, keys, end, scale, sums[first + m]); });
      pack<PANEL>(gradient.data, gradient.stride, rows, width, room.some.data());
      along_queries(room.p.data(), room.some.data(), width, room.dv.data(), rows, first);

      pack_transposed<ROWS>(gradient.data, gradient.stride, rows, width, room.left.data());
      below(room.left.data(), room.values_by_channel.data(), width, room.dp.data(), rows, first);
      for (i64 m = 0; m < rows; ++m) {
        float* const dp = room.dp.data() + m * columns();
        const float* const p = room.p.data() + m * columns();
        const i64 keys = first + m + 1;
        // Saved probabilities are rounded to bf16, so compute the mean from the rounded values. If probabilities are
        // recomputed, the log-sum-exp may cover more keys than this span; then only the output gives the mean over all
        // keys.
        const float mean = kept ? dot<float>(dp, p, keys) : dot(gradient.data + m * gradient.stride, output.data + m * output.stride, width);
        softmax_backward(dp, p, keys, end, scale, mean);
      }
      along_keys(room.dp.data(), room.keys.data(), length, qk, room.out.data(), rows, first);
      write(room.out.data(), matrix(dq, b, head, t), rows, qk);
      pack<PANEL>(query.data, query.stride, rows, qk, room.some.data());
      along_queries(room.dp.data(), room.some.data(), qk, room.dk.data(), rows, first);
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

// Sets the offset of the saved values in every span with at most `longest` positions. Returns the number of all saved
// values.
i64 attention_kept(Span* spans, i64 count, i64 heads, i64 longest) {
  i64 values = 0;
  for (Span* span = spans; span < spans + count; ++span) {
    const i64 length = span->end - span->start;
    span->kept = length <= longest ? values : -1;
    if (length <= longest) values += heads * kept_before(length);
  }
  return values;
}

void attention_forward(const Problem* problem, const Span* spans, i64 count, i64 threads) {
  problem->each(spans, count, threads, false, [=](Room& room, Span span, i64 head) { problem->forward(room, span, head); });
}

void attention_backward(const Problem* problem, const Span* spans, i64 count, i64 threads) {
  problem->each(spans, count, threads, true, [=](Room& room, Span span, i64 head) { problem->backward(room, span, head); });
}

}
