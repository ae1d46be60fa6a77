import pytest
import torch
import torch.nn.functional as F

from fastgpt import GPT, GPTConfig
from fastgpt.model import KVCache
from fastgpt.train import build_optimizer


def small(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig.preset("micro", **{"vocab_size": 300, **changes})).eval()


def some_ids(model, B=2, T=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (B, T), generator=generator)


def test_the_padding_is_never_seen_learnt_or_decayed():
    model = small()
    assert model.transformer.wte.weight.shape == (320, 64)
    ids = some_ids(model)
    assert model(ids).shape == (2, 20, 300)
    optimizer = build_optimizer(model, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        model.loss(ids, ids.roll(-1, 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.count_nonzero(model.transformer.wte.weight[300:]) == 0


@pytest.mark.parametrize("vocab_size", [300, 320])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_the_cross_entropy_of_the_logits(vocab_size, tied):
    model = small(vocab_size=vocab_size, tie_word_embeddings=tied)
    ids, targets = some_ids(model), some_ids(model, seed=1)
    targets[0, :7] = -100
    plain = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="none").view(2, 20)
    torch.testing.assert_close(model.loss(ids, targets, reduction="none"), plain)
    torch.testing.assert_close(model.loss(ids, targets), plain.sum() / 33)
    torch.testing.assert_close(model.loss(ids, targets, reduction="sum"), plain.sum())


def test_an_untrained_models_loss_is_that_of_guessing():
    model = small()
    loss = model.loss(some_ids(model, 8, 64), some_ids(model, 8, 64, seed=1))
    assert loss.item() == pytest.approx(torch.tensor(300.0).log().item(), abs=0.1)


def test_causal():
    model = small()
    ids = some_ids(model)
    changed = ids.clone()
    changed[:, 12] = (changed[:, 12] + 1) % 300
    a, b = model(ids), model(changed)
    assert torch.equal(a[:, :12], b[:, :12])
    assert not torch.allclose(a[:, 12:], b[:, 12:])


def test_every_parameter_learns():
    model = small(tie_word_embeddings=False)
    model.loss(some_ids(model, 2, 64), some_ids(model, 2, 64, 1)).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_initialisation_is_gpt2s():
    model = GPT(GPTConfig(vocab_size=1000, n_layer=8, n_embd=256, n_head=4, n_positions=64))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif ".ln_" in name:
            assert (p == 1).all()
        else:
            wanted = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02
            rows = p[:1000] if "wte" in name else p
            assert rows.std().item() == pytest.approx(wanted, rel=0.05), name


@pytest.mark.parametrize("parts", [[20], [1] * 20, [5, 1, 9, 5], [19, 1]])
def test_with_the_cache_the_logits_are_the_same(parts):
    model = small()
    ids = some_ids(model)
    cache = KVCache(model.config, 2, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        pieces = [model(part, cache) for part in ids.split(parts, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids), rtol=1e-5, atol=1e-5)
        assert cache.length == 20
        torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:])


@pytest.mark.parametrize("B", [1, 2])
def test_packed_documents_do_not_see_each_other(B):
    model = small()
    lengths = [30, 1, 9, 40, 64, 16]  # 160 tokens, more than n_positions; 80 of them in the first four
    documents = [some_ids(model, 1, n, seed=n) for n in lengths]
    ids = torch.cat(documents, 1).view(B, -1)
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed = model.hidden(ids, cu_seqlens).view(1, 160, -1)
    alone = torch.cat([model.hidden(d) for d in documents], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_a_document_that_rows_cut_is_two():
    model = small()
    ids = some_ids(model, 2, 20)
    torch.testing.assert_close(model.hidden(ids, torch.tensor([0, 40], dtype=torch.int32)), model.hidden(ids))


def test_the_loss_of_packed_documents_is_that_of_each():
    model = small()
    lengths = [20, 7, 37]
    documents = [some_ids(model, 1, n, seed=n) for n in lengths]
    targets = [d.roll(-1, 1) for d in documents]
    cu_seqlens = torch.tensor([0, 20, 27, 64], dtype=torch.int32)
    each = torch.cat([model.loss(d, t, "none") for d, t in zip(documents, targets, strict=True)], 1)
    packed = model.loss(torch.cat(documents, 1), torch.cat(targets, 1), "none", cu_seqlens)
    torch.testing.assert_close(packed, each, rtol=1e-5, atol=1e-5)


def test_bad_document_boundaries_are_named():
    model = small()
    ids = some_ids(model, 1, 100)
    for bad, words in (
        ([0, 65, 100], "ids has 65 tokens, the model has n_positions=64"),
        ([0, 60, 90], "must begin with 0 and end with B \\* T = 100"),
        ([0, 60, 50, 100], "must not decrease"),
        ([0], r"shape \(n \+ 1,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            model.hidden(ids, torch.tensor(bad, dtype=torch.int32))


def test_dropout_only_while_training():
    model = small(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    ids = some_ids(model)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
    model.set_dropout(0.0)
    assert torch.equal(model(ids), model(ids))
    assert model.config.resid_pdrop == 0


def test_bad_input_is_named():
    model = small()
    ids = some_ids(model)
    with pytest.raises(TypeError, match=r"ids must be int64, got torch.float32"):
        model(ids.float())
    with pytest.raises(ValueError, match=r"ids must have shape \(B, T\), got \(20,\)"):
        model(ids[0])
    with pytest.raises(ValueError, match="ids has 65 tokens, the model has n_positions=64"):
        model(some_ids(model, 1, 65))
    for bad in (300, -1):
        ids[1, 3] = bad
        with pytest.raises(ValueError, match=f"ids holds {bad}, the vocabulary has 300 ids"):
            model(ids)
    with pytest.raises(ValueError, match=r"targets must have the shape of ids \(2, 20\), got \(2, 19\)"):
        model.loss(some_ids(model), some_ids(model)[:, 1:])


def test_under_autocast_it_stays_near():
    model = small()
    ids, targets = some_ids(model), some_ids(model, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(ids, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model.loss(ids, targets).item(), abs=0.02)


def test_compiles_whole():
    model = small()
    ids, targets = some_ids(model), some_ids(model, seed=1)
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, targets), model.loss(ids, targets))


def test_the_reference_ops_give_the_same_model():
    from fastgpt import ops

    model = small()
    ids = some_ids(model)
    with ops.using("reference"):
        plain = model(ids)
    torch.testing.assert_close(model(ids), plain, rtol=1e-5, atol=1e-5)
