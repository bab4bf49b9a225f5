// The gate: which K experts a token goes to, how much each counts, and the sequence-wise balance loss; its gradient; and the sort
// of (token, expert) pairs by expert.
//
// A lane is a token: LANES tokens are turned into columns, x[e] being the logits of expert e, and everything runs down the experts.
// So no vector is searched across, and a column of any length needs no tail. Sums over a sequence are made in chunks of a fixed
// number of tokens, then over the chunks in order: the same bits on any number of threads.
#include <vector>

#include "vector.h"

constexpr int64_t CHUNK = 128;  // tokens; a multiple of LANES

// The K best of each lane so far, best first; of equals the one that was offered first.
struct Best {
    std::vector<Vector> value;
    std::vector<Integers> id;
    explicit Best(int64_t K) : value(K), id(K) {}

    void clear() {
        for (Vector& v : value) v = all(-INFINITY);
        for (Integers& i : id) i = Integers{};
    }

    void offer(Vector v, int32_t expert) {
        Integers i = Integers{} + expert;
        for (size_t k = 0; k < value.size(); ++k) {
            const Integers better = v > value[k];
            const Vector worse = better ? value[k] : v;
            const Integers worse_id = better ? id[k] : i;
            value[k] = better ? v : value[k];
            id[k] = better ? i : id[k];
            v = worse, i = worse_id;
        }
    }
};

// A number that is above -infinity, so that it is chosen before one that may not be; NaN is the largest, as it is to torch.topk.
static inline Vector comparable(Vector x) { return x == x ? larger(x, all(-3.4e38f)) : all(INFINITY); }

static inline Vector decay(Vector x) { return exp(x > 0.0f ? -x : x); }  // e^-|x|
static inline Vector sigmoid(Vector x) {
    const Vector small = decay(x);
    return (x >= 0.0f ? all(1.0f) : small) / (small + 1.0f);
}

// sigmoid(x[e]) / sum of sigmoid(x[.]), which is softmax(log sigmoid(x)). Where all are tiny, all are multiplied by e^-(largest x).
static void shares(int64_t E, const Vector* x, Vector* share) {
    Vector top = x[0], total{};
    for (int64_t e = 1; e < E; ++e) top = larger(x[e], top);
    top = smaller(top, Vector{});
    for (int64_t e = 0; e < E; ++e) {
        share[e] = (x[e] > 0.0f ? all(1.0f) : exp(x[e] - top)) / (decay(x[e]) + 1.0f);
        total += share[e];
    }
    for (int64_t e = 0; e < E; ++e) share[e] /= total;
}

// Rows of E numbers to columns, and back; lanes beyond `rows` are 0.
static void to_columns(int64_t E, int64_t rows, const float* from, Vector* to) {
    if (rows < LANES) std::fill(to, to + E, Vector{});
    float* numbers = (float*)to;
    for (int64_t n = 0; n < rows; ++n)
        for (int64_t e = 0; e < E; ++e) numbers[e * LANES + n] = from[n * E + e];
}
static void to_rows(int64_t E, int64_t rows, const Vector* from, float* to) {
    const float* numbers = (const float*)from;
    for (int64_t n = 0; n < rows; ++n)
        for (int64_t e = 0; e < E; ++e) to[n * E + e] = numbers[e * LANES + n];
}

static void gather(int64_t K, const Vector* x, const Integers* id, Vector* chosen) {
    const float* numbers = (const float*)x;
    for (int64_t k = 0; k < K; ++k)
        for (int l = 0; l < LANES; ++l) chosen[k][l] = numbers[id[k][l] * LANES + l];
}

// choice [E]: biased affinities, -infinity where the expert's group is not among the `kept` with the highest sums of two.
static void limit_to_groups(int64_t E, int64_t groups, Vector* choice, Best& two, Best& best_groups) {
    const int64_t size = E / groups;
    best_groups.clear();
    for (int64_t g = 0; g < groups; ++g) {
        two.clear();
        for (int64_t e = g * size; e < (g + 1) * size; ++e) two.offer(choice[e], 0);
        best_groups.offer(larger(two.value[0] + two.value[1], all(-3.4e38f)), (int32_t)g);
    }
    for (int64_t g = 0; g < groups; ++g) {
        Integers kept{};
        for (const Integers& id : best_groups.id) kept |= id == (int32_t)g;
        for (int64_t e = g * size; e < (g + 1) * size; ++e) choice[e] = kept ? choice[e] : all(-INFINITY);
    }
}

// logits [B, T, E], bias [E] -> ids [B*T, K], weights [B*T, K], frequency [B, E] (f of the balance loss), loss (one number).
extern "C" void route(
    int64_t B, int64_t T, int64_t E, int64_t K, int64_t groups, int64_t kept, bool normalise, float scale, const float* logits,
    const float* bias, int64_t* ids, float* weights, float* frequency, float* loss, int64_t threads
) {
    const int64_t chunks = (T + CHUNK - 1) / CHUNK;
    std::vector<float> probability(B * chunks * E), hits(B * chunks * E);  // of each chunk, summed over its tokens
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<Vector> x(E), y(E), sums(E), chosen(K), weight(K);
        Best best(K), two(2), best_groups(kept);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < B * chunks; ++c) {
            const int64_t first = c / chunks * T + c % chunks * CHUNK;
            const int64_t tokens = std::min(CHUNK, T - c % chunks * CHUNK);
            float* hit = &hits[c * E];
            std::fill(sums.begin(), sums.end(), Vector{});
            for (int64_t n = 0; n < tokens; n += LANES) {
                const int64_t rows = std::min<int64_t>(LANES, tokens - n), at = first + n;
                to_columns(E, rows, logits + at * E, x.data());

                for (int64_t e = 0; e < E; ++e) y[e] = comparable(sigmoid(x[e]) + bias[e]);
                if (kept < groups) limit_to_groups(E, groups, y.data(), two, best_groups);
                best.clear();
                for (int64_t e = 0; e < E; ++e) best.offer(y[e], (int32_t)e);
                gather(K, x.data(), best.id.data(), chosen.data());
                if (normalise) shares(K, chosen.data(), weight.data());
                else for (int64_t k = 0; k < K; ++k) weight[k] = sigmoid(chosen[k]);
                for (int64_t l = 0; l < rows; ++l)
                    for (int64_t k = 0; k < K; ++k) {
                        ids[(at + l) * K + k] = best.id[k][l];
                        weights[(at + l) * K + k] = weight[k][l] * scale;
                    }

                best.clear();
                for (int64_t e = 0; e < E; ++e) best.offer(comparable(x[e]), (int32_t)e);
                for (int64_t l = 0; l < rows; ++l)
                    for (int64_t k = 0; k < K; ++k) hit[best.id[k][l]] += 1;
                shares(E, x.data(), y.data());
                Vector counted{};
                for (int64_t l = 0; l < rows; ++l) counted[l] = 1;
                for (int64_t e = 0; e < E; ++e) sums[e] += counted * y[e];
            }
            for (int64_t e = 0; e < E; ++e) probability[c * E + e] = sum(sums[e]);
        }
    }
    double total = 0;
    for (int64_t b = 0; b < B; ++b)
        for (int64_t e = 0; e < E; ++e) {
            float f = 0, p = 0;
            for (int64_t c = b * chunks; c < (b + 1) * chunks; ++c) f += hits[c * E + e], p += probability[c * E + e];
            frequency[b * E + e] = f * (float)E / (float)(K * T);
            total += (double)frequency[b * E + e] * p / T;
        }
    *loss = (float)total;
}

// d_weights [B*T, K] and d_loss (one number), either of them null for none -> d_logits [B, T, E].
extern "C" void route_backward(
    int64_t B, int64_t T, int64_t E, int64_t K, bool normalise, float scale, const float* logits, const int64_t* ids,
    const float* weights, const float* frequency, const float* d_weights, const float* d_loss, float* d_logits, int64_t threads
) {
    const int64_t chunks = (T + CHUNK - 1) / CHUNK;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<Vector> x(E), d(E);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < B * chunks; ++c) {
            const int64_t first = c / chunks * T + c % chunks * CHUNK;
            const int64_t tokens = std::min(CHUNK, T - c % chunks * CHUNK);
            const float* f = frequency + c / chunks * E;
            for (int64_t n = 0; n < tokens; n += LANES) {
                const int64_t rows = std::min<int64_t>(LANES, tokens - n), at = first + n;
                to_columns(E, rows, logits + at * E, x.data());
                std::fill(d.begin(), d.end(), Vector{});
                if (d_loss) {  // P = softmax(log sigmoid(x)): dP_j / dx_i = P_j (delta_ij - P_i) (1 - sigmoid(x_i))
                    Vector mean{};
                    shares(E, x.data(), d.data());
                    for (int64_t e = 0; e < E; ++e) mean += d[e] * f[e];
                    for (int64_t e = 0; e < E; ++e) d[e] *= (f[e] - mean) * (*d_loss / (float)T);
                }
                if (d_weights)  // the same over the chosen, times `scale`
                    for (int64_t l = 0; l < rows; ++l) {
                        const int64_t row = (at + l) * K;
                        float mean = 0;
                        for (int64_t k = 0; k < K && normalise; ++k) mean += weights[row + k] / scale * d_weights[row + k];
                        for (int64_t k = 0; k < K; ++k) d[ids[row + k]][l] += weights[row + k] * (d_weights[row + k] - mean);
                    }
                for (int64_t e = 0; e < E; ++e) d[e] *= sigmoid(-x[e]);
                to_rows(E, rows, d.data(), d_logits + at * E);
            }
        }
    }
}

// ids [pairs], each below E -> counts [E]; order [pairs]: the pairs by expert, those of an expert as they came; place: its inverse.
extern "C" void sort_by_expert(int64_t pairs, int64_t E, const int64_t* ids, int64_t* order, int64_t* place, int64_t* counts) {
    std::vector<int64_t> next(E);
    std::fill(counts, counts + E, 0);
    for (int64_t m = 0; m < pairs; ++m) ++counts[ids[m]];
    for (int64_t e = 1; e < E; ++e) next[e] = next[e - 1] + counts[e - 1];
    for (int64_t m = 0; m < pairs; ++m) {
        place[m] = next[ids[m]]++;
        order[place[m]] = m;
    }
}
