// Products of matrices in tiles that stay in registers, and what goes with them, for CPUs with AVX-512.
//
// Operands in bf16 are widened where they are packed, and multiplied and summed in fp32: exact products, and twice as fast
// as dot products of bf16 pairs (VDPBF16PS) where those run at a quarter of the rate of fp32's FMA. A, on the left, is read
// value by value; it may be packed in panels of ROWS rows. B is packed in panels of PANEL columns: of every panel all its
// rows, PANEL values each, so that it streams. C is fp32, its rows as long as whole panels. Nothing is masked: what pads a
// panel is zero.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace tiles {

using i64 = int64_t;
using u16 = uint16_t;

constexpr i64 PANEL = 32;  // columns
constexpr i64 ROWS = 12;   // of a tile: 24 registers of sums

inline i64 up(i64 x, i64 step) { return (x + step - 1) / step * step; }

// A[m][k] = data[m * row + k * inner]. One of the two strides is 1.
struct Left {
  const float* data;
  i64 row, inner;
};

// body(M) with M = rows known at compile time, 1 to ROWS.
template <int M = ROWS, class Body>
inline void of_rows(i64 rows, const Body& body) {
  if (rows == M) body(std::integral_constant<int, M>{});
  else if constexpr (M > 1) of_rows<M - 1>(rows, body);
}

// Adds the products of M rows and one panel over `count` of the contraction to the sums. TURNED: a.row is 1, else a.inner.
// Inlined and with loops over rows unrolled, so that the sums stay in registers.
template <int M, bool TURNED>
[[gnu::always_inline]] inline void multiply(Left a, const float* panel, i64 count, __m512 (&sum)[M][2]) {
  for (i64 k = 0; k < count; ++k, panel += PANEL) {
    const __m512 b0 = _mm512_loadu_ps(panel), b1 = _mm512_loadu_ps(panel + 16);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const __m512 x = _mm512_set1_ps(TURNED ? a.data[m + k * a.inner] : a.data[m * a.row + k]);
      sum[m][0] = _mm512_fmadd_ps(x, b0, sum[m][0]);
      sum[m][1] = _mm512_fmadd_ps(x, b1, sum[m][1]);
    }
  }
}

// ---- between bf16 and fp32, 16 at a time

inline __m512 widen(const u16* x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}

// To the nearest, ties to even. CPUs with an instruction for it make zero of subnormals.
inline __m256i narrow(__m512 x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
#endif
}

// ---- rows, 16 values at a time

inline __mmask16 first_of(i64 n) { return __mmask16(n >= 16 ? 0xFFFF : (1u << std::max<i64>(n, 0)) - 1); }

// All 16 values, or the first few, the rest being zero.
struct All {};
struct Some {
  __mmask16 mask;
};

inline __m512 load(const u16* x, All) { return widen(x); }
inline __m512 load(const float* x, All) { return _mm512_loadu_ps(x); }
inline void store(u16* to, __m512 x, All) { _mm256_storeu_si256((__m256i*)to, narrow(x)); }
inline void store(float* to, __m512 x, All) { _mm512_storeu_ps(to, x); }

inline __m512 load(const u16* x, Some some) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some.mask, x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}
inline __m512 load(const float* x, Some some) { return _mm512_maskz_loadu_ps(some.mask, x); }
inline void store(u16* to, __m512 x, Some some) { _mm256_mask_storeu_epi16(to, some.mask, narrow(x)); }
inline void store(float* to, __m512 x, Some some) { _mm512_mask_storeu_ps(to, some.mask, x); }

// Whole lines of memory that nobody reads soon: they are written past the caches, which would fetch them first.
struct Stream {
  float* at;
  Stream operator+(i64 n) const { return {at + n}; }
};

inline void store(Stream to, __m512 x, All) { _mm512_stream_ps(to.at, x); }

// body(first, which) over n values.
template <class Body>
inline void along(i64 n, const Body& body) {
  i64 j = 0;
  for (; j + 16 <= n; j += 16) body(j, All{});
  if (j < n) body(j, Some{first_of(n - j)});
}

// n values of fp32 as bf16.
inline void narrow(const float* from, u16* to, i64 n) {
  along(n, [&](i64 j, auto which) { store(to + j, load(from + j, which), which); });
}

// ---- tiles

// Sums of up to ROWS rows of one panel, added to what is at `from`, if that is given. To: float*, u16* or Stream.
template <bool TURNED, class To>
inline void tile(i64 rows, Left a, const float* panel, i64 count, const float* from, i64 from_row, To to, i64 to_row) {
  of_rows(rows, [=](auto constant) {
    constexpr int M = constant;
    __m512 sum[M][2];
    if (from) {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
        for (int n = 0; n < 2; ++n) sum[m][n] = _mm512_loadu_ps(from + m * from_row + 16 * n);
    } else {
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    }
    multiply<M, TURNED>(a, panel, count, sum);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < 2; ++n) store(to + m * to_row + 16 * n, sum[m][n], All{});
  });
}

// Added to C or in its place.
template <bool TURNED>
inline void tile(i64 rows, Left a, const float* panel, i64 count, float* c, i64 ldc, bool add) {
  tile<TURNED>(rows, a, panel, count, add ? c : nullptr, ldc, c, ldc);
}

// 16 vectors of 16 words, transposed.
inline void transpose(__m512i* x) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i) {  // now x[4 r + i] has columns i, i + 4, i + 8, i + 12 of rows 4 r to 4 r + 3
    const __m512i low0 = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88), low1 = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    const __m512i high0 = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88), high1 = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    y[i] = _mm512_shuffle_i32x4(low0, high0, 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(low1, high1, 0x88);
    y[i + 8] = _mm512_shuffle_i32x4(low0, high0, 0xdd);
    y[i + 12] = _mm512_shuffle_i32x4(low1, high1, 0xdd);
  }
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

// ---- panels of bf16 matrices, widened. WIDTH: PANEL for B, ROWS for A.

// Values of the panels of a matrix with so many rows and columns.
template <i64 WIDTH>
inline i64 panel_values(i64 rows, i64 columns) { return rows * up(columns, WIDTH); }

constexpr i64 part_of(i64 width) { return std::min<i64>(width, 16); }

// As many values of a vector as a part has. Written with a mask: whole vectors, of which the next covers the end, take longer.
template <i64 PART>
inline void store_part(float* to, __m512 x) {
  if constexpr (PART < 16) store(to, x, Some{first_of(PART)});
  else store(to, x, All{});
}

// Of X, its rows being the contraction. N panels at a time.
template <i64 WIDTH, i64 N>
inline void pack_panels(const u16* x, i64 stride, i64 rows, i64 columns, float* panels) {
  constexpr i64 PART = part_of(WIDTH), PARTS = WIDTH / PART;
  __mmask16 some[N * PARTS];
  for (i64 i = 0; i < N * PARTS; ++i) some[i] = first_of(std::min(PART, columns - i * PART));
  for (i64 k = 0; k < rows; ++k, x += stride)
#pragma GCC unroll 8
    for (i64 i = 0; i < N * PARTS; ++i) {
      const __m512 values = load(x + i * PART, Some{some[i]});
      float* to = panels + i / PARTS * rows * WIDTH + k * WIDTH + i % PARTS * PART;
      store_part<PART>(to, values);
    }
}

template <i64 WIDTH>
inline void pack(const u16* x, i64 stride, i64 rows, i64 columns, float* panels) {
  constexpr i64 LINES = WIDTH < PANEL ? 96 : PANEL;  // columns that are read together: whole lines of memory
  i64 first = 0;
  for (; first + LINES <= columns; first += LINES) pack_panels<WIDTH, LINES / WIDTH>(x + first, stride, rows, LINES, panels + first * rows);
  for (; first < columns; first += WIDTH) pack_panels<WIDTH, 1>(x + first, stride, rows, columns - first, panels + first * rows);
}

// Of X^T, columns of X being the contraction.
template <i64 WIDTH>
inline void pack_transposed(const u16* x, i64 stride, i64 rows, i64 columns, float* panels) {
  constexpr i64 PART = part_of(WIDTH);
  const __m512i high = _mm512_set1_epi32(0xffff0000);
  for (i64 first = 0; first < up(rows, WIDTH); first += PART) {
    const i64 n = std::clamp<i64>(rows - first, 0, PART);
    float* to = panels + first / WIDTH * WIDTH * columns + first % WIDTH;
    for (i64 k = 0; k < columns; k += 32) {
      const i64 left = columns - k;
      const __mmask32 some = left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
      __m512i words[16];  // of two neighbours each
      for (i64 i = 0; i < 16; ++i) {
        const u16* from = x + (first + i) * stride + k;
        words[i] = i < n ? _mm512_maskz_loadu_epi16(some, from) : _mm512_setzero_si512();
      }
      transpose(words);
      for (i64 i = 0; i < std::min<i64>(16, (left + 1) / 2); ++i) {
        float* row = to + (k + 2 * i) * WIDTH;
        store_part<PART>(row, _mm512_castsi512_ps(_mm512_slli_epi32(words[i], 16)));
        if (2 * i + 1 < left) store_part<PART>(row + WIDTH, _mm512_castsi512_ps(_mm512_and_si512(words[i], high)));
      }
    }
  }
}

// A tensor (B, H, T, width) of bf16 in memory, channels side by side.
struct Heads {
  u16* data;
  i64 batch, head, position;  // strides
  u16* at(i64 b, i64 h, i64 t) const { return data + b * batch + h * head + t * position; }
};

// exp for x <= 0: 2^n times a polynomial for the rest, 2 units in the last place.
inline __m512 exp(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-104));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1)));
  return _mm512_scalef_ps(p, n);
}

}  // namespace tiles
