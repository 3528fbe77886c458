// Operations on rows in bf16 that the model computes between its matmuls, for CPUs with AVX-512 or AVX2: RMSNorm and
// SwiGLU of train/model/layers.py, the split into heads of train/model/mla.py and the loss of train/model/loss.py.
// Python calls the functions with ctypes.
//
// Each forward and each backward is one pass over memory. Values are widened to fp32 when they are read, and rounded
// once when they are written. No result depends on the number of threads.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tiles.h"

namespace {

using namespace tiles;

// ---- RMSNorm

constexpr i64 PARTS = 64, PART = 64;  // rows are split into at most PARTS parts with at least PART rows, whose sums are added in order

void norm_row(const u16* x, const u16* weight, u16* y, float* rstd, i64 width, float eps) {
  Vector sum{};
  along(width, [&](i64 j, auto which) {
    const Vector v = load(x + j, which);
    sum = fmadd(v, v, sum);
  });
  *rstd = 1 / std::sqrt(sum_of(sum) / float(width) + eps);
  const Vector factor = all(*rstd);
  along(width, [&](i64 j, auto which) {
    store(y + j, load(x + j, which) * factor * load(weight + j, which), which);
  });
}

// With u = grad * weight: dx = rstd * (u - x * rstd^2 * mean(u * x)); grad * x * rstd is added to dweight. dx or
// dweight may be null.
void norm_row_backward(const u16* grad, const u16* x, const u16* weight, float rstd, u16* dx, float* dweight, i64 width) {
  const Vector factor = all(rstd);
  Vector sum{};
  along(width, [&](i64 j, auto which) {
    const Vector product = load(x + j, which) * load(grad + j, which);
    sum = fmadd(product, load(weight + j, which), sum);
    if (dweight) store(dweight + j, fmadd(product, factor, load(dweight + j, which)), which);
  });
  if (!dx) return;
  const Vector slope = all(sum_of(sum) * (rstd * rstd * rstd) / float(width));
  along(width, [&](i64 j, auto which) {
    const Vector u = load(grad + j, which) * load(weight + j, which);
    store(dx + j, fnmadd(load(x + j, which), slope, u * factor), which);
  });
}

// ---- SwiGLU

struct Silu {
  Vector sigmoid, value;
};

inline Silu silu(Vector x) {
  const Vector one = all(1), e = exp(minus_abs(x));
  const Vector sigmoid = where_negative(x, e, one) / (one + e);
  return {sigmoid, x * sigmoid};
}

void swiglu_row(const u16* h, const float* gate_value, u16* out, i64 inner) {
  const Vector factor = all(gate_value ? *gate_value : 1);
  along(inner, [&](i64 j, auto which) {
    const Vector product = silu(load(h + j, which)).value * load(h + inner + j, which);
    store(out + j, product * factor, which);
  });
}

void swiglu_row_backward(const u16* grad, const u16* h, const float* gate_value, u16* dh, float* dgate_value, i64 inner) {
  const Vector factor = all(gate_value ? *gate_value : 1), one = all(1);
  Vector sum{};
  along(inner, [&](i64 j, auto which) {
    const Vector gate = load(h + j, which), up = load(h + inner + j, which), d = load(grad + j, which);
    const Silu s = silu(gate);
    const Vector dup = s.value * d, dsilu = d * up * factor;
    sum = fmadd(dup, up, sum);
    const Vector slope = fmadd(gate, one - s.sigmoid, one);
    store(dh + j, dsilu * s.sigmoid * slope, which);
    store(dh + inner + j, dup * factor, which);
  });
  if (dgate_value) *dgate_value = sum_of(sum);
}

// ---- loss

inline float value_of(const u16* x) { return load(x, Some{first_of(1)})[0]; }

// Returns -log softmax(x)[target]. gradient: whether to replace x by the gradient times scale. powers: a buffer of
// `width` values.
float cross_entropy_row(u16* x, i64 target, float scale, bool gradient, float* powers, i64 width) {
  const Vector least = all(-INFINITY), lowest = all(-FLT_MAX);
  Vector most = least, sum{}, broken{};
  along(width, [&](i64 j, auto which) { most = max(most, where(which, load(x + j, which), least)); });
  const float largest = largest_of(most);
  along(width, [&](i64 j, auto which) {
    const Vector v = load(x + j, which), power = exp(v - all(largest));
    store(powers + j, power, which);
    sum = sum + where(which, power, Vector{});
    broken = fmadd(max(lowest, v), Vector{}, broken);  // NaN if a value is NaN; `power` is not NaN then
  });
  const float total = sum_of(sum) + sum_of(broken) + largest * 0, loss = std::log(total) - (value_of(x + target) - largest);
  if (!gradient) return loss;
  const Vector factor = all(scale / total);
  along(width, [&](i64 j, auto which) { store(x + j, load(powers + j, which) * factor, which); });
  store(x + target, all((powers[target] / total - 1) * scale), Some{first_of(1)});
  return loss;
}

// ---- the largest scores

// Maps x to an unsigned integer that has the same order as x. 0 and -0 get the same integer.
inline std::uint32_t order_of(float x) {
  x += 0.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}

// Writes to `best` the indices of the k largest scores, in ascending order. If scores are equal, the lower index wins.
// If fewer than k scores are above -inf, -1 fills the remaining entries. orders: a buffer of `width` values.
void best_keys_row(const float* scores, int* best, i64 width, i64 k, std::uint32_t* orders) {
  constexpr int BITS[] = {11, 11, 10};
  const std::uint32_t nothing = order_of(-INFINITY);
  for (i64 j = 0; j < width; ++j) orders[j] = order_of(scores[j]);
  std::uint32_t least = 0, known = 0;  // the k-th largest order, and a mask of its bits that are final
  i64 left = std::min(k, width);       // number of scores to choose among those that equal `least` in the bits of `known`
  for (int shift = 32, pass = 0; pass < 3; ++pass) {
    shift -= BITS[pass];
    std::vector<i64> counts(std::size_t(1) << BITS[pass]);
    const std::uint32_t mask = std::uint32_t(counts.size() - 1);
    for (i64 j = 0; j < width; ++j) counts[(orders[j] >> shift) & mask] += (orders[j] & known) == least;
    std::uint32_t bin = mask;
    while (counts[bin] < left) left -= counts[bin--];
    least |= bin << shift;
    known |= mask << shift;
  }
  i64 found = 0;
  for (i64 j = 0; j < width && found < k; ++j)
    if (orders[j] > nothing && (orders[j] > least || (orders[j] == least && left-- > 0))) best[found++] = int(j);
  std::fill(best + found, best + k, -1);
}

// ---- heads

constexpr i64 POSITIONS = 32;  // number of positions that a job processes

// Multiplies pairs by complex numbers, or by their conjugates if BACK. Every product is rounded before it is added, as
// in torch's complex products.
template <bool BACK>
inline Vector turn(Vector x, Vector by) {
  const Vector straight = x * evens(by), across = swapped(x) * odds(by);
  return BACK ? add_subtract(straight, across) : subtract_add(straight, across);
}

template <bool BACK, class From>
void turn(const From* x, const float* by, u16* to, i64 width) {
  along(width, [&](i64 j, auto which) { store(to + j, turn<BACK>(load(x + j, which), load(by + j, which)), which); });
}

inline void copy(const u16* from, u16* to, i64 n) { std::memcpy(to, from, n * sizeof(u16)); }

// A tensor (B, T, H, width) in memory, with contiguous channels.
struct Positions {
  u16* data;
  i64 batch, position, head;  // strides
  u16* at(i64 b, i64 h, i64 t) const { return data + b * batch + t * position + h * head; }
};

struct Split {
  Positions q, kv, shared;       // (B, T, H, nope + rope), (B, T, H, nope + value), (B, T, 1, rope); or their gradients
  Heads queries, keys, values;   // (B, H, T, width); or their gradients
  const float* table;            // (T, rope / 2) complex
  i64 batch, heads, length, nope, rope, value;

  // Forward and backward both read memory in order. This matters more for speed than the order of writes.

  void forward(i64 b, i64 first, i64 last) const {
    for (i64 t = first; t < last; ++t)
      for (i64 h = 0; h < heads; ++h) {
        const u16 *from = q.at(b, h, t), *latent = kv.at(b, h, t);
        u16 *query = queries.at(b, h, t), *key = keys.at(b, h, t);
        copy(from, query, nope);
        turn<false>(from + nope, table + t * rope, query + nope, rope);
        copy(latent, key, nope);
        if (h == 0) turn<false>(shared.at(b, 0, t), table + t * rope, key + nope, rope);
        else copy(keys.at(b, 0, t) + nope, key + nope, rope);
        copy(latent + nope, values.at(b, h, t), value);
      }
  }

  // sums: a buffer of POSITIONS x rope values.
  void backward(i64 b, i64 first, i64 last, float* sums) const {
    std::fill_n(sums, (last - first) * rope, 0.f);
    for (i64 h = 0; h < heads; ++h)
      for (i64 t = first; t < last; ++t) {
        const u16 *query = queries.at(b, h, t), *key = keys.at(b, h, t);
        u16 *to = q.at(b, h, t), *latent = kv.at(b, h, t);
        copy(query, to, nope);
        turn<true>(query + nope, table + t * rope, to + nope, rope);
        copy(key, latent, nope);
        copy(values.at(b, h, t), latent + nope, value);
        float* sum = sums + (t - first) * rope;
        along(rope, [&](i64 j, auto which) {
          store(sum + j, load(sum + j, which) + load(key + nope + j, which), which);
        });
      }
    for (i64 t = first; t < last; ++t)
      turn<true>(sums + (t - first) * rope, table + t * rope, shared.at(b, 0, t), rope);
  }

  template <class Job>
  void each(i64 threads, const Job& job) const {
    const i64 jobs = (length + POSITIONS - 1) / POSITIONS;
    threads = threads_for(batch * length * heads * (nope + rope), threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      std::vector<float> sums(POSITIONS * rope);
#pragma omp for
      for (i64 work = 0; work < batch * jobs; ++work) {
        const i64 first = work % jobs * POSITIONS;
        job(work / jobs, first, std::min(first + POSITIONS, length), sums.data());
      }
    }
  }
};

}  // namespace

extern "C" {

void rms_norm_forward(const u16* x, i64 x_row, const u16* weight, u16* y, float* rstd, i64 rows, i64 width, float eps,
                      i64 threads) {
  threads = threads_for(rows * width, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (i64 n = 0; n < rows; ++n) norm_row(x + n * x_row, weight, y + n * width, rstd + n, width, eps);
}

// dx or dweight may be null.
void rms_norm_backward(const u16* grad, i64 grad_row, const u16* x, i64 x_row, const u16* weight, const float* rstd, u16* dx,
                       float* dweight, i64 rows, i64 width, i64 threads) {
  const i64 part = std::max(PART, (rows + PARTS - 1) / PARTS), parts = (rows + part - 1) / part;
  std::vector<float> sums(dweight ? parts * width : 0);
  threads = threads_for(rows * width, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for
    for (i64 p = 0; p < parts; ++p)
      for (i64 n = p * part; n < std::min(rows, (p + 1) * part); ++n)
        norm_row_backward(grad + n * grad_row, x + n * x_row, weight, rstd[n], dx ? dx + n * width : nullptr,
                           dweight ? sums.data() + p * width : nullptr, width);
#pragma omp for
    for (i64 j = 0; j < (dweight ? width : 0); ++j) {
      dweight[j] = 0;
      for (i64 p = 0; p < parts; ++p) dweight[j] += sums[p * width + j];
    }
  }
}

// gates may be null.
void swiglu_forward(const u16* h, i64 h_row, const float* gates, u16* out, i64 rows, i64 inner, i64 threads) {
  threads = threads_for(4 * rows * inner, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (i64 n = 0; n < rows; ++n) swiglu_row(h + n * h_row, gates ? gates + n : nullptr, out + n * inner, inner);
}

// gates and dgates may both be null.
void swiglu_backward(const u16* grad, i64 grad_row, const u16* h, i64 h_row, const float* gates, u16* dh, float* dgates,
                     i64 rows, i64 inner, i64 threads) {
  threads = threads_for(4 * rows * inner, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (i64 n = 0; n < rows; ++n)
    swiglu_row_backward(grad + n * grad_row, h + n * h_row, gates ? gates + n : nullptr, dh + n * 2 * inner,
                        dgates ? dgates + n : nullptr, inner);
}

// Computes the loss of every row with cross_entropy_row. Returns false if a target is out of range.
bool cross_entropy(u16* logits, const i64* targets, float* losses, i64 rows, i64 width, float scale, bool gradient, i64 threads) {
  for (i64 n = 0; n < rows; ++n)
    if (targets[n] < 0 || targets[n] >= width) return false;
  threads = threads_for(4 * rows * width, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> powers(width);
#pragma omp for
    for (i64 n = 0; n < rows; ++n)
      losses[n] = cross_entropy_row(logits + n * width, targets[n], scale, gradient, powers.data(), width);
  }
  return true;
}

// Sorts rows by expert; rows of one expert keep their order. k: number of rows of each token. Returns false if an
// expert id is out of range.
bool sort_by_expert(const i64* expert, i64* order, i64* inverse, i64* tokens, i64* counts, i64 rows, i64 k, i64 experts) {
  std::fill_n(counts, experts, 0);
  for (i64 n = 0; n < rows; ++n) {
    if (expert[n] < 0 || expert[n] >= experts) return false;
    ++counts[expert[n]];
  }
  std::vector<i64> next(experts);
  for (i64 e = 1; e < experts; ++e) next[e] = next[e - 1] + counts[e - 1];
  for (i64 n = 0; n < rows; ++n) {
    const i64 to = next[expert[n]]++;
    order[to] = n;
    inverse[n] = to;
    tokens[to] = n / k;
  }
  return true;
}

void best_keys(const float* scores, i64 row, int* best, i64 rows, i64 width, i64 k, i64 threads) {
  threads = threads_for(8 * rows * width, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<std::uint32_t> orders(width);
#pragma omp for
    for (i64 n = 0; n < rows; ++n) best_keys_row(scores + n * row, best + n * k, width, k, orders.data());
  }
}

void heads_forward(const Split* split, i64 threads) {
  split->each(threads, [=](i64 b, i64 first, i64 last, float*) { split->forward(b, first, last); });
}

void heads_backward(const Split* split, i64 threads) {
  split->each(threads, [=](i64 b, i64 first, i64 last, float* sums) { split->backward(b, first, last, sums); });
}

}
