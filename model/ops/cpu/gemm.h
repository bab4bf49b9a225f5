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

// M <= ROWS rows and V <= VECTORS vectors of columns, the last of which is whole, or has n columns. add: to what C holds.
template <int M, int V, bool WHOLE>
static inline __attribute__((always_inline)) void multiply_tile(
    int64_t K, const float* A, int64_t row, int64_t step, const float* B, int64_t ldb, float* C, int64_t ldc, int64_t n, bool add
) {
    Vector c[M][V];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < V; ++j) {
            c[i][j] = Vector{};
            __builtin_prefetch(C + i * ldc + j * LANES, 1);
        }
    for (int64_t k = 0; k < K; ++k) {
        Vector b[V];
        for (int j = 0; j < V; ++j) {
            const float* from = B + k * ldb + j * LANES;
            b[j] = WHOLE || j < V - 1 ? load(from) : load(from, n);
        }
        for (int i = 0; i < M; ++i) {
            const float a = A[i * row + k * step];
            for (int j = 0; j < V; ++j) c[i][j] += a * b[j];
        }
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < V; ++j) {
            float* to = C + i * ldc + j * LANES;
            if (WHOLE || j < V - 1) store(to, add ? load(to) + c[i][j] : c[i][j]);
            else store(to, add ? load(to, n) + c[i][j] : c[i][j], n);
        }
}

template <int M, int V, bool WHOLE>
static void multiply_rows(
    int64_t left, int64_t K, const float* A, int64_t row, int64_t step, const float* B, int64_t ldb, float* C, int64_t ldc, int64_t n, bool add
) {
    if constexpr (M == 0) return;
    else if (left == M) multiply_tile<M, V, WHOLE>(K, A, row, step, B, ldb, C, ldc, n, add);
    else multiply_rows<M - 1, V, WHOLE>(left, K, A, row, step, B, ldb, C, ldc, n, add);
}

// Any M and N.
static inline void multiply(
    int64_t M, int64_t N, int64_t K, const float* A, int64_t row, int64_t step, const float* B, int64_t ldb, float* C, int64_t ldc, bool add
) {
    static_assert(VECTORS == 2, "one vector or two are left");
    for (int64_t n = 0; n < N; n += COLUMNS) {
        const int64_t columns = std::min<int64_t>(COLUMNS, N - n);
        for (int64_t m = 0; m < M; m += ROWS) {
            const int64_t left = std::min<int64_t>(ROWS, M - m);
            const float* a = A + m * row;
            float* c = C + m * ldc + n;
            if (columns == COLUMNS) multiply_rows<ROWS, 2, true>(left, K, a, row, step, B + n, ldb, c, ldc, LANES, add);
            else if (columns > LANES) multiply_rows<ROWS, 2, false>(left, K, a, row, step, B + n, ldb, c, ldc, columns - LANES, add);
            else if (columns == LANES) multiply_rows<ROWS, 1, true>(left, K, a, row, step, B + n, ldb, c, ldc, LANES, add);
            else multiply_rows<ROWS, 1, false>(left, K, a, row, step, B + n, ldb, c, ldc, columns, add);
        }
    }
}
