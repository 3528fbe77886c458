// Products of bf16 matrices in tiles that stay in registers, accumulated in fp32: AVX512-BF16's dot products of pairs.
//
// A is read where it lies, as pairs (two neighbours along the contraction, one 32-bit word). B is packed in panels of 32
// columns: of every panel all its pairs of rows, 32 words each, so that it streams. C is fp32, its rows as long as whole
// panels. Nothing is masked: what pads a panel or a contraction is zero.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace tiles {

using i64 = int64_t;
using u16 = uint16_t;
using u32 = uint32_t;

constexpr i64 PANEL = 32;  // columns
constexpr i64 ROWS = 8;    // of a tile: 16 registers of sums

inline i64 up(i64 x, i64 step) { return (x + step - 1) / step * step; }

// A[m][k] = data[m * row + k * pair], in pairs. One of the two strides is 1.
struct Pairs {
  const u32* data;
  i64 row, pair;
  Pairs from(i64 m) const { return {data + m * row, row, pair}; }
};

// Sums of M rows of one panel over pairs [begin, end), added to C or in its place. TURNED: a.row is 1, else a.pair; known at
// compile time it is worth 5 %. Loops over rows are unrolled, so that the sums stay in registers.
template <int M, bool TURNED>
inline void tile(Pairs a, const u32* panel, float* c, i64 ldc, i64 begin, i64 end, bool add) {
  __m512 sum[M][2];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < 2; ++n) sum[m][n] = add ? _mm512_loadu_ps(c + m * ldc + 16 * n) : _mm512_setzero_ps();
  for (i64 k = begin; k < end; ++k) {
    const __m512bh b0 = (__m512bh)_mm512_loadu_si512(panel + k * PANEL);
    const __m512bh b1 = (__m512bh)_mm512_loadu_si512(panel + k * PANEL + 16);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(int(TURNED ? a.data[m + k * a.pair] : a.data[m * a.row + k]));
      sum[m][0] = _mm512_dpbf16_ps(sum[m][0], pair, b0);
      sum[m][1] = _mm512_dpbf16_ps(sum[m][1], pair, b1);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < 2; ++n) _mm512_storeu_ps(c + m * ldc + 16 * n, sum[m][n]);
}

// The same for up to ROWS rows.
template <bool TURNED>
inline void tile(i64 rows, Pairs a, const u32* panel, float* c, i64 ldc, i64 begin, i64 end, bool add) {
  switch (rows) {
    case 8: return tile<8, TURNED>(a, panel, c, ldc, begin, end, add);
    case 7: return tile<7, TURNED>(a, panel, c, ldc, begin, end, add);
    case 6: return tile<6, TURNED>(a, panel, c, ldc, begin, end, add);
    case 5: return tile<5, TURNED>(a, panel, c, ldc, begin, end, add);
    case 4: return tile<4, TURNED>(a, panel, c, ldc, begin, end, add);
    case 3: return tile<3, TURNED>(a, panel, c, ldc, begin, end, add);
    case 2: return tile<2, TURNED>(a, panel, c, ldc, begin, end, add);
    case 1: return tile<1, TURNED>(a, panel, c, ldc, begin, end, add);
  }
}

inline void tile(i64 rows, Pairs a, const u32* panel, float* c, i64 ldc, i64 begin, i64 end, bool add) {
  if (a.row == 1) tile<true>(rows, a, panel, c, ldc, begin, end, add);
  else tile<false>(rows, a, panel, c, ldc, begin, end, add);
}

// Words of the panels of a matrix with so many pairs of rows and so many columns.
inline i64 panel_words(i64 pairs, i64 columns) { return pairs * up(columns, PANEL); }

// Panels of B = X, rows of X being the contraction: the pairs are of two rows. An odd last row meets zeros.
inline void pack(const u16* x, i64 stride, i64 rows, i64 columns, u32* panels) {
  const i64 pairs = (rows + 1) / 2;
  for (i64 first = 0; first < columns; first += PANEL) {
    const i64 n = std::min(PANEL, columns - first);
    for (i64 k = 0; k < pairs; ++k, panels += PANEL) {
      const u16* low = x + 2 * k * stride + first;
      const u16* high = 2 * k + 1 < rows ? low + stride : nullptr;
      if (n < PANEL) std::memset(panels, 0, PANEL * 4);
      if (high) for (i64 j = 0; j < n; ++j) panels[j] = u32(low[j]) | u32(high[j]) << 16;
      else for (i64 j = 0; j < n; ++j) panels[j] = low[j];
    }
  }
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

// Panels of B = X^T, columns of X being the contraction: the pairs are neighbours. An odd last column meets zeros.
inline void pack_transposed(const u16* x, i64 stride, i64 rows, i64 columns, u32* panels) {
  const i64 pairs = (columns + 1) / 2;
  for (i64 first = 0; first < up(rows, PANEL); first += 16) {
    const i64 n = std::clamp<i64>(rows - first, 0, 16);
    u32* to = panels + first / PANEL * PANEL * pairs + first % PANEL;
    for (i64 k = 0; k < pairs; k += 16) {
      const i64 left = columns - 2 * k;
      const __mmask32 some = left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
      __m512i words[16];
      for (i64 i = 0; i < 16; ++i)
        words[i] = i < n ? _mm512_maskz_loadu_epi16(some, x + (first + i) * stride + 2 * k) : _mm512_setzero_si512();
      transpose(words);
      for (i64 i = 0; i < std::min<i64>(16, pairs - k); ++i) _mm512_storeu_si512(to + (k + i) * PANEL, words[i]);
    }
  }
}

// ---- between bf16 and fp32, 16 at a time

inline __m512 widen(const u16* x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}

// To the nearest, ties to even; a subnormal becomes zero.
inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

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
