// Rows of tokens and rows of (token, expert) pairs: row place[n, k] belongs to token n. D numbers a row; weights are one for each pair's
// row, or null for 1. Each pass reads and writes a row once, and sums a token's rows in the order of k.
#include "vector.h"

// tokens[n] = sum over k of weights[place[n, k]] rows[place[n, k]]
extern "C" void sum_rows(
    int64_t N, int64_t K, int64_t D, const float* rows, const int64_t* place, const float* weights, float* tokens, int64_t threads
) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < N; ++n) {
        const int64_t* at = place + n * K;
        for (int64_t d = 0; d < D; d += LANES) {
            const int64_t lanes = std::min<int64_t>(LANES, D - d);
            Vector total{};
            for (int64_t k = 0; k < K; ++k) {
                const Vector row = load(rows + at[k] * D + d, lanes);
                total += weights ? row * weights[at[k]] : row;
            }
            store(tokens + n * D + d, total, lanes);
        }
    }
}

// rows[place[n, k]] = tokens[n]
extern "C" void spread_rows(int64_t N, int64_t K, int64_t D, const float* tokens, int64_t ldt, const int64_t* place, float* rows, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < N; ++n)
        for (int64_t k = 0; k < K; ++k) std::memcpy(rows + place[n * K + k] * D, tokens + n * ldt, D * sizeof(float));
}

// Of the weighted sum_rows: d_rows[m] = weights[m] grad[n], d_weights[m] = rows[m] . grad[n], for each m = place[n, k].
extern "C" void sum_rows_backward(
    int64_t N, int64_t K, int64_t D, const float* grad, int64_t ldg, const float* rows, const int64_t* place, const float* weights,
    float* d_rows, float* d_weights, int64_t threads
) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < N; ++n)
        for (int64_t k = 0; k < K; ++k) {
            const int64_t m = place[n * K + k];
            Vector total{};
            for (int64_t d = 0; d < D; d += LANES) {
                const int64_t lanes = std::min<int64_t>(LANES, D - d);
                const Vector g = load(grad + n * ldg + d, lanes);
                total += g * load(rows + m * D + d, lanes);
                store(d_rows + m * D + d, g * weights[m], lanes);
            }
            d_weights[m] = sum(total);
        }
}
