// Casts to formats smaller than bf16 on a CPU, in one pass over memory. train/kernels/fp8/quantize.py defines the
// casts. Python calls the functions with ctypes.
//
// A matrix is processed in strips. If several rows share scales, a strip has at least these rows. With 1x128 tiles,
// each row is read once. With blocks of 128 rows, each row is read twice, the second time from the cache. The code
// widens a few rows at a time to fp32, in a buffer that fits the L1 cache. All arithmetic is fp32 with IEEE rounding,
// as in the reference, so every bit agrees with the reference (except the sign of zeros). The loops are simple, so the
// compiler vectorises them. The compiler must not fuse a multiplication and an addition.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using i32 = int32_t;
using i64 = int64_t;

inline i32 bits(float x) { i32 b; std::memcpy(&b, &x, 4); return b; }
inline float number(i32 b) { float x; std::memcpy(&x, &b, 4); return x; }
inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// A format with a sign bit, exponent bits and `mantissa` bits. Exponent field 0 means values below the smallest normal
// value, which have a fixed step.
struct Format {
  i32 mantissa, min_exponent, width;  // width: number of bits of a code, 8 or 12
  float max;

  i32 bias() const { return 1 - min_exponent; }
  i32 sign() const { return 1 << (width - 1); }
  float step() const { return number((127 + min_exponent - mantissa) << 23); }
};

// Matrices in row-major memory. They have values, or codes and scales; a pointer is null if its part is absent. If
// there are values and scales, the values are not yet multiplied by the scales.
struct Matrices {
  void* values;
  i64 fp32;         // whether values are fp32; else they are bf16
  uint8_t* codes;   // codes of one byte
  uint8_t* packed;  // codes of twelve bits; two codes have three bytes
  float* scale;
  i64 block_rows, block_columns;
  Format format;
};

inline i64 packed_bytes(i64 columns) { return 3 * ceil_div(columns, 2); }

// ---- between memory and fp32

void widen(const uint16_t* from, float* to, i64 n) {
  for (i64 j = 0; j < n; ++j) to[j] = number(i32(from[j]) << 16);
}

void narrow(const float* from, uint16_t* to, i64 n) {
  for (i64 j = 0; j < n; ++j) {
    const uint32_t b = uint32_t(bits(from[j]));
    const uint32_t nearest = (b + 0x7FFF + ((b >> 16) & 1)) >> 16;  // ties to even
    to[j] = uint16_t(from[j] != from[j] ? 0x7FC0 : nearest);
  }
}

template <class Code>
void decode(const Code* codes, float* to, i64 n, const Format& f, float scale) {
  const i32 mantissa = f.mantissa, bias = f.bias(), sign = f.sign();
  const i32 largest = (bits(f.max) >> (23 - mantissa)) - ((127 - bias) << mantissa);
  const float step = f.step();
  for (i64 j = 0; j < n; ++j) {
    const i32 magnitude = codes[j] & (sign - 1);
    float value = number((magnitude << (23 - mantissa)) + ((127 - bias) << 23));
    value = magnitude >> mantissa ? value : float(magnitude) * step;
    value = magnitude > largest ? number(0x7FC00000) : value;
    to[j] = (codes[j] & sign ? -value : value) * scale;
  }
}

// Encodes values that the format represents exactly.
template <class Code>
void encode(const float* from, Code* codes, i64 n, const Format& f) {
  const i32 mantissa = f.mantissa, bias = f.bias(), sign = f.sign();
  const float smallest = number((127 + f.min_exponent) << 23), inverse_step = 1 / f.step();
  for (i64 j = 0; j < n; ++j) {
    const float magnitude = number(bits(from[j]) & 0x7FFFFFFF);
    const i32 normal = (bits(magnitude) >> (23 - mantissa)) - ((127 - bias) << mantissa);
    i32 code = magnitude < smallest ? i32(magnitude * inverse_step) : normal;
    code = from[j] != from[j] ? sign - 1 : code;
    codes[j] = Code(bits(from[j]) < 0 ? code | sign : code);
  }
}

// Two codes of 12 bits are stored in three bytes, with the first code in the low bits.
void unpack(const uint8_t* from, uint16_t* to, i64 pairs) {
  for (i64 j = 0; j < pairs; ++j) {
    const i32 first = from[3 * j], middle = from[3 * j + 1], last = from[3 * j + 2];
    to[2 * j] = uint16_t(first | (middle & 15) << 8);
    to[2 * j + 1] = uint16_t(middle >> 4 | last << 4);
  }
}

void pack(const uint16_t* from, uint8_t* to, i64 pairs) {
  for (i64 j = 0; j < pairs; ++j) {
    const i32 first = from[2 * j], second = from[2 * j + 1];
    to[3 * j] = uint8_t(first);
    to[3 * j + 1] = uint8_t(first >> 8 | (second & 15) << 4);
    to[3 * j + 2] = uint8_t(second >> 4);
  }
}

// ---- scales and rounding

void scales(const i32* amax, float* scale, float* inverse, i64 n, float max, float floor, bool pow2) {
  for (i64 k = 0; k < n; ++k) {
    float a = number(amax[k]);
    a = a < floor ? floor : a;
    float s = a / max, inv = max / a;
    if (pow2) {
      s = s == s ? number((bits(s) + 0x7FFFFF) & 0x7F800000) : s;
      inv = 1 / s;
    }
    scale[k] = s;
    inverse[k] = inv;
  }
}

// Rounds to the nearest value of the format. A step is the distance between two neighbouring values. After the addition
// of 1.5 * 2**23 steps, an fp32 has no bits for fractions of a step, so the addition rounds. The subtraction is exact.
struct Grid {
  i32 smallest, half;
  explicit Grid(const Format& f)
      : smallest((127 + f.min_exponent) << 23), half(((23 - f.mantissa) << 23) + 0x400000) {}
  float nearest(float x) const {
    const float shift = number(std::max(bits(x) & 0x7F800000, smallest) + half);
    return (x + shift) - shift;
  }
};

struct Cast {
  Matrices in, out;
  i64 rows, columns;
  float floor;
  bool pow2;

  i64 across() const { return ceil_div(columns, out.block_columns); }
  i64 down() const { return ceil_div(rows, out.block_rows); }
  i64 rows_at_a_time() const { return std::max<i64>(1, 4096 / std::max<i64>(columns, 1)); }

  void read(i64 matrix, i64 row, i64 count, float* x, uint16_t* wide) const {
    const i64 index = matrix * rows + row;
    if (in.values) {
      if (in.fp32) std::memcpy(x, (const float*)in.values + index * columns, count * columns * 4);
      else widen((const uint16_t*)in.values + index * columns, x, count * columns);
      if (!in.scale) return;
    }
    const i64 scales = ceil_div(columns, in.block_columns);
    const i64 side = in.scale ? in.block_columns : columns;  // without scales, a row is one block
    for (i64 i = 0; i < count; ++i) {
      const i64 first = (matrix * ceil_div(rows, in.block_rows) + (row + i) / in.block_rows) * scales;
      if (in.packed) unpack(in.packed + (index + i) * packed_bytes(columns), wide, ceil_div(columns, 2));
      for (i64 k = 0, j = 0; j < columns; ++k, j += side) {
        const i64 n = std::min(side, columns - j);
        const float factor = in.scale ? in.scale[first + k] : 1;
        float* to = x + i * columns + j;
        if (in.values) for (i64 l = 0; l < n; ++l) to[l] *= factor;
        else if (in.codes) decode(in.codes + (index + i) * columns + j, to, n, in.format, factor);
        else decode(wide + j, to, n, in.format, factor);
      }
    }
  }

  void write_values(i64 matrix, i64 row, i64 count, const float* x) const {
    const i64 first = (matrix * rows + row) * columns, n = count * columns;
    if (out.fp32) std::memcpy((float*)out.values + first, x, n * 4);
    else narrow(x, (uint16_t*)out.values + first, n);
  }

  void write_codes(i64 matrix, i64 row, i64 count, const float* x, uint16_t* wide) const {
    const i64 index = matrix * rows + row;
    if (out.codes) return encode(x, out.codes + index * columns, count * columns, out.format);
    for (i64 i = 0; i < count; ++i) {
      encode(x + i * columns, wide, columns, out.format);
      wide[columns] = 0;  // second code of the last pair if the number of columns is odd
      pack(wide, out.packed + (index + i) * packed_bytes(columns), ceil_div(columns, 2));
    }
  }

  // Calls a function for each row and each block. If a block has one column: calls column(index in x, index in amax or
  // scale) for each row. Else: calls block(first index in x, end index, index in amax or scale) for each block of a
  // row.
  template <class Column, class Block>
  void each(i64 count, const Column& column, const Block& block) const {
    for (i64 i = 0; i < count; ++i) {
      const i64 first = i * columns, scales = out.block_rows == 1 ? i * across() : 0;
      if (out.block_columns == 1) { column(first, scales); continue; }
      for (i64 k = 0, j = 0; j < columns; ++k, j += out.block_columns)
        block(first + j, first + std::min(columns, j + out.block_columns), scales + k);
    }
  }

  // Updates the max-abs of each block, stored as the bits of a float. Bits of positive floats have the same order as
  // the floats, and NaN comes last.
  void raise(const float* x, i32* amax, i64 count) const {
    each(count,
         [=, n = columns](i64 x0, i64 k0) {
           for (i64 j = 0; j < n; ++j) amax[k0 + j] = std::max(amax[k0 + j], bits(x[x0 + j]) & 0x7FFFFFFF);
         },
         [=](i64 begin, i64 end, i64 k) {
           i32 most = amax[k];
           for (i64 j = begin; j < end; ++j) most = std::max(most, bits(x[j]) & 0x7FFFFFFF);
           amax[k] = most;
         });
  }

  // Replaces x by the values of the codes: x times inverse, rounded to the format.
  void round(float* x, const float* inverse, i64 count) const {
    const Grid grid(out.format);
    each(count,
         [=, n = columns](i64 x0, i64 k0) {
           for (i64 j = 0; j < n; ++j) x[x0 + j] = grid.nearest(x[x0 + j] * inverse[k0 + j]);
         },
         [=](i64 begin, i64 end, i64 k) {
           const float factor = inverse[k];
           for (i64 j = begin; j < end; ++j) x[j] = grid.nearest(x[j] * factor);
         });
  }

  void multiply(float* x, const float* scale, i64 count) const {
    each(count,
         [=, n = columns](i64 x0, i64 k0) {
           for (i64 j = 0; j < n; ++j) x[x0 + j] *= scale[k0 + j];
         },
         [=](i64 begin, i64 end, i64 k) {
           const float factor = scale[k];
           for (i64 j = begin; j < end; ++j) x[j] *= factor;
         });
  }

  // Casts the rows from `first` to `last` of a matrix. These rows share their scales, or each row has its own scales.
  void strip(i64 matrix, i64 first, i64 last, float* x, i32* amax, float* scale, float* inverse, uint16_t* wide) const {
    const bool own = out.block_rows == 1;
    const i64 step = rows_at_a_time(), blocks = across() * (own ? last - first : 1);
    std::fill(amax, amax + blocks, 0);
    for (i64 row = first; row < last; row += step) {
      const i64 count = std::min(step, last - row);
      read(matrix, row, count, x, wide);
      raise(x, amax, count);
    }
    scales(amax, scale, inverse, blocks, out.format.max, floor, pow2);
    if (out.scale) std::copy(scale, scale + blocks, out.scale + (matrix * down() + first / out.block_rows) * across());
    for (i64 row = first; row < last; row += step) {
      const i64 count = std::min(step, last - row);
      if (!own) read(matrix, row, count, x, wide);
      round(x, inverse, count);
      if (out.codes || out.packed) write_codes(matrix, row, count, x, wide);
      if (!out.values) continue;
      if (!out.scale) multiply(x, scale, count);
      write_values(matrix, row, count, x);
    }
  }
};

}  // namespace

extern "C" {

// Casts matrices of one size to a format. The result is codes and scales, or values, or scales and values that are not
// yet multiplied by the scales.
void cast_matrices(const Matrices* in, const Matrices* out, i64 matrices, i64 rows, i64 columns, float floor, i32 pow2,
                   i32 threads) {
  const Cast cast{*in, *out, rows, columns, floor, bool(pow2)};
  const i64 height = out->block_rows == 1 ? cast.rows_at_a_time() : out->block_rows;
  const i64 strips = ceil_div(rows, height), blocks = cast.across() * cast.rows_at_a_time();
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> x(columns * cast.rows_at_a_time()), scale(blocks), inverse(blocks);
    std::vector<i32> amax(blocks);
    std::vector<uint16_t> wide(columns + 2);
#pragma omp for
    for (i64 work = 0; work < matrices * strips; ++work) {
      const i64 first = work % strips * height;
      cast.strip(work / strips, first, std::min(rows, first + height), x.data(), amax.data(), scale.data(),
                 inverse.data(), wide.data());
    }
  }
}

// Computes the values of codes and scales, or of values and scales.
void decode_matrices(const Matrices* in, const Matrices* out, i64 matrices, i64 rows, i64 columns, i32 threads) {
  const Cast cast{*in, *out, rows, columns, 0, false};
  const i64 height = cast.rows_at_a_time(), strips = ceil_div(rows, height);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> x(columns * height);
    std::vector<uint16_t> wide(columns + 2);
#pragma omp for
    for (i64 work = 0; work < matrices * strips; ++work) {
      const i64 first = work % strips * height, count = std::min(height, rows - first);
      cast.read(work / strips, first, count, x.data(), wide.data());
      cast.write_values(work / strips, first, count, x.data());
    }
  }
}

}
