// AdamW of train/optim.py with bf16 moments, in one pass over memory, for CPUs with AVX512-BF16. Called by ctypes.
//
// Every element gets the same arithmetic wherever a shard begins or ends: that of torch's kernel, in fp32, so that moments
// are rounded to the same bf16.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace {

using i64 = int64_t;
using u16 = uint16_t;

struct Settings {
  float factor;  // of the gradient
  float lerp, keep_square, add_square;  // mean += lerp (g - mean), square = keep_square square + add_square g^2
  float decay, step, root, eps;
};

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// Elements of some lanes.
inline void update(__mmask16 some, float* weight, const float* gradient, u16* mean, u16* square, const Settings& s) {
  const __m512 g = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, gradient), _mm512_set1_ps(s.factor));
  __m512 m = widen(_mm256_maskz_loadu_epi16(some, mean)), v = widen(_mm256_maskz_loadu_epi16(some, square));
  m = _mm512_fmadd_ps(_mm512_set1_ps(s.lerp), _mm512_sub_ps(g, m), m);
  v = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_set1_ps(s.add_square), g), g, _mm512_mul_ps(v, _mm512_set1_ps(s.keep_square)));
  const __m512 scale = _mm512_add_ps(_mm512_div_ps(_mm512_sqrt_ps(v), _mm512_set1_ps(s.root)), _mm512_set1_ps(s.eps));
  __m512 w = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, weight), _mm512_set1_ps(s.decay));
  w = _mm512_sub_ps(w, _mm512_div_ps(_mm512_mul_ps(m, _mm512_set1_ps(s.step)), scale));
  _mm512_mask_storeu_ps(weight, some, w);
  _mm256_mask_storeu_epi16(mean, some, (__m256i)_mm512_cvtneps_pbh(m));
  _mm256_mask_storeu_epi16(square, some, (__m256i)_mm512_cvtneps_pbh(v));
}

}  // namespace

extern "C" void adamw(float* weight, const float* gradient, u16* mean, u16* square, i64 n, const Settings* settings, i64 threads) {
  const Settings s = *settings;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (i64 i = 0; i < n; i += 16) {
    const __mmask16 some = n - i >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (n - i)) - 1);
    update(some, weight + i, gradient + i, mean + i, square + i, s);
  }
}
