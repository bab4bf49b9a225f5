// Cross-entropy of a linear head with its gradients: a block of tokens at a time, all three products in one pass.
//
//     z = W h,   p = e^(z - max) / sum,   loss = log sum + max - z[label],   dz = ratio (p - onehot),   dh = dz W,   dW += dz^T h
//
// Logits lie transposed, [vocabulary, tokens]: tokens are the lanes of a vector, so maximum, sum and scaling need no sum over lanes,
// and the products read dz as it lies. A block of the vocabulary passes through the second cache twice:
//
//     1. z = W h, and in place e = e^(z - m) with the block's own maximum m and sum s of every token
//        the blocks' m and s together give each token's loss, and the factor that turns the block's e into p
//     2. dz in place; dW += dz^T h; dh += dz W
//
// An exponential is taken once. Sums over the vocabulary are made in its order, so they do not depend on the number of threads.
#include "gemm.h"

constexpr int64_t WORDS = 128, DEPTH = 256;  // of a block of the vocabulary, and of D in z = W h

static inline int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How logits of a block lie: [V, leading], of which `tokens` are in use, whole vectors. From one word to the next are never whole
// KiB, which would share a few lines of the first cache.
struct Block {
    int64_t tokens, leading;
    explicit Block(int64_t rows) : tokens(ceil_of(rows, COLUMNS) * COLUMNS), leading(tokens + 16) {}
};

// n rows of D as columns, in panels [D, COLUMNS] of tokens; those beyond n are 0.
static void pack_across(int64_t n, int64_t tokens, int64_t D, const float* from, float* to) {
    for (int64_t t = 0; t < tokens; ++t) {
        float* column = to + t / COLUMNS * COLUMNS * D + t % COLUMNS;
        for (int64_t d = 0; d < D; ++d) column[d * COLUMNS] = t < n ? from[t * D + d] : 0.0f;
    }
}

// The same rows in panels [n, COLUMNS] of D; columns beyond D are 0.
static void pack_along(int64_t n, int64_t D, const float* from, float* to) {
    for (int64_t d = 0; d < D; d += COLUMNS)
        for (int64_t t = 0; t < n; ++t, to += COLUMNS)
            for (int64_t c = 0; c < COLUMNS; ++c) to[c] = d + c < D ? from[t * D + d + c] : 0.0f;
}

// Logits [words, tokens] over themselves: e^(z - m). Gives m and the sum s of each token.
static void exponentials(int64_t words, Block size, float* z, float* m, float* s) {
    for (int64_t t = 0; t < size.tokens; t += LANES) {
        Vector peak = load(z + t);
        for (int64_t v = 1; v < words; ++v) peak = larger(load(z + v * size.leading + t), peak);
        Vector total{};
        for (int64_t v = 0; v < words; ++v) {
            const Vector e = exp(load(z + v * size.leading + t) - peak);
            store(z + v * size.leading + t, e);
            total += e;
        }
        store(m + t, peak);
        store(s + t, total);
    }
}

// Floats of scratch memory that `cross_entropy` asks for.
extern "C" int64_t cross_entropy_scratch(int64_t rows, int64_t V, int64_t D) {
    const Block size(rows);
    const int64_t blocks = ceil_of(V, WORDS), columns = ceil_of(D, COLUMNS) * COLUMNS;
    return V * size.leading + size.tokens * (D + columns + 2 * blocks + 1);
}

// `rows` tokens are a block. labels [N]: below 0 where a token has no target. losses [N]. dh [N, D], and dW [V, D], to which is
// added, may be null: without either only losses are made.
extern "C" void cross_entropy(
    int64_t N, int64_t rows, int64_t V, int64_t D, const float* h, const float* W, const int64_t* labels, const float* ratio,
    float* losses, float* dh, float* dW, float* scratch, int64_t threads
) {
    const Block size(rows);
    const int64_t tokens = size.tokens, leading = size.leading;
    const int64_t blocks = ceil_of(V, WORDS), columns = ceil_of(D, COLUMNS) * COLUMNS;
    float* z = scratch;                          // [V, leading]
    float* across = z + V * leading;             // h as panels [D, COLUMNS] of tokens
    float* along = across + tokens * D;          // h as panels [tokens, COLUMNS] of D
    float* m = along + tokens * columns;         // [blocks, tokens], then the factors of e
    float* s = m + blocks * tokens;              // [blocks, tokens]
    float* picked = s + blocks * tokens;         // [tokens] logits of the labels
    const bool wanted = dh || dW;
    for (int64_t first = 0; first < N; first += rows) {
        const int64_t n = std::min(rows, N - first);
        const float* given = h + first * D;
        const int64_t* label = labels + first;
        pack_across(n, tokens, D, given, across);
        if (dW) pack_along(n, D, given, along);
        #pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t v = block * WORDS, words = std::min(WORDS, V - v);
            for (int64_t d = 0; d < D; d += DEPTH)
                for (int64_t t = 0; t < tokens; t += COLUMNS)
                    multiply(words, COLUMNS, std::min(DEPTH, D - d), W + v * D + d, D, 1, across + t * D + d * COLUMNS, COLUMNS,
                             z + v * leading + t, leading, d > 0);
            for (int64_t t = 0; t < n; ++t)
                if (label[t] >= v && label[t] < v + words) picked[t] = z[label[t] * leading + t];
            exponentials(words, size, z + v * leading, m + block * tokens, s + block * tokens);
        }
        for (int64_t t = 0; t < tokens; t += LANES) {
            Vector peak = load(m + t), total{};
            for (int64_t block = 1; block < blocks; ++block) peak = larger(load(m + block * tokens + t), peak);
            for (int64_t block = 0; block < blocks; ++block) {
                const Vector factor = exp(load(m + block * tokens + t) - peak);
                total += factor * load(s + block * tokens + t);
                store(m + block * tokens + t, factor);
            }
            alignas(64) float peaks[LANES], totals[LANES], scale[LANES];
            store(peaks, peak);
            store(totals, total);
            for (int64_t lane = 0; lane < LANES; ++lane) {
                const bool valid = t + lane < n && label[t + lane] >= 0;
                scale[lane] = valid ? *ratio / totals[lane] : 0.0f;
                if (t + lane >= n) continue;
                losses[first + t + lane] = valid ? std::log(totals[lane]) + (peaks[lane] - picked[t + lane]) : 0.0f;
            }
            for (int64_t block = 0; block < blocks; ++block)
                store(m + block * tokens + t, load(m + block * tokens + t) * load(scale));
        }
        if (!wanted) continue;
        for (int64_t group = 0; group < blocks; group += threads) {
            const int64_t end = std::min(blocks, group + threads);
            #pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
            for (int64_t block = group; block < end; ++block) {
                const int64_t v = block * WORDS, words = std::min(WORDS, V - v);
                float* dz = z + v * leading;
                for (int64_t word = 0; word < words; ++word)
                    for (int64_t t = 0; t < tokens; t += LANES)
                        store(dz + word * leading + t, load(dz + word * leading + t) * load(m + block * tokens + t));
                for (int64_t t = 0; t < n; ++t)
                    if (label[t] >= v && label[t] < v + words) z[label[t] * leading + t] -= *ratio;
                if (dW)
                    for (int64_t d = 0; d < D; d += COLUMNS)
                        multiply(words, std::min<int64_t>(COLUMNS, D - d), n, dz, leading, 1, along + d * n, COLUMNS,
                                 dW + v * D + d, D, true);
            }
            if (!dh) continue;
            #pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
            for (int64_t d = 0; d < D; d += COLUMNS)
                for (int64_t block = group; block < end; ++block) {
                    const int64_t v = block * WORDS, words = std::min(WORDS, V - v), width = std::min<int64_t>(COLUMNS, D - d);
                    alignas(64) float panel[WORDS * COLUMNS];
                    for (int64_t word = 0; word < words; ++word)
                        std::memcpy(panel + word * COLUMNS, W + (v + word) * D + d, width * sizeof(float));
                    multiply(n, width, words, z + v * leading, 1, leading, panel, COLUMNS, dh + first * D + d, D, block > 0);
                }
        }
    }
}
