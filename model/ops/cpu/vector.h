// Vectors of the machine's own width, by the vector extensions that GCC and Clang share.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

static inline Vector load(const float* p) { return *(const Unaligned*)p; }
static inline void store(float* p, Vector v) { *(Unaligned*)p = v; }
static inline Vector all(float x) { return Vector{} + x; }

// The first n lanes, 0 < n <= LANES; the others are 0, and are not written.
static inline Vector load(const float* p, int64_t n) {
#if defined(__AVX512F__)
    return (Vector)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    Vector v{};
    std::memcpy(&v, p, n * sizeof(float));
    return v;
#endif
}
static inline void store(float* p, Vector v, int64_t n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    std::memcpy(p, &v, n * sizeof(float));
#endif
}

static inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }
static inline Vector smaller(Vector a, Vector b) { return a < b ? a : b; }
// Every lane's neighbour at that distance, a power of 2: lane i becomes lane i ^ DISTANCE.
template <int DISTANCE> static inline Vector exchange(Vector v) {
    Integers order;
    for (int i = 0; i < LANES; ++i) order[i] = i ^ DISTANCE;
#if defined(__clang__)
    Vector exchanged;
    for (int i = 0; i < LANES; ++i) exchanged[i] = v[order[i]];
    return exchanged;
#else
    return __builtin_shuffle(v, order);
#endif
}
static inline Vector swap_pairs(Vector v) { return exchange<1>(v); }
template <int DISTANCE = LANES / 2> static inline float sum(Vector v) {
    if constexpr (DISTANCE == 0) return v[0];
    else return sum<DISTANCE / 2>(v + exchange<DISTANCE>(v));
}
template <int DISTANCE = LANES / 2> static inline float largest(Vector v) {
    if constexpr (DISTANCE == 0) return v[0];
    else return largest<DISTANCE / 2>(larger(v, exchange<DISTANCE>(v)));
}

// A square of numbers turned over its diagonal: lane j of v[i] becomes lane i of v[j].
static inline void transpose(Vector v[LANES]) {
#if defined(__AVX512F__)
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {  // pairs of rows: numbers 0 0 1 1 of each quarter, then 2 2 3 3
        a[i] = _mm512_unpacklo_ps((__m512)v[i], (__m512)v[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps((__m512)v[i], (__m512)v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)  // b[i + c] has column c of each quarter, of rows i to i + 3
        for (int j = 0; j < 2; ++j) {
            const __m512d x = (__m512d)a[i + j], y = (__m512d)a[i + j + 2];
            b[i + 2 * j] = (__m512)_mm512_unpacklo_pd(x, y);
            b[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(x, y);
        }
    for (int c = 0; c < 4; ++c) {  // quarters are a 4 x 4 of their own
        const __m512 even = _mm512_shuffle_f32x4(b[c], b[c + 4], 0x88), odd = _mm512_shuffle_f32x4(b[c], b[c + 4], 0xdd);
        const __m512 even_below = _mm512_shuffle_f32x4(b[c + 8], b[c + 12], 0x88);
        const __m512 odd_below = _mm512_shuffle_f32x4(b[c + 8], b[c + 12], 0xdd);
        v[c] = (Vector)_mm512_shuffle_f32x4(even, even_below, 0x88);
        v[c + 4] = (Vector)_mm512_shuffle_f32x4(odd, odd_below, 0x88);
        v[c + 8] = (Vector)_mm512_shuffle_f32x4(even, even_below, 0xdd);
        v[c + 12] = (Vector)_mm512_shuffle_f32x4(odd, odd_below, 0xdd);
    }
#else
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < i; ++j) {
            const float kept = v[i][j];
            v[i][j] = v[j][i];
            v[j][i] = kept;
        }
#endif
}

// e^x to 2 units in the last place: x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial in r (coefficients of Cephes' expf).
// Below -87.3 it is 0, above 88.3 infinite; NaN stays NaN.
static inline Vector exp(Vector x) {
    const Vector shift = all(12582912.0f);  // 1.5 * 2^23: what is added and taken away again leaves the nearest integer
    Vector bounded = smaller(larger(x, all(-87.3f)), all(88.3f));
    Vector n = (bounded * 1.44269504088896341f + shift) - shift;
    Vector r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    Vector p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    Integers power = (__builtin_convertvector(n, Integers) + 127) << 23;
    Vector scaled = p * (Vector)power;
    scaled = x < -87.3f ? Vector{} : scaled;
    scaled = x > 88.3f ? all(INFINITY) : scaled;
    return x == x ? scaled : x;
}
