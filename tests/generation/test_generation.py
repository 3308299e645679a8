"""Texts: the right token, the same text for the same seed, whole characters, and a conversation."""

from __future__ import annotations

import io

import pytest
import torch

from ekiden.errors import UsageError, UserError
from ekiden.export.huggingface import export_huggingface
from ekiden.generation import (
    Sampling,
    choose,
    continuation,
    converse,
    generate,
    interactive,
    next_tokens,
    prompt_ids,
    run_generate,
    stream,
    streaming,
)
from small_models import small_model, small_tokenizer

FAMILIES = ("gpt2-10m", "gemma3-tiny")
PROMPTS = ["The river runs", "x", "नदी पहाड़ से", "The river runs", ""]
"""Of several lengths, one twice."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tokenizer):
    return small_model(request.param, tokenizer)


class Endless:
    """A tokenizer whose texts have no end."""

    def __init__(self, tokenizer):
        self.inner, self.eos_id = tokenizer, None

    def __getattr__(self, name):
        return getattr(self.inner, name)


def reference(model, ids, count):
    """Return the greedy continuation by whole forward passes, without any cache."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[-count:]


def greedy(count):
    return Sampling(max_new_tokens=count, temperature=0, repetition_penalty=1)


def test_greedy_is_the_argmax_of_whole_passes(model, tokenizer):
    rows = [prompt_ids(model, tokenizer, prompt) for prompt in PROMPTS]
    steps = list(next_tokens(model, rows, greedy(12), [], tokenizer.vocab_size, eos_id=None))
    for index, row in enumerate(rows):
        assert [step[index] for step in steps] == reference(model, row, 12)


def test_a_full_context_goes_on_with_its_newer_half(model, tokenizer):
    row = [5 + i for i in range(28)]
    made = [step[0] for step in next_tokens(model, [row], greedy(30), [], tokenizer.vocab_size, None)]
    expected, view = [], list(row)
    for _ in range(30):
        expected += reference(model, view, 1)
        view.append(expected[-1])
        view = view[-16:] if len(view) > 32 else view
    assert made == expected


def test_rows_do_not_disturb_each_other(model, tokenizer):
    settings = {"max_new_tokens": 40, "temperature": 1.0, "seed": 3}
    endless = Endless(tokenizer)
    together = generate(model, endless, PROMPTS, **settings)
    in_pairs = generate(model, endless, PROMPTS, batch_size=2, **settings)
    backwards = generate(model, endless, PROMPTS[::-1], **settings)[::-1]
    alone = [generate(model, endless, [prompt], **settings)[0] for prompt in PROMPTS]
    assert together == in_pairs
    for index in (0, 1, 2, 4):
        assert together[index] == alone[index]
    assert together[1:3] == backwards[1:3]
    # The second of two equal prompts is another draw.
    assert together[3] != together[0]


def test_the_seed_decides_and_nothing_else_is_touched(model, tokenizer):
    model.train()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = generate(model, tokenizer, ["The"], max_new_tokens=20, temperature=1.2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert generate(model, tokenizer, ["The"], max_new_tokens=20, temperature=1.2) == first
    assert generate(model, tokenizer, ["The"], max_new_tokens=20, temperature=1.2, seed=1) != first
    assert model.training
    assert model.config.use_cache is False
    assert all(weight.grad is None for weight in model.parameters())


def test_a_text_ends_before_eos(model, tokenizer):
    row = prompt_ids(model, tokenizer, "The river")
    expected = reference(model, row, 12)
    stop = expected[5] if expected[5] not in expected[:5] else expected[0]
    made = [
        step[0] for step in next_tokens(model, [row, row[:3]], greedy(12), [], tokenizer.vocab_size, stop)
    ]
    count = expected.index(stop)
    assert made[:count] == expected[:count]
    assert all(token is None for token in made[count:])


def test_ids_beyond_the_tokenizer_are_never_chosen(model):
    row = list(range(4, 14))
    chosen = [step[0] for step in next_tokens(model, [row], greedy(20), [], 50, None)]
    assert max(chosen) < 50


def test_damaged_weights_are_said(tokenizer):
    model = small_model("gemma3-tiny", tokenizer)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        generate(model, tokenizer, ["The"])


# -- the choice of a token --------------------------------------------------------------------------------------


def draws(logits, count=4000, seen=(), **settings):
    """Return how often each token was chosen, as shares."""
    logits = torch.tensor(logits).repeat(count, 1)
    seen_mask = torch.zeros(logits.shape, dtype=torch.bool)
    seen_mask[:, list(seen)] = True
    generators = [torch.Generator().manual_seed(number) for number in range(count)]
    sampling = Sampling(**{"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, **settings})
    chosen = torch.tensor(choose(logits, seen_mask, sampling, generators))
    return torch.bincount(chosen, minlength=logits.shape[1]) / count


LOGITS = [0.5, 2.0, -1.0, 1.0, 0.0]


def test_draws_follow_the_softmax():
    for temperature in (1.0, 0.5, 2.0):
        expected = torch.softmax(torch.tensor(LOGITS) / temperature, 0)
        assert torch.allclose(draws(LOGITS, temperature=temperature), expected, atol=0.03)


def test_top_k_keeps_the_k_likeliest():
    found = draws(LOGITS, top_k=2)
    expected = torch.softmax(torch.tensor([2.0, 1.0]), 0)
    assert torch.allclose(found[[1, 3]], expected, atol=0.03)
    assert found[[0, 2, 4]].sum() == 0
    assert draws(LOGITS, top_k=1)[1] == 1
    assert (draws(LOGITS, top_k=50) > 0).all()


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, [1]), (0.55, [1]), (0.6, [1, 3]), (0.76, [1, 3]), (0.89, [0, 1, 3])]
)
def test_top_p_keeps_the_smallest_set_of_that_probability(top_p, kept):
    # Probabilities in order: token 1 .563, 3 .207, 0 .126, 4 .076, 2 .028.
    found = draws(LOGITS, top_p=top_p)
    assert (found > 0).nonzero().flatten().tolist() == kept


def test_min_p_keeps_what_is_likely_beside_the_likeliest():
    # Shares of the likeliest one's probability: token 1 1, 3 .368, 0 .223, 4 .135, 2 .050.
    for min_p, kept in ((1.0, [1]), (0.3, [1, 3]), (0.2, [0, 1, 3]), (0.0, [0, 1, 2, 3, 4])):
        assert (draws(LOGITS, min_p=min_p) > 0).nonzero().flatten().tolist() == kept
    # The stricter of the two decides.
    assert (draws(LOGITS, min_p=0.1, top_p=0.6) > 0).nonzero().flatten().tolist() == [1, 3]


def test_repetition_penalty_moves_both_signs_down():
    found = draws(LOGITS, seen=[1, 2], repetition_penalty=2.0, count=8000)
    expected = torch.softmax(torch.tensor([0.5, 1.0, -2.0, 1.0, 0.0]), 0)
    assert torch.allclose(found, expected, atol=0.03)
    likeliest = draws(LOGITS, seen=[1], repetition_penalty=3.0, temperature=0, count=1)
    assert likeliest.argmax() == 3


def test_a_certain_token_is_certain():
    assert draws([0.0, 200.0, 0.0])[1] == 1


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("min_p", 1.5),
    ],
)
def test_settings_out_of_range(setting, value):
    with pytest.raises(UsageError, match=f"--{setting.replace('_', '-')} must be"):
        Sampling(**{setting: value})


# -- text -------------------------------------------------------------------------------------------------------


class Scripted:
    """A stand-in for the model's choices: the ids of a given text, one after another."""

    def __init__(self, monkeypatch, ids):
        steps = [[number] for number in ids]
        monkeypatch.setattr(streaming, "next_tokens", lambda *_arguments: iter(steps))


def test_a_stream_never_splits_a_character(tokenizer, model, monkeypatch):
    ids = tokenizer.encode("the ☂ 😀 नदी é end")
    text = tokenizer.decode([*tokenizer.encode("The"), *ids]).removeprefix("The")
    assert len(ids) > len(text)  # some characters are bytes
    Scripted(monkeypatch, ids)
    pieces = list(stream(model, tokenizer, "The", Sampling()))
    assert "".join(pieces) == text
    assert "😀" in "".join(pieces)
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert len(pieces) > 5


def test_bytes_that_never_become_a_character_are_shown_at_the_end(tokenizer, model, monkeypatch):
    whole = tokenizer.encode("☂")
    Scripted(monkeypatch, whole[:-1])
    text = "".join(stream(model, tokenizer, "The", Sampling()))
    assert text
    assert set(text.strip()) == {"\N{REPLACEMENT CHARACTER}"}


def test_stream_and_batch_write_the_same(model, tokenizer):
    settings = {"max_new_tokens": 25, "temperature": 0.9, "seed": 4}
    streamed = "".join(stream(model, tokenizer, "The children", Sampling(**settings)))
    assert streamed == generate(model, tokenizer, ["The children"], **settings)[0]


def test_a_continuation_keeps_its_leading_space(tokenizer):
    head, tail = tokenizer.encode("The river"), tokenizer.encode("The river runs")
    assert tail[: len(head)] == head
    assert continuation(tokenizer, head, tail[len(head) :]) == " runs"
    assert continuation(tokenizer, [tokenizer.bos_id], tokenizer.encode("The river")) == "The river"


def test_a_prompt_longer_than_the_context_is_cut_and_said(model, tokenizer, capsys):
    prompt = "the river runs down from the hill " * 10
    ids = tokenizer.encode(prompt)
    assert prompt_ids(model, tokenizer, prompt) == ids[-32:]
    assert "the model reads its last 32" in capsys.readouterr().err
    assert prompt_ids(model, tokenizer, "The") == [tokenizer.bos_id, *tokenizer.encode("The")]
    assert capsys.readouterr().err == ""


def test_an_empty_prompt(model, tokenizer):
    bare = Endless(tokenizer)
    assert prompt_ids(model, bare, "") == [tokenizer.bos_id]
    bare.bos_id, bare.eos_id = None, 1
    assert prompt_ids(model, bare, "") == [1]
    bare.eos_id = None
    with pytest.raises(UserError, match="empty --prompt needs a tokenizer with BOS or EOS"):
        prompt_ids(model, bare, "")


# -- on a terminal ----------------------------------------------------------------------------------------------


def talk(model, tokenizer, *lines):
    """Return all that is written in a conversation of these lines."""
    asked, written = iter(lines), []
    converse(model, tokenizer, Sampling(max_new_tokens=6, seed=2), lambda: next(asked, None), written.append)
    return "".join(written)


def test_a_conversation_goes_on_from_the_text_so_far(model, tokenizer):
    settings = {"max_new_tokens": 6, "seed": 2}
    first = "The river" + generate(model, tokenizer, ["The river"], **settings)[0]
    second = f"{first} and then"
    second += generate(model, tokenizer, [second], **settings)[0]
    said = talk(
        model, tokenizer, "The river", "and then", "/history", "/reset", "The river", "/quit", "never"
    )
    assert said.split("\n", 1)[1] == f"{first}\n{second[len(first) + 1 :]}\n{second}\n{first}\n"


def test_commands(model, tokenizer):
    said = talk(model, tokenizer, "/temperature 0.25", "/top-k 7", "/settings")
    assert "temperature 0.25\n" in said
    assert "top-k 7\nmax-new-tokens 6\ntemperature 0.25\ntop-k 7\ntop-p 0.95\nmin-p 0.0\n" in said
    assert "/temperature needs a number, as /temperature 0.8" in talk(model, tokenizer, "/temperature warm")
    assert "/seed needs a whole number, as /seed 2" in talk(model, tokenizer, "/seed")
    assert "--top-p must be above 0" in talk(model, tokenizer, "/top-p 7")
    assert "there is no /temprature; did you mean 'temperature'?" in talk(model, tokenizer, "/temprature 1")
    help_page = talk(model, tokenizer, "/help")
    for name in (
        "temperature",
        "top-k",
        "top-p",
        "repetition-penalty",
        "max-new-tokens",
        "seed",
        "settings",
        "quit",
    ):
        assert f"/{name}" in help_page


def test_an_interrupted_text_leaves_the_conversation(model, tokenizer, monkeypatch):
    def interrupted(*_arguments):
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(interactive, "stream", interrupted)
    assert talk(model, tokenizer, "The", "/history").endswith("Thehalf [stopped]\nThehalf\n")


def test_the_verb(tokenizer, tmp_path, capsys, monkeypatch):
    model = small_model("gemma3-tiny", tokenizer)
    folder = str(export_huggingface(model, tokenizer, tmp_path / "model"))
    expected = [generate(model, tokenizer, [prompt], max_new_tokens=5)[0] for prompt in ("The", "De")]
    run_generate(folder, ["The"], device="cpu", max_new_tokens=5)
    assert capsys.readouterr().out == f"The{expected[0]}\n"
    run_generate(folder, ["The", "De"], device="cpu", max_new_tokens=5)
    assert capsys.readouterr().out == f"The{expected[0]}\n\nDe{expected[1]}\n\n"
    monkeypatch.setattr("sys.stdin", open(tmp_path / "model" / "config.json"))  # noqa: SIM115, PTH123 - not a terminal
    monkeypatch.setattr("builtins.input", lambda _prompt: "/quit")
    run_generate(folder, [], interactive=True, device="cpu")
    assert "/quit ends" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(UsageError, match="nothing to continue"):
        run_generate(folder, [])
