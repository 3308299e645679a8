/* What the exact encoders share: a trie of the pieces, where a text may be cut, the key of a unit (text between two
   places that no piece spans), and the ids of an unknown character. Compiled by `tokens.kernel`. */

#ifndef EKIDEN_TRIE_H
#define EKIDEN_TRIE_H

#define _DEFAULT_SOURCE /* madvise */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define KEY_WORDS 4
#define KEY_BYTES (8 * KEY_WORDS - 1)
#define ONES 255, 255, 255, 255, 255, 255, 255, 255

/* -- trie: a double array; state s goes by byte c to base[s] + c where check says so ------------------------ */

typedef struct {
    int32_t base, check, value; /* value: index of the piece that ends here, or -1 */
} Node;

typedef struct {
    Node *nodes;
    int64_t size;
} Trie;

static int grow_nodes(Trie *m, int64_t needed) {
    if (needed <= m->size) return 1;
    int64_t size = m->size ? m->size : 1024;
    while (size < needed) size *= 2;
    Node *nodes = realloc(m->nodes, size * sizeof(Node));
    if (!nodes) return 0;
    for (int64_t i = m->size; i < size; i++) nodes[i] = (Node){0, -1, -1};
    m->nodes = nodes;
    m->size = size;
    return 1;
}

typedef struct {
    int32_t low, high, depth, state; /* pieces [low, high) share `depth` bytes and are at `state` */
} Range;

/* Pieces are sorted by their bytes, all different and none empty. */
static int build_trie(Trie *m, const uint8_t *bytes, const int64_t *ends, int32_t count) {
    int64_t first_free = 1, stacked = 0, room = 1 << 16;
    Range *stack = malloc(room * sizeof(Range));
    if (!stack || !grow_nodes(m, 2048)) { free(stack); return 0; }
    m->nodes[0].check = 0;
    stack[stacked++] = (Range){0, count, 0, 0};
    while (stacked) {
        Range range = stack[--stacked];
        int32_t at = range.low, children = 0, firsts[257];
        uint8_t letters[256];
        if (ends[at] - (at ? ends[at - 1] : 0) == range.depth) m->nodes[range.state].value = at++;
        for (int32_t i = at; i < range.high; i++) {
            uint8_t letter = bytes[(i ? ends[i - 1] : 0) + range.depth];
            if (!children || letters[children - 1] != letter) {
                letters[children] = letter;
                firsts[children++] = i;
            }
        }
        if (!children) continue;
        firsts[children] = range.high;
        int64_t base = 0, tried = 0;
        for (int64_t place = first_free; !base; place++) {
            if (!grow_nodes(m, place + 512)) { free(stack); return 0; }
            if (m->nodes[place].check >= 0) { tried++; continue; }
            if (place <= letters[0]) continue;
            base = place - letters[0];
            for (int32_t i = 1; i < children && base; i++)
                if (m->nodes[base + letters[i]].check >= 0) base = 0;
            /* A stretch that is nearly full is not searched again. */
            if (base && 20 * tried >= 19 * (place - first_free)) first_free = place;
        }
        m->nodes[range.state].base = (int32_t)base;
        for (int32_t i = 0; i < children; i++) m->nodes[base + letters[i]].check = range.state;
        if (stacked + children > room) {
            room *= 2;
            Range *more = realloc(stack, room * sizeof(Range));
            if (!more) { free(stack); return 0; }
            stack = more;
        }
        for (int32_t i = 0; i < children; i++)
            stack[stacked++] = (Range){firsts[i], firsts[i + 1], range.depth + 1, (int32_t)(base + letters[i])};
    }
    free(stack);
    return 1;
}

/* The value of a string, -1 where it has none. */
static inline int32_t trie_value(const Trie *m, const uint8_t *text, int64_t size) {
    int32_t state = 0;
    for (int64_t i = 0; i < size; i++) {
        int32_t next = m->nodes[state].base + text[i];
        if (m->nodes[next].check != state) return -1;
        state = next;
    }
    return m->nodes[state].value;
}

/* -- texts ---------------------------------------------------------------------------------------------------- */

static inline int character_bytes(uint8_t first) {
    return "\1\1\1\1\1\1\1\1\1\1\1\1\2\2\3\4"[first >> 4];
}

static inline int cut_between(const uint8_t *cuts, uint8_t left, uint8_t right) {
    return cuts[left << 5 | right >> 3] >> (right & 7) & 1;
}

/* The first `length` bytes at `data`, KEY_BYTES at most, as a key (8 * KEY_WORDS bytes may be read); its hash. */
static inline uint64_t key_of(const uint8_t *data, int64_t length, const uint64_t *mix, uint64_t *key) {
    static const uint8_t mask[2 * KEY_BYTES + 1] = {ONES, ONES, ONES, 255, 255, 255, 255, 255, 255, 255};
    uint64_t kept[KEY_WORDS], hash = 0;
    memcpy(key, data, sizeof kept);
    memcpy(kept, mask + KEY_BYTES - length, sizeof kept);
    for (int i = 0; i < KEY_WORDS; i++) key[i] &= kept[i];
    key[KEY_WORDS - 1] |= (uint64_t)length << 56;
    for (int i = 0; i < KEY_WORDS; i++) hash += key[i] * mix[i];
    hash ^= hash >> 32;
    return hash * mix[0];
}

static inline int same_key(const uint64_t *one, const uint64_t *other) {
    uint64_t differ = 0;
    for (int i = 0; i < KEY_WORDS; i++) differ |= one[i] ^ other[i];
    return !differ;
}

/* Text between two places that no piece spans. Longer than KEY_BYTES: without a key. */
typedef struct {
    uint64_t key[KEY_WORDS], hash;
    int64_t at, length;
} Unit;

#define AHEAD 32

/* Find the next units of a text from `*at` on, AHEAD at most; return how many. As many are found before the first of them is
   looked up in a table that is larger than a processor's caches: its lines arrive meanwhile. */
static inline int next_units(const uint8_t *cuts, const uint8_t *text, int64_t size, int64_t *at, const uint64_t *mix,
                             Unit *units) {
    int count = 0;
    int64_t stop = *at;
    for (; count < AHEAD && stop < size; count++) {
        Unit *unit = &units[count];
        unit->at = stop++;
        while (stop < size && !cut_between(cuts, text[stop - 1], text[stop])) stop++;
        unit->length = stop - unit->at;
        if (unit->length <= KEY_BYTES) unit->hash = key_of(text + unit->at, unit->length, mix, unit->key);
    }
    *at = stop;
    return count;
}

/* A table of zeros that begins at a cache line, and where it is large, on large pages if the system has them: random places
   of 32 MB are looked at, and each would cost a walk through the table of small pages too. Freed by `free`. */
static inline void *new_table(int64_t bytes) {
    const int64_t large = 2 << 20, step = bytes < large ? 64 : large;
    const int64_t size = (bytes + step - 1) / step * step;
    void *table = aligned_alloc(step, size);
    if (!table) return NULL;
#ifdef MADV_HUGEPAGE
    if (step == large) madvise(table, size, MADV_HUGEPAGE);
#endif
    return memset(table, 0, size);
}

/* Write the ids of a character that is no piece; return where they end. A space stands for U+2581. */
static inline int32_t *put_unknown(const int32_t *byte_ids, int32_t unknown_id, const uint8_t *text, int64_t size,
                                   int32_t *out, int after_unknown) {
    if (byte_ids[0] < 0) {
        if (!after_unknown) *out++ = unknown_id; /* neighbouring unknown characters are one id */
    } else if (text[0] == ' ') {
        *out++ = byte_ids[0xE2];
        *out++ = byte_ids[0x96];
        *out++ = byte_ids[0x81];
    } else {
        for (int64_t i = 0; i < size; i++) *out++ = byte_ids[text[i]];
    }
    return out;
}

#endif
