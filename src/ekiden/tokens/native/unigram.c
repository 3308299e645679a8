/* The best segmentation of a text by a unigram model, in SentencePiece's own arithmetic: Viterbi search over a trie of the
   pieces, sums of scores in fp32. Compiled by `tokens.kernel` where there is a C compiler; `tokens.unigram_search` says why
   it is exact. */

#include <float.h>

#include "trie.h"

#if FLT_EVAL_METHOD != 0
#error "fp32 sums would be kept in a wider type"
#endif

typedef struct {
    float score;         /* of the best path that ends here */
    int32_t id, start;   /* its last piece; start -1: no path yet */
    int32_t next;
} Slot;

#define KEPT_IDS 5
#define AT_ZERO 255
#define LEAST 0x1p-10 /* a score nearer to 0, added to a sum below 2^17, need not be exact in double */

/* What a unit (text between two places that no piece spans) does to the sum before it. */
typedef struct {
    uint64_t key[KEY_WORDS]; /* the unit's bytes, its length in the last one; length 0: empty */
    float delta, reach;      /* what it adds to the sum; the most that any path in it does, without sign */
    uint8_t exponent, parity, count;
    int32_t ids[KEPT_IDS];
} Known;

typedef struct {
    Trie trie;
    int32_t *ids;
    float *scores;
    float unknown_score;
    int32_t unknown_id;
    float limit, kept;  /* sums beyond limit are set back to 0 (0: never), beyond kept nothing is kept */
    int32_t bytes[256]; /* ids of byte pieces; bytes[0] < 0: no byte fallback */
    uint8_t cuts[8192]; /* bit a << 8 | b: no piece holds bytes a and b side by side */
    Slot *slots;
    int64_t room;
    Known *known; /* NULL: nothing is kept */
    int64_t known_mask;
} Unigram;

void unigram_free(Unigram *m) {
    if (!m) return;
    free(m->trie.nodes);
    free(m->ids);
    free(m->scores);
    free(m->slots);
    free(m->known);
    free(m);
}

/* limit: see Unigram; known: units kept, a power of 2, or 0. */
Unigram *unigram_new(const uint8_t *bytes, const int64_t *ends, const int32_t *ids, const float *scores, int32_t count,
                     float unknown_score, int32_t unknown_id, const int32_t *byte_ids, const uint8_t *cuts,
                     float limit, int64_t known) {
    Unigram *m = calloc(1, sizeof(Unigram));
    if (!m) return NULL;
    m->ids = malloc(count * sizeof(int32_t));
    m->scores = malloc(count * sizeof(float));
    m->room = 1 << 12;
    m->slots = malloc(m->room * sizeof(Slot));
    m->known = known ? new_table(known * sizeof(Known)) : NULL;
    m->known_mask = known - 1;
    if (!m->ids || !m->scores || !m->slots || (known && !m->known) || !build_trie(&m->trie, bytes, ends, count)) {
        unigram_free(m);
        return NULL;
    }
    memcpy(m->ids, ids, count * sizeof(int32_t));
    memcpy(m->scores, scores, count * sizeof(float));
    memcpy(m->bytes, byte_ids, sizeof m->bytes);
    memcpy(m->cuts, cuts, sizeof m->cuts);
    m->unknown_score = unknown_score;
    m->unknown_id = unknown_id;
    m->limit = limit;
    m->kept = limit > 0 ? limit : 1 << 17;
    return m;
}

/* Write the ids of the best path to slot `end`, a place that every path goes through; return how many. */
static int64_t emit(Unigram *m, const uint8_t *text, int64_t end, int32_t *out, int *after_unknown) {
    Slot *slots = m->slots;
    int32_t *begin = out;
    for (int64_t at = end; at > 0; at = slots[at].start) slots[slots[at].start].next = (int32_t)at;
    for (int64_t at = 0; at < end;) {
        int64_t next = slots[at].next;
        int32_t id = slots[next].id;
        int unknown = id == m->unknown_id;
        if (unknown)
            out = put_unknown(m->bytes, id, text + at, next - at, out, *after_unknown);
        else
            *out++ = id;
        *after_unknown = unknown;
        at = next;
    }
    return out - begin;
}

static int grow_slots(Unigram *m, int64_t needed) {
    while (m->room < needed) m->room *= 2;
    Slot *slots = realloc(m->slots, m->room * sizeof(Slot));
    if (!slots) return 0;
    m->slots = slots;
    return 1;
}

/* What one unit's search showed: the sum after it, the farthest sum, whether another sum before it in the same binade
   would shift all these sums by the same amount; even: only one that differs by an even number of the binade's steps. */
typedef struct {
    float sum, farthest;
    int shifts, even;
} Found;

static inline Slot *slot_at(Unigram *m, int64_t place, int64_t *reach) {
    if (place > *reach) {
        if (place >= m->room && !grow_slots(m, place + 1)) return NULL;
        while (*reach < place) m->slots[++*reach].start = -1;
    }
    return &m->slots[place];
}

/* A path to a place, by one piece from a place that `here` is the sum of. */
static inline void offer(Slot *target, float here, float score, int32_t id, int32_t start, Found *found) {
    const double exact = (double)score + (double)here;
    const float sum = score + here;
    const double rest = exact - sum;
    /* Half-way: as far from the fp32 number on the other side. */
    if (rest != 0 && (float)(sum + 2 * rest) == sum + 2 * rest) found->even = 1;
    if (score > -LEAST) found->shifts = 0;
    if (sum < found->farthest) found->farthest = sum;
    if (target->start < 0 || sum > target->score) {
        target->score = sum;
        target->start = start;
        target->id = id;
    }
}

/* Search one unit of text that begins with `found->sum`. Returns the number of ids, -1 where memory ended.

   A sum of the fp32 x and a score is rounded to a multiple of the binade's step, of which x is one: so adding the same
   multiple to all sums changes no comparison, unless a sum leaves the binade. One half-way between two multiples is
   rounded to the even one: then the multiple that is added must be even. */
static int64_t search(Unigram *m, const uint8_t *text, int64_t size, int32_t *out, int *after_unknown, Found *found) {
    int32_t *begin = out;
    int64_t origin = 0, reach = 0; /* slots are of places from `origin`; reach: the last one with a slot */
    const Node *nodes = m->trie.nodes;
    found->farthest = found->sum;
    found->shifts = 1;
    found->even = 0;
    m->slots[0].score = found->sum;
    for (int64_t at = 0; at < size;) {
        if (at - origin == reach && at > origin) { /* all paths meet here: what is before is decided */
            out += emit(m, text + origin, reach, out, after_unknown);
            m->slots[0].score = m->slots[reach].score;
            origin = at;
            reach = 0;
        }
        float here = m->slots[at - origin].score;
        if (m->limit > 0 && (here > m->limit || here < -m->limit)) {
            for (int64_t i = at - origin; i <= reach; i++)
                if (i == at - origin || m->slots[i].start >= 0) m->slots[i].score -= here;
            here = 0;
            found->shifts = 0;
        }
        int64_t first = at + character_bytes(text[at]);
        int alone = 0;
        int32_t state = 0;
        if (first > size) first = size;
        for (int64_t end = at; end < size;) {
            int32_t next = nodes[state].base + text[end];
            if (nodes[next].check != state) break;
            state = next;
            end++;
            int32_t piece = nodes[state].value;
            if (piece < 0) continue;
            Slot *target = slot_at(m, end - origin, &reach);
            if (!target) return -1;
            offer(target, here, m->scores[piece], m->ids[piece], (int32_t)(at - origin), found);
            alone |= end == first;
        }
        if (!alone) {
            Slot *target = slot_at(m, first - origin, &reach);
            if (!target) return -1;
            offer(target, here, m->unknown_score, m->unknown_id, (int32_t)(at - origin), found);
            if (m->bytes[0] < 0) found->shifts = 0; /* its id depends on what is before the unit */
        }
        at = first;
    }
    out += emit(m, text + origin, size - origin, out, after_unknown);
    found->sum = m->slots[size - origin].score;
    return out - begin;
}

/* The binade of a sum, without sign; AT_ZERO for 0 itself. */
static inline uint8_t binade(float sum) {
    uint32_t bits;
    memcpy(&bits, &sum, 4);
    uint8_t exponent = bits >> 23 & 255;
    return sum == 0 ? AT_ZERO : exponent;
}

/* Whether a sum is an odd number of its binade's steps. */
static inline int odd(float sum) {
    uint32_t bits;
    memcpy(&bits, &sum, 4);
    return bits & 1;
}

enum { ANY, SEE_PARITY, ODD, EVEN };

static inline Known *bucket_of(const Unigram *m, uint64_t hash, uint8_t exponent, uint8_t parity) {
    const uint64_t slot = hash + (exponent << 2 | parity) * UINT64_C(0x9E3779B97F4A7C15);
    return &m->known[(slot ^ slot >> 32) & m->known_mask & ~(uint64_t)1];
}

/* The unit with this key after a sum of this binade and parity, or where it may be kept. */
static inline Known *place_of(const Unigram *m, const uint64_t *key, uint64_t hash, uint8_t exponent, uint8_t parity) {
    Known *known = bucket_of(m, hash, exponent, parity);
    for (int way = 0; way < 2; way++) {
        const Known *one = &known[way];
        int same = one->exponent == exponent && (parity ? one->parity == parity : one->parity <= SEE_PARITY);
        if (same && same_key(one->key, key)) return &known[way];
    }
    known[1] = known[0]; /* the older one goes */
    known->key[KEY_WORDS - 1] = 0;
    return known;
}

/* One unit after `*sum`, which becomes the sum after it. Returns the number of ids, -1 where memory ended. */
static int64_t encode_unit(Unigram *m, const uint8_t *text, const Unit *unit, float *sum, int32_t *out, int *after_unknown) {
    const float before = m->limit > 0 && (*sum > m->limit || *sum < -m->limit) ? 0 : *sum;
    const uint8_t exponent = binade(before), parity = odd(before) ? ODD : EVEN;
    Known *known = NULL;
    if (m->known && unit->length <= KEY_BYTES && before >= -m->kept) {
        known = place_of(m, unit->key, unit->hash, exponent, ANY);
        if (known->key[KEY_WORDS - 1] && known->parity == SEE_PARITY)
            known = place_of(m, unit->key, unit->hash, exponent, parity);
        if (known->key[KEY_WORDS - 1]) {
            const float far = before - known->reach; /* exact: multiples of one step, below 2^24 of them */
            if (exponent == AT_ZERO || (binade(far) == exponent && far >= -m->kept)) {
                for (int i = 0; i < KEPT_IDS; i++) out[i] = known->ids[i]; /* all: a copy of fixed size is faster */
                *sum = before + known->delta;
                *after_unknown = 0;
                return known->count;
            }
        }
    }
    Found found = {before, 0, 0, 0};
    const int64_t count = search(m, text + unit->at, unit->length, out, after_unknown, &found);
    *sum = found.sum;
    if (count < 0 || !known || !found.shifts || count > KEPT_IDS) return count;
    if (exponent != AT_ZERO && (binade(found.farthest) != exponent || found.farthest < -m->kept)) return count;
    if (found.even && known->parity <= SEE_PARITY) {
        memcpy(known->key, unit->key, sizeof known->key);
        known->exponent = exponent;
        known->parity = SEE_PARITY;
        known = place_of(m, unit->key, unit->hash, exponent, parity);
    }
    memcpy(known->key, unit->key, sizeof known->key);
    known->delta = found.sum - before;
    known->reach = before - found.farthest;
    known->exponent = exponent;
    known->parity = !found.even && known->parity <= SEE_PARITY ? ANY : parity;
    known->count = (uint8_t)count;
    memcpy(known->ids, out, count * sizeof(int32_t));
    return count;
}

/* One text; spaces stand for U+2581. Returns the number of ids, -1 where memory ended. */
static int64_t encode_text(Unigram *m, const uint8_t *text, int64_t size, const uint64_t *mix, int32_t *out) {
    const int32_t *begin = out;
    int after_unknown = 0;
    float sum = 0;
    Unit units[AHEAD];
    for (int64_t at = 0; at < size;) {
        const int ahead = next_units(m->cuts, text, size, &at, mix, units);
        const uint8_t exponent = binade(sum); /* seldom another one for the last of them */
        for (int i = 0; i < ahead && m->known; i++)
            if (units[i].length <= KEY_BYTES) __builtin_prefetch(bucket_of(m, units[i].hash, exponent, ANY));
        for (int i = 0; i < ahead; i++) {
            const int64_t count = encode_unit(m, text, &units[i], &sum, out, &after_unknown);
            if (count < 0) return -1;
            out += count;
        }
    }
    return out - begin;
}

/* Texts stand one after the other, text i before borders[i + 1], 64 bytes after them. Writes all ids and where each text's
   end; `out` has room for 3 ids a byte and 64 more. */
int64_t unigram_encode(Unigram *m, const uint8_t *data, const int64_t *borders, int64_t texts, const uint64_t *mix,
                       int32_t *out, int64_t *ends) {
    int64_t total = 0;
    for (int64_t i = 0; i < texts; i++) {
        int64_t count = encode_text(m, data + borders[i], borders[i + 1] - borders[i], mix, out + total);
        if (count < 0) return -1;
        ends[i] = total += count;
    }
    return total;
}
