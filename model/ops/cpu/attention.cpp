// Causal softmax attention of multi-head latent attention, and its gradients:
//
//     q = scale [q_C ; RoPE(q_R)],  k = [k_C ; RoPE(k_R)],  S = q kᵀ,  P = exp(S - lse),  out = P v
//     D = Σ dout · out,  dS = P ∘ (dout vᵀ - D),  dv = Pᵀ dout,  dk = dSᵀ q,  dq = scale dS k       (FlashAttention-2)
//
// Queries are those of the last positions; there may be fewer of them than keys.
//
// A thread takes one head of one sequence. It writes its keys and values out as the products read them, rotated, and then goes
// through blocks of QUERIES x KEYS scores, which stay in the second cache. Of a block it computes what queries may see: for every
// ROWS queries, a strip, the keys from the first visible one to the last.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <utility>

#include "gemm.h"

constexpr int64_t QUERIES = 8 * ROWS, KEYS = 4 * COLUMNS, STRIPS = QUERIES / ROWS;
constexpr int64_t LINE = KEYS + LANES;  // from one row of scores to the next; rows a power of 2 apart fall into few sets of a cache
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

struct Shape {
    int64_t sequences, queries, keys, heads, nope, rope, v;
    int64_t q_sequence, q_token, q_head, kv_sequence, kv_token, kv_head, k_sequence, k_token;  // strides
    int64_t out_sequence, out_token, out_head;  // of the gradient of what comes out

    int64_t qk() const { return nope + rope; }
    int64_t panels() const { return (keys + COLUMNS - 1) / COLUMNS; }
    int64_t before() const { return keys - queries; }  // position of the first query
};

// Small helpers ------------------------------------------------------------------------------------------------------------------

static int64_t down(int64_t n, int64_t step) { return n / step * step; }
static int64_t up(int64_t n, int64_t step) { return down(n + step - 1, step); }
// From one row to the next in scratch memory, at least width: see LINE.
static int64_t line(int64_t width) { return up(width, LANES) % (4 * LANES) ? up(width, LANES) : up(width, LANES) + LANES; }

static Vector get(const float* p, int64_t n) { return n >= LANES ? load(p) : load(p, n); }
static void put(float* p, Vector v, int64_t n) { n >= LANES ? store(p, v) : store(p, v, n); }

// Memory of a thread, which each head that it takes cuts into pieces anew. A piece begins with a line of a cache.
constexpr int64_t ALIGNED = 16, PIECES = 12;
struct Memory {
    std::unique_ptr<float, decltype(&std::free)> numbers;
    explicit Memory(int64_t n)
        : numbers((float*)std::aligned_alloc(4 * ALIGNED, 4 * up(n + PIECES * ALIGNED, ALIGNED)), &std::free) {
        if (numbers) return;
        std::fprintf(stderr, "attention.cpp: no memory for %lld numbers of a thread's scratch\n", (long long)n);
        std::abort();
    }
};
struct Scratch {
    float* left;
    explicit Scratch(const Memory& memory) : left(memory.numbers.get()) {}
    float* take(int64_t n) { return std::exchange(left, left + up(n, ALIGNED)); }
};

// Cosine and sine of every number of a rotary part: turned x = x cos + (x with its pairs swapped) sin.
struct Angles {
    int64_t width;
    std::unique_ptr<float[]> table;
    Angles(const Shape& s, const float* cosines, const float* sines) : width(s.rope), table(new float[2 * s.keys * s.rope]) {
        for (int64_t i = 0; i < s.keys * s.rope / 2; ++i) {
            const int64_t t = i / (width / 2), j = 2 * (i % (width / 2));
            float* row = table.get() + 2 * t * width;
            row[j] = row[j + 1] = cosines[i];
            row[width + j] = -sines[i];
            row[width + j + 1] = sines[i];
        }
    }
    // way: 1 turns, -1 turns back.
    void turn(int64_t t, const float* from, float* to, float factor, float way) const {
        const float *cosines = table.get() + 2 * t * width, *sines = cosines + width;
        for (int64_t i = 0; i < width; i += LANES) {
            const int64_t n = width - i;
            const Vector x = get(from + i, n) * factor;
            put(to + i, x * get(cosines + i, n) + swap_pairs(x) * (get(sines + i, n) * way), n);
        }
    }
};

// Rows of one head lie far apart: what is read a few rows later is asked for now.
static void ask(const float* row, int64_t step, int64_t width) {
    for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(row + 16 * step + i);
}

static void copy(const float* from, float* to, int64_t n, float factor) {
    for (int64_t i = 0; i < n; i += LANES) put(to + i, get(from + i, n - i) * factor, n - i);
}

static float dot(const float* a, const float* b, int64_t n) {
    Vector total{};
    for (int64_t i = 0; i < n; i += LANES) total += get(a + i, n - i) * get(b + i, n - i);
    return sum(total);
}

// Rows as panels of COLUMNS tokens, [panel][width][COLUMNS]: the right side of a product with their transpose.
static void pack_panels(const Shape& s, const float* rows, int64_t width, float* panels) {
    const int64_t row = line(width);
    for (int64_t t = 0; t < s.panels() * COLUMNS; t += LANES)
        for (int64_t d = 0; d < width; d += LANES) {
            Vector square[LANES];
            for (int64_t j = 0; j < LANES; ++j) square[j] = t + j < s.keys ? get(rows + (t + j) * row + d, width - d) : Vector{};
            transpose(square);
            float* to = panels + down(t, COLUMNS) * width + d * COLUMNS + t % COLUMNS;
            for (int64_t i = 0; i < std::min<int64_t>(LANES, width - d); ++i) store(to + i * COLUMNS, square[i]);
        }
}

// What the queries of a block see -------------------------------------------------------------------------------------------------

struct Block {
    int64_t q, queries, strips;           // its first query, and how many
    int64_t position;                     // of that query among the keys
    int64_t first[STRIPS], last[STRIPS];  // keys that a strip sees, up to last; neither decreases, first is a multiple of COLUMNS
    const int32_t* starts;                // of these queries; null: 0

    Block(const Shape& s, int64_t q, const int32_t* starts)
        : q(q), queries(std::min(QUERIES, s.queries - q)), strips((queries + ROWS - 1) / ROWS), position(s.before() + q),
          starts(starts ? starts + q : nullptr) {
        int64_t earliest = s.keys;
        for (int64_t i = strips; i-- > 0;) {
            const int64_t end = std::min((i + 1) * ROWS, queries);
            last[i] = position + end;
            for (int64_t r = i * ROWS; r < end; ++r) earliest = std::min(earliest, start(r));
            first[i] = down(earliest, COLUMNS);
        }
    }
    int64_t start(int64_t r) const { return starts ? starts[r] : 0; }

    // f(first key, keys, first query in the block, queries) for runs of panels that the same strips see; panels of keys k to end.
    template <typename F> void for_panels(int64_t k, int64_t end, F f) const {
        for (int64_t n = k; n < end;) {
            const auto [from, to] = seeing(n);
            int64_t next = n + COLUMNS;
            while (next < end && seeing(next) == std::pair(from, to)) next += COLUMNS;
            if (from < to) f(n, next - n, from * ROWS, std::min(to * ROWS, queries) - from * ROWS);
            n = next;
        }
    }
    // f(first query in the block, queries, first key, keys) for runs of strips that see the same of keys k to end.
    template <typename F> void for_strips(int64_t k, int64_t end, F f) const {
        for (int64_t i = 0; i < strips;) {
            const int64_t from = std::max(first[i], k), to = std::min(last[i], end);
            int64_t next = i + 1;
            while (next < strips && std::max(first[next], k) == from && std::min(last[next], end) == to) ++next;
            if (from < to) f(i * ROWS, std::min(next * ROWS, queries) - i * ROWS, from, to - from);
            i = next;
        }
    }
    // Strips that see something of the panel that begins at key n.
    std::pair<int64_t, int64_t> seeing(int64_t n) const {
        int64_t from = 0, to = strips;
        while (from < strips && last[from] <= n) ++from;
        while (to > from && first[to - 1] > n) --to;
        return {from, to};
    }
};

// f(query in the block, its row of scores, the same of `other`, numbers) for every query that sees some of the keys k to end.
// Rows are handed out in whole vectors, with scores of -inf where the query does not see; 0 is the rest of what its strip sees.
template <typename F> static void for_rows(const Block& block, int64_t k, int64_t end, float* scores, float* other, F f) {
    for (int64_t i = 0; i < block.strips; ++i) {
        const int64_t from = std::max(block.first[i], k) - k, to = std::min(up(block.last[i], COLUMNS), end) - k;
        for (int64_t r = i * ROWS; from < to && r < std::min((i + 1) * ROWS, block.queries); ++r) {
            const int64_t a = std::max(block.start(r) - k, from), b = std::min(block.position + r + 1 - k, to);
            const int64_t begin = a < b ? down(a, LANES) : to, stop = a < b ? up(b, LANES) : to;
            float* row = scores + r * LINE;
            if (a < b) {
                std::fill(row + begin, row + a, LOWEST);
                std::fill(row + b, row + stop, LOWEST);
                f(r, row + begin, other ? other + r * LINE + begin : nullptr, stop - begin);
            }
            for (float* rest : {row, other ? other + r * LINE : nullptr})
                if (rest) {
                    std::fill(rest + from, rest + begin, 0.0f);
                    std::fill(rest + stop, rest + to, 0.0f);
                }
        }
    }
}

// Forward -------------------------------------------------------------------------------------------------------------------------

struct Keys {
    float *rows, *panels;  // [Tk][line(qk)], [panel][qk][COLUMNS]
    Keys(const Shape& s, Scratch& scratch)
        : rows(scratch.take(s.keys * line(s.qk()))), panels(scratch.take(s.panels() * s.qk() * COLUMNS)) {}

    // values [Tk][line(v)] as well.
    void pack(const Shape& s, const Angles& angles, const float* kv, const float* k_rope, float* values) {
        for (int64_t t = 0; t < s.keys; ++t) {
            ask(kv + t * s.kv_token, s.kv_token, s.nope + s.v);
            copy(kv + t * s.kv_token, rows + t * line(s.qk()), s.nope, 1);
            copy(kv + t * s.kv_token + s.nope, values + t * line(s.v), s.v, 1);
            angles.turn(t, k_rope + t * s.k_token, rows + t * line(s.qk()) + s.nope, 1, 1);
        }
        pack_panels(s, rows, s.qk(), panels);
    }
};

static void pack_queries(const Shape& s, const Angles& angles, const Block& block, const float* q, float scale, float* to) {
    for (int64_t r = 0; r < block.queries; ++r, to += line(s.qk())) {
        const float* from = q + (block.q + r) * s.q_token;
        ask(from, s.q_token, s.qk());
        copy(from, to, s.nope, scale);
        angles.turn(block.position + r, from + s.nope, to + s.nope, scale, 1);
    }
}

// Rows times the transpose of what lies in panels, where queries see keys k to end; scores [QUERIES][LINE] begin with key k.
static void multiply_seen(
    const Block& block, int64_t k, int64_t end, const float* rows, int64_t width, const float* panels, float* scores
) {
    const int64_t row = line(width);
    block.for_panels(k, end, [&](int64_t key, int64_t keys, int64_t r, int64_t count) {
        for (int64_t n = key; n < key + keys; n += COLUMNS)
            multiply(
                count, COLUMNS, width, rows + r * row, row, 1, panels + n * width, COLUMNS, scores + r * LINE + n - k, LINE, false
            );
    });
}

static int64_t forward_scratch(const Shape& s) {
    return s.keys * (line(s.qk()) + line(s.v)) + s.panels() * s.qk() * COLUMNS + QUERIES * (line(s.qk()) + line(s.v) + LINE + 2);
}

static void forward(
    Scratch scratch, const Shape& s, const Angles& angles, const float* q, const float* kv, const float* k_rope,
    const int32_t* starts, float scale, float* out, float* lse
) {
    const int64_t row = line(s.v);
    Keys keys(s, scratch);
    float *values = scratch.take(s.keys * row), *queries = scratch.take(QUERIES * line(s.qk()));
    float *scores = scratch.take(QUERIES * LINE);  // and what exp makes of them
    float *sums = scratch.take(QUERIES * row), *best = scratch.take(QUERIES), *total = scratch.take(QUERIES);
    keys.pack(s, angles, kv, k_rope, values);

    for (int64_t at = 0; at < s.queries; at += QUERIES) {
        const Block block(s, at, starts);
        pack_queries(s, angles, block, q, scale, queries);
        std::fill(sums, sums + block.queries * row, 0.0f);
        std::fill(total, total + block.queries, 0.0f);
        std::fill(best, best + block.queries, LOWEST);
        for (int64_t k = block.first[0]; k < block.last[block.strips - 1]; k += KEYS) {
            const int64_t end = std::min(k + KEYS, up(block.last[block.strips - 1], COLUMNS));
            multiply_seen(block, k, end, queries, s.qk(), keys.panels, scores);
            for_rows(block, k, end, scores, nullptr, [&](int64_t r, float* p, float*, int64_t n) {
                Vector most = load(p), added{};
                for (int64_t i = LANES; i < n; i += LANES) most = larger(most, load(p + i));
                const float before = best[r], now = std::max(before, largest(most));
                for (int64_t i = 0; i < n; i += LANES) {
                    const Vector e = exp(load(p + i) - now);
                    added += e;
                    store(p + i, e);
                }
                if (now > before && total[r] != 0) {
                    const float shrunk = std::exp(before - now);
                    total[r] *= shrunk;
                    copy(sums + r * row, sums + r * row, s.v, shrunk);
                }
                best[r] = now;
                total[r] += sum(added);
            });
            block.for_strips(k, end, [&](int64_t r, int64_t count, int64_t key, int64_t n) {
                multiply(count, s.v, n, scores + r * LINE + key - k, LINE, 1, values + key * row, row, sums + r * row, row, true);
            });
        }
        for (int64_t r = 0; r < block.queries; ++r) {
            copy(sums + r * row, out + (at + r) * s.heads * s.v, s.v, 1 / total[r]);
            lse[at + r] = best[r] + std::log(total[r]);
        }
    }
}

extern "C" void attention(
    const Shape* shape, const float* q, const float* kv, const float* k_rope, const float* cosines, const float* sines,
    const int32_t* starts, float scale, float* out, float* lse, int64_t threads
) {
    const Shape& s = *shape;
    const Angles angles(s, cosines, sines);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Memory memory(forward_scratch(s));
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < s.sequences * s.heads; ++i) {
            const int64_t b = i / s.heads, h = i % s.heads;
            forward(
                Scratch(memory), s, angles, q + b * s.q_sequence + h * s.q_head, kv + b * s.kv_sequence + h * s.kv_head,
                k_rope + b * s.k_sequence, starts ? starts + b * s.queries : nullptr, scale,
                out + (b * s.queries * s.heads + h) * s.v, lse + i * s.queries
            );
        }
    }
}

// Backward ------------------------------------------------------------------------------------------------------------------------

static int64_t backward_scratch(const Shape& s) {
    const int64_t row = line(s.v), wide = line(s.qk());
    return s.keys * (2 * wide + row) + s.panels() * (s.qk() + s.v) * COLUMNS + QUERIES * (2 * wide + row + 2 * LINE + 1);
}

static void backward(
    Scratch scratch, const Shape& s, const Angles& angles, const float* q, const float* kv, const float* k_rope,
    const int32_t* starts, float scale, const float* out, const float* lse, const float* d_out, float* dq, float* dkv,
    float* dk_rope
) {
    const int64_t row = line(s.v), wide = line(s.qk());
    Keys keys(s, scratch);
    float* values = scratch.take(s.panels() * s.v * COLUMNS);  // as panels
    float *dk = scratch.take(s.keys * wide), *dv = scratch.take(s.keys * row);
    float *queries = scratch.take(QUERIES * wide), *d_queries = scratch.take(QUERIES * wide), *above = scratch.take(QUERIES * row);
    float *p = scratch.take(QUERIES * LINE), *ds = scratch.take(QUERIES * LINE), *d = scratch.take(QUERIES);
    keys.pack(s, angles, kv, k_rope, dv);  // which has the rows of values until they are panels
    pack_panels(s, dv, s.v, values);
    std::fill(dk, dk + s.keys * wide, 0.0f);
    std::fill(dv, dv + s.keys * row, 0.0f);

    for (int64_t at = 0; at < s.queries; at += QUERIES) {
        const Block block(s, at, starts);
        pack_queries(s, angles, block, q, scale, queries);
        std::fill(d_queries, d_queries + block.queries * wide, 0.0f);
        for (int64_t r = 0; r < block.queries; ++r) {
            ask(d_out + (at + r) * s.out_token, s.out_token, s.v);
            ask(out + (at + r) * s.heads * s.v, s.heads * s.v, s.v);
            copy(d_out + (at + r) * s.out_token, above + r * row, s.v, 1);
            d[r] = dot(above + r * row, out + (at + r) * s.heads * s.v, s.v);
        }
        for (int64_t k = block.first[0]; k < block.last[block.strips - 1]; k += KEYS) {
            const int64_t end = std::min(k + KEYS, up(block.last[block.strips - 1], COLUMNS));
            multiply_seen(block, k, end, queries, s.qk(), keys.panels, p);
            multiply_seen(block, k, end, above, s.v, values, ds);
            for_rows(block, k, end, p, ds, [&](int64_t r, float* p, float* ds, int64_t n) {
                for (int64_t i = 0; i < n; i += LANES) {
                    const Vector e = exp(load(p + i) - lse[at + r]);
                    store(p + i, e);
                    store(ds + i, e * (load(ds + i) - d[r]));
                }
            });
            block.for_panels(k, end, [&](int64_t key, int64_t seen, int64_t r, int64_t count) {
                const int64_t n = std::min(seen, s.keys - key), at = r * LINE + key - k;
                multiply(n, s.v, count, p + at, 1, LINE, above + r * row, row, dv + key * row, row, true);
                multiply(n, s.qk(), count, ds + at, 1, LINE, queries + r * wide, wide, dk + key * wide, wide, true);
            });
            block.for_strips(k, end, [&](int64_t r, int64_t count, int64_t key, int64_t n) {
                const float* of = ds + r * LINE + key - k;
                multiply(count, s.qk(), n, of, LINE, 1, keys.rows + key * wide, wide, d_queries + r * wide, wide, true);
            });
        }
        for (int64_t r = 0; r < block.queries; ++r) {
            float* to = dq + (at + r) * s.heads * s.qk();
            copy(d_queries + r * wide, to, s.nope, scale);
            angles.turn(block.position + r, d_queries + r * wide + s.nope, to + s.nope, scale, -1);
        }
    }
    for (int64_t t = 0; t < s.keys; ++t) {
        float* to = dkv + t * s.heads * (s.nope + s.v);
        copy(dk + t * wide, to, s.nope, 1);
        copy(dv + t * row, to + s.nope, s.v, 1);
        copy(dk + t * wide + s.nope, dk_rope + t * s.rope, s.rope, 1);
    }
}

extern "C" void attention_backward(
    const Shape* shape, const float* q, const float* kv, const float* k_rope, const float* cosines, const float* sines,
    const int32_t* starts, float scale, const float* out, const float* lse, const float* d_out, float* dq, float* dkv,
    float* dk_rope, int64_t threads
) {
    const Shape& s = *shape;
    const Angles angles(s, cosines, sines);
    // The heads' shares of the rotary key's gradient: added up at the end, so that their order does not depend on the threads.
    std::unique_ptr<float[]> shares(new float[s.sequences * s.heads * s.keys * s.rope]);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Memory memory(backward_scratch(s));
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < s.sequences * s.heads; ++i) {
            const int64_t b = i / s.heads, h = i % s.heads;
            const int64_t query = b * s.queries * s.heads + h, key = b * s.keys * s.heads + h;  // a head's first ones
            backward(
                Scratch(memory), s, angles, q + b * s.q_sequence + h * s.q_head, kv + b * s.kv_sequence + h * s.kv_head,
                k_rope + b * s.k_sequence, starts ? starts + b * s.queries : nullptr, scale, out + query * s.v,
                lse + i * s.queries, d_out + b * s.out_sequence + h * s.out_head, dq + query * s.qk(),
                dkv + key * (s.nope + s.v), shares.get() + i * s.keys * s.rope
            );
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < s.sequences * s.keys; ++i) {
            const int64_t b = i / s.keys, t = i % s.keys;
            float* first = shares.get() + (b * s.heads * s.keys + t) * s.rope;
            for (int64_t h = 1; h < s.heads; ++h)
                for (int64_t j = 0; j < s.rope; ++j) first[j] += first[h * s.keys * s.rope + j];
            angles.turn(t, first, dk_rope + i * s.rope, 1, -1);
        }
    }
}
