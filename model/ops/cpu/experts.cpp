// Products of rows, sorted by expert, with the matrices of their experts:
//
//     multiply_groups          y[m] = x[index[m]] W[e]^T     and by strides the other way, dx[m] = dy[m] W[e]
//     multiply_within_groups   dW[e] = sum of dy[index[m]]^T x[index[m]] over the rows m of e
//
// What lies in the second cache is a block of B, DEPTH x WIDTH, in panels of COLUMNS, and beside it HEIGHT rows of A, gathered there
// by their index. A number is the sum of the same terms in the same order, however many threads there are.
#include <memory>
#include "gemm.h"

constexpr int64_t DEPTH = 256, WIDTH = 512, HEIGHT = 8 * ROWS;
constexpr int64_t PITCH = DEPTH + LANES;  // of rows of A: a power of two apart, they would share lines of the first cache

struct Room {
    float a[HEIGHT * PITCH], b[DEPTH * WIDTH];
};
static Room& room() {  // of this thread, for good: fresh memory costs as much as a tenth of the products
    static thread_local std::unique_ptr<Room> kept(new Room);
    return *kept;
}

// As few blocks as there must be, of equal sizes.
static int64_t block_size(int64_t n, int64_t most) {
    const int64_t blocks = (n + most - 1) / most;
    return (n + blocks - 1) / blocks;
}

// Rows x[index[k]], N numbers of each, cut into strips of `width`: [N / width][K][width], with zeros beyond N.
template <int64_t width>
static void pack_rows(int64_t K, int64_t N, const float* x, int64_t ldx, const int64_t* index, float* strips) {
    for (int64_t k = 0; k < K; ++k) {
        const float* row = x + (index ? index[k] : k) * ldx;
        float* to = strips + k * width;
        int64_t n = 0;
        for (; n + width <= N; n += width, to += K * width) std::memcpy(to, row + n, width * sizeof(float));
        if (n < N) {
            std::memset(to, 0, width * sizeof(float));
            std::memcpy(to, row + n, (N - n) * sizeof(float));
        }
    }
}

// Panels [N / COLUMNS][K][COLUMNS] of a matrix whose element (k, n) is w[k + n * ldw], with zeros beyond N.
static void pack_transposed(int64_t K, int64_t N, const float* w, int64_t ldw, float* panels) {
    for (int64_t n = 0; n < N; n += LANES) {
        const int64_t lanes = std::min<int64_t>(LANES, N - n);
        float* to = panels + n / COLUMNS * K * COLUMNS + n % COLUMNS;
        for (int64_t k = 0; k < K; k += LANES) {
            const int64_t rows = std::min<int64_t>(LANES, K - k);
            Vector v[LANES];
            for (int i = 0; i < LANES; ++i) v[i] = i < lanes ? load(w + (n + i) * ldw + k, rows) : Vector{};
            transpose(v);
            for (int i = 0; i < rows; ++i) store(to + (k + i) * COLUMNS, v[i]);
        }
    }
}

// Rows that will be read soon, fetched into the second cache a few at a time, while products run.
struct Ahead {
    const float* x;
    int64_t ldx;
    const int64_t* index;
    int64_t rows, numbers;  // of each row
    void fetch(int64_t part, int64_t parts) const {
        for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i) {
            const float* row = x + (index ? index[i] : i) * ldx;
            for (int64_t j = 0; j < numbers; j += 16) __builtin_prefetch(row + j, 0, 2);
        }
    }
};

// C [M, N] (+)= A B of what lies in the second cache. A: element (m, k) of the tile m / ROWS is a[tile * tile_step + m % ROWS * row + k * step].
static void multiply_blocks(
    int64_t M, int64_t N, int64_t K, const float* a, int64_t tile_step, int64_t row, int64_t step, const float* panels, float* c, int64_t ldc, bool add,
    std::initializer_list<Ahead> next
) {
    const int64_t tiles = (M + ROWS - 1) / ROWS, all = (N + COLUMNS - 1) / COLUMNS * tiles;
    for (int64_t n = 0; n < N; n += COLUMNS)
        for (int64_t m = 0; m < M; m += ROWS) {
            for (const Ahead& rows : next) rows.fetch(n / COLUMNS * tiles + m / ROWS, all);
            multiply(
                std::min<int64_t>(ROWS, M - m), std::min<int64_t>(COLUMNS, N - n), K, a + m / ROWS * tile_step, row, step,
                panels + n * K, COLUMNS, c + m * ldc + n, ldc, add
            );
        }
}

// Rows `low` to `high`, of one expert.
static void multiply_group(
    int64_t low, int64_t high, int64_t last, int64_t N, int64_t K, const float* x, int64_t ldx, const int64_t* index,
    const float* w, int64_t w_row, int64_t w_column, const float* next_w, float* y
) {
    Room& here = room();
    const int64_t depth = block_size(K, DEPTH), width = block_size(N, WIDTH);
    for (int64_t n = 0; n < N; n += width)
        for (int64_t k = 0; k < K; k += depth) {
            const int64_t columns = std::min(width, N - n), terms = std::min(depth, K - k);
            const float* block = w + n * w_row + k * w_column;
            if (w_column == 1) pack_transposed(terms, columns, block, w_row, here.b);
            else pack_rows<COLUMNS>(terms, columns, block, w_column, nullptr, here.b);
            for (int64_t m = low; m < high; m += HEIGHT) {
                const int64_t rows = std::min(HEIGHT, high - m);
                for (int64_t i = 0; i < rows; ++i)
                    std::memcpy(here.a + i * PITCH, x + (index ? index[m + i] : m + i) * ldx + k, terms * sizeof(float));
                const int64_t begin = m + rows, then = std::min(HEIGHT, last - begin);
                const Ahead next{index ? x : x + begin * ldx, ldx, index ? index + begin : nullptr, std::max<int64_t>(then, 0), K};
                const int64_t lines = next_w ? (N * K) / 16 : 0, b0 = lines * (m - low) / (high - low), b1 = lines * (m + rows - low) / (high - low);
                const Ahead weights{next_w + b0 * 16, 16, nullptr, b1 - b0, 1};
                multiply_blocks(rows, columns, terms, here.a, ROWS * PITCH, PITCH, 1, here.b, y + m * N + n, N, k > 0, {next, weights});
            }
        }
}

// Columns `left` to `right` of one expert's dW [O, I], from its `count` rows.
static void multiply_within_group(
    int64_t count, int64_t after, int64_t O, int64_t I, int64_t left, int64_t right, const float* dy, int64_t ldy, const int64_t* y_index,
    const float* x, int64_t ldx, const int64_t* x_index, float* dw
) {
    Room& here = room();
    const bool packs = y_index || ldy >= 512;
    if (count == 0)
        for (int64_t o = 0; o < O; ++o) std::memset(dw + o * I + left, 0, (right - left) * sizeof(float));
    const int64_t depth = count ? block_size(count, DEPTH) : 1, width = block_size(right - left, WIDTH);
    for (int64_t i = left; i < right; i += width)
        for (int64_t k = 0; k < count; k += depth) {
            const int64_t columns = std::min(width, right - i), terms = std::min(depth, count - k);
            const float* x_rows = x_index ? x + i : x + k * ldx + i;
            const float* y_rows = y_index ? dy : dy + k * ldy;
            pack_rows<COLUMNS>(terms, columns, x_rows, ldx, x_index ? x_index + k : nullptr, here.b);
            for (int64_t o = 0; o < O; o += HEIGHT) {
                const int64_t rows = std::min(HEIGHT, O - o);
                const int64_t then = std::min(terms, after - k - terms), p0 = then * o / O, p1 = then * (o + rows) / O;
                const Ahead a_next{y_index ? dy : dy + (k + terms + p0) * ldy, ldy, y_index ? y_index + k + terms + p0 : nullptr, p1 - p0, O};
                const Ahead b_next{x_index ? x + i : x + (k + terms + p0) * ldx + i, ldx, x_index ? x_index + k + terms + p0 : nullptr, p1 - p0, columns};
                const float* a = y_rows + o;
                if (packs) pack_rows<ROWS>(terms, rows, a, ldy, y_index ? y_index + k : nullptr, here.a), a = here.a;
                multiply_blocks(rows, columns, terms, a, packs ? ROWS * terms : ROWS, 1, packs ? ROWS : ldy, here.b, dw + o * I + i, I, k > 0, {a_next, b_next});
            }
        }
}

// x [., K], rows ldx apart; W[e] at w + e * w_expert, element (n, k) at n * w_row + k * w_column, one of both 1; y [M, N].
extern "C" void multiply_groups(
    int64_t E, int64_t M, int64_t N, int64_t K, const float* x, int64_t ldx, const int64_t* index,
    const float* w, int64_t w_expert, int64_t w_row, int64_t w_column, const int64_t* counts, float* y, int64_t threads
) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < threads; ++t) {
        const int64_t first = M * t / threads, last = M * (t + 1) / threads;
        int64_t begin = 0;
        for (int64_t e = 0; e < E; begin += counts[e++]) {
            const int64_t low = std::max(first, begin), high = std::min(last, begin + counts[e]);
            if (low < high) multiply_group(low, high, last, N, K, x, ldx, index, w + e * w_expert, w_row, w_column, e + 1 < E ? w + (e + 1) * w_expert : nullptr, y);
        }
    }
}

// dy [., O], x [., I], rows ldy and ldx apart, each with or without an index; dw [E, O, I].
extern "C" void multiply_within_groups(
    int64_t E, int64_t O, int64_t I, const float* dy, int64_t ldy, const int64_t* y_index, const float* x, int64_t ldx,
    const int64_t* x_index, const int64_t* counts, float* dw, int64_t threads
) {
    const int64_t panels = (I + COLUMNS - 1) / COLUMNS, parts = std::min(threads, panels);
    std::unique_ptr<int64_t[]> begin(new int64_t[E + 1]());
    for (int64_t e = 0; e < E; ++e) begin[e + 1] = begin[e] + counts[e];
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < E * parts; ++item) {
        const int64_t e = item / parts, part = item % parts, first = begin[e];
        const int64_t left = panels * part / parts * COLUMNS, right = std::min(I, panels * (part + 1) / parts * COLUMNS);
        multiply_within_group(
            counts[e], begin[E] - begin[e], O, I, left, right, y_index ? dy : dy + first * ldy, ldy, y_index ? y_index + first : nullptr,
            x_index ? x : x + first * ldx, ldx, x_index ? x_index + first : nullptr, dw + e * O * I
        );
    }
}
