/* Vectors of floats as wide as the processor's registers, exp, and products of small matrices that stay in the cache.

   GCC's and Clang's vector extensions, so that one source serves AVX-512, AVX2 and others. Every sum is taken in an order
   that depends on the shapes alone and not on the number of threads. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec load(const float *from) { return *(const vec *)from; }
INLINE void store(float *to, vec value) { *(vec *)to = value; }
INLINE vec all(float value) { return value - (vec){0}; }
INLINE vec choose(ivec condition, vec yes, vec no) { return (vec)((condition & (ivec)yes) | (~condition & (ivec)no)); }
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }

/* exp(x) for x up to 88; 0 below -87.3, where the result would be a slow denormal number. 2^n e^r with |r| up to ln(2) / 2,
   e^r by its series to r^7 / 7!, whose rest is 5e-9. */
INLINE vec vexp(vec x) {
    const vec magic = all(12582912.0f); /* 1.5 x 2^23: what is added to it is rounded to a whole number */
    vec shifted = x * all(1.44269504f) + magic;
    vec n = shifted - magic;
    vec r = x - n * all(0.693145751953125f); /* ln 2 in two parts, the first exact in products with n */
    r = r - n * all(1.42860677e-6f);
    vec y = all(1.0f / 5040);
    y = y * r + all(1.0f / 720);
    y = y * r + all(1.0f / 120);
    y = y * r + all(1.0f / 24);
    y = y * r + all(1.0f / 6);
    y = y * r + all(0.5f);
    y = y * r + all(1.0f);
    y = y * r + all(1.0f);
    ivec power = ((ivec)shifted - (ivec)magic + 127) << 23;
    return choose(x < all(-87.3f), (vec){0}, y * (vec)power); /* a product, in which NaN stays NaN */
}

/* C[ROWS, VECTORS x LANES] (+)= sum over k of A[i a_row + k a_step] B[k, :], the sums in registers. A macro, since arrays whose
   size is an argument live in memory. */
#define TILE(ROWS, VECTORS)                                                                                          \
    INLINE void tile_##ROWS##_##VECTORS(int64_t depth, const float *a, int64_t a_row, int64_t a_step, const float *b, \
                                        int64_t b_row, float *c, int64_t c_row, const int add) {                     \
        vec sum[ROWS][VECTORS];                                                                                      \
        for (int i = 0; i < ROWS; i++)                                                                               \
            for (int j = 0; j < VECTORS; j++) sum[i][j] = add ? load(c + i * c_row + j * LANES) : (vec){0};          \
        for (int64_t k = 0; k < depth; k++)                                                                          \
            for (int i = 0; i < ROWS; i++)                                                                           \
                for (int j = 0; j < VECTORS; j++)                                                                    \
                    sum[i][j] += all(a[i * a_row + k * a_step]) * load(b + k * b_row + j * LANES);                   \
        for (int i = 0; i < ROWS; i++)                                                                               \
            for (int j = 0; j < VECTORS; j++) store(c + i * c_row + j * LANES, sum[i][j]);                           \
    }
#if defined(__AVX512F__)
TILE(6, 4) /* 24 of 32 registers hold sums */
TILE(12, 2)
TILE(12, 1)
TILE(4, 4) /* what is left of 64 rows */
TILE(4, 2)
TILE(4, 1)
#define WIDE_ROWS 6
#define NARROW_ROWS 12
#else
TILE(4, 4)
TILE(2, 4) /* 8 of 16 */
TILE(4, 2)
TILE(4, 1)
#define WIDE_ROWS 2
#define NARROW_ROWS 4
#endif
TILE(1, 4)
TILE(1, 2)
TILE(1, 1)

#define STRIPS(ROWS, VECTORS) STRIPS_OF(ROWS, VECTORS)
#define STRIPS_OF(ROWS, VECTORS)                                                                                     \
    do {                                                                                                             \
        int64_t i = 0;                                                                                               \
        for (; i + ROWS <= m; i += ROWS)                                                                             \
            tile_##ROWS##_##VECTORS(depth, a + i * a_row, a_row, a_step, b + j, b_row, c + i * c_row + j, c_row, add); \
        for (; i + 4 <= m; i += 4)                                                                                   \
            tile_4_##VECTORS(depth, a + i * a_row, a_row, a_step, b + j, b_row, c + i * c_row + j, c_row, add);        \
        for (; i < m; i++)                                                                                           \
            tile_1_##VECTORS(depth, a + i * a_row, a_row, a_step, b + j, b_row, c + i * c_row + j, c_row, add);        \
    } while (0)

/* C[m, n] (+)= A B for n a multiple of LANES. */
INLINE void product(int64_t m, int64_t n, int64_t depth, const float *a, int64_t a_row, int64_t a_step, const float *b,
                    int64_t b_row, float *c, int64_t c_row, const int add) {
    int64_t j = 0;
    for (; j + 4 * LANES <= n; j += 4 * LANES) STRIPS(WIDE_ROWS, 4);
    for (; j + 2 * LANES <= n; j += 2 * LANES) STRIPS(NARROW_ROWS, 2);
    for (; j < n; j += LANES) STRIPS(NARROW_ROWS, 1);
}
