import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import GPT, GPTConfig, ops
from fastgpt.ops import registry
from fastgpt.train import build_optimizer


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 11))


def backward(model, seed, scale=1.0):
    ids = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(seed))
    (scale * nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten())).backward()


def test_matches_torchs_clipping_and_adamw_over_20_steps():
    ours, theirs = small_model(), small_model()
    opt = build_optimizer(ours, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95), grad_clip=0.5)
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(20):
        backward(ours, step)
        backward(theirs, step)
        opt.step()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        plain.step()
        torch.testing.assert_close(opt.grad_norm, norm)
        opt.zero_grad()
        plain.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_only_matrices_decay():
    model = small_model()
    opt = build_optimizer(model, lr=0.1, weight_decay=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old * (0.95 if new.dim() >= 2 else 1.0))


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_clipping(clip, implementation):
    """The first step's running mean is 1 - beta1 = 0.1 of the clipped gradient."""
    model = small_model()
    opt = build_optimizer(model, lr=0.0, grad_clip=clip)
    backward(model, 0, scale=100)
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
    with ops.using(implementation):
        opt.step()
    torch.testing.assert_close(opt.grad_norm, norm)
    assert norm > 1
    means = torch.linalg.vector_norm(torch.stack([opt.state[p]["exp_avg"].norm() for p in model.parameters()]))
    torch.testing.assert_close(10 * means, torch.tensor(clip) if clip else norm, rtol=1e-4, atol=0)


def kernel_or_skip():
    if registry.implementation("adamw_step", "cpu").name == "reference":
        pytest.skip("no kernel here")


def test_the_kernel_leaves_gradients_as_they_are():
    kernel_or_skip()
    model = small_model()
    opt = build_optimizer(model, lr=0.1, grad_clip=0.1)
    backward(model, 0, scale=100)
    before = [p.grad.clone() for p in model.parameters()]
    opt.step()
    assert opt.grad_norm > 1
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(("first", "second"), [("ours", "torch"), ("torch", "ours"), ("ours", "reference")])
def test_either_optimizer_goes_on_with_the_others_state(first, second):
    models = [small_model(), small_model()]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}

    def make(kind, model):
        if kind == "torch":
            groups = build_optimizer(model, **options).param_groups
            return torch.optim.AdamW([{k: g[k] for k in ("params", "weight_decay")} for g in groups], **options)
        return build_optimizer(model, grad_clip=0, **options)

    def run(opt, kind, model, steps):
        for step in steps:
            opt.zero_grad()
            backward(model, step)
            with ops.using("reference" if kind == "reference" else "auto"):
                opt.step()

    mixed, whole = make(first, models[0]), make("torch", models[1])
    run(mixed, first, models[0], range(5))
    state = mixed.state_dict()
    mixed = make(second, models[0])
    mixed.load_state_dict(state)
    run(mixed, second, models[0], range(5, 10))
    run(whole, "torch", models[1], range(10))
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert mixed.state[a]["step"] == 10


def test_parameters_that_had_no_gradient_at_first_count_their_own_steps():
    ours, theirs = small_model(), small_model()
    opt = build_optimizer(ours, lr=1e-2, weight_decay=0.1, grad_clip=0)
    plain = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 if p.dim() >= 2 else 0.0} for p in theirs.parameters()],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    for step in range(6):
        for model, optimizer in ((ours, opt), (theirs, plain)):
            optimizer.zero_grad()
            backward(model, step)
            if step < 3:
                model[1].weight.grad = None
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert opt.state[ours[1].weight]["step"] == 3


@pytest.mark.parametrize("change", ["bfloat16", "amsgrad", "transposed"])
def test_what_the_kernel_does_not_take_goes_another_way(change):
    ours, theirs = small_model(), small_model()
    for model in (ours, theirs):
        if change == "bfloat16":
            model.bfloat16()
        if change == "transposed":
            model[1].weight = nn.Parameter(model[1].weight.detach().t())
    opt = build_optimizer(ours, lr=1e-2, weight_decay=0.0, grad_clip=0.5)
    plain = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if change == "amsgrad":
        for group in (*opt.param_groups, *plain.param_groups):
            group["amsgrad"] = True
    for step in range(3):
        for model, optimizer in ((ours, opt), (theirs, plain)):
            optimizer.zero_grad()
            backward(model, step)
            if model is theirs:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_step_that_a_gradient_scaler_found_infinite_is_skipped():
    model = small_model()
    opt = build_optimizer(model, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, 0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones((), requires_grad=True))  # makes the scale
    model[1].weight.grad[0, 0] = torch.inf
    scaler.step(opt)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("change", ["kernels", "reference", "bfloat16", "amsgrad", "masters"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(value, change):
    """With clipping and without: the update is skipped on the device, and the next one goes on."""
    model = small_model()
    if change == "bfloat16":
        model.bfloat16()
    opt = build_optimizer(
        model, lr=0.1, weight_decay=0.1, grad_clip=0 if change == "kernels" else 1, masters=change == "masters"
    )
    for group in opt.param_groups:
        group["amsgrad"] = change == "amsgrad"
    with ops.using("reference" if change == "reference" else "auto"):
        backward(model, 0)
        opt.step()
        held = [*model.parameters(), *(t for s in opt.state.values() for k, t in s.items() if k != "step")]
        before = [t.detach().clone() for t in held]
        for p in model.parameters():
            p.grad[..., 0] = value
        opt.step()
        assert not opt.grad_norm.isfinite()
        assert all(torch.equal(t, b) for t, b in zip(held, before, strict=True))
        opt.zero_grad()
        backward(model, 1)
        opt.step()
        assert not any(torch.equal(t, b) for t, b in zip(held, before, strict=True))


class NothingIsRead(TorchDispatchMode):
    """Refuses to read a number from a float tensor, for which a host would wait. An optimizer counts on the CPU."""

    def __init__(self, optimizer):
        super().__init__()
        self.optimizer = optimizer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
            assert any(args[0] is state["step"] for state in self.optimizer.state.values())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("options", [{}, {"masters": True}, {"name": "muon"}], ids=str)
def test_a_step_reads_nothing(options, mode):
    model = GPT(GPTConfig(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    opt = build_optimizer(model, **options)
    ids = torch.randint(64, (2, 16))
    for _ in range(2):
        with ops.using(mode), NothingIsRead(opt):
            model.loss(ids, ids).backward()
            opt.step()
            opt.zero_grad()
    with NothingIsRead(opt), pytest.raises(AssertionError):
        opt.grad_norm.item()


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_masters_are_what_float32_weights_would_be(mode):
    """The bf16 parameters are always their roundings; full precision shows the masters in their place."""
    model, exact = small_model(), small_model()
    opt, plain = build_optimizer(model, lr=1e-3, masters=True), build_optimizer(exact, lr=1e-3)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    for step in range(5):
        backward(model, step)
        for p, q in zip(model.parameters(), exact.parameters(), strict=True):
            q.grad = p.grad.float()
        with ops.using(mode):
            opt.step()
            plain.step()
        opt.zero_grad()
    rounded = [p.detach().clone() for p in model.parameters()]
    with opt.full_precision():
        for p, q, r in zip(model.parameters(), exact.parameters(), rounded, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
            assert torch.equal(p.bfloat16(), r)
    for p, r in zip(model.parameters(), rounded, strict=True):
        assert torch.equal(p, r)
        assert {t.dtype for k, t in opt.state[p].items()} == {torch.float32}


def test_masters_load_unrounded_and_bring_their_parameters():
    model, again = small_model(), small_model()
    opt = build_optimizer(model, lr=1e-2, masters=True)
    for step in range(3):
        opt.zero_grad()
        backward(model, step)
        opt.step()
    with torch.no_grad():
        again[1].weight += 1
    other = build_optimizer(again, lr=1e-2, masters=True)
    other.load_state_dict(opt.state_dict())
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(t, other.state[q][k]) for k, t in opt.state[p].items())
        assert other.state[q]["master"] is not opt.state[p]["master"]


def test_a_closure_gives_the_gradients_of_the_step():
    model = small_model()
    opt = build_optimizer(model, lr=0.1)
    before = model[1].weight.detach().clone()

    def closure():
        opt.zero_grad()
        backward(model, 0)
        return 7.0

    assert opt.step(closure) == 7.0
    assert opt.grad_norm > 0
    assert not torch.equal(model[1].weight, before)


def test_no_gradients_at_all():
    model = small_model()
    opt = build_optimizer(model, lr=0.1)
    opt.step()
    assert opt.grad_norm == 0


@pytest.mark.gpu
def test_a_state_whose_steps_are_on_the_gpu():
    model = small_model().cuda()
    opt = build_optimizer(model, lr=0.1)
    for mode in ("reference", "auto", "reference"):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with ops.using(mode):
            opt.step()
    assert all(state["step"] == 3 for state in opt.state.values())


def test_frozen_parameters_stay():
    model = small_model()
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    opt = build_optimizer(model, lr=0.1)
    backward(model, 0)
    opt.step()
    assert torch.equal(model[0].weight, frozen)
