// Rows of tokens and rows of (token, expert) pairs: row place[n, k] belongs to token n. D numbers a row. Each pass reads and writes a row
// once, and sums a token's rows in the order of k.
#include "vector.h"

// tokens[n] = sum over k of rows[place[n, k]]
extern "C" void sum_rows(int64_t N, int64_t K, int64_t D, const float* rows, const int64_t* place, float* tokens, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < N; ++n) {
        const int64_t* at = place + n * K;
        for (int64_t d = 0; d < D; d += LANES) {
            const int64_t lanes = std::min<int64_t>(LANES, D - d);
            Vector total{};
            for (int64_t k = 0; k < K; ++k) total += load(rows + at[k] * D + d, lanes);
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
