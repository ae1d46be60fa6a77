import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DEVICES, DTYPES, OpContract, assert_within_bound, results, rows

from fastgpt import ops
from fastgpt.ops import linear_cross_entropy_reference

module = sys.modules["fastgpt.ops.linear_cross_entropy"]


def op(hidden, weight, targets, ignore_index=-100, reduction="mean", z_loss=0.0):
    return ops.linear_cross_entropy(
        hidden, weight, targets, ignore_index=ignore_index, reduction=reduction, z_loss=z_loss
    )


def reference(hidden, weight, targets, ignore_index=-100, reduction="mean", z_loss=0.0):
    return linear_cross_entropy_reference(
        hidden, weight, targets, ignore_index=ignore_index, reduction=reduction, z_loss=z_loss
    )


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ROWS", {"cpu": 64, "cuda": 64})


class TestLinearCrossEntropy(OpContract):
    name = "linear_cross_entropy"
    reference = staticmethod(reference)
    library_sums = True
    smallest = 1e-6  # a gradient of a mean over many rows is made of terms that small
    op = property(lambda self: op)
    # (N, C, V, reduction, z_loss); targets of -100 among them, unless there is one row only
    cases = [
        (65, 24, 100, "mean", 0.0),
        (63, 24, 129, "none", 0.01),
        (7, 5, 3, "sum", 0.0),
        (1, 16, 1, "mean", 0.0),
        (1, 16, 97, "mean", 0.0),
        (0, 16, 10, "sum", 0.0),
        (0, 16, 10, "none", 0.0),
        ((2, 3), 8, 33, "none", 0.0),
        (130, 64, 5000, "mean", 0.01),
        (200, 32, 1000, "none", 0.0),
        (9, 48, 50257, "sum", 0.001),
        (1100, 16, 300, "sum", 0.0),
        (1100, 16, 300, "mean", 0.0),
    ]

    def inputs(self, case, dtype, device, layout="contiguous", seed=0):
        N, C, V, reduction, z_loss = case
        shape = N if isinstance(N, tuple) else (N,)
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(*shape, C, generator=generator).to(dtype).to(device)
        weight = (torch.randn(V, C, generator=generator) * 0.5).to(dtype).to(device)
        targets = torch.randint(0, V, shape, generator=generator)
        if targets.numel() > 1:
            targets[torch.rand(shape, generator=generator) < 0.2] = -100
        hidden, weight = (rows(t, layout).requires_grad_() for t in (hidden, weight))
        return hidden, weight, targets.to(device), -100, reduction, z_loss

    def raw_inputs(self, args):
        hidden, weight, targets, *rest = args
        return hidden.detach().flatten(0, -2).requires_grad_(), weight, targets.flatten(), *rest, [True, True]

    bad_inputs = [
        (TypeError, "hidden must be a tensor, got list", lambda: ([1.0], torch.ones(1, 1), torch.zeros(1).long())),
        (TypeError, "targets must be a tensor, got int", lambda: (torch.ones(1, 1), torch.ones(1, 1), 0)),
        (
            TypeError,
            "hidden must be float32.*got torch.int64",
            lambda: (torch.ones(2, 3).long(), torch.ones(4, 3), torch.zeros(2).long()),
        ),
        (
            TypeError,
            "weight must have hidden's dtype",
            lambda: (torch.ones(2, 3), torch.ones(4, 3).half(), torch.zeros(2).long()),
        ),
        (
            TypeError,
            "targets must be int64, got torch.int32",
            lambda: (torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2).int()),
        ),
        (
            ValueError,
            r"hidden must have a last dimension of at least 1, got shape \(2, 0\)",
            lambda: (torch.ones(2, 0), torch.ones(4, 0), torch.zeros(2).long()),
        ),
        (
            ValueError,
            r"weight must have shape \(V, 3\).*got \(3, 4\)",
            lambda: (torch.ones(2, 3), torch.ones(3, 4), torch.zeros(2).long()),
        ),
        (
            ValueError,
            r"weight must have shape \(V, 3\), V of at least 1, got \(0, 3\)",
            lambda: (torch.ones(2, 3), torch.ones(0, 3), torch.zeros(2).long()),
        ),
        (
            ValueError,
            r"targets must have shape \(2,\).*got \(2, 1\)",
            lambda: (torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, 1).long()),
        ),
        (
            ValueError,
            "weight is on meta but hidden is on cpu",
            lambda: (torch.ones(2, 3), torch.ones(4, 3, device="meta"), torch.zeros(2).long()),
        ),
        (
            ValueError,
            'reduction must be "mean", "sum" or "none", got \'max\'',
            lambda: (torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2).long(), -100, "max"),
        ),
        (
            ValueError,
            r"targets must be in \[0, 4\) or ignore_index -100, got 4",
            lambda: (torch.ones(2, 3), torch.ones(4, 3), torch.tensor([-100, 4])),
        ),
        (
            ValueError,
            r"targets must be in \[0, 4\) or ignore_index 9, got -1",
            lambda: (torch.ones(3, 3), torch.ones(4, 3), torch.tensor([9, 0, -1]), 9),
        ),
    ]

    @given(
        N=st.integers(0, 150),
        C=st.integers(1, 40),
        V=st.integers(1, 300),
        reduction=st.sampled_from(["mean", "sum", "none"]),
        z_loss=st.sampled_from([0.0, 0.01]),
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(["contiguous", "strided", "transposed", "offset"]),
        seed=st.integers(0, 2**16),
    )
    @settings(max_examples=60, deadline=None)
    def test_random_shapes(self, N, C, V, reduction, z_loss, dtype, layout, seed):
        args = self.inputs((N, C, V, reduction, z_loss), dtype, "cpu", layout, seed)
        if reduction == "mean" and not (args[2] != -100).any():
            assert op(*args).isnan()
        else:
            self.check_accuracy(args, roundings=16)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_several_chunks(self, small_chunks, dtype, device):
        """The last one shorter than the others."""
        for reduction in ("mean", "sum", "none"):
            self.check_accuracy(self.inputs((200, 24, 129, reduction, 0.01), dtype, device))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_dweight_is_summed_in_fp32(self, small_chunks, dtype, monkeypatch):
        """Of 16 chunks, and in parts: the error is then still at most twice that of torch's one matmul."""
        monkeypatch.setattr(module, "WEIGHT_ROWS", 50)
        self.check_accuracy(self.inputs((2048, 16, 129, "mean", 0.0), dtype, "cpu"))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_16_bit_hidden_with_fp32_weight(self, dtype):
        case = (100, 24, 129, "mean", 0.0)
        hidden, _, *rest = self.inputs(case, dtype, "cpu")
        args = (hidden, self.inputs(case, torch.float32, "cpu")[1], *rest)
        ours = results(op, args)
        assert ours["output 0"].dtype == torch.float32
        assert ours["gradient of argument 0"].dtype == dtype
        assert ours["gradient of argument 1"].dtype == torch.float32
        exact = results(reference, args, torch.float64)
        assert_within_bound(ours, results(reference, args), exact, smallest=self.smallest)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_autocast_casts_as_a_linear_layer_would(self, reduction):
        hidden, weight, *rest = self.inputs((100, 24, 129, reduction, 0.0), torch.float32, "cpu")
        with torch.autocast("cpu", torch.bfloat16):
            loss = op(hidden, weight, *rest)
        cast = op(hidden.bfloat16(), weight, *rest)
        assert torch.equal(loss, cast)
        ours, theirs = (torch.autograd.grad(y.sum(), [hidden, weight]) for y in (loss, cast))
        assert ours[0].dtype == ours[1].dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
    def test_logits_of_ten_thousand(self, dtype, device):
        hidden = torch.tensor([[1.0], [-1.0], [0.5]], dtype=dtype, device=device, requires_grad=True)
        weight = torch.tensor([[1e4], [-1e4], [0.0]], dtype=dtype, device=device, requires_grad=True)
        for targets in ([0, 1, 2], [1, 0, 0]):
            args = (hidden, weight, torch.tensor(targets, device=device), -100, "none", 0.0)
            found = results(op, args)
            assert all(t.isfinite().all() for t in found.values())
            for name, want in results(reference, args).items():
                torch.testing.assert_close(found[name], want)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_the_targets_gradient_where_its_probability_nears_1(self, dtype, device):
        """1 - p is 1.2e-5 and 1.9e-13: of the difference of the rounded numbers little or nothing would be left."""
        for logit in (12.0,) if dtype == torch.float16 else (12.0, 30.0):  # fp16 holds nothing below 6e-8
            hidden = torch.tensor([[logit, 1.0]], dtype=dtype, device=device, requires_grad=True)
            weight = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=dtype, device=device, requires_grad=True)
            loss = op(hidden, weight, torch.tensor([0], device=device), -100, "sum")
            loss.backward()
            others = 2 * torch.tensor(-logit, dtype=torch.float64).exp().item()
            roundings = 4 * torch.finfo(dtype).eps + (0.01 if dtype == torch.float16 else 0)  # subnormal there
            missing = others / (1 + others)
            assert loss.item() == pytest.approx(others, rel=1e-4)
            assert weight.grad[0, 1].item() == pytest.approx(-missing, rel=roundings)
            assert weight.grad[1, 1].item() == pytest.approx(missing / 2, rel=roundings)

    def test_no_target_counts(self):
        for N in (0, 3):
            hidden = torch.ones(N, 4, requires_grad=True)
            weight = torch.ones(5, 4, requires_grad=True)
            targets = torch.full((N,), 7)
            loss = op(hidden, weight, targets, 7)
            assert loss.isnan()
            loss.backward()
            assert torch.equal(hidden.grad, torch.zeros(N, 4))
            assert torch.equal(weight.grad, torch.zeros(5, 4))
            assert op(hidden, weight, targets, 7, "sum").item() == 0

    @pytest.mark.parametrize("device", DEVICES)
    def test_ignored_rows_are_as_if_they_were_not_there(self, device):
        hidden, weight, targets, *_ = self.inputs((70, 16, 40, "mean", 0.0), torch.float32, device)
        hidden.detach()[targets == -100] = torch.nan
        keep = targets != -100
        loss = op(hidden, weight, targets, -100, "none")
        assert torch.equal(loss[~keep], torch.zeros_like(loss[~keep]))
        torch.testing.assert_close(loss[keep], op(hidden[keep], weight, targets[keep], -100, "none"))

    def test_an_ignore_index_inside_the_vocabulary(self):
        hidden, weight, targets, *_ = self.inputs((70, 16, 40, "mean", 0.0), torch.float32, "cpu")
        self.check_accuracy((hidden, weight, targets.clamp(min=0), 0, "mean", 0.01))

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_nan_stays_in_its_row(self, dtype, device):
        hidden, weight, targets, *_ = self.inputs((70, 16, 40, "none", 0.0), dtype, device)
        hidden.detach()[3, 2] = torch.nan
        hidden.detach()[5, 1] = torch.inf
        targets[3] = targets[5] = 1
        found = results(op, (hidden, weight, targets, -100, "none"))
        bad = torch.zeros(70, dtype=torch.bool, device=device)
        bad[[3, 5]] = True
        for name in ("output 0", "gradient of argument 0"):
            assert found[name][bad].isnan().flatten(1 if name != "output 0" else 0).any()
            assert found[name][~bad].isfinite().all()

    def test_a_padded_vocabulary_is_passed_as_a_view(self):
        hidden, weight, targets, *_ = self.inputs((70, 16, 50, "mean", 0.0), torch.float32, "cpu")
        padded = F.pad(weight.detach(), (0, 0, 0, 14), value=torch.nan).requires_grad_()
        loss = op(hidden, padded[:50], targets)
        loss.backward()
        assert torch.equal(loss, op(hidden, weight, targets))
        want = torch.autograd.grad(op(hidden, weight, targets), weight)[0]
        assert torch.equal(padded.grad[:50], want)
        assert torch.equal(padded.grad[50:], torch.zeros(14, 16))

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("which", [0, 1])
    def test_only_the_wanted_gradient_is_made(self, reduction, which):
        args = list(self.inputs((70, 16, 40, reduction, 0.0), torch.float32, "cpu"))
        want = results(op, tuple(args))[f"gradient of argument {which}"]
        args[1 - which] = args[1 - which].detach()
        found = results(op, tuple(args))
        assert torch.equal(found[f"gradient of argument {which}"], want)
        assert f"gradient of argument {1 - which}" not in found

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_a_graph_that_is_kept_gives_the_same_gradients_again(self, reduction):
        hidden, weight, targets, *_ = self.inputs((70, 16, 40, "mean", 0.0), torch.float32, "cpu")
        loss = (op(hidden, weight, targets, -100, reduction) * 3).sum()
        first = torch.autograd.grad(loss, [hidden, weight], retain_graph=True)
        kept = [g.clone() for g in first]
        again = torch.autograd.grad(loss, [hidden, weight])
        for a, b, c in zip(first, kept, again, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(b, c)

    def test_gradients_add_up_over_calls(self):
        """The gradient handed to the first call's parameter is the op's own memory: the second must not reuse it."""
        hidden, weight, targets, *_ = self.inputs((70, 16, 40, "mean", 0.0), torch.float32, "cpu")
        op(hidden, weight, targets, -100, "sum").backward()
        once = weight.grad.clone()
        op(hidden, weight, targets, -100, "sum").backward()
        torch.testing.assert_close(weight.grad, 2 * once)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_gradients_that_forward_did_not_make(self, reduction):
        """A call of the registered op may say that it needs none, and then ask for them."""
        self.kernel_or_skip()
        args = self.inputs((70, 16, 40, reduction, 0.01), torch.float32, "cpu")
        late = results(lambda *a: self.raw(*a, [False, False])[0], args)
        assert_within_bound(late, results(reference, args), results(reference, args, torch.float64), smallest=1e-6)

    def test_opcheck_of_the_pass(self):
        self.kernel_or_skip()
        targets = torch.tensor([1, -100, 3])
        for factor in (None, torch.rand(3)):
            for gradient in (False, True):
                args = (torch.randn(3, 7), targets, torch.empty(3), factor, -100, 0.01, gradient)
                torch.library.opcheck(torch.ops.fastgpt.cross_entropy_.default, args)

    def test_direct_calls_with_wrong_arguments_do_not_crash(self):
        self.kernel_or_skip()
        one, long = torch.ones, torch.zeros(2).long()
        call = torch.ops.fastgpt.cross_entropy_
        for words, args in [
            ("logits must be 2-D", (one(3, 2).t(), long, one(2), None)),
            ("targets must be", (one(2, 3), long[:1], one(2), None)),
            ("targets must be", (one(2, 3), long.int(), one(2), None)),
            ("loss must be", (one(2, 3), long, one(1), None)),
            ("loss must be", (one(2, 3), long, one(2).double(), None)),
            ("factor must be", (one(2, 3), long, one(2), one(3))),
        ]:
            with pytest.raises(RuntimeError, match=words):
                call(*args, -100, 0.0, True)
        loss, logits = one(2), one(2, 3)
        call(logits, torch.tensor([3, -1]), loss, None, -100, 0.0, True)
        assert loss.isnan().all()
        assert logits.isnan().all()


needs_plain_proc = pytest.mark.skipif(
    sys.platform != "linux" or "asan" in os.environ.get("LD_PRELOAD", ""),
    reason="reads /proc, where AddressSanitizer's own memory counts too",
)
# What a mean's forward and backward take above their inputs, as the system counts it, in a process of its own.
PEAK = """
import re, torch
from pathlib import Path
from fastgpt import ops
torch.set_num_threads(2)
def status(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
def step(N, C, V):
    hidden, weight = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    targets = torch.randint(V, (N,))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    ops.{function}(hidden, weight, targets).backward()
    return status("VmHWM") - before
step(70, 8, 100)
print(step{shape})
"""


def peak(function: str, shape: tuple[int, int, int]) -> int:
    code = PEAK.format(shape=shape, function=function)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@needs_plain_proc
def test_memory_does_not_grow_with_the_rows():
    TestLinearCrossEntropy().kernel_or_skip()
    C, V = 64, 20000
    chunk = 4 * V * module.CHUNK_ROWS["cpu"]
    for N in (2 * module.CHUNK_ROWS["cpu"], 8 * module.CHUNK_ROWS["cpu"]):
        gradients = 4 * C * (N + V)
        assert peak("linear_cross_entropy", (N, C, V)) < 1.1 * (chunk + gradients) + 16e6


@pytest.mark.slow
@needs_plain_proc
def test_memory_is_at_most_15_percent_of_torchs():
    TestLinearCrossEntropy().kernel_or_skip()
    shape = (8192, 768, 50304)
    ours, torchs = peak("linear_cross_entropy", shape), peak("linear_cross_entropy_reference", shape)
    assert ours <= 0.15 * torchs, f"{ours / 1e6:.0f} MB, {torchs / 1e6:.0f} MB"
