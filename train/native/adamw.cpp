// AdamW of train/optim.py with bf16 moments, in one pass over memory, and the norm before it, for CPUs with AVX-512. Called by
// ctypes.
//
// Every element gets the same arithmetic wherever a shard begins or ends: that of torch's kernel, in fp32, so that moments
// are rounded to the same bf16.

#include <vector>

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

// Of up to PIECE elements, in fp32.
float squares(const float* x, i64 n) {
  __m512 sums[4] = {};
  i64 i = 0;
  for (; i + 64 <= n; i += 64)
    for (int j = 0; j < 4; ++j) {
      const __m512 v = _mm512_loadu_ps(x + i + 16 * j);
      sums[j] = _mm512_fmadd_ps(v, v, sums[j]);
    }
  along(n - i, [&](i64 j, auto which) {
    const __m512 v = load(x + i + j, which);
    sums[0] = _mm512_fmadd_ps(v, v, sums[0]);
  });
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

}  // namespace

extern "C" {

// Pieces are added in fp64 and in their order, so the number of threads changes nothing.
double sum_of_squares(const float* x, i64 n, i64 threads) {
  const i64 pieces = (n + PIECE - 1) / PIECE;
  std::vector<float> sums(pieces);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (i64 piece = 0; piece < pieces; ++piece) sums[piece] = squares(x + piece * PIECE, std::min(PIECE, n - piece * PIECE));
  double sum = 0;
  for (const float one : sums) sum += one;
  return sum;
}

void adamw(float* weight, const float* gradient, u16* mean, u16* square, u16* rounded, i64 n, const Settings* settings,
           i64 threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (i64 i = 0; i < n; i += PIECE)
    along(std::min(PIECE, n - i), [=](i64 j, auto which) {
      update(weight + i + j, gradient + i + j, mean + i + j, square + i + j, rounded ? rounded + i + j : nullptr, *settings, which);
    });
}

}
