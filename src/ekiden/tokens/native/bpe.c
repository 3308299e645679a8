/* The ids of a text by a BPE model, as SentencePiece gives them: of all neighbours that make a piece together, the two
   with the highest score are joined, the leftmost of equal ones, until none are left. Compiled by `tokens.kernel` where
   there is a C compiler; `tokens.bpe_merges` says why it is exact. */

#include "trie.h"

#define KEPT_IDS 7
#define SHORT 24 /* symbols up to which the next merge is looked for in all pairs; more need a heap */
#define NONE INT32_MAX

/* Two symbols and what they make. Symbols are numbers of the strings that can stand in a text on the way. */
typedef struct {
    uint64_t pair;        /* left << 32 | right */
    int32_t merged, rank; /* merged -1: empty; the lower the rank, the higher the score */
} Merge;

typedef struct {
    uint64_t key[KEY_WORDS]; /* the unit's bytes, its length in the last one; length 0: empty */
    int32_t count;
    int32_t ids[KEPT_IDS];
} Known;

typedef struct {
    int32_t symbol, at;   /* -1: a character of no piece; where in the unit it begins */
    int32_t before, next; /* neighbours in `heap_merges`, -1: none */
    int32_t merged, rank; /* with the next one; rank NONE: nothing */
} Place;

typedef struct {
    Trie trie;           /* values are symbols */
    int32_t *ids;        /* of symbols; -1: a character that is no piece */
    uint8_t *whole;      /* symbols that the user defined: taken first, and never merged */
    int any_whole;
    Merge *merges;
    uint64_t merge_mask;
    int32_t unknown_id;
    int32_t bytes[256];  /* ids of byte pieces; bytes[0] < 0: no byte fallback */
    uint8_t cuts[8192];  /* bit a << 8 | b: no piece holds bytes a and b side by side */
    Place *places;
    uint64_t *heap;
    int64_t room;
    Known *known;
    uint64_t known_mask;
} Bpe;

static inline uint64_t slot_of(const Bpe *m, uint64_t pair) {
    const uint64_t hash = pair * UINT64_C(0x9E3779B97F4A7C15);
    return (hash ^ hash >> 32) & m->merge_mask;
}

/* Put what a symbol and the one after it make into `place`. */
static inline void look_up(const Bpe *m, int32_t left, int32_t right, Place *place) {
    place->rank = NONE;
    if (left < 0 || right < 0) return;
    const uint64_t pair = (uint64_t)left << 32 | (uint32_t)right;
    for (uint64_t slot = slot_of(m, pair); m->merges[slot].merged >= 0; slot = (slot + 1) & m->merge_mask) {
        if (m->merges[slot].pair == pair) {
            place->merged = m->merges[slot].merged;
            place->rank = m->merges[slot].rank;
            return;
        }
    }
}

/* Go through the ways to make each piece of two symbols: add them to the table (`add`), or return how many there are. */
static int64_t ways(Bpe *m, const uint8_t *bytes, const int64_t *ends, const int32_t *ranks, int32_t count, int add) {
    int64_t found = 0;
    for (int32_t i = 0; i < count; i++) {
        const uint8_t *piece = bytes + (i ? ends[i - 1] : 0);
        const int64_t size = ends[i] - (i ? ends[i - 1] : 0);
        if (m->whole[i] || m->ids[i] < 0) continue;
        for (int64_t at = character_bytes(piece[0]); at < size; at += character_bytes(piece[at])) {
            int32_t left = trie_value(&m->trie, piece, at), right = trie_value(&m->trie, piece + at, size - at);
            if (left < 0 || right < 0 || m->whole[left] || m->whole[right]) continue;
            found++;
            if (!add) continue;
            const uint64_t pair = (uint64_t)left << 32 | (uint32_t)right;
            uint64_t slot = slot_of(m, pair);
            while (m->merges[slot].merged >= 0) slot = (slot + 1) & m->merge_mask;
            m->merges[slot] = (Merge){pair, i, ranks[i]};
        }
    }
    return found;
}

void bpe_free(Bpe *m) {
    if (!m) return;
    free(m->trie.nodes);
    free(m->ids);
    free(m->whole);
    free(m->merges);
    free(m->places);
    free(m->heap);
    free(m->known);
    free(m);
}

static int grow_places(Bpe *m, int64_t needed) {
    int64_t room = m->room ? m->room : 1 << 10;
    while (room < needed) room *= 2;
    Place *places = realloc(m->places, room * sizeof(Place));
    if (!places) return 0;
    m->places = places;
    uint64_t *heap = realloc(m->heap, 2 * room * sizeof(uint64_t));
    if (!heap) return 0;
    m->heap = heap;
    m->room = room;
    return 1;
}

static int fill(Bpe *m, const uint8_t *bytes, const int64_t *ends, const int32_t *ids, const int32_t *ranks,
                const uint8_t *whole, int32_t count, int64_t known) {
    m->ids = malloc((count + 1) * sizeof(int32_t));
    m->whole = malloc(count + 1);
    m->known = new_table(known * sizeof(Known));
    m->known_mask = known - 1;
    if (!m->ids || !m->whole || !m->known || !grow_places(m, 1) || !build_trie(&m->trie, bytes, ends, count)) return 0;
    memcpy(m->ids, ids, count * sizeof(int32_t));
    memcpy(m->whole, whole, count);
    for (int32_t i = 0; i < count; i++) m->any_whole |= whole[i];
    int64_t needed = 2 * ways(m, bytes, ends, ranks, count, 0), slots = 2;
    while (slots < needed) slots *= 2;
    m->merges = malloc(slots * sizeof(Merge));
    if (!m->merges) return 0;
    for (int64_t i = 0; i < slots; i++) m->merges[i].merged = -1;
    m->merge_mask = slots - 1;
    ways(m, bytes, ends, ranks, count, 1);
    return 1;
}

/* Strings are sorted by their bytes, all different and none empty: pieces, and characters of theirs that are none (id -1).
   known: units kept, a power of 2 from 2 on. */
Bpe *bpe_new(const uint8_t *bytes, const int64_t *ends, const int32_t *ids, const int32_t *ranks, const uint8_t *whole,
             int32_t count, int32_t unknown_id, const int32_t *byte_ids, const uint8_t *cuts, int64_t known) {
    Bpe *m = calloc(1, sizeof(Bpe));
    if (!m) return NULL;
    memcpy(m->bytes, byte_ids, sizeof m->bytes);
    memcpy(m->cuts, cuts, sizeof m->cuts);
    m->unknown_id = unknown_id;
    if (!fill(m, bytes, ends, ids, ranks, whole, count, known)) {
        bpe_free(m);
        return NULL;
    }
    return m;
}

/* Divide a unit into the symbols it begins with: what the user defined (the longest), else characters. Returns how many. */
static int64_t divide(const Bpe *m, const uint8_t *text, int64_t size, Place *places) {
    int64_t count = 0;
    for (int64_t at = 0; at < size;) {
        int64_t end = at + character_bytes(text[at]);
        if (end > size) end = size;
        int32_t symbol = trie_value(&m->trie, text + at, end - at);
        if (m->any_whole) {
            int32_t state = 0;
            for (int64_t i = at; i < size; i++) {
                int32_t next = m->trie.nodes[state].base + text[i];
                if (m->trie.nodes[next].check != state) break;
                state = next;
                int32_t value = m->trie.nodes[state].value;
                if (value >= 0 && m->whole[value]) symbol = value, end = i + 1;
            }
        }
        places[count].symbol = symbol;
        places[count].at = (int32_t)at;
        count++;
        at = end;
    }
    return count;
}

/* Merge few symbols, closing the gaps; returns how many are left. */
static int64_t short_merges(const Bpe *m, Place *places, int64_t count) {
    for (int64_t i = 0; i + 1 < count; i++) look_up(m, places[i].symbol, places[i + 1].symbol, &places[i]);
    while (count > 1) {
        int64_t best = 0;
        for (int64_t i = 1; i + 1 < count; i++)
            if (places[i].rank < places[best].rank) best = i;
        if (places[best].rank == NONE) break;
        places[best].symbol = places[best].merged;
        count--;
        for (int64_t i = best + 1; i < count; i++) places[i] = places[i + 1];
        if (best > 0) look_up(m, places[best - 1].symbol, places[best].symbol, &places[best - 1]);
        if (best + 1 < count) look_up(m, places[best].symbol, places[best + 1].symbol, &places[best]);
    }
    return count;
}

static void push(uint64_t *heap, int64_t *size, uint64_t value) {
    int64_t at = (*size)++;
    for (; at > 0 && heap[(at - 1) / 2] > value; at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
    heap[at] = value;
}

static uint64_t pop(uint64_t *heap, int64_t *size) {
    const uint64_t top = heap[0], last = heap[--*size];
    int64_t at = 0;
    for (int64_t child = 1; child < *size; child = 2 * at + 1) {
        if (child + 1 < *size && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= last) break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = last;
    return top;
}

/* Merge many symbols; returns how many are left, gaps closed.

   Heap entries are rank << 32 | place. One is out of date where the place now makes a pair of another rank, or none; of the
   same rank it may stand for the pair that is there now, which has the same turn. At most 2 * count are in the heap at once:
   count - 1 pairs to begin with, and every merge takes one out and puts two in. */
static int64_t heap_merges(Bpe *m, int64_t count) {
    Place *places = m->places;
    int64_t size = 0, left = 0;
    for (int64_t i = 0; i < count; i++) {
        places[i].before = (int32_t)i - 1;
        places[i].next = i + 1 < count ? (int32_t)i + 1 : -1;
        places[i].rank = NONE;
        if (i + 1 < count) look_up(m, places[i].symbol, places[i + 1].symbol, &places[i]);
        if (places[i].rank != NONE) push(m->heap, &size, (uint64_t)places[i].rank << 32 | (uint64_t)i);
    }
    while (size) {
        const uint64_t top = pop(m->heap, &size);
        const int32_t at = (int32_t)(top & UINT32_MAX);
        Place *here = &places[at];
        if (here->rank != (int32_t)(top >> 32)) continue;
        Place *gone = &places[here->next];
        here->symbol = here->merged;
        here->next = gone->next;
        here->rank = gone->rank = NONE;
        if (here->next >= 0) {
            places[here->next].before = at;
            look_up(m, here->symbol, places[here->next].symbol, here);
            if (here->rank != NONE) push(m->heap, &size, (uint64_t)here->rank << 32 | (uint64_t)at);
        }
        if (here->before >= 0) {
            Place *before = &places[here->before];
            look_up(m, before->symbol, here->symbol, before);
            if (before->rank != NONE) push(m->heap, &size, (uint64_t)before->rank << 32 | (uint64_t)here->before);
        }
    }
    for (int32_t i = 0; i >= 0; i = places[i].next) places[left++] = places[i];
    return left;
}

/* One unit of text; returns the number of ids, -1 where memory ended. plain: set to 0 where they depend on what is before. */
static int64_t encode_unit(Bpe *m, const uint8_t *text, int64_t size, int32_t *out, int *after_unknown, int *plain) {
    const int32_t *begin = out;
    if (size > m->room && !grow_places(m, size)) return -1;
    Place *places = m->places;
    int64_t count = divide(m, text, size, places);
    count = count <= SHORT ? short_merges(m, places, count) : heap_merges(m, count);
    for (int64_t i = 0; i < count; i++) {
        const int32_t id = places[i].symbol < 0 ? -1 : m->ids[places[i].symbol];
        const int64_t at = places[i].at, end = i + 1 < count ? places[i + 1].at : size;
        if (id >= 0) {
            *out++ = id;
        } else {
            out = put_unknown(m->bytes, m->unknown_id, text + at, end - at, out, *after_unknown);
            if (m->bytes[0] < 0) *plain = 0;
        }
        *after_unknown = id < 0;
    }
    return out - begin;
}

/* Ids of a unit that has none kept yet, or cannot have; -1 where memory ended. known: where they are kept, NULL: nowhere. */
static int64_t learn(Bpe *m, const uint8_t *text, int64_t size, const uint64_t *key, Known *known, int32_t *out,
                     int *after_unknown) {
    int plain = 1;
    const int64_t count = encode_unit(m, text, size, out, after_unknown, &plain);
    if (known && plain && count >= 0 && count <= KEPT_IDS) {
        known[1] = known[0]; /* the older one goes */
        memcpy(known->key, key, sizeof known->key);
        known->count = (int32_t)count;
        memcpy(known->ids, out, count * sizeof(int32_t));
    }
    return count;
}

static inline Known *place_of(const Bpe *m, uint64_t hash) {
    return &m->known[hash >> 20 & m->known_mask & ~(uint64_t)1];
}

/* One text; spaces stand for U+2581. Returns the number of ids, -1 where memory ended. */
static int64_t encode_text(Bpe *m, const uint8_t *text, int64_t size, const uint64_t *mix, int32_t *out) {
    const int32_t *begin = out;
    int after_unknown = 0;
    Unit units[AHEAD];
    for (int64_t at = 0; at < size;) {
        const int ahead = next_units(m->cuts, text, size, &at, mix, units);
        for (int i = 0; i < ahead; i++)
            if (units[i].length <= KEY_BYTES) __builtin_prefetch(place_of(m, units[i].hash));
        for (int i = 0; i < ahead; i++) {
            const Unit *unit = &units[i];
            Known *known = unit->length <= KEY_BYTES ? place_of(m, unit->hash) : NULL;
            const Known *same = known && same_key(known->key, unit->key) ? known : NULL;
            if (known && !same && same_key(known[1].key, unit->key)) same = known + 1;
            if (same) {
                for (int j = 0; j < KEPT_IDS; j++) out[j] = same->ids[j]; /* all: a copy of fixed size is faster */
                out += same->count;
                after_unknown = 0;
                continue;
            }
            const int64_t count = learn(m, text + unit->at, unit->length, unit->key, known, out, &after_unknown);
            if (count < 0) return -1;
            out += count;
        }
    }
    return out - begin;
}

/* Texts stand one after the other, text i before borders[i + 1], 64 bytes after them. Writes all ids and where each text's
   end; `out` has room for 3 ids a byte and 64 more. */
int64_t bpe_encode(Bpe *m, const uint8_t *data, const int64_t *borders, int64_t texts, const uint64_t *mix, int32_t *out,
                   int64_t *ends) {
    int64_t total = 0;
    for (int64_t i = 0; i < texts; i++) {
        int64_t count = encode_text(m, data + borders[i], borders[i + 1] - borders[i], mix, out + total);
        if (count < 0) return -1;
        ends[i] = total += count;
    }
    return total;
}
