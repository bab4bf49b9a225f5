// SwiGLU between two products, p = w silu(g) u with silu(g) = g s and s = 1 / (1 + e^-g), and backward from dp:
//
//     dg = dp w u s (1 + g (1 - s))      du = dp w silu(g)      dw = sum over the row of dp silu(g) u      and p again
//
// g and u are rows of F numbers, ldg and ldu apart: halves of one matrix, or two. w is a number a row, or null for 1. One pass each.
#include "vector.h"

static inline Vector sigmoid(Vector g) { return 1.0f / (1.0f + exp(-g)); }

extern "C" void swiglu(
    int64_t M, int64_t F, const float* gate, int64_t ldg, const float* up, int64_t ldu, const float* weights, float* product, int64_t threads
) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t m = 0; m < M; ++m) {
        const Vector w = all(weights ? weights[m] : 1.0f);
        for (int64_t f = 0; f < F; f += LANES) {
            const int64_t n = std::min<int64_t>(LANES, F - f);
            const Vector g = load(gate + m * ldg + f, n), u = load(up + m * ldu + f, n);
            store(product + m * F + f, g * sigmoid(g) * u * w, n);
        }
    }
}

// d_gate_up [M, 2F]: dg beside du.
extern "C" void swiglu_backward(
    int64_t M, int64_t F, const float* grad, int64_t ldp, const float* gate, int64_t ldg, const float* up, int64_t ldu, const float* weights,
    float* d_gate_up, float* product, float* d_weights, int64_t threads
) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t m = 0; m < M; ++m) {
        const Vector w = all(weights ? weights[m] : 1.0f);
        float* d_gate = d_gate_up + m * 2 * F;
        Vector dw{};
        for (int64_t f = 0; f < F; f += LANES) {
            const int64_t n = std::min<int64_t>(LANES, F - f);
            const Vector d = load(grad + m * ldp + f, n), g = load(gate + m * ldg + f, n), u = load(up + m * ldu + f, n);
            const Vector s = sigmoid(g), silu = g * s, p = silu * u, dp = d * w;
            dw += d * p;
            store(d_gate + f, dp * u * s * (1.0f + g * (1.0f - s)), n);
            store(d_gate + F + f, dp * silu, n);
            store(product + m * F + f, p * w, n);
        }
        if (d_weights) d_weights[m] = sum(dw);
    }
}
