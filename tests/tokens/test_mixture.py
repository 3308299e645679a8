"""The order of the data: exact shares, permutations, any starting point, never another order than before."""

from __future__ import annotations

import hashlib
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ekiden.errors import UsageError, UserError
from ekiden.tokens.mixture import BLOCK, Mixture, permute
from ekiden.tokens.shares import GIFT_EPOCHS, _levelled, plan_mixture

AWKWARD = [
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    97,
    127,
    128,
    129,
    255,
    256,
    257,
    1009,
    4095,
    4096,
    4097,
    65537,
]
LANGUAGES = {"english": 1_000_003, "hindi": 200_000, "konkani": 5_000, "dutch": 300}

sizes = st.dictionaries(st.text(min_size=1, max_size=8), st.integers(1, 10**13), min_size=1, max_size=12)


def one_language(windows: int, length: int = 8, spare: int = 0, seed: int = 0) -> Mixture:
    return Mixture(("x",), (BLOCK,), (windows * length + 1 + spare,), length, seed)


def numbers(first: int, count: int) -> np.ndarray:
    return np.arange(first, first + count, dtype=np.uint64)


def permuted(size: int, key: int) -> np.ndarray:
    return permute(
        numbers(0, size), np.full(size, size, dtype=np.uint64), np.full(size, key, dtype=np.uint64)
    )


# -- shares --------------------------------------------------------------------------------------------------


@given(sizes, st.floats(0, 3), st.integers(-(2**70), 2**70), st.integers(0, 2**40))
def test_every_block_holds_the_exact_quota_of_each_language(tokens, temperature, seed, block):
    mixture = plan_mixture(tokens, 128, seed, temperature)
    assert set(mixture.languages) == set(tokens)
    languages, _, _ = mixture.locate(numbers(block * BLOCK, BLOCK))
    assert tuple(np.bincount(languages, minlength=len(tokens))) == mixture.quotas


@given(sizes, st.floats(0, 2))
def test_a_quota_is_the_share_rounded_and_never_zero(tokens, temperature):
    mixture = plan_mixture(tokens, 128, 0, temperature)
    weights = [n**temperature for n in mixture.tokens]
    shares = [weight / sum(weights) * BLOCK for weight in weights]
    raised = sum(1 - share for share in shares if share < 1)
    for quota, share in zip(mixture.quotas, shares):
        # What lifts the tiny ones to one sample is taken from the others.
        assert max(1, share - raised - 1) <= quota + 1e-6 and quota < max(1, share) + 1 + 1e-6


def test_temperature_goes_from_equal_to_proportional():
    tokens = {"large": 3_000_000, "small": 1_000_000}
    assert plan_mixture(tokens, 8, 0, temperature=0).quotas == (2048, 2048)
    assert plan_mixture(tokens, 8, 0, temperature=1).quotas == (3072, 1024)
    half = plan_mixture(tokens, 8, 0, 0.5).shares()
    assert half["large"] / half["small"] == pytest.approx(3**0.5, rel=1e-3)


def test_many_tiny_languages_beside_a_huge_one():
    mixture = plan_mixture({"huge": 10**15} | {f"tiny{i}": 1 for i in range(100)}, 1024, 0, temperature=1)
    assert mixture.quotas == (BLOCK - 100, *[1] * 100)
    assert plan_mixture({f"{i}": 1 for i in range(BLOCK)}, 8, 0).quotas == (1,) * BLOCK
    with pytest.raises(UserError, match="4097 languages"):
        plan_mixture({f"{i}": 1 for i in range(BLOCK + 1)}, 8, 0)


def test_explicit_weights_leave_the_others_out():
    mixture = plan_mixture(LANGUAGES, 8, 0, weights={"hindi": 3, "english": 1, "dutch": 0})
    assert mixture.shares() == {"english": 0.25, "hindi": 0.75}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"hindu": 1.0}, r"'hindu'.*did you mean 'hindi'"),
        ({"hindi": -1.0, "english": 1.0}, "hindi=-1"),
        ({"hindi": float("nan")}, "hindi=nan"),
        ({"hindi": float("inf")}, "hindi=inf"),
        ({"hindi": 0.0}, "no language a share"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights, message):
    with pytest.raises(UsageError, match=message):
        plan_mixture(LANGUAGES, 8, 0, weights=weights)


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf")])
def test_temperatures_that_make_no_sense_are_refused(temperature):
    with pytest.raises(UsageError, match="--temperature"):
        plan_mixture(LANGUAGES, 8, 0, temperature)


# -- the cap on epochs ---------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(10**5, 10**9), min_size=2, max_size=8),
    st.floats(0.5, 8),
    st.floats(0, 1),
    st.floats(0.1, 0.99),
)
def test_no_language_is_repeated_more_often_than_the_cap(counts, max_epochs, temperature, use):
    tokens = {f"l{number}": count for number, count in enumerate(counts)}
    total = max(1, int(use * max_epochs * sum(counts)) // 8)
    mixture = plan_mixture(tokens, 8, 0, temperature, max_epochs=max_epochs, total_samples=total)
    for quota, count in zip(mixture.quotas, mixture.tokens):
        assert (quota - 1) / BLOCK * total * 8 <= max_epochs * count * (1 + 1e-9)


def test_what_a_capped_language_gives_up_goes_to_the_others_in_proportion():
    tokens = {"a": 800, "b": 400_000, "c": 400_000}
    mixture = plan_mixture(tokens, 8, 0, weights={"a": 2, "b": 1, "c": 3}, max_epochs=10, total_samples=8_000)
    shares = mixture.shares()
    assert shares["a"] == pytest.approx(10 * 800 / 64_000, abs=2 / BLOCK)
    assert shares["c"] / shares["b"] == pytest.approx(3, rel=0.01)


def test_a_cap_that_binds_nothing_changes_nothing():
    assert plan_mixture(LANGUAGES, 8, 0, max_epochs=1000, total_samples=10) == plan_mixture(LANGUAGES, 8, 0)


def test_an_impossible_cap_is_one_sentence_that_says_what_would_be_possible():
    with pytest.raises(UserError, match=r"--max-epochs-per-language 2 .*50\.0%.*raise it to 4") as caught:
        plan_mixture({"a": 4_000, "b": 4_000}, 8, 0, max_epochs=2, total_samples=4_000)
    needed = float(re.search(r"raise it to ([\d.]+)", str(caught.value)).group(1))
    assert plan_mixture({"a": 4_000, "b": 4_000}, 8, 0, max_epochs=needed, total_samples=4_000).quotas == (
        2048,
        2048,
    )
    with pytest.raises(UsageError, match="above 0"):
        plan_mixture({"a": 4_000}, 8, 0, max_epochs=-1, total_samples=4_000)


# -- permutations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows", AWKWARD)
def test_every_epoch_is_a_permutation(windows):
    length, spare = 8, windows % 8
    _, starts, epochs = one_language(windows, length, spare).locate(numbers(0, 3 * windows))
    assert (epochs == np.repeat([0, 1, 2], windows)).all(), "an epoch ends when every window was seen"
    for of_epoch in starts.reshape(3, windows):
        shift = of_epoch.min()
        assert shift <= spare
        assert sorted(of_epoch - shift) == list(range(0, windows * length, length))


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size, key):
    assert sorted(permuted(size, key)) == list(range(size))


def reference(value: int, size: int, key: int) -> int:
    """The same permutation in Python's integers, one value at a time."""
    wrap = 2**64 - 1

    def mixed(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) & wrap
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & wrap
        return z ^ (z >> 31)

    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    while True:
        left, right = value % a, value // a
        for number in range(6):
            modulus = (a, b)[number % 2]
            left, right = right, (left + mixed(right ^ mixed((key + number) & wrap)) % modulus) % modulus
        value = left + a * right
        if value < size:
            return value


@given(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.data())
def test_permute_is_its_definition_in_integers_without_overflow(size, key, data):
    values = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=8))
    full = [np.full(len(values), number, dtype=np.uint64) for number in (size, key)]
    assert permute(np.array(values, dtype=np.uint64), *full).tolist() == [
        reference(v, size, key) for v in values
    ]


@given(st.integers(1, 2**62), st.integers(0, 2**64 - 1), st.data())
def test_permute_stays_in_range_and_apart_up_to_2_to_the_62(size, key, data):
    values = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    full = [np.full(len(values), number, dtype=np.uint64) for number in (size, key)]
    sent = permute(np.array(values, dtype=np.uint64), *full)
    assert sent.max() < size and len(set(sent.tolist())) == len(values)


@pytest.mark.parametrize("root", [2, 3, 1000, 94906266, 2**31 - 1])
def test_permute_near_squares_where_floating_roots_are_off_by_one(root):
    for size in (root * root - 1, root * root, root * root + 1):
        values = np.array([0, size // 2, size - 1], dtype=np.uint64)
        sent = permute(values, np.full(3, size, dtype=np.uint64), np.arange(3, dtype=np.uint64))
        assert (sent < size).all()


@pytest.mark.parametrize("size", [2, 3, 5, 16, 17])
def test_permutations_of_many_keys_are_uniform(size):
    """Each (value, image) pair is 1/size of 4,000 keys' permutations, to 5 standard deviations."""
    keys = 4000
    names = np.repeat(np.arange(keys, dtype=np.uint64) * np.uint64(7919), size)
    values = np.tile(numbers(0, size), keys)
    images = (
        permute(values, np.full(len(values), size, dtype=np.uint64), names).reshape(keys, size).astype(int)
    )
    counts = np.array([np.bincount(images[:, value], minlength=size) for value in range(size)])
    deviation = (keys * (1 / size) * (1 - 1 / size)) ** 0.5
    assert np.abs(counts - keys / size).max() < 5 * deviation


def test_a_permutation_leaves_no_trace_of_the_order_before():
    """Neighbours are as far apart as in a random permutation (size / 3), and the rank correlation is nil."""
    sent = permuted(20_000, 1234).astype(float)
    assert abs(np.corrcoef(np.arange(20_000), sent)[0, 1]) < 0.03
    assert np.abs(np.diff(sent)).mean() == pytest.approx(20_000 / 3, rel=0.03)
    assert abs(np.corrcoef(sent[:-1], sent[1:])[0, 1]) < 0.03


# -- places in the text --------------------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(1, 60), st.integers(0, 2**62))
def test_a_window_never_runs_over_the_end_of_a_text_that_holds_one(tokens, length, first):
    mixture = Mixture(("x",), (BLOCK,), (tokens,), length, 5)
    _, starts, _ = mixture.locate(numbers(first, 100))
    assert (starts >= 0).all()
    if tokens > length:
        assert (starts + length + 1 <= tokens).all()
    else:
        assert (starts == 0).all()


def test_the_tail_beyond_whole_windows_is_seen_in_some_epoch():
    mixture = one_language(5, length=16, spare=13)
    _, starts, _ = mixture.locate(numbers(0, 5 * 200))
    seen = np.zeros(mixture.tokens[0], dtype=bool)
    for start in starts:
        seen[start : start + 17] = True
    assert seen.all()


def test_windows_of_an_epoch_do_not_overlap_and_epochs_differ_in_order_and_shift():
    mixture = one_language(100, length=16, spare=15)
    _, starts, epoch = mixture.locate(numbers(0, 1000))
    orders = [tuple(starts[epoch == number]) for number in range(10)]
    assert all(np.diff(sorted(order)).min() == 16 for order in orders)
    assert len({tuple(np.argsort(order)) for order in orders}) == 10
    assert len({min(order) for order in orders}) > 3


# -- any starting point --------------------------------------------------------------------------------------


@given(st.lists(st.one_of(st.integers(0, 10**6), st.integers(10**12, 2**63 - 1)), min_size=1, max_size=40))
def test_a_sample_is_the_same_alone_and_among_others(samples):
    mixture = plan_mixture(LANGUAGES, 64, 3, 0.5)
    together = mixture.locate(np.array(samples, dtype=np.uint64))
    for number, sample in enumerate(samples):
        alone = mixture.locate(np.array([sample], dtype=np.uint64))
        assert [int(part[0]) for part in alone] == [int(part[number]) for part in together]


def test_starting_at_sample_10_to_the_12_is_the_arithmetic_of_python_integers():
    """The occurrence of each language is counted by hand; no step in between is computed."""
    first = 10**12
    mixture = plan_mixture(LANGUAGES, 64, 3, 0.5)
    languages, starts, epochs = mixture.locate(numbers(first, 2 * BLOCK))
    for number, (quota, windows, tokens) in enumerate(zip(mixture.quotas, mixture.windows, mixture.tokens)):
        mine = languages == number
        lowest, highest = first // BLOCK * quota, (first // BLOCK + 3) * quota
        assert lowest // windows <= epochs[mine].min() and epochs[mine].max() <= highest // windows
        assert starts[mine].max() + 65 <= tokens
        complete = [e for e in np.unique(epochs[mine]) if (epochs[mine] == e).sum() == windows]
        for epoch in complete:
            assert len(set(starts[mine][epochs[mine] == epoch])) == windows
    assert epochs[languages == mixture.languages.index("dutch")].max() > 10**9


def test_no_samples_are_no_places():
    assert [len(part) for part in plan_mixture(LANGUAGES, 64, 3, 0.5).locate(numbers(0, 0))] == [0, 0, 0]


# -- seeds and names -----------------------------------------------------------------------------------------


def test_seeds_and_blocks_and_names_differ():
    first = plan_mixture(LANGUAGES, 64, 1, 0.5)
    second = plan_mixture(LANGUAGES, 64, 2, 0.5)
    one, other, later = (
        first.locate(numbers(0, BLOCK)),
        second.locate(numbers(0, BLOCK)),
        first.locate(numbers(BLOCK, BLOCK)),
    )
    assert (one[0] != other[0]).mean() > 0.2 and (one[0] != later[0]).mean() > 0.2
    alone, renamed = one_language(1000), Mixture(("y",), (BLOCK,), one_language(1000).tokens, 8, 0)
    assert (alone.locate(numbers(0, 1000))[1] != renamed.locate(numbers(0, 1000))[1]).mean() > 0.9


def test_the_order_does_not_depend_on_the_order_in_which_languages_are_given():
    assert plan_mixture(dict(reversed(LANGUAGES.items())), 64, 1) == plan_mixture(LANGUAGES, 64, 1)


# -- never another order -------------------------------------------------------------------------------------


def test_the_order_is_the_one_that_every_release_has_had():
    """Frozen: whoever changes these values changes the data of every run that will be resumed."""
    mixture = plan_mixture(LANGUAGES, 64, 42, 0.5)
    assert mixture.quotas == GOLDEN_QUOTAS
    for first, expected in GOLDEN.items():
        places = mixture.locate(numbers(first, 6))
        assert [part.tolist() for part in places] == expected
    hashes = hashlib.sha256()
    for first in (0, 10**6, 10**12, 2**62):
        for part in mixture.locate(numbers(first, 10_000)):
            hashes.update(part.astype("<i8").tobytes())
    assert hashes.hexdigest() == GOLDEN_SHA256


GOLDEN_QUOTAS = (46, 2668, 1193, 189)
GOLDEN = {
    0: [[1, 1, 1, 1, 1, 1], [720066, 817986, 950146, 332738, 403010, 132994], [0, 0, 0, 0, 0, 0]],
    BLOCK - 2: [[1, 1, 1, 2, 1, 2], [717826, 756354, 243202, 63977, 32834, 159017], [0, 0, 0, 0, 0, 0]],
    10**12: [
        [1, 1, 2, 1, 1, 2],
        [79681, 248833, 139274, 407489, 916225, 74634],
        [41687500, 41687500, 93232959, 41687500, 41687500, 93232959],
    ],
    2**62: [
        [1, 2, 1, 2, 1, 3],
        [627968, 47291, 750016, 13691, 348416, 4417],
        [
            192249660893191,
            429961135999760,
            192249660893191,
            429961135999760,
            192249660893191,
            2728142081964819,
        ],
    ],
}
GOLDEN_SHA256 = "db5aa6b9c5b7ec915c738f3549ea1caec9bea7295c529fd7302a4e89eac5a02d"


# -- JSON ----------------------------------------------------------------------------------------------------


@given(sizes, st.integers(-(2**70), 2**70))
def test_a_mixture_survives_json(tokens, seed):
    mixture = plan_mixture(tokens, 128, seed)
    assert Mixture.from_dict(json.loads(json.dumps(mixture.as_dict()))) == mixture


@pytest.mark.parametrize(
    "change",
    [
        {"quotas": [4000, 1]},
        {"quotas": [BLOCK, 0]},
        {"quotas": [2048.0, 2048.0]},
        {"quotas": [BLOCK]},
        {"tokens": [5, 0]},
        {"tokens": "ab"},
        {"languages": ["a", "a"]},
        {"languages": []},
        {"languages": None},
        {"length": 0},
        {"seed": True},
        {"seed": "1"},
        {"extra": 1},
        {"seed": ...},
    ],
)
def test_a_damaged_mixture_is_refused(change):
    value = plan_mixture({"a": 100, "b": 100}, 8, 0).as_dict() | change
    value = {name: item for name, item in value.items() if item is not ...}
    with pytest.raises(UserError, match="data order is damaged"):
        Mixture.from_dict(value)


def test_describe_says_share_and_epochs():
    text = plan_mixture({"a": 1_000, "b": 3_000}, 8, 0, temperature=1).describe(total_tokens=8 * BLOCK)
    assert text.splitlines() == [
        "  a: 25.0% of the samples, 8.19 epochs of its 1,000 tokens",
        "  b: 75.0% of the samples, 8.19 epochs of its 3,000 tokens",
    ]
    ends = plan_mixture(
        {"a": 1_000, "b": 3_000}, 8, 0, 1, total_samples=BLOCK, final_temperature=0, final_share=0.5
    )
    assert ends.describe(total_tokens=8 * BLOCK).startswith(
        "  a: 25.0% of the samples, 50.0% at the end, 12."
    )


# -- other shares at the end -----------------------------------------------------------------------------------


@given(st.integers(1, 3 * BLOCK), st.integers(1, 2 * BLOCK), st.integers(0, 2**40))
def test_later_shares_begin_at_their_sample_and_every_window_is_still_read_once_an_epoch(first, more, seed):
    tokens = {"large": 40_001, "small": 4_001}
    plain = plan_mixture(tokens, 8, seed, temperature=1)
    ended = plain.ending_with({"large": 1, "small": 1}, first)
    total = first + more
    languages, starts, epochs = ended.locate(numbers(0, total))
    for before, after in zip(plain.locate(numbers(0, first)), (languages, starts, epochs)):
        assert (before == after[:first]).all()
    counts = np.bincount(languages, minlength=2)
    assert ended.samples_of(total) == dict(zip(ended.languages, counts.tolist()))
    for number, windows in enumerate(ended.windows):
        own = epochs[languages == number]
        # Samples of a language keep their order: epochs begin one after the other, each with all its windows.
        assert (own == np.arange(len(own)) // windows).all()
        for epoch in range(len(own) // windows):
            read = starts[(languages == number) & (epochs == epoch)]
            assert len(set(read.tolist())) == windows
    whole_blocks = (more // BLOCK) * BLOCK
    if whole_blocks:
        end = languages[first : first + whole_blocks]
        assert (np.bincount(end, minlength=2) == whole_blocks // 2).all()


def test_later_shares_are_read_in_any_order_and_kept_in_a_checkpoint():
    mixture = plan_mixture(
        LANGUAGES, 64, 3, 1.0, total_samples=10_000, final_temperature=0.0, final_share=0.3
    )
    assert [begin for begin, _quotas in mixture.later] == [7_000]
    assert Mixture.from_dict(json.loads(json.dumps(mixture.as_dict()))) == mixture
    where = np.random.default_rng(0).permutation(12_000).astype(np.uint64)
    at_once = mixture.locate(numbers(0, 12_000))
    for whole, part in zip(at_once, mixture.locate(where)):
        assert (whole[where.astype(np.int64)] == part).all()
    again = mixture.ending_with(dict.fromkeys(LANGUAGES, 1), 9_000)
    assert [begin for begin, _quotas in again.later] == [7_000, 9_000]


def test_a_checkpoint_from_before_later_shares_is_read():
    value = plan_mixture(LANGUAGES, 64, 3).as_dict()
    del value["later"]
    assert Mixture.from_dict(value) == plan_mixture(LANGUAGES, 64, 3)


@pytest.mark.parametrize(
    "later", [[[0, [2048, 2048]]], [[9, [2048, 2047]]], [[9, [4096]]], [[9, [1.0, 4095]]], [[9]]]
)
def test_later_shares_that_make_no_order_are_refused(later):
    value = plan_mixture({"a": 100, "b": 100}, 8, 0).as_dict() | {"later": later}
    with pytest.raises(UserError, match="data order is damaged"):
        Mixture.from_dict(value)


@given(st.floats(0, 1), st.floats(0.05, 0.95), st.floats(1, 6))
def test_the_cap_on_epochs_holds_over_both_parts(temperature, final_share, max_epochs):
    tokens = {"large": 4_000_000, "middle": 900_000, "small": 80_000}
    total = int(0.9 * max_epochs * sum(tokens.values())) // 128
    mixture = plan_mixture(
        tokens, 128, 0, 1.0, None, max_epochs, total, final_temperature=temperature, final_share=final_share
    )
    for name, samples in mixture.samples_of(total).items():
        # A part of a block holds its shares only as closely as a shuffle does: 4 standard deviations, twice.
        assert samples * 128 <= max_epochs * tokens[name] + (total / BLOCK + 2 * 4 * 32) * 128


def test_no_later_shares_for_one_language_or_explicit_weights():
    ends = {"total_samples": 100, "final_temperature": 0.1, "final_share": 0.5}
    assert plan_mixture({"a": 100}, 8, 0, **ends).later == ()
    assert plan_mixture(LANGUAGES, 8, 0, weights={"hindi": 1, "dutch": 2}, **ends).later == ()
    assert plan_mixture(LANGUAGES, 8, 0, **ends | {"final_share": 0.0}).later == ()


shares_by_name = st.dictionaries(st.sampled_from(sorted(LANGUAGES)), st.floats(0.01, 1), min_size=1)


@given(shares_by_name, shares_by_name, st.floats(0.05, 1), st.integers(1, 3 * BLOCK))
def test_explicit_shares_at_the_end_are_those_of_the_last_part(begin, end, final_share, total):
    end = {name: weight for name, weight in end.items() if name in begin} or begin
    mixture = plan_mixture(
        LANGUAGES, 64, 3, 1.0, begin, None, total, 0.5, final_share=final_share, final_weights=end
    )
    assert Mixture.from_dict(json.loads(json.dumps(mixture.as_dict()))) == mixture
    first = 0 if len(begin) == 1 else round((1 - final_share) * total)
    languages, starts, epochs = mixture.locate(numbers(0, total))
    names = np.array(mixture.languages)[languages]
    assert set(names[first:].tolist()) <= set(end)
    counts = np.bincount(languages, minlength=len(mixture.languages))
    assert mixture.samples_of(total) == dict(zip(mixture.languages, counts.tolist()))
    block = names[first : first + BLOCK]
    if len(block) == BLOCK:
        for name, weight in end.items():
            share = weight / sum(end.values())
            assert abs((block == name).sum() / BLOCK - share) <= len(end) / BLOCK
    for number, windows in enumerate(mixture.windows):
        own = epochs[languages == number]
        assert (own == np.arange(len(own)) // windows).all()
        assert (starts[languages == number] + 64 < max(65, mixture.tokens[number])).all()


def test_a_language_left_out_at_the_end_stays_readable_in_the_lines_and_the_cap():
    ends = {"total_samples": 1_000, "final_share": 0.5, "final_weights": {"a": 1}}
    mixture = plan_mixture({"a": 1_000, "b": 3_000}, 8, 0, 1, **ends)
    assert "b: 75.0% of the samples, 0.0% at the end" in mixture.describe(8_000)
    whole = plan_mixture({"a": 1_000, "b": 3_000}, 8, 0, 1, **ends | {"final_share": 1.0})
    assert whole == plan_mixture({"a": 1_000, "b": 3_000}, 8, 0, weights={"a": 1})
    with pytest.raises(UserError, match="--max-epochs-per-language 4 leaves text"):
        plan_mixture({"a": 1_000, "b": 3_000}, 8, 0, 1, max_epochs=4, **ends)
    with pytest.raises(UsageError, match=r"--final-language-weights names 'c', of which .* in the run"):
        plan_mixture({"a": 9, "b": 9}, 8, 0, **ends | {"final_weights": {"c": 1}})
    with pytest.raises(UsageError, match="--final-language-weights names 'b'"):
        plan_mixture(
            {"a": 9, "b": 9, "c": 9}, 8, 0, weights={"a": 1, "c": 1}, **ends | {"final_weights": {"b": 1}}
        )


# -- a part of every share for the smallest languages ---------------------------------------------------------


def test_small_languages_are_raised_to_one_level_by_all():
    sizes = {"large": 6_000_000, "middle": 3_000_000, "small": 1_000_000}
    with_text = {"length": 8, "seed": 0, "temperature": 1.0, "total_samples": 1_000}
    shares = plan_mixture(sizes, small_share=0.1, **with_text).shares()
    assert shares == pytest.approx({"large": 0.54, "middle": 0.27, "small": 0.19}, abs=1 / BLOCK)
    # An equal share at most, and none to a language that has half of one: it goes back.
    rest = {"large": 4 / 9, "middle": 2 / 9, "small": 1 / 3}
    for part in (0.3, 1.0):
        shares = plan_mixture(sizes, small_share=part, **with_text).shares()
        assert shares == pytest.approx(rest, abs=1 / BLOCK)
    # Several small ones come to one level.
    more = {"large": 9_000_000, "little": 800_000, "small": 200_000}
    shares = plan_mixture(more, small_share=0.2, **with_text).shares()
    assert shares == pytest.approx({"large": 0.72, "little": 0.14, "small": 0.14}, abs=1 / BLOCK)
    alike = {"a": 3_000_000, "b": 2_000_000}
    assert plan_mixture(alike, small_share=0.3, **with_text) == plan_mixture(alike, **with_text)
    explicit = {"large": 1.0, "small": 1.0}
    plain = plan_mixture(sizes, weights=explicit, **with_text)
    assert plan_mixture(sizes, weights=explicit, small_share=0.3, **with_text) == plain


@pytest.mark.parametrize("final_share", [0.0, 0.5])
def test_no_text_is_given_more_than_four_readings(final_share):
    sizes = {"large": 10_000_000, "small": 80_000}
    for total in (100, 10_000, 30_000, 100_000, 10_000_000):
        mixture = plan_mixture(
            sizes,
            8,
            0,
            1.0,
            total_samples=total,
            final_temperature=1.0,
            final_share=final_share,
            small_share=0.2,
        )
        small = mixture.samples_of(total)["small"]
        proportional = plan_mixture(sizes, 8, 0, 1.0).samples_of(total)["small"]
        assert small <= max(GIFT_EPOCHS * 10_000, proportional) + total / BLOCK + 64
        assert small > proportional or proportional >= GIFT_EPOCHS * 10_000


@given(
    st.lists(st.floats(1e-9, 1), min_size=1, max_size=8),
    st.floats(0, 1),
    st.lists(st.floats(0, 2), min_size=8, max_size=8),
)
def test_levelled_shares_are_shares_and_every_language_keeps_its_part(weights, part, most):
    names = [str(number) for number in range(len(weights))]
    before = {name: weight / sum(weights) for name, weight in zip(names, weights)}
    caps = dict(zip(names, most))
    shares = _levelled(dict(zip(names, weights)), part, caps)
    assert sum(shares.values()) == pytest.approx(1)
    kept = {name: (1 - part) * share for name, share in before.items()}
    assert all(shares[name] >= kept[name] - 1e-9 for name in names)
    enough = sum(max(kept[name], caps[name]) for name in names) >= 1
    raised = [name for name in names if shares[name] > kept[name] + 1e-9]
    if enough:
        assert all(shares[name] <= caps[name] + 1e-9 for name in raised)
        level = max((shares[name] for name in raised), default=0.0)
        # Raised less than to the level: its text is spent; not raised: it was above.
        assert all(shares[name] >= min(level, caps[name]) - 1e-9 for name in names)
