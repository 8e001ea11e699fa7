// Vectors of float32 as wide as the machine has them, and the functions that attention needs.
//
// Written with GCC's vector extensions, so that +, *, < and ?: work on any target; intrinsics
// replace them only where the extensions have no spelling for a single instruction.
#ifndef JAX_ATTN_VECTORS_H_
#define JAX_ATTN_VECTORS_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace jax_attn {

// kLanes floats in a vector; kWide vectors across a micro-kernel's tile, kHigh rows: kWide * kHigh
// accumulators, kWide operands and one broadcast fill the registers (32, or 16 with AVX2).
#if defined(__AVX512F__)
constexpr int kLanes = 16, kWide = 4, kHigh = 6;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kLanes = 8, kWide = 2, kHigh = 6;
#else
constexpr int kLanes = 4, kWide = 4, kHigh = 6;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline IntVec load(const int32_t* p) {
  IntVec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }

inline Vec broadcast(float x) { return x - Vec{}; }  // x - 0 is x for every x, -0 included

inline IntVec bits(Vec x) { return reinterpret_cast<IntVec>(x); }

inline Vec as_floats(IntVec x) { return reinterpret_cast<Vec>(x); }

// a * b + c with one rounding. The generic form relies on -ffp-contract=fast.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__) && defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// The larger one; NaN in b wins.
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);  // unmasked, GCC 12 warns of its own header
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Vec min(Vec a, Vec b) { return a < b ? a : b; }  // NaN in b wins

// 2^(f + n) for |f| <= 1/2 and whole n: a polynomial times a power of 2. Infinite n gives 0 or inf,
// NaN gives NaN; without AVX-512, results below 2^-126 are 0.
inline Vec exp2(Vec f, Vec n) {
  // Minimax on [-1/2, 1/2], relative error 2e-9.
  Vec p = fma(f, broadcast(1.5353362e-4f), broadcast(1.3398874e-3f));
  p = fma(p, f, broadcast(9.6184373e-3f));
  p = fma(p, f, broadcast(5.5503324e-2f));
  p = fma(p, f, broadcast(2.4022648e-1f));
  p = fma(p, f, broadcast(6.9314718e-1f));
  p = fma(p, f, broadcast(1.0f));
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(0xffff, p, n);
#else
  // n + 127 are the exponent's bits; 128 would be infinity, so that 2^n is made of two factors.
  Vec low = broadcast(-126.0f), kept = min(broadcast(128.0f), max(low, n));
  IntVec half = __builtin_convertvector(kept * 0.5f, IntVec);
  IntVec rest = __builtin_convertvector(kept, IntVec) - half;
  p *= as_floats((half + 127) << 23) * as_floats((rest + 127) << 23);
  return n < low ? Vec{} : p;
#endif
}

// The nearest whole number; without AVX-512, beyond 2^22 some large number of the same sign.
inline Vec round(Vec x) {
#if defined(__AVX512F__)
  return _mm512_maskz_roundscale_ps(0xffff, x, 0);
#else
  Vec limit = broadcast(4194304.0f);
  return (min(limit, max(-limit, x)) + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: no bit is left
#endif
}

// 2^x to about 1 ulp for every x.
inline Vec exp2(Vec x) {
#if defined(__AVX512DQ__)
  Vec f = _mm512_maskz_reduce_ps(0xffff, x, 0);  // x - round(x), and 0 for infinite x
  return exp2(f, x - f);
#else
  Vec kept = min(broadcast(128.0f), max(broadcast(-127.0f), x)), n = round(kept);
  return exp2(kept - n, n);
#endif
}

// 2^(a b - n) for whole n, without the rounding of a b and of the difference.
inline Vec exp2_product(Vec a, Vec b, Vec n) {
  Vec whole = round(a * b);
  return exp2(fma(a, b, -whole), whole - n);
}

// tanh to a few ulp, by the odd rational function of degree 13 / 6 that Eigen and XLA use.
inline Vec tanh(Vec x) {
  Vec limit = broadcast(7.90531110763549805f);
  Vec y = min(limit, max(-limit, x));
  Vec y2 = y * y;
  Vec p = broadcast(-2.76076847742355e-16f);
  for (float a : {2.00018790482477e-13f, -8.60467152213735e-11f, 5.12229709037114e-08f,
                  1.48572235717979e-05f, 6.37261928875436e-04f, 4.89352455891786e-03f}) {
    p = fma(p, y2, broadcast(a));
  }
  Vec q = broadcast(1.19825839466702e-06f);
  for (float b : {1.18534705686654e-04f, 2.26843463243900e-03f, 4.89352518554385e-03f}) {
    q = fma(q, y2, broadcast(b));
  }
  Vec small = y < 0.0f ? -y : y;
  return small < 4e-4f ? y : y * p / q;
}

// Transpose kLanes rows of kLanes floats: swap the off-diagonal quarters, then inside each quarter.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Vec x[kLanes];
  for (int i = 0; i < kLanes; i++) x[i] = load(from + i * from_stride);
#pragma GCC unroll 4
  for (int d = kLanes / 2; d > 0; d /= 2) {
    IntVec upper, lower;
    for (int i = 0; i < kLanes; i++) {
      upper[i] = i & d ? kLanes + i - d : i;
      lower[i] = i & d ? kLanes + i : i + d;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) {
      if (i & d) continue;
      Vec a = x[i], b = x[i + d];
      x[i] = __builtin_shuffle(a, b, upper);
      x[i + d] = __builtin_shuffle(a, b, lower);
    }
  }
  for (int i = 0; i < kLanes; i++) store(to + i * to_stride, x[i]);
}

// bfloat16, the upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) {
  uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &wide, sizeof y);
  return y;
}

inline void from_float(float x, float* y) { *y = x; }

// Round to nearest, ties to even; NaN stays NaN.
inline void from_float(float x, BFloat16* y) {
  uint32_t wide;
  std::memcpy(&wide, &x, sizeof wide);
  uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  y->bits = static_cast<uint16_t>((wide & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

}  // namespace jax_attn

#endif  // JAX_ATTN_VECTORS_H_
