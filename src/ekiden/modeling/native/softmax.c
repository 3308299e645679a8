/* Cross-entropy of rows of logits, and its gradient in their place. */
#include "vector.h"

/* logits [rows, pieces] with `stride` floats a row; losses [rows] = log sum exp(z) - z[target]. With `write` the logits become
   softmax(z) - onehot(target). Each row is read three times, from the cache. */
void softmax_minus_target(float *logits, int64_t rows, int64_t pieces, int64_t stride, const int64_t *targets, float *losses,
                          int64_t write, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        float *z = logits + row * stride, top = z[0], sum = 0;
        const int64_t whole = pieces / (4 * LANES) * 4 * LANES;
        vec tops[4] = {all(z[0]), all(z[0]), all(z[0]), all(z[0])}, sums[4] = {{0}};
        for (int64_t i = 0; i < whole; i += 4 * LANES)
            for (int j = 0; j < 4; j++) tops[j] = larger(load(z + i + j * LANES), tops[j]);
        for (int j = 0; j < 4; j++)
            for (int lane = 0; lane < LANES; lane++) top = fmaxf(top, tops[j][lane]);
        for (int64_t i = whole; i < pieces; i++) top = fmaxf(top, z[i]);
        const float at_target = z[targets[row]] - top;
        for (int64_t i = 0; i < whole; i += 4 * LANES)
            for (int j = 0; j < 4; j++) {
                vec e = vexp(load(z + i + j * LANES) - all(top));
                sums[j] += e;
                store(z + i + j * LANES, e);
            }
        for (int64_t i = whole; i < pieces; i++) {
            z[i] = vexp(all(z[i] - top))[0];
            sum += z[i];
        }
        vec total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        for (int lane = 0; lane < LANES; lane++) sum += total[lane];
        losses[row] = logf(sum) - at_target;
        if (!write) continue;
        const float share = 1.0f / sum;
        for (int64_t i = 0; i < whole; i += LANES) store(z + i, load(z + i) * all(share));
        for (int64_t i = whole; i < pieces; i++) z[i] *= share;
        z[targets[row]] -= 1.0f;
    }
}
