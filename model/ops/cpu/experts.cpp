// Products of rows, sorted by expert, with the matrices of their experts:
//
//     multiply_groups          y[m] = x[index[m]] W[e]^T     and by strides the other way, dx[m] = dy[m] W[e]
//     multiply_within_groups   dW[e] = sum of dy[index[m]]^T x[index[m]] over the rows m of e
//
// What lies in the second cache is a block of B, DEPTH x WIDTH, in panels of COLUMNS, and beside it HEIGHT rows of A. Rows are taken by
// their index when they are brought there. While one block is multiplied, the rows and matrices that follow are fetched from memory.
// A number is the sum of the same terms in the same order, however many threads there are.
#include <memory>
#include "gemm.h"

constexpr int64_t DEPTH = 256, WIDTH = 512, HEIGHT = 8 * ROWS;
constexpr int64_t PITCH = DEPTH + LANES;  // of rows of A: a power of two apart, they would share lines of the first cache
constexpr int64_t LINE = 16;              // numbers of a line of the caches
constexpr int64_t NEAR = 512;             // rows of dy so far apart or more are packed before they are read downwards

struct Room {
    float a[HEIGHT * PITCH], b[DEPTH * WIDTH];
};
static Room& room() {  // of this thread, for good: fresh memory costs as much as a tenth of the products
    static thread_local std::unique_ptr<Room> kept(new Room);
    return *kept;
}

// Rows that lie `apart`, all of them or those of an index.
struct Rows {
    const float* first;
    int64_t apart;
    const int64_t* index;

    const float* operator[](int64_t i) const { return first + (index ? index[i] : i) * apart; }
    Rows from(int64_t row, int64_t column) const {
        return {first + column + (index ? 0 : row * apart), apart, index ? index + row : nullptr};
    }
};

// Rows of `numbers` that will be read soon.
struct Ahead {
    Rows rows;
    int64_t count, numbers;

    void fetch(int64_t part, int64_t parts) const {  // a part of them, into the second cache
        for (int64_t i = count * part / parts; i < count * (part + 1) / parts; ++i)
            for (int64_t j = 0; j < numbers; j += LINE) __builtin_prefetch(rows[i] + j, 0, 2);
    }
};

// As few blocks as there must be, of equal sizes, which are multiples of `unit`.
static int64_t block_size(int64_t n, int64_t most, int64_t unit) {
    const int64_t blocks = (n + most - 1) / most;
    return ((n + blocks - 1) / blocks + unit - 1) / unit * unit;
}

// K rows of N numbers, cut into strips of `width`: [N / width][K][width], with zeros beyond N.
template <int64_t width>
static void pack_rows(int64_t K, int64_t N, Rows rows, float* strips) {
    for (int64_t k = 0; k < K; ++k) {
        const float* row = rows[k];
        float* to = strips + k * width;
        int64_t n = 0;
        for (; n + width <= N; n += width, to += K * width) std::memcpy(to, row + n, width * sizeof(float));
        if (n < N) {
            std::memset(to, 0, width * sizeof(float));
            std::memcpy(to, row + n, (N - n) * sizeof(float));
        }
    }
}

// The same strips of COLUMNS, of a matrix whose columns are rows of w.
static void pack_transposed(int64_t K, int64_t N, Rows w, float* panels) {
    for (int64_t n = 0; n < N; n += LANES) {
        float* to = panels + n / COLUMNS * K * COLUMNS + n % COLUMNS;
        for (int64_t k = 0; k < K; k += LANES) {
            const int64_t terms = std::min<int64_t>(LANES, K - k);
            Vector v[LANES];
            for (int i = 0; i < LANES; ++i) v[i] = n + i < N ? load(w[n + i] + k, terms) : Vector{};
            transpose(v);
            for (int i = 0; i < terms; ++i) store(to + (k + i) * COLUMNS, v[i]);
        }
    }
}

// A block of A in the second cache: element (m, k) of a tile of ROWS is m * row + k * step from where the tile begins.
struct Tiles {
    const float* first;
    int64_t apart, row, step;
};

// C [M, N] (+)= A B, B in panels of K rows.
static void multiply_blocks(
    int64_t M, int64_t N, int64_t K, Tiles a, const float* panels, float* c, int64_t ldc, bool add, const Ahead (&next)[2]
) {
    const int64_t tiles = (M + ROWS - 1) / ROWS, parts = (N + COLUMNS - 1) / COLUMNS * tiles;
    for (int64_t n = 0, part = 0; n < N; n += COLUMNS)
        for (int64_t m = 0; m < M; m += ROWS, ++part) {
            for (const Ahead& rows : next) rows.fetch(part, parts);
            multiply(
                std::min<int64_t>(ROWS, M - m), std::min<int64_t>(COLUMNS, N - n), K, a.first + m / ROWS * a.apart, a.row, a.step,
                panels + n * K, COLUMNS, c + m * ldc + n, ldc, add
            );
        }
}

// y [M, N] of the M rows of one expert, W's element (n, k) at w[n * w_row + k * w_column]. `after` rows of other experts follow, and
// their matrix, if there is one.
static void multiply_group(
    int64_t M, int64_t N, int64_t K, Rows x, const float* w, int64_t w_row, int64_t w_column, int64_t after, const float* next_w, float* y
) {
    Room& here = room();
    const int64_t depth = block_size(K, DEPTH, 1), width = block_size(N, WIDTH, COLUMNS);
    for (int64_t n = 0; n < N; n += width)
        for (int64_t k = 0; k < K; k += depth) {
            const int64_t columns = std::min(width, N - n), terms = std::min(depth, K - k);
            const float* block = w + n * w_row + k * w_column;
            if (w_column == 1) pack_transposed(terms, columns, {block, w_row, nullptr}, here.b);
            else pack_rows<COLUMNS>(terms, columns, {block, w_column, nullptr}, here.b);
            for (int64_t m = 0; m < M; m += HEIGHT) {
                const int64_t rows = std::min(HEIGHT, M - m), end = m + rows;
                for (int64_t i = 0; i < rows; ++i) std::memcpy(here.a + i * PITCH, x[m + i] + k, terms * sizeof(float));
                const int64_t lines = next_w ? N * K / LINE : 0, fetched = lines * m / M;
                const Ahead next[] = {
                    {x.from(end, k), std::min(HEIGHT, M + after - end), terms},
                    {{next_w + fetched * LINE, LINE, nullptr}, lines * end / M - fetched, 1},
                };
                multiply_blocks(rows, columns, terms, {here.a, ROWS * PITCH, PITCH, 1}, here.b, y + m * N + n, N, k > 0, next);
            }
        }
}

// Columns `left` to `right` of one expert's dW [O, I], from its M rows; `after` rows of other experts follow.
static void multiply_within_group(
    int64_t M, int64_t O, int64_t I, int64_t left, int64_t right, Rows dy, Rows x, int64_t after, float* dw
) {
    if (M == 0)
        for (int64_t o = 0; o < O; ++o) std::memset(dw + o * I + left, 0, (right - left) * sizeof(float));
    Room& here = room();
    const bool packs = dy.index || dy.apart >= NEAR;
    const int64_t depth = M ? block_size(M, DEPTH, 1) : 1, width = block_size(right - left, WIDTH, COLUMNS);
    for (int64_t i = left; i < right; i += width)
        for (int64_t k = 0; k < M; k += depth) {
            const int64_t columns = std::min(width, right - i), terms = std::min(depth, M - k), end = k + terms;
            pack_rows<COLUMNS>(terms, columns, x.from(k, i), here.b);
            for (int64_t o = 0; o < O; o += HEIGHT) {
                const int64_t rows = std::min(HEIGHT, O - o), follow = std::min(terms, M + after - end);
                const int64_t begin = follow * o / O, count = follow * (o + rows) / O - begin;
                const Ahead next[] = {{dy.from(end + begin, 0), count, O}, {x.from(end + begin, i), count, columns}};
                Tiles a{here.a, ROWS * terms, 1, ROWS};
                if (packs) pack_rows<ROWS>(terms, rows, dy.from(k, o), here.a);
                else a = {dy[k] + o, ROWS, 1, dy.apart};
                multiply_blocks(rows, columns, terms, a, here.b, dw + o * I + i, I, k > 0, next);
            }
        }
}

// x [., K], rows ldx apart; W[e] at w + e * w_expert, element (n, k) at n * w_row + k * w_column, one of both 1; y [M, N].
extern "C" void multiply_groups(
    int64_t E, int64_t M, int64_t N, int64_t K, const float* x, int64_t ldx, const int64_t* index,
    const float* w, int64_t w_expert, int64_t w_row, int64_t w_column, const int64_t* counts, float* y, int64_t threads
) {
    const Rows all{x, ldx, index};
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < threads; ++t) {
        const int64_t first = M * t / threads, last = M * (t + 1) / threads;
        for (int64_t e = 0, begin = 0; e < E; begin += counts[e++]) {
            const int64_t low = std::max(first, begin), high = std::min(last, begin + counts[e]);
            if (low >= high) continue;
            const float* next_w = e + 1 < E ? w + (e + 1) * w_expert : nullptr;
            multiply_group(high - low, N, K, all.from(low, 0), w + e * w_expert, w_row, w_column, last - high, next_w, y + low * N);
        }
    }
}

// dy [., O], x [., I], rows ldy and ldx apart, each with or without an index; dw [E, O, I].
extern "C" void multiply_within_groups(
    int64_t E, int64_t O, int64_t I, const float* dy, int64_t ldy, const int64_t* y_index, const float* x, int64_t ldx,
    const int64_t* x_index, const int64_t* counts, float* dw, int64_t threads
) {
    const int64_t panels = (I + COLUMNS - 1) / COLUMNS, parts = std::min(threads, panels);
    const std::unique_ptr<int64_t[]> begin(new int64_t[E + 1]());
    for (int64_t e = 0; e < E; ++e) begin[e + 1] = begin[e] + counts[e];
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t item = 0; item < E * parts; ++item) {
        const int64_t e = item / parts, part = item % parts;
        const int64_t left = panels * part / parts * COLUMNS, right = std::min(I, panels * (part + 1) / parts * COLUMNS);
        const Rows of_dy = Rows{dy, ldy, y_index}.from(begin[e], 0), of_x = Rows{x, ldx, x_index}.from(begin[e], 0);
        multiply_within_group(counts[e], O, I, left, right, of_dy, of_x, begin[E] - begin[e + 1], dw + e * O * I);
    }
}
