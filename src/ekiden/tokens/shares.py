"""How often each language is read: from the languages' sizes and the user's wishes to the quotas of a `Mixture`.

Asked once, at the start of a run (or to print a plan); what it answers is kept in the checkpoint with the order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ekiden.errors import UsageError, UserError, nearest
from ekiden.tokens.mixture import BLOCK, Mixture, apportion

GIFT_EPOCHS = 4.0
"""Epochs over the whole run up to which a small language is given of the others' share: so often text is repeated nearly
without loss (Muennighoff et al. 2023, arXiv:2305.16264)."""


def plan_mixture(
    tokens: Mapping[str, int],
    length: int,
    seed: int,
    temperature: float = 1.0,
    weights: Mapping[str, float] | None = None,
    max_epochs: float | None = None,
    total_samples: int | None = None,
    final_temperature: float | None = None,
    final_share: float = 0.0,
    small_share: float = 0.0,
    final_weights: Mapping[str, float] | None = None,
) -> Mixture:
    """Return the mixture for languages of the given sizes.

    Args:
        tokens: training tokens of each language, all above 0.
        length: tokens of a sample; seed: of the order.
        temperature: a language with n tokens has the weight n ** temperature (Conneau et al. 2020,
            arXiv:1911.02116): 1 takes the languages as they are, 0 makes them equal.
        weights: explicit weights instead; a language that is not named, or with 0, is left out.
        max_epochs: no language is repeated more often than this over `total_samples`, to within one sample a
            block; what it gives up goes to the others in proportion.
        total_samples: samples of the whole run, for `max_epochs`, `small_share` and `final_share`.
        final_temperature: temperature of the last `final_share` of the run: below `temperature`, small languages are
            read more while the learning rate falls, when what is read is kept best. None, or explicit weights: as
            before.
        small_share: every language gives this part of its share to those with less than half of an equal share, which are
            raised to one level, an equal share at most, as long as their text is read GIFT_EPOCHS times at most. Not with
            explicit weights.
        final_weights: explicit weights of that last part instead of both; a language that is not named has no part in it.

    Raises:
        UsageError: weights for a language that is not there, or none above 0; a value that is no weight.
        UserError: the cap leaves too little text for the run, or there are too many languages.
    """
    assert tokens and min(tokens.values()) > 0 and length > 0
    raw = _wished(tokens, temperature, weights)
    small_share = 0.0 if weights else small_share
    if small_share or max_epochs is not None:
        assert total_samples is not None and total_samples > 0
        sizes = {name: tokens[name] for name in raw}
        raw = _limited(raw, sizes, total_samples * length, max_epochs, small_share)
    quotas = apportion(raw)
    names = tuple(raw)
    mixture = Mixture(
        names, tuple(quotas[name] for name in names), tuple(tokens[name] for name in names), length, seed
    )
    if not 0 < final_share <= 1 or len(names) == 1:
        return mixture
    if not final_weights and (final_temperature is None or weights):
        return mixture
    assert total_samples is not None and total_samples > 0
    first = round((1 - final_share) * total_samples)
    shares = final_shares(
        mixture, final_temperature or 0.0, first, total_samples, max_epochs, small_share, final_weights
    )
    return mixture.ending_with(shares, first)


def final_shares(
    mixture: Mixture,
    temperature: float,
    first: int,
    total_samples: int,
    max_epochs: float | None = None,
    small_share: float = 0.0,
    weights: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return the shares of the samples from `first` to the end of a run of `total_samples`, by `temperature`.

    Args:
        max_epochs: of a language over the whole run, what was read before `first` included.
        small_share: as in `plan_mixture`.
        weights: explicit weights instead of temperature and small_share; a language that is not named is read no more.

    Raises:
        UsageError: weights for a language that the run does not read.
        UserError: the cap leaves too little text for the rest of the run.
    """
    sizes = dict(zip(mixture.languages, mixture.tokens))
    shares = (
        _explicit(weights, sizes, "--final-language-weights")
        if weights
        else _by_temperature(sizes, temperature)
    )
    read = {name: count * mixture.length for name, count in mixture.samples_of(first).items()}
    total = max(1, total_samples - first) * mixture.length
    return _limited(shares, sizes, total, max_epochs, 0.0 if weights else small_share, read)


def _wished(
    tokens: Mapping[str, int], temperature: float, weights: Mapping[str, float] | None
) -> dict[str, float]:
    """Return the weight of each language by temperature or as given, before any limit."""
    wished = (
        _explicit(weights, tokens, "--language-weights") if weights else _by_temperature(tokens, temperature)
    )
    if len(wished) > BLOCK:
        raise UserError(
            f"the shards hold {len(wished)} languages, a mixture at most {BLOCK}; leave some out by "
            "--language-weights"
        )
    return wished


def _limited(
    weights: dict[str, float],
    sizes: Mapping[str, int],
    total: int,
    max_epochs: float | None,
    small_share: float,
    read: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Return shares of the next `total` tokens, in proportion to `weights` but for `small_share` and `max_epochs`, where
    the tokens in `read` were read before.
    """
    if small_share:
        caps = _gift_caps(weights, _caps(_texts(sizes, GIFT_EPOCHS, read), total))
        weights = _levelled(weights, small_share, caps)
    if max_epochs is None:
        return weights
    left = {name: count for name, count in _texts(sizes, max_epochs, read).items() if name in weights}
    return _capped(weights, left, total, max_epochs)


def _texts(
    tokens: Mapping[str, int], max_epochs: float, read: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Return the tokens that may be read of each language, after those in `read`."""
    if not max_epochs > 0:
        raise UsageError(
            f"--max-epochs-per-language must be above 0, not {max_epochs}; leave it out for no cap"
        )
    return {name: max(0.0, max_epochs * n - (read[name] if read else 0)) for name, n in tokens.items()}


def _caps(texts: Mapping[str, float], total: int) -> dict[str, float]:
    """Return the largest share of `total` tokens that each language has text for."""
    return {name: count / total for name, count in texts.items()}


def _by_temperature(tokens: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Return the weight of each language, by name; relative to the largest, so that no power overflows."""
    if not 0 <= temperature < math.inf:
        raise UsageError(
            f"--temperature must be 0 (languages equal), 1 (as they are) or between, not {temperature}"
        )
    largest = max(tokens.values())
    return {name: max((tokens[name] / largest) ** temperature, 1e-9) for name in sorted(tokens)}


def _explicit(weights: Mapping[str, float], tokens: Mapping[str, int], flag: str) -> dict[str, float]:
    """Return the given weights above 0, by name; `flag` is where they were given."""
    for name, weight in weights.items():
        if name not in tokens:
            raise UsageError(
                f"{flag} names {name!r}, of which there is no training text in the run{nearest(name, tokens)}"
            )
        if not 0 <= weight < math.inf:
            raise UsageError(f"{flag} {name}={weight} is not a share; give 0 or a number above")
    above = {name: float(weights[name]) for name in sorted(weights) if weights[name] > 0}
    if not above:
        raise UsageError(f"{flag} gives no language a share above 0; give at least one")
    return above


def _capped(
    weights: dict[str, float], texts: dict[str, float], total: int, max_epochs: float
) -> dict[str, float]:
    """Return shares of `total` tokens, none above the tokens in `texts`; the others get the excess."""
    caps = _caps(texts, total)
    # A block of samples is the resolution of every share.
    if sum(caps.values()) < 1 - len(caps) / BLOCK:
        needed = math.ceil(100 * max_epochs * total / sum(texts.values())) / 100
        raise UserError(
            f"--max-epochs-per-language {max_epochs:g} leaves text for {sum(caps.values()):.1%} of the run's "
            f"{total:,} tokens; raise it to {needed:g}, or lower --max-steps or --epochs"
        )
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    fixed: dict[str, float] = {}
    while over := {name for name in shares if name not in fixed and shares[name] > caps[name] * (1 + 1e-12)}:
        fixed |= {name: caps[name] for name in over}
        rest = sum(weights[name] for name in shares if name not in fixed)
        left = 1 - sum(fixed.values())
        shares = {name: fixed[name] if name in fixed else left * weights[name] / rest for name in shares}
    return shares


def _gift_caps(weights: Mapping[str, float], caps: Mapping[str, float]) -> dict[str, float]:
    """Return up to which share each language may be given something: none but those below half of an equal share.

    So that it reaches the small ones: at one level with Hindi, 15 % of four languages, Konkani came to 13.7 % where every
    language gave 14 %.
    """
    equal, total = 1 / len(weights), sum(weights.values())
    return {
        name: min(caps[name], equal) if weight < equal / 2 * total else 0.0
        for name, weight in weights.items()
    }


def _levelled(weights: dict[str, float], part: float, caps: dict[str, float]) -> dict[str, float]:
    """Return shares in proportion to `weights`, of which each gives `part` to the smallest: these are raised to one level,
    but none above its cap. What no language can take stays where it came from.
    """
    shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    kept = {name: (1 - part) * share for name, share in shares.items()}
    most = {name: max(share, caps[name]) for name, share in kept.items()}
    low, level = 0.0, 1.0
    for _ in range(60):  # the level's last bit
        middle = (low + level) / 2
        if sum(min(max(kept[name], middle), most[name]) for name in kept) < 1:
            low = middle
        else:
            level = middle
    raised = {name: min(max(kept[name], level), most[name]) for name in kept}
    back = 1 - sum(raised.values())
    givers = {name: share for name, share in shares.items() if kept[name] == raised[name]} or shares
    return {
        name: share + (back * givers[name] / sum(givers.values()) if name in givers else 0.0)
        for name, share in raised.items()
    }
