// Matmuls C = A B in tiles that stay in registers, and helper functions.
//
// bf16 operands are widened to fp32 when they are packed. Products are exact, and sums are in fp32. On some CPUs, dot
// products of bf16 pairs (VDPBF16PS) have only a quarter of the rate of fp32 FMA instructions; there this method is
// twice as fast as such dot products. A is read value by value, and may be packed in panels of ROWS rows. B is packed
// in panels of PANEL columns. A panel contains all rows of these columns, one after another, so B is read in memory
// order. C is fp32, and its rows are complete panels. No operation needs a mask, because panels are padded with zeros.

#pragma once

#include <type_traits>

#include "vectors.h"

namespace tiles {

constexpr i64 PANEL = 2 * LANES;            // columns of a panel
constexpr i64 ROWS = LANES == 16 ? 12 : 6;  // rows of a tile, whose sums occupy three quarters of the registers

inline i64 up(i64 x, i64 step) { return (x + step - 1) / step * step; }

// A[m][k] = data[m * row + k * inner]. One of the two strides is 1.
struct Left {
  const float* data;
  i64 row, inner;
};

// Calls body(M), where M equals `rows` and is a compile-time constant from 1 to ROWS.
template <int M = ROWS, class Body>
inline void of_rows(i64 rows, const Body& body) {
  if (rows == M) body(std::integral_constant<int, M>{});
  else if constexpr (M > 1) of_rows<M - 1>(rows, body);
}

// Adds to the sums the products of M rows and one panel, over `count` elements of the contraction. TURNED: whether
// a.row is 1; else a.inner is 1. The function is inlined and its loops over rows are unrolled, so that the sums stay in
// registers.
template <int M, bool TURNED>
[[gnu::always_inline]] inline void multiply(Left a, const float* panel, i64 count, Vector (&sum)[M][2]) {
  for (i64 k = 0; k < count; ++k, panel += PANEL) {
    const Vector b0 = load(panel, All{}), b1 = load(panel + LANES, All{});
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Vector x = all(TURNED ? a.data[m + k * a.inner] : a.data[m * a.row + k]);
      sum[m][0] = fmadd(x, b0, sum[m][0]);
      sum[m][1] = fmadd(x, b1, sum[m][1]);
    }
  }
}

// Converts n fp32 values to bf16.
inline void narrow(const float* from, u16* to, i64 n) {
  along(n, [&](i64 j, auto which) { store(to + j, load(from + j, which), which); });
}

// ---- tiles

// Computes the sums of at most ROWS rows of one panel. If `from` is not null, adds them to the values at `from`. To:
// float*, u16* or Stream.
template <bool TURNED, class To>
inline void tile(i64 rows, Left a, const float* panel, i64 count, const float* from, i64 from_row, To to, i64 to_row) {
  of_rows(rows, [=](auto constant) {
    constexpr int M = constant;
    Vector sum[M][2];
    if (from) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < 2; ++n) sum[m][n] = load(from + m * from_row + LANES * n, All{});
    } else {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = Vector{};
    }
    multiply<M, TURNED>(a, panel, count, sum);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < 2; ++n) store(to + m * to_row + LANES * n, sum[m][n], All{});
  });
}

// Computes a tile of C. add: whether to add the sums to C instead of overwriting C.
template <bool TURNED>
inline void tile(i64 rows, Left a, const float* panel, i64 count, float* c, i64 ldc, bool add) {
  tile<TURNED>(rows, a, panel, count, add ? c : nullptr, ldc, c, ldc);
}

// ---- panels of bf16 matrices, widened. WIDTH: PANEL for B, ROWS for A.

// Returns the number of values in the panels of a matrix (rows, columns).
template <i64 WIDTH>
inline i64 panel_values(i64 rows, i64 columns) { return rows * up(columns, WIDTH); }

constexpr i64 part_of(i64 width) { return std::min(width, LANES); }

// Packs N complete panels of X. The contraction runs over the rows of X.
template <i64 WIDTH, i64 N>
inline void pack_panels(const u16* x, i64 stride, i64 rows, float* panels) {
  constexpr i64 PART = part_of(WIDTH), PARTS = WIDTH / PART;
  for (i64 k = 0; k < rows; ++k, x += stride)
#pragma GCC unroll 16
    for (i64 i = 0; i < N * PARTS; ++i)
      store_part<PART>(panels + i / PARTS * rows * WIDTH + k * WIDTH + i % PARTS * PART, load_part<PART>(x + i * PART));
}

// Packs the last panel, which has fewer than WIDTH columns.
template <i64 WIDTH>
inline void pack_last(const u16* x, i64 stride, i64 rows, i64 columns, float* panel) {
  constexpr i64 PART = part_of(WIDTH);
  for (i64 k = 0; k < rows; ++k, x += stride, panel += WIDTH)
    for (i64 j = 0; j < WIDTH; j += PART) store_part<PART>(panel + j, load(x + j, Some{first_of(columns - j)}));
}

template <i64 WIDTH>
inline void pack(const u16* x, i64 stride, i64 rows, i64 columns, float* panels) {
  constexpr i64 LINES = WIDTH < PANEL ? 96 : PANEL;  // number of columns that are read together: complete cache lines
  i64 first = 0;
  for (; first + LINES <= columns; first += LINES) pack_panels<WIDTH, LINES / WIDTH>(x + first, stride, rows, panels + first * rows);
  for (; first + WIDTH <= columns; first += WIDTH) pack_panels<WIDTH, 1>(x + first, stride, rows, panels + first * rows);
  if (first < columns) pack_last<WIDTH>(x + first, stride, rows, columns - first, panels + first * rows);
}

// Packs panels of X^T. The contraction runs over the columns of X.
template <i64 WIDTH>
inline void pack_transposed(const u16* x, i64 stride, i64 rows, i64 columns, float* panels) {
  constexpr i64 PART = part_of(WIDTH);
  for (i64 first = 0; first < up(rows, WIDTH); first += PART) {
    const i64 n = std::clamp<i64>(rows - first, 0, PART);
    float* to = panels + first / WIDTH * WIDTH * columns + first % WIDTH;
    for (i64 k = 0; k < columns; k += 2 * LANES) {
      const i64 left = columns - k;
      Pairs pairs[LANES];  // adjacent values of a row
      for (i64 i = 0; i < LANES; ++i) pairs[i] = i < n ? load_pairs(x + (first + i) * stride + k, left) : no_pairs();
      transpose(pairs);
      for (i64 i = 0; i < std::min(LANES, (left + 1) / 2); ++i) {
        float* row = to + (k + 2 * i) * WIDTH;
        store_part<PART>(row, first_of_pairs(pairs[i]));
        if (2 * i + 1 < left) store_part<PART>(row + WIDTH, second_of_pairs(pairs[i]));
      }
    }
  }
}

// A bf16 tensor (B, H, T, width) in memory, with contiguous channels.
struct Heads {
  u16* data;
  i64 batch, head, position;  // strides
  u16* at(i64 b, i64 h, i64 t) const { return data + b * batch + h * head + t * position; }
};

// Returns exp(x) for x <= 0, computed as 2^n times a polynomial of the remainder. The error is at most 2 units in the
// last place.
inline Vector exp(Vector x) {
  x = max(x, all(-104));
  const Vector n = nearest(x * all(1.44269504f));
  Vector r = fnmadd(n, all(0.693359375f), x);
  r = fnmadd(n, all(-2.12194440e-4f), r);
  Vector p = all(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fmadd(p, r, all(c));
  p = fmadd(p, r * r, r + all(1));
  return times_power(p, n);
}

}  // namespace tiles
