// Matrix products of what lies in a cache: C [M, N] (+)= A [M, K] B [K, N].
//
// The inner loop keeps ROWS x COLUMNS sums in registers. It reads A one number at a time, so A may lie in any order: element (m, k) is
// A[m * row + k * step]. Rows of B and C are contiguous. A caller keeps K x COLUMNS numbers of B in the first cache (K about 256), and
// blocks its loops so that A and C stay in the second.
#pragma once
#include "vector.h"

#if defined(__AVX512F__)
constexpr int ROWS = 12, VECTORS = 2;
#elif defined(__AVX__)
constexpr int ROWS = 6, VECTORS = 2;
#else
constexpr int ROWS = 8, VECTORS = 2;
#endif
constexpr int COLUMNS = VECTORS * LANES;

// M <= ROWS rows and `columns` <= COLUMNS columns. add: to what C holds.
template <int M, bool FULL>
static inline __attribute__((always_inline)) void multiply_tile(
    int64_t K, const float* A, int64_t row, int64_t step, const float* B, int64_t ldb, float* C, int64_t ldc, int64_t columns, bool add
) {
    int64_t lanes[VECTORS];
    for (int j = 0; j < VECTORS; ++j) lanes[j] = std::clamp<int64_t>(columns - j * LANES, 0, LANES);
    Vector c[M][VECTORS];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < VECTORS; ++j) c[i][j] = Vector{};
    for (int i = 0; i < M; ++i) {
        __builtin_prefetch(C + i * ldc, 1);
        __builtin_prefetch(C + i * ldc + LANES, 1);
    }
    for (int64_t k = 0; k < K; ++k) {
        Vector b[VECTORS];
        for (int j = 0; j < VECTORS; ++j) {
            const float* from = B + k * ldb + j * LANES;
            b[j] = FULL ? load(from) : lanes[j] ? load(from, lanes[j]) : Vector{};
        }
        for (int i = 0; i < M; ++i) {
            const float a = A[i * row + k * step];
            for (int j = 0; j < VECTORS; ++j) c[i][j] += a * b[j];
        }
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < VECTORS; ++j) {
            float* to = C + i * ldc + j * LANES;
            if (FULL) store(to, add ? load(to) + c[i][j] : c[i][j]);
            else if (lanes[j]) store(to, add ? load(to, lanes[j]) + c[i][j] : c[i][j], lanes[j]);
        }
}

template <int M, bool FULL>
static void multiply_rows(
    int64_t left, int64_t K, const float* A, int64_t row, int64_t step, const float* B, int64_t ldb, float* C, int64_t ldc, int64_t columns, bool add
) {
    if constexpr (M == 0) return;
    else if (left == M) multiply_tile<M, FULL>(K, A, row, step, B, ldb, C, ldc, columns, add);
    else multiply_rows<M - 1, FULL>(left, K, A, row, step, B, ldb, C, ldc, columns, add);
}

// Any M and N.
static inline void multiply(
    int64_t M, int64_t N, int64_t K, const float* A, int64_t row, int64_t step, const float* B, int64_t ldb, float* C, int64_t ldc, bool add
) {
    for (int64_t n = 0; n < N; n += COLUMNS) {
        const int64_t columns = std::min<int64_t>(COLUMNS, N - n);
        for (int64_t m = 0; m < M; m += ROWS) {
            const int64_t left = std::min<int64_t>(ROWS, M - m);
            if (columns == COLUMNS) multiply_rows<ROWS, true>(left, K, A + m * row, row, step, B + n, ldb, C + m * ldc + n, ldc, columns, add);
            else multiply_rows<ROWS, false>(left, K, A + m * row, row, step, B + n, ldb, C + m * ldc + n, ldc, columns, add);
        }
    }
}
