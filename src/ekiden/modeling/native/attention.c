/* Causal attention in fp32, forward and backward, with all numbers of a block in the first-level cache.

   The loop is FlashAttention-2's (Dao 2023, arXiv:2307.08691): a block of queries meets one block of keys after the other.
   Scores are kept transposed, [keys, queries], so that no operand has to be turned over but the block of queries, and the
   softmax runs down vectors of queries without sums across a vector. Blocks that no query of theirs may see are left out.

   Tensors are [batch, heads, tokens, d] with strides in floats, d contiguous and a multiple of LANES, up to MOST_UNITS.
   Query head h reads key/value head h / (heads / groups). */
#include "vector.h"

#define BLOCK 64 /* queries of a block */
#define KEYS 64
#define MOST_UNITS 128

typedef struct {
    int64_t batch, heads, groups, tokens, units, window; /* window: keys that a query sees, itself included */
    int64_t q[3], k[3], v[3], o[3], g[3];                /* strides of batch, head, token; g: of the output's gradient */
    int64_t gradient_row, threads; /* gradient_row: floats from a token to the next one in dq, dk and dv */
    float scale;
} shape;

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE const float *at(const float *from, const int64_t *stride, int64_t b, int64_t h) {
    return from + b * stride[0] + h * stride[1];
}

/* to[d, BLOCK] = factor x from[count, d] transposed, zeros behind it. */
INLINE void turn(float *to, const float *from, int64_t row, int64_t count, int64_t units, float factor) {
    for (int64_t i = 0; i < BLOCK; i++)
        for (int64_t u = 0; u < units; u++) to[u * BLOCK + i] = i < count ? from[i * row + u] * factor : 0.0f;
}

/* scores[keys, BLOCK] of keys from `first` on with turned queries from `query` on; minus infinity where they are not seen. */
INLINE void scores_of(const shape *s, float *scores, const float *keys, const float *turned, int64_t first, int64_t count,
                      int64_t query) {
    product(count, BLOCK, s->units, keys, s->k[2], 1, turned, BLOCK, scores, BLOCK, 0);
    if (first + count > query) /* on the diagonal: queries before the key */
        for (int64_t k = most(0, query - first); k < count; k++)
            for (int64_t i = 0; i < least(BLOCK, first + k - query); i++) scores[k * BLOCK + i] = -INFINITY;
    if (query + BLOCK - first > s->window) /* queries that are a window behind the key */
        for (int64_t k = 0; k < count; k++)
            for (int64_t i = most(0, first + k + s->window - query); i < BLOCK; i++) scores[k * BLOCK + i] = -INFINITY;
}

/* First key block that queries from `query` on see. */
INLINE int64_t begin_of(const shape *s, int64_t query) { return most(0, query - s->window + 1) / KEYS * KEYS; }

static void forward_block(const shape *s, int64_t b, int64_t h, int64_t query, const float *q, const float *k, const float *v,
                          float *o, float *lse) {
    float turned[MOST_UNITS * BLOCK], scores[KEYS * BLOCK], top[BLOCK], sum[BLOCK], out[BLOCK * MOST_UNITS];
    const int64_t d = s->units, group = h / (s->heads / s->groups), rows = least(BLOCK, s->tokens - query);
    k = at(k, s->k, b, group), v = at(v, s->v, b, group);
    turn(turned, at(q, s->q, b, h) + query * s->q[2], s->q[2], rows, d, s->scale);
    for (int64_t i = 0; i < BLOCK; i++) top[i] = -1e30f, sum[i] = 0;
    memset(out, 0, sizeof(float) * BLOCK * d);
    for (int64_t first = begin_of(s, query); first < query + rows; first += KEYS) {
        const int64_t keys = least(KEYS, query + rows - first);
        float factor[BLOCK];
        int rescale = 0;
        scores_of(s, scores, k + first * s->k[2], turned, first, keys, query);
        vec now[BLOCK / LANES];
        for (int j = 0; j < BLOCK / LANES; j++) now[j] = load(top + j * LANES);
        for (int64_t key = 0; key < keys; key++)
            for (int j = 0; j < BLOCK / LANES; j++) now[j] = larger(now[j], load(scores + key * BLOCK + j * LANES));
        for (int j = 0; j < BLOCK / LANES; j++) {
            vec total = {0}, shrink = vexp(load(top + j * LANES) - now[j]);
            for (int64_t key = 0; key < keys; key++) {
                vec p = vexp(load(scores + key * BLOCK + j * LANES) - now[j]);
                store(scores + key * BLOCK + j * LANES, p);
                total += p;
            }
            store(sum + j * LANES, load(sum + j * LANES) * shrink + total);
            store(top + j * LANES, now[j]), store(factor + j * LANES, shrink);
        }
        for (int64_t i = 0; i < rows; i++) rescale |= factor[i] != 1.0f;
        if (rescale && first > begin_of(s, query))
            for (int64_t i = 0; i < rows; i++)
                for (int64_t u = 0; u < d; u += LANES) store(out + i * d + u, load(out + i * d + u) * all(factor[i]));
        product(rows, d, keys, scores, 1, BLOCK, v + first * s->v[2], s->v[2], out, d, 1);
    }
    float *to = (float *)at(o, s->o, b, h) + query * s->o[2];
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t u = 0; u < d; u += LANES) store(to + i * s->o[2] + u, load(out + i * d + u) * all(1.0f / sum[i]));
        lse[(b * s->heads + h) * s->tokens + query + i] = top[i] + logf(sum[i]);
    }
}

/* o [batch, heads, tokens, d] = softmax(scale q k^T) v; lse [batch, heads, tokens]: logarithms of the softmax's sums. */
void attention_forward(const shape *s, const float *q, const float *k, const float *v, float *o, float *lse) {
    const int64_t blocks = (s->tokens + BLOCK - 1) / BLOCK, heads = s->batch * s->heads;
#pragma omp parallel for schedule(dynamic) num_threads(s->threads)
    for (int64_t task = 0; task < heads * blocks; task++) /* the longest first */
        forward_block(s, task % heads / s->heads, task % s->heads, (blocks - 1 - task / heads) * BLOCK, q, k, v, o, lse);
}

/* First key of a part of `parts` of a head's keys, a multiple of KEYS. Later keys are seen by fewer queries: equal work for every
   part means equal areas below the diagonal, as long as there is no window. */
INLINE int64_t part_begin(const shape *s, int64_t part, int64_t parts) {
    if (part >= parts) return s->tokens;
    const double share = (double)part / parts;
    const double at = s->window < s->tokens ? share : 1 - sqrt(1 - share);
    return (int64_t)(at * s->tokens) / KEYS * KEYS;
}

/* Behind the last query that sees one of the keys before `to`. */
INLINE int64_t seen_until(const shape *s, int64_t to) { return least(s->tokens, to + s->window - 1); }

/* One part of a head's keys: all of its dk and dv, and the part's own dq [tokens, row], of the first part every row, of others
   those of queries that see its keys. */
static void backward_part(const shape *s, int64_t b, int64_t h, int64_t from, int64_t to, const float *q, const float *k,
                          const float *v, const float *o, const float *g, const float *lse, float *dq, int64_t dq_row, float *dk,
                          float *dv) {
    float turned[MOST_UNITS * BLOCK], upstream[MOST_UNITS * BLOCK], p[KEYS * BLOCK], ds[KEYS * BLOCK];
    float delta[BLOCK], shift[BLOCK];
    const int64_t d = s->units, group = h / (s->heads / s->groups), row = s->gradient_row, start = b * s->tokens * row + h * d;
    const int64_t last = seen_until(s, to);
    q = at(q, s->q, b, h), k = at(k, s->k, b, group), v = at(v, s->v, b, group), o = at(o, s->o, b, h), g = at(g, s->g, b, h);
    dk += start, dv += start;
    for (int64_t t = from; t < (from ? last : s->tokens); t++) memset(dq + t * dq_row, 0, 4 * d);
    for (int64_t t = from; t < to; t++) memset(dk + t * row, 0, 4 * d), memset(dv + t * row, 0, 4 * d);
    for (int64_t query = from / BLOCK * BLOCK; query < last; query += BLOCK) {
        const int64_t rows = least(BLOCK, s->tokens - query);
        turn(turned, q + query * s->q[2], s->q[2], rows, d, s->scale);
        turn(upstream, g + query * s->g[2], s->g[2], rows, d, 1.0f);
        for (int64_t i = 0; i < BLOCK; i++) {
            vec sum = {0};
            for (int64_t u = 0; i < rows && u < d; u += LANES)
                sum += load(o + (query + i) * s->o[2] + u) * load(g + (query + i) * s->g[2] + u);
            delta[i] = 0;
            for (int lane = 0; lane < LANES; lane++) delta[i] += sum[lane];
            shift[i] = i < rows ? lse[(b * s->heads + h) * s->tokens + query + i] : 0;
        }
        for (int64_t first = most(from, begin_of(s, query)); first < least(to, query + rows); first += KEYS) {
            const int64_t keys = least(KEYS, query + rows - first);
            scores_of(s, p, k + first * s->k[2], turned, first, keys, query);
            product(keys, BLOCK, d, v + first * s->v[2], s->v[2], 1, upstream, BLOCK, ds, BLOCK, 0);
            for (int64_t i = 0; i < BLOCK; i += LANES) {
                const vec less = load(shift + i), mean = load(delta + i);
                for (int64_t key = 0; key < keys; key++) {
                    vec one = vexp(load(p + key * BLOCK + i) - less);
                    store(p + key * BLOCK + i, one);
                    store(ds + key * BLOCK + i, one * (load(ds + key * BLOCK + i) - mean) * all(s->scale));
                }
            }
            product(keys, d, rows, p, BLOCK, 1, g + query * s->g[2], s->g[2], dv + first * row, row, 1);
            product(keys, d, rows, ds, BLOCK, 1, q + query * s->q[2], s->q[2], dk + first * row, row, 1);
            product(rows, d, keys, ds, 1, BLOCK, k + first * s->k[2], s->k[2], dq + query * dq_row, dq_row, 1);
        }
    }
}

/* dq, dk, dv [batch, tokens, heads, d], a token's at `gradient_row` from the one's before; dk and dv for every query head by
   itself. With few heads the keys of each are divided into `parts`, a number that follows the shape and never the threads; each
   part's dq stands in `scratch` [parts - 1, batch, heads, tokens, d] until all are added up in order. */
void attention_backward(const shape *s, const float *q, const float *k, const float *v, const float *o, const float *g,
                        const float *lse, float *dq, float *dk, float *dv, float *scratch, int64_t parts) {
    const int64_t heads = s->batch * s->heads, d = s->units, row = s->gradient_row, size = s->tokens * d;
#pragma omp parallel num_threads(s->threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < heads * parts; task++) {
            const int64_t head = task % heads, part = task / heads, b = head / s->heads, h = head % s->heads;
            float *own = part ? scratch + ((part - 1) * heads + head) * size : dq + b * s->tokens * row + h * d;
            backward_part(s, b, h, part_begin(s, part, parts), part_begin(s, part + 1, parts), q, k, v, o, g, lse, own,
                          part ? d : row, dk, dv);
        }
        if (parts > 1)
#pragma omp for schedule(static)
            for (int64_t task = 0; task < heads * s->tokens; task++) {
                const int64_t head = task / s->tokens, t = task % s->tokens;
                float *to = dq + (head / s->heads * s->tokens + t) * row + head % s->heads * d;
                for (int64_t part = 1; part < parts; part++) {
                    if (t < part_begin(s, part, parts) || t >= seen_until(s, part_begin(s, part + 1, parts))) continue;
                    const float *from = scratch + ((part - 1) * heads + head) * size + t * d;
                    for (int64_t u = 0; u < d; u += LANES) store(to + u, load(to + u) + load(from + u));
                }
            }
    }
}
