// fp32 vectors of this CPU's width, and operations on them, for tiles.h and the files that include it. A vector has 16
// values with AVX-512, and 8 with AVX2 and FMA. Operators compute plain arithmetic; the compiler does not fuse a
// multiplication and an addition.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace tiles {

using i64 = int64_t;
using u16 = uint16_t;

// A destination for complete cache lines that are not read soon. Stores to it bypass the caches. Otherwise the caches
// would first read each line from memory.
struct Stream {
  float* at;
  Stream operator+(i64 n) const { return {at + n}; }
};

// Returns the number of threads for work of about this many cycles. It takes about ten microseconds to wake a thread,
// so each thread gets work for at least this time.
constexpr i64 WAKING = 1 << 15;
inline i64 threads_for(i64 cycles, i64 threads) { return std::clamp<i64>(cycles / WAKING, 1, threads); }

// Selects all values of a vector. In contrast, `Some` selects only the first values; the others count as zero.
struct All {};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)

using Vector = __m512;
using Pairs = __m512i;  // of bf16
using Mask = __mmask16;

constexpr i64 LANES = 16;

inline Mask first_of(i64 n) { return Mask(n >= LANES ? 0xFFFF : (1u << std::max<i64>(n, 0)) - 1); }

struct Some {
  Mask mask;
};

inline Vector all(float x) { return _mm512_set1_ps(x); }
inline Vector fmadd(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector fmsub(Vector a, Vector b, Vector c) { return _mm512_fmsub_ps(a, b, c); }
inline Vector fnmadd(Vector a, Vector b, Vector c) { return _mm512_fnmadd_ps(a, b, c); }
inline Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
inline Vector sqrt(Vector x) { return _mm512_sqrt_ps(x); }
inline Vector nearest(Vector x) { return _mm512_roundscale_ps(x, 0); }
inline Vector times_power(Vector x, Vector n) { return _mm512_scalef_ps(x, n); }  // x 2^n
inline Vector minus_abs(Vector x) { return _mm512_or_ps(x, _mm512_set1_ps(-0.f)); }
inline float sum_of(Vector x) { return _mm512_reduce_add_ps(x); }
inline float largest_of(Vector x) { return _mm512_reduce_max_ps(x); }

inline Vector where(Some some, Vector a, Vector b) { return _mm512_mask_mov_ps(b, some.mask, a); }
inline Vector where_negative(Vector x, Vector a, Vector b) { return _mm512_mask_mov_ps(b, _mm512_movepi32_mask(_mm512_castps_si512(x)), a); }

// evens, odds: twice the first value of each adjacent pair, or twice the second value. swapped: each pair with its
// values exchanged. subtract_add: subtracts b from the first value of each pair, and adds b to the second value.
// add_subtract: adds b to the first value, and subtracts b from the second value.
inline Vector evens(Vector x) { return _mm512_moveldup_ps(x); }
inline Vector odds(Vector x) { return _mm512_movehdup_ps(x); }
inline Vector swapped(Vector x) { return _mm512_permute_ps(x, 0xB1); }
inline Vector subtract_add(Vector a, Vector b) { return _mm512_fmaddsub_ps(a, _mm512_set1_ps(1), b); }
inline Vector add_subtract(Vector a, Vector b) { return _mm512_fmsubadd_ps(a, _mm512_set1_ps(1), b); }

inline Vector widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// Rounds to bf16, to nearest with ties to even. CPUs that have an instruction for this also flush subnormals to zero.
inline __m256i narrowed(Vector x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x);
#else
  const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
#endif
}

inline Vector load(const u16* x, All) { return widened(_mm256_loadu_si256((const __m256i*)x)); }
inline Vector load(const float* x, All) { return _mm512_loadu_ps(x); }
inline void store(u16* to, Vector x, All) { _mm256_storeu_si256((__m256i*)to, narrowed(x)); }
inline void store(float* to, Vector x, All) { _mm512_storeu_ps(to, x); }
inline void store(Stream to, Vector x, All) { _mm512_stream_ps(to.at, x); }

inline Vector load(const u16* x, Some some) { return widened(_mm256_maskz_loadu_epi16(some.mask, x)); }
inline Vector load(const float* x, Some some) { return _mm512_maskz_loadu_ps(some.mask, x); }
inline void store(u16* to, Vector x, Some some) { _mm256_mask_storeu_epi16(to, some.mask, narrowed(x)); }
inline void store(float* to, Vector x, Some some) { _mm512_mask_storeu_ps(to, some.mask, x); }

// Loads or stores the first PART values, with a mask. Complete vectors that overlap would take longer to write.
template <i64 PART>
inline Vector load_part(const u16* x) {
  if constexpr (PART < LANES) return load(x, Some{first_of(PART)});
  else return load(x, All{});
}

template <i64 PART>
inline void store_part(float* to, Vector x) {
  if constexpr (PART < LANES) store(to, x, Some{first_of(PART)});
  else store(to, x, All{});
}

// Loads 2 * LANES values, or only the first n if n is smaller.
inline Pairs load_pairs(const u16* x, i64 n) {
  return _mm512_maskz_loadu_epi16(n >= 2 * LANES ? ~__mmask32(0) : (__mmask32(1) << n) - 1, x);
}
inline Pairs no_pairs() { return _mm512_setzero_si512(); }
inline Vector first_of_pairs(Pairs x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
inline Vector second_of_pairs(Pairs x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff0000))); }

// Transposes LANES vectors of LANES 32-bit words.
inline void transpose(Pairs* x) {
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

#else  // AVX2

using Vector = __m256;
using Pairs = __m256i;  // of bf16

constexpr i64 LANES = 8;

struct Mask {
  __m256i lanes;
  i64 count;
};

inline Mask first_of(i64 n) {
  return {_mm256_cmpgt_epi32(_mm256_set1_epi32(int(std::clamp<i64>(n, 0, LANES))), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
          std::clamp<i64>(n, 0, LANES)};
}

struct Some {
  Mask mask;
};

inline Vector all(float x) { return _mm256_set1_ps(x); }
inline Vector fmadd(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector fmsub(Vector a, Vector b, Vector c) { return _mm256_fmsub_ps(a, b, c); }
inline Vector fnmadd(Vector a, Vector b, Vector c) { return _mm256_fnmadd_ps(a, b, c); }
inline Vector max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline Vector sqrt(Vector x) { return _mm256_sqrt_ps(x); }
inline Vector nearest(Vector x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vector minus_abs(Vector x) { return _mm256_or_ps(x, _mm256_set1_ps(-0.f)); }

// Returns x 2^n, in two multiplications, because 2^n alone may be too small for fp32.
inline Vector times_power(Vector x, Vector n) {
  const auto power = [](__m256i exponent) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23)); };
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  return x * power(half) * power(_mm256_sub_epi32(whole, half));
}

template <class Operation>
inline float reduce(Vector x, const Operation& op) {
  __m128 y = op(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = op(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(op(y, _mm_movehdup_ps(y)));
}
inline float sum_of(Vector x) { return reduce(x, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); }); }
inline float largest_of(Vector x) { return reduce(x, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); }); }

inline Vector where(Some some, Vector a, Vector b) { return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(some.mask.lanes)); }
inline Vector where_negative(Vector x, Vector a, Vector b) { return _mm256_blendv_ps(b, a, x); }

// The AVX-512 part above describes these functions.
inline Vector evens(Vector x) { return _mm256_moveldup_ps(x); }
inline Vector odds(Vector x) { return _mm256_movehdup_ps(x); }
inline Vector swapped(Vector x) { return _mm256_permute_ps(x, 0xB1); }
inline Vector subtract_add(Vector a, Vector b) { return _mm256_addsub_ps(a, b); }
inline Vector add_subtract(Vector a, Vector b) { return _mm256_fmsubadd_ps(a, _mm256_set1_ps(1), b); }

inline Vector widened(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }

// Rounds to bf16, to nearest with ties to even.
inline __m128i narrowed(Vector x) {
  const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

inline Vector load(const u16* x, All) { return widened(_mm_loadu_si128((const __m128i*)x)); }
inline Vector load(const float* x, All) { return _mm256_loadu_ps(x); }
inline void store(u16* to, Vector x, All) { _mm_storeu_si128((__m128i*)to, narrowed(x)); }
inline void store(float* to, Vector x, All) { _mm256_storeu_ps(to, x); }
inline void store(Stream to, Vector x, All) { _mm256_stream_ps(to.at, x); }

inline Vector load(const u16* x, Some some) {
  u16 values[LANES] = {};
  std::memcpy(values, x, some.mask.count * sizeof(u16));
  return load(values, All{});
}
inline Vector load(const float* x, Some some) { return _mm256_maskload_ps(x, some.mask.lanes); }
inline void store(u16* to, Vector x, Some some) {
  u16 values[LANES];
  store(values, x, All{});
  std::memcpy(to, values, some.mask.count * sizeof(u16));
}
inline void store(float* to, Vector x, Some some) { _mm256_maskstore_ps(to, some.mask.lanes, x); }

// Loads or stores the first PART values, 6 or all. It uses no masks, because some CPUs write slowly with masks.
template <i64 PART>
inline Vector load_part(const u16* x) {
  static_assert(PART == 6 || PART == LANES);
  if constexpr (PART == LANES) return load(x, All{});
  int last;
  std::memcpy(&last, x + 4, sizeof last);
  return widened(_mm_insert_epi32(_mm_loadl_epi64((const __m128i*)x), last, 2));
}

template <i64 PART>
inline void store_part(float* to, Vector x) {
  static_assert(PART == 6 || PART == LANES);
  if constexpr (PART == LANES) return store(to, x, All{});
  _mm_storeu_ps(to, _mm256_castps256_ps128(x));
  _mm_storel_pi((__m64*)(to + 4), _mm256_extractf128_ps(x, 1));
}

// Loads 2 * LANES values, or only the first n if n is smaller.
inline Pairs load_pairs(const u16* x, i64 n) {
  if (n >= 2 * LANES) return _mm256_loadu_si256((const __m256i*)x);
  u16 values[2 * LANES] = {};
  std::memcpy(values, x, n * sizeof(u16));
  return _mm256_loadu_si256((const __m256i*)values);
}
inline Pairs no_pairs() { return _mm256_setzero_si256(); }
inline Vector first_of_pairs(Pairs x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
inline Vector second_of_pairs(Pairs x) { return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff0000))); }

// Transposes LANES vectors of LANES 32-bit words.
inline void transpose(Pairs* x) {
  __m256i y[8];
  for (int i = 0; i < 8; i += 2) {
    y[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm256_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm256_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i) {  // now x[4 r + i] has columns i and i + 4 of rows 4 r to 4 r + 3
    y[i] = _mm256_permute2x128_si256(x[i], x[i + 4], 0x20);
    y[i + 4] = _mm256_permute2x128_si256(x[i], x[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) x[i] = y[i];
}

#endif

inline Vector where(All, Vector a, Vector) { return a; }

// Calls body(first, which) for all n values, one vector at a time. The last vector may be incomplete.
template <class Body>
inline void along(i64 n, const Body& body) {
  i64 j = 0;
  for (; j + LANES <= n; j += LANES) body(j, All{});
  if (j < n) body(j, Some{first_of(n - j)});
}

}  // namespace tiles
