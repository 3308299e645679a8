/* Parts of a block over rows of numbers: GELU behind a bias, the gradients of norms, sums of columns; all fp32, each array
   read once.

   Sums over rows are taken in parts of PART rows, which follow the shape and not the number of threads, and then added in order. */
#include "vector.h"

#define PART 128

INLINE int64_t parts_of(int64_t rows) { return (rows + PART - 1) / PART; }
INLINE int64_t end_of(int64_t part, int64_t rows) { return (part + 1) * PART < rows ? (part + 1) * PART : rows; }

/* to[n] = sum of from[parts, n] over parts. */
static void add_parts(float *to, const float *from, int64_t parts, int64_t n) {
    memcpy(to, from, sizeof(float) * n);
    for (int64_t part = 1; part < parts; part++)
        for (int64_t i = 0; i < n; i++) to[i] += from[part * n + i];
}

/* sums[n] = sum of x[rows, n] over rows; n a multiple of LANES. parts: [ceil(rows / PART), n], scratch. */
void column_sums(const float *x, int64_t rows, int64_t n, float *sums, float *parts, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < parts_of(rows); part++) {
        float *to = parts + part * n;
        int64_t row = part * PART, end = end_of(part, rows);
        memset(to, 0, sizeof(float) * n);
        for (; row + 4 <= end; row += 4)
            for (int64_t i = 0; i < n; i += LANES) {
                const float *from = x + row * n + i;
                store(to + i, load(to + i) + ((load(from) + load(from + n)) + (load(from + 2 * n) + load(from + 3 * n))));
            }
        for (; row < end; row++)
            for (int64_t i = 0; i < n; i += LANES) store(to + i, load(to + i) + load(x + row * n + i));
    }
    add_parts(sums, parts, parts_of(rows), n);
}

#define TWICE 1.5957691216057308f /* 2 sqrt(2 / pi) */
#define CUBIC 0.044715f

/* x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), which is GELU's form with a tanh. */
INLINE vec gate_of(vec x) {
    const vec power = -(x * (all(TWICE) + all(TWICE * CUBIC) * x * x));
    return all(1.0f) / (all(1.0f) + choose(power > all(87.0f), all(INFINITY), vexp(power)));
}

/* y[rows, n] = gelu(z + bias[n]); n a multiple of LANES. */
void bias_gelu(const float *z, const float *bias, int64_t rows, int64_t n, float *y, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < n; i += LANES) {
            vec x = load(z + row * n + i) + load(bias + i);
            store(y + row * n + i, x * gate_of(x));
        }
}

/* dz[rows, n] and dbias[n] from the gradient g of `bias_gelu`'s result. parts: as in `column_sums`. */
void bias_gelu_backward(const float *g, const float *z, const float *bias, int64_t rows, int64_t n, float *dz, float *dbias,
                        float *parts, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < parts_of(rows); part++) {
        float *sum = parts + part * n;
        memset(sum, 0, sizeof(float) * n);
        for (int64_t row = part * PART; row < end_of(part, rows); row++)
            for (int64_t i = 0; i < n; i += LANES) {
                vec x = load(z + row * n + i) + load(bias + i), gate = gate_of(x);
                vec inner = all(TWICE) + all(3 * TWICE * CUBIC) * x * x;
                vec d = load(g + row * n + i) * (gate + x * gate * (all(1.0f) - gate) * inner);
                store(dz + row * n + i, d);
                store(sum + i, load(sum + i) + d);
            }
    }
    add_parts(dbias, parts, parts_of(rows), n);
}

INLINE float across(vec v) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += v[lane];
    return sum;
}

/* Gradients of y = (x - mean) scale gain (+ bias), scale = 1 / sqrt(variance + eps), over rows of n, a multiple of LANES.

   mean: [rows], or NULL for root mean squares without a mean. dgain, dbias [n]; parts: [2, ceil(rows / PART), n], scratch. */
void norm_backward(const float *g, const float *x, const float *mean, const float *scale, const float *gain, int64_t rows,
                   int64_t n, float *dx, float *dgain, float *dbias, float *parts, int64_t threads) {
    const int64_t count = parts_of(rows);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < count; part++) {
        float *gains = parts + part * n, *biases = parts + (count + part) * n;
        memset(gains, 0, sizeof(float) * n), memset(biases, 0, sizeof(float) * n);
        for (int64_t row = part * PART; row < end_of(part, rows); row++) {
            const float *grad = g + row * n, *in = x + row * n;
            const vec middle = all(mean ? mean[row] : 0.0f), factor = all(scale[row]);
            vec plain = {0}, along = {0};
            for (int64_t i = 0; i < n; i += LANES) {
                vec unit = (load(in + i) - middle) * factor, one = load(grad + i), scaled = one * load(gain + i);
                plain += scaled;
                along += scaled * unit;
                store(gains + i, load(gains + i) + one * unit);
                store(biases + i, load(biases + i) + one);
            }
            const vec shift = all(mean ? across(plain) / n : 0.0f), share = all(across(along) / n);
            for (int64_t i = 0; i < n; i += LANES) {
                vec unit = (load(in + i) - middle) * factor;
                store(dx + row * n + i, factor * (load(grad + i) * load(gain + i) - shift - unit * share));
            }
        }
    }
    add_parts(dgain, parts, count, n);
    add_parts(dbias, parts + count * n, count, n);
}
