import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt import GPT, GPTConfig, UserError
from fastgpt.generate import filter_logits, sample, stream

logits_of = st.lists(st.floats(-20, 20, width=32, allow_subnormal=False), min_size=2, max_size=30).map(
    lambda v: torch.tensor([v])
)


def small(**changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("micro", **{"vocab_size": 70, "n_positions": 16, **changes}))
    with torch.no_grad():  # far from uniform, so that greedy choices are clear
        for p in model.parameters():
            p.mul_(3)
    return model


@given(logits_of, st.integers(1, 40))
def test_top_k_keeps_k_and_the_largest(logits, k):
    kept = filter_logits(logits, top_k=k).isfinite()
    assert kept.sum() == min(k, logits.numel())
    if not kept.all():
        assert logits[kept].min() >= logits[~kept].max()


@given(logits_of, st.floats(0.01, 1))
def test_top_p_keeps_the_fewest_that_have_the_mass(logits, p):
    probs = logits.double().softmax(-1)
    kept = filter_logits(logits, top_p=p).isfinite()
    mass = probs[kept].sum().item()
    assert kept.any()
    assert mass >= p - 1e-5
    if kept.sum() > 1:
        assert mass - probs[kept].min().item() < p + 1e-5
    if not kept.all():
        assert logits[kept].min() >= logits[~kept].max()


@given(logits_of)
def test_temperature_0_and_near_0_take_the_likeliest(logits):
    assert logits[0, sample(logits, temperature=0)] == logits.max()
    assert logits[0, sample(logits, temperature=1e-30)] == logits.max()


def test_draws_follow_the_distribution():
    """Chi-square over 20,000 draws with a fixed seed, for temperature 0.7 after top-k 4."""
    logits = torch.tensor([1.0, 2.0, 0.5, 0.0, -1.0, 1.5])
    n = 20_000
    draws = sample(logits.expand(n, -1), 0.7, top_k=4, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draws, minlength=6).double()
    expected = n * filter_logits(logits[None] / 0.7, top_k=4)[0].double().softmax(-1)
    assert counts[expected == 0].sum() == 0
    seen = expected > 0
    assert ((counts - expected)[seen] ** 2 / expected[seen]).sum() < 16.3  # 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize("shape", [{}, {"n_head": 4, "n_layer": 3}, {"tie_word_embeddings": False, "n_positions": 9}])
@pytest.mark.parametrize("prompt", [1, 5, 9])
def test_greedy_is_the_same_with_and_without_the_cache_beyond_the_context_too(shape, prompt):
    model = small(**shape)
    ids = torch.randint(70, (3, prompt), generator=torch.Generator().manual_seed(1))
    cached = model.generate(ids, 40, temperature=0)
    assert torch.equal(cached, model.generate(ids, 40, temperature=0, use_cache=False))
    assert cached.shape == (3, prompt + 40)
    assert torch.equal(cached[:, :prompt], ids)


def test_greedy_is_transformers_greedy(tmp_path):
    import transformers

    model = small(n_positions=64)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(70, (2, 6), generator=torch.Generator().manual_seed(1))
    want = theirs.generate(ids, max_new_tokens=30, do_sample=False, attention_mask=torch.ones_like(ids), pad_token_id=0)
    assert torch.equal(model.generate(ids, 30, temperature=0), want)


def test_seeds_decide_and_the_global_state_is_left_alone():
    model = small()
    ids = torch.ones(2, 3, dtype=torch.int64)
    before = torch.get_rng_state()
    a, b, c = (model.generate(ids, 12, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not torch.equal(model.generate(ids, 12), model.generate(ids, 12))
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_that_ended_are_filled_and_all_ended_stops():
    model = small()
    ids = torch.tensor([[1], [2], [3]])
    free = model.generate(ids, 30, temperature=0)
    eos = int(free[0, 3])
    ended = model.generate(ids, 30, temperature=0, eos_id=eos)
    for row, whole in zip(ended, free, strict=True):
        hits = (whole[1:] == eos).nonzero()
        end = int(hits[0]) + 1 if len(hits) else len(whole)
        assert torch.equal(row[: end + 1], whole[: end + 1][: len(row)])
        assert (row[end + 1 :] == eos).all()
    alone = model.generate(ids[:1], 30, temperature=0, eos_id=eos)
    assert alone.shape == (1, 1 + int((free[0, 1:] == eos).nonzero()[0]) + 1)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_what_it_was_also_when_stopped_early(training):
    model = small().train(training)
    tokens = stream(model, torch.ones(1, 1, dtype=torch.int64), 10)
    next(tokens)
    tokens.close()
    assert model.training is training


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"temperature": math.nan}, "temperature must be at least 0"),
        ({"temperature": math.inf}, "temperature must be at least 0"),
        ({"top_k": 0}, "top-k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top-p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top-p must be above 0 and at most 1"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(UserError, match=words):
        small().generate(torch.ones(1, 1, dtype=torch.int64), 3, **options)


def test_prompts_that_do_not_fit():
    model = small()
    with pytest.raises(UserError, match="the prompt has 17 tokens, the model reads at most 16: shorten it"):
        model.generate(torch.ones(1, 17, dtype=torch.int64), 3)
    with pytest.raises(UserError, match="the prompt is empty"):
        model.generate(torch.ones(1, 0, dtype=torch.int64), 3)


SMALL = small()


@given(st.integers(0, 2**63 - 1), st.integers(1, 70), st.floats(0.05, 1), st.floats(0.0, 5))
@settings(max_examples=30, deadline=None)
def test_any_options_give_ids_of_the_vocabulary(seed, top_k, top_p, temperature):
    out = SMALL.generate(
        torch.ones(2, 1, dtype=torch.int64), 5, seed=seed, top_k=top_k, top_p=top_p, temperature=temperature
    )
    assert out.shape == (2, 6)
    assert out.min() >= 0
    assert out.max() < 70
