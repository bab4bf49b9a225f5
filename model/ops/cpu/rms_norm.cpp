// RMSNorm, y = x / rms * weight with rms = sqrt(mean(x^2) + eps), and its gradient: one pass each over the rows, which stay in the
// first cache while they are read a second time. Rows of x may be a part of wider ones.
#include <vector>

#include "vector.h"

constexpr int64_t CHUNK = 64;  // rows whose share in the gradient of weight is summed in one go, whatever the number of threads

// f(at, load, store) for every vector of a row, the last one with as many lanes as are left.
template <class F>
static inline void along(int64_t D, F f) {
    int64_t d = 0;
    for (; d + LANES <= D; d += LANES)
        f(d, [](const float* p) { return load(p); }, [](float* p, Vector v) { store(p, v); });
    if (const int64_t n = D - d)
        f(d, [n](const float* p) { return load(p, n); }, [n](float* p, Vector v) { store(p, v, n); });
}

// x [rows, D] with rows `stride` apart, weight [D] -> y [rows, D], inverse [rows] = 1 / rms.
extern "C" void rms_norm(
    int64_t rows, int64_t D, int64_t stride, float eps, const float* x, const float* weight, float* y, float* inverse, int64_t threads
) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < rows; ++n) {
        const float* row = x + n * stride;
        Vector squares{};
        along(D, [&](int64_t d, auto get, auto) {
            const Vector v = get(row + d);
            squares += v * v;
        });
        const float scale = 1.0f / std::sqrt(sum(squares) / (float)D + eps);
        along(D, [&](int64_t d, auto get, auto put) { put(y + n * D + d, get(row + d) * scale * get(weight + d)); });
        inverse[n] = scale;
    }
}

// grad [rows, D] -> dx [rows, D], d_weight [D]. With n = x / rms and g = grad * weight:  dx = (g - n mean(g n)) / rms.
extern "C" void rms_norm_backward(
    int64_t rows, int64_t D, int64_t stride, const float* x, const float* weight, const float* inverse, const float* grad,
    float* dx, float* d_weight, int64_t threads
) {
    const int64_t chunks = (rows + CHUNK - 1) / CHUNK;
    std::vector<float> shares(chunks * D);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t c = 0; c < chunks; ++c) {
        float* share = &shares[c * D];
        for (int64_t n = c * CHUNK; n < std::min(rows, (c + 1) * CHUNK); ++n) {
            const float *row = x + n * stride, *g = grad + n * D;
            const float scale = inverse[n];
            Vector products{};
            along(D, [&](int64_t d, auto get, auto put) {
                const Vector by_normed = get(g + d) * get(row + d) * scale;
                products += by_normed * get(weight + d);
                put(share + d, get(share + d) + by_normed);
            });
            const float mean = sum(products) / (float)D * scale;
            along(D, [&](int64_t d, auto get, auto put) {
                put(dx + n * D + d, (get(g + d) * get(weight + d) - get(row + d) * mean) * scale);
            });
        }
    }
    std::fill(d_weight, d_weight + D, 0.0f);
    for (int64_t c = 0; c < chunks; ++c)
        for (int64_t d = 0; d < D; ++d) d_weight[d] += shares[c * D + d];
}
