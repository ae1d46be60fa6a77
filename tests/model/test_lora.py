import copy
import weakref

import pytest
import torch
from adapters import KINDS, SHAPE, assert_close, ids, logits, randomize, with_peft, write_base
from torch import nn

from fastgpt import GPT, GPTConfig, UserError, ops
from fastgpt.model.adapter import load_adapter, save_adapter
from fastgpt.model.lora import (
    LoRALinear,
    adapted_layers,
    adapter_names,
    apply_lora,
    linear_layers,
    merge,
    set_adapter,
    unmerge,
)
from fastgpt.train import build_optimizer

CONFIG = GPTConfig(**SHAPE)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base):
    return GPT.from_pretrained(base)


def adapted(base, **options):
    """Ours with an adapter of random numbers."""
    model = GPT.from_pretrained(base)
    apply_lora(model, **options)
    randomize(model)
    return model


# What it computes


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_base_and_keeps_its_names(model, kind):
    before, names = logits(model), set(model.state_dict())
    apply_lora(model, **KINDS[kind])
    assert_close(logits(model), before, atol=1e-5)
    assert names < set(model.state_dict())
    assert all(".adapters.default.lora_" in n for n in set(model.state_dict()) - names)


# For LoRA without DoRA PEFT draws another mask than ops.lora_linear, whose own tests check what it does with one.
@pytest.mark.parametrize(("kind", "dropout"), [*((kind, 0.0) for kind in KINDS), ("dora", 0.4), ("rsdora", 0.4)])
def test_loss_and_gradients_are_pefts(base, kind, dropout, tmp_path):
    hf = with_peft(base, lora_dropout=dropout, **KINDS[kind])
    hf.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    x, targets = ids(1), ids(2)
    hf.train()
    ours.train()
    torch.manual_seed(7)
    expected = torch.nn.functional.cross_entropy(hf(x).logits.flatten(0, 1), targets.flatten())
    expected.backward()
    torch.manual_seed(7)
    loss = ours.loss(x, targets)
    loss.backward()
    assert_close(loss, expected, atol=1e-5)
    gradients = {n.replace("adapters.default.", ""): p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert len(gradients) == 8 * (3 if "dora" in kind else 2)
    for name, p in hf.named_parameters():
        if p.requires_grad:
            name = name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")
            assert_close(gradients[name], p.grad, atol=1e-5)


def test_dropout_is_for_training_only(base):
    model = adapted(base, dropout=0.5).eval()
    assert torch.equal(model(ids()), model(ids()))
    model.train()
    assert not torch.equal(model(ids()), model(ids()))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_without_bias(use_dora, dropout):
    torch.manual_seed(0)
    wrapped = nn.Module()
    wrapped.transformer = nn.Module()
    wrapped.transformer.h = nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(6, 5)})])
    apply_lora(wrapped, targets=("mlp",), rank=2, dropout=dropout, use_dora=use_dora)
    randomize(wrapped)
    layer = wrapped.transformer.h[0]["mlp"]
    x = torch.randn(3, 4, 6)
    for active in ("default", None):
        set_adapter(wrapped, active)
        torch.manual_seed(1)
        whole = layer(x)
        torch.manual_seed(1)
        assert_close(layer.without_bias(x) + layer.bias, whole, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_by_autocast_and_by_weights(base, kind):
    model = adapted(base, **KINDS[kind])
    expected = model.loss(ids(1), ids(2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(ids(1), ids(2))
    loss.backward()
    assert_close(loss.float(), expected, atol=0.05)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained(model).values())
    half = GPT.from_pretrained(base, dtype=torch.bfloat16)
    apply_lora(half, **KINDS[kind])
    randomize(half)
    loss = half.loss(ids(1), ids(2))
    loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained(half).values())


# What trains


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def check_training(model):
    """A dozen steps lower the loss, and change the adapters and nothing else."""
    before = copy.deepcopy(model.state_dict())
    model.train()
    optimizer = build_optimizer(model, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(12):
        loss = model.loss(ids(1), ids(2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".adapters." not in name), name


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_only_the_adapter_trains_and_the_loss_falls(model, kind):
    apply_lora(model, rank=4, **KINDS[kind])
    assert all(".adapters." in n for n in trained(model))
    check_training(model)


def test_targets_choose_the_layers(base):
    def layers(targets):
        model = GPT.from_pretrained(base)
        apply_lora(model, targets=targets)
        return [n for n, m in model.named_modules() if isinstance(m, LoRALinear)]

    blocks = ["transformer.h.0.", "transformer.h.1."]
    assert layers(("attn.c_attn",)) == [f"{b}attn.c_attn" for b in blocks]
    assert layers(("c_proj",)) == [f"{b}{p}.c_proj" for b in blocks for p in ("attn", "mlp")]
    assert layers(r".*\.1\..*c_proj") == ["transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"]
    assert layers(("transformer.h.0.mlp.c_fc",)) == ["transformer.h.0.mlp.c_fc"]
    assert len(layers("all-linear")) == 8


def test_another_module_around_a_transformer(base):
    class Classifier(nn.Module):
        def __init__(self, transformer):
            super().__init__()
            self.transformer = transformer
            self.score = nn.Linear(32, 2, bias=False)

    model = Classifier(GPT.from_pretrained(base).transformer)
    apply_lora(model)
    assert len(trained(model)) == 16
    model.score.requires_grad_(True)
    set_adapter(model, None)
    assert list(trained(model)) == ["score.weight"]


# Several adapters, merged or not


def test_switching(base, model):
    plain = logits(model)
    expected = {}
    for i, (name, kind) in enumerate(KINDS.items()):
        apply_lora(model, rank=i + 1, targets=("c_proj",) if i % 2 else ("c_fc", "c_attn"), name=name, **kind)
        randomize(model, seed=i)
        expected[name] = logits(model)
    assert adapter_names(model) == sorted(KINDS)
    for name in reversed(KINDS):
        set_adapter(model, name)
        assert torch.equal(logits(model), expected[name])
        assert all(f".adapters.{name}." in n for n in trained(model))
    set_adapter(model, None)
    assert torch.equal(logits(model), plain)
    assert not trained(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unmerge(base, kind, dtype):
    model = GPT.from_pretrained(base, dtype=dtype)
    apply_lora(model, **KINDS[kind])
    randomize(model)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    merge(model)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    assert_close(logits(model), before, atol=tolerance)
    merged = logits(model)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.active = None  # nothing but the weights is used
    assert torch.equal(logits(model), merged)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.active = "default"
    assert set(model.state_dict()) == set(weights)
    assert not torch.equal(
        model.state_dict()["transformer.h.1.mlp.c_fc.weight"], weights["transformer.h.1.mlp.c_fc.weight"]
    )
    unmerge(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert torch.equal(logits(model), before)


def test_a_merged_model_moves_and_copies_whole(base):
    model = adapted(base)
    weight = model.transformer.h[0].mlp.c_fc.weight.clone()
    merge(model)
    twin = copy.deepcopy(model).double()
    unmerge(twin)
    assert torch.equal(twin.transformer.h[0].mlp.c_fc.weight, weight.double())


def test_generating(base):
    model = adapted(base, use_dora=True).eval()
    tokens = model.generate(ids()[:, :4], 12, temperature=0)
    assert torch.equal(model.generate(ids()[:, :4], 12, temperature=0, use_cache=False), tokens)
    merge(model)
    assert torch.equal(model.generate(ids()[:, :4], 12, temperature=0), tokens)


def test_merging_is_what_transformers_computes_after_pefts_merge(base, tmp_path):
    hf = with_peft(base, use_dora=True)
    hf.save_pretrained(tmp_path)
    model = GPT.from_pretrained(base)
    load_adapter(model, tmp_path)
    merge(model)
    merged = hf.merge_and_unload()
    assert_close(logits(model), logits(merged))
    for i, block in enumerate(model.transformer.h):
        assert_close(block.mlp.c_fc.weight.detach(), merged.transformer.h[i].mlp.c_fc.weight.detach().T, atol=1e-5)


# Errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "the rank of an adapter must be a whole number of at least 1, got 0"),
        ({"rank": 2.0}, "whole number of at least 1, got 2.0"),
        ({"alpha": float("nan")}, "the alpha of an adapter must be a number, got nan"),
        ({"dropout": 1.0}, "the dropout of an adapter must be at least 0 and below 1, got 1.0"),
        (
            {"targets": ("attn.c_attn", "q_proj")},
            "is named 'q_proj': there are attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c",
        ),
        ({"targets": ("attn",)}, "no linear layer of the model is named 'attn'"),
        ({"targets": "c_attn"}, "no linear layer of the model is named 'c_attn'"),
        ({"targets": "("}, "is no regular expression"),
        ({"targets": ()}, "no linear layer of the model is named"),
        ({"name": "a.b"}, "an adapter cannot be named 'a.b': take letters"),
        ({"name": ""}, "an adapter cannot be named ''"),
        ({"name": "train"}, "an adapter cannot be named 'train': .* and no word of torch's"),
    ],
    ids=str,
)
def test_what_cannot_be_applied_leaves_the_model_as_it_was(model, options, words):
    with pytest.raises(UserError, match=words) as caught:
        apply_lora(model, **options)
    assert "\n" not in str(caught.value)
    assert len(trained(model)) == len(list(model.parameters()))
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


def test_adapters_that_are_not_there(model):
    with pytest.raises(UserError, match="the model has no adapter named 'x': it has none"):
        set_adapter(model, "x")
    with pytest.raises(UserError, match="no active adapter to merge"):
        merge(model)
    apply_lora(model, name="a")
    with pytest.raises(UserError, match=r"the model has no adapter named 'x': it has a$"):
        set_adapter(model, "x")
    with pytest.raises(UserError, match="has an adapter named 'a' already"):
        apply_lora(model, name="a")
    set_adapter(model, None)
    with pytest.raises(UserError, match="no active adapter to merge: choose one with set_adapter"):
        merge(model)
    with pytest.raises(UserError, match="no merged adapter to take out"):
        unmerge(model)


def test_while_one_is_merged(base):
    model = adapted(base)
    merge(model)
    merged = logits(model)
    for what in (merge, apply_lora_as_b, lambda m: set_adapter(m, "default"), lambda m: set_adapter(m, None)):
        with pytest.raises(UserError, match="the adapter 'default' is merged into the weights: unmerge it first"):
            what(model)
        assert torch.equal(logits(model), merged)


def apply_lora_as_b(model):
    apply_lora(model, name="b")


# A base in 4 bits


def quantized(base, **options):
    """(a model in 4 bits with an adapter of random numbers, one whose weights are those 4 bits made whole)"""
    held = adapted(base, quantize="nf4", **options)
    whole = GPT.from_pretrained(base)
    with torch.no_grad():
        for name, layer in adapted_layers(held).items():
            whole.get_submodule(name).weight.copy_(layer.whole_weight())
    apply_lora(whole, **options)
    randomize(whole)
    for p, q in zip(trained(held).values(), trained(whole).values(), strict=True):
        q.data.copy_(p)
    return held, whole


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, {"use_dora": True}, {"use_dora": True, "dropout": 0.3}])
def test_4_bits_train_as_their_whole_weights(base, options):
    """To the bit, but for DoRA with dropout, where another op multiplies by the base's weight."""
    held, whole = quantized(base, **options)
    found = []
    for model in (held, whole):
        torch.manual_seed(5)
        loss = model.train().loss(ids(1), ids(2))
        loss.backward()
        found.append({"loss": loss.detach(), **{name: p.grad for name, p in trained(model).items()}})
    assert len(found[0]) == 1 + 8 * (3 if "use_dora" in options else 2)
    for name, want in found[1].items():
        if len(options) == 2:
            assert_close(found[0][name], want, atol=1e-5)
        else:
            assert torch.equal(found[0][name], want), name


def test_4_bits_beside_which_the_loss_falls(model):
    plain = logits(model)
    apply_lora(model, quantize="nf4")
    assert 0 < (logits(model) - plain).square().mean().sqrt() < 0.15 * plain.std()
    check_training(model)


@pytest.mark.parametrize("active", ["default", None])
@pytest.mark.parametrize("options", [{}, {"use_dora": True, "dropout": 0.3}])
def test_nothing_as_large_as_a_weight_is_saved_for_backward(base, options, active):
    torch.manual_seed(0)
    layer = nn.Module()
    layer.transformer = nn.Module()
    layer.transformer.h = nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(64, 96)})])
    apply_lora(layer, targets=("mlp",), rank=2, quantize="nf4", **options)
    set_adapter(layer, active)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer.transformer.h[0]["mlp"](torch.randn(3, 64, requires_grad=True)).sum().backward()
    assert saved
    assert max(t.numel() for t in saved) < 64 * 96


def test_merge_and_unmerge_of_4_bits(base, tmp_path):
    model, whole = quantized(base)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    merge(model)
    merge(whole)
    assert torch.equal(logits(model), logits(whole))
    assert_close(logits(model), before)
    model.save_pretrained(tmp_path / "merged")
    unmerge(model)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())
    model.save_pretrained(tmp_path / "unmerged")
    set_adapter(model, None)
    model.save_pretrained(tmp_path / "base")
    for folder, expected in (("merged", logits(whole)), ("unmerged", logits(whole)), ("base", logits(model))):
        assert torch.equal(logits(GPT.from_pretrained(tmp_path / folder)), expected)


def test_an_adapter_beside_4_bits_is_saved_as_any_other(base, tmp_path):
    model = adapted(base, quantize="nf4")
    save_adapter(model, tmp_path, base)
    plain, loaded = GPT.from_pretrained(base).state_dict(), GPT.from_pretrained(tmp_path).state_dict()
    numbers = {name: p.detach() for name, p in trained(model).items()}
    assert all(torch.equal(t, numbers[n] if n in numbers else plain[n]) for n, t in loaded.items())
    other = GPT.from_pretrained(base)
    apply_lora(other, quantize="nf4", name="first")
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_layers_are_quantized_one_by_one_and_their_weights_let_go(model, monkeypatch):
    paths = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("transformer.h.")]
    weights = [weakref.ref(model.get_submodule(path).weight) for path in paths]
    alive, quantize = [], ops.quantize_nf4

    def counted(weight):
        alive.append(sum(w() is not None for w in weights))
        return quantize(weight)

    monkeypatch.setattr(ops, "quantize_nf4", counted)
    apply_lora(model, quantize="nf4")
    assert alive == list(range(len(paths), 0, -1))
    assert not any(w() is not None for w in weights)


def test_gpt2s_projections_take_an_eighth_of_their_bytes():
    """A block of GPT-2 124M has 7,077,888 weights in its four projections: 28.3 MB in float32, 3.65 MB in 4 bits."""
    model = GPT(GPTConfig(vocab_size=8, n_positions=4, n_embd=768, n_layer=1, n_head=12))
    count = sum(layer.weight.numel() for layer in linear_layers(model).values())
    assert count == 7_077_888
    apply_lora(model, quantize="nf4")
    held = sum(t.nbytes for layer in adapted_layers(model).values() for t in layer.weight.tensors())
    assert held * 8 / count == pytest.approx(4.127, abs=1e-3)
    assert held == 3_651_280


def test_what_cannot_be_quantized(model):
    with pytest.raises(UserError, match="weights can be quantized to 'nf4' only, got 'int8'"):
        apply_lora(model, quantize="int8")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 4] = torch.nan
    with pytest.raises(UserError, match=r"^transformer.h.1.mlp.c_fc.weight has numbers that are infinite, NaN"):
        apply_lora(model, quantize="nf4")
    assert not adapted_layers(model)
