// AdamW of train/optim.py with bf16 moments, in one pass over memory, for CPUs with AVX-512. Called by ctypes.
//
// Every element gets the same arithmetic wherever a shard begins or ends: that of torch's kernel, in fp32, so that moments
// are rounded to the same bf16.

#include "tiles.h"

namespace {

using namespace tiles;

constexpr i64 PIECE = 4096;  // elements that a thread takes at a time

struct Settings {
  float factor;  // of the gradient
  float lerp, keep_square, add_square;  // mean += lerp (g - mean), square = keep_square square + add_square g^2
  float decay, step, root, eps;
};

// Up to 16 elements. rounded: gets the weights as bf16, or is null.
template <class Which>
inline void update(float* weight, const float* gradient, u16* mean, u16* square, u16* rounded, const Settings& s, Which which) {
  const __m512 g = _mm512_mul_ps(load(gradient, which), _mm512_set1_ps(s.factor));
  __m512 m = load(mean, which), v = load(square, which);
  m = _mm512_fmadd_ps(_mm512_set1_ps(s.lerp), _mm512_sub_ps(g, m), m);
  v = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_set1_ps(s.add_square), g), g, _mm512_mul_ps(v, _mm512_set1_ps(s.keep_square)));
  const __m512 scale = _mm512_add_ps(_mm512_div_ps(_mm512_sqrt_ps(v), _mm512_set1_ps(s.root)), _mm512_set1_ps(s.eps));
  const __m512 kept = _mm512_mul_ps(load(weight, which), _mm512_set1_ps(s.decay));
  const __m512 w = _mm512_sub_ps(kept, _mm512_div_ps(_mm512_mul_ps(m, _mm512_set1_ps(s.step)), scale));
  store(weight, w, which);
  if (rounded) store(rounded, w, which);
  store(mean, m, which);
  store(square, v, which);
}

}  // namespace

extern "C" void adamw(float* weight, const float* gradient, u16* mean, u16* square, u16* rounded, i64 n, const Settings* settings,
                      i64 threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (i64 i = 0; i < n; i += PIECE)
    along(std::min(PIECE, n - i), [=](i64 j, auto which) {
      update(weight + i + j, gradient + i + j, mean + i + j, square + i + j, rounded ? rounded + i + j : nullptr, *settings, which);
    });
}
