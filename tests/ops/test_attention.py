import functools
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DEVICES, DTYPES, OpContract, assert_within_bound, results, rows, same

from fastgpt import ops
from fastgpt.ops import attention_cpu, attention_reference, attention_table, philox, registry


def positional(fn):
    """`fn` with its keyword arguments in the registered op's order, as the harness calls it."""

    @functools.wraps(fn)
    def call(q, k, v, causal=True, scale=None, dropout_p=0.0, seed=None, cu_seqlens=None):
        return fn(q, k, v, causal=causal, scale=scale, dropout_p=dropout_p, seed=seed, cu_seqlens=cu_seqlens)

    return call


reference = positional(attention_reference)


def boundaries(tokens, *inside):
    return torch.tensor([0, *inside, tokens], dtype=torch.int32)


X = torch.ones(1, 2, 4, 8)
CU = boundaries(4)


def with_documents(cu_seqlens, k=X):
    return X, k, k, True, None, 0.0, None, cu_seqlens


class TestAttention(OpContract):
    name = "attention"
    reference = staticmethod(reference)
    # (B, H, T_q, T_k, D, options): lengths around blocks, more rows than columns and fewer, one row, nothing at all;
    # documents that are empty, of one token, and across batch rows; dropout, also with both.
    cases = [
        (2, 3, 9, 9, 16, {}),
        (2, 2, 12, 12, 8, {"cu_seqlens": boundaries(24, 1, 5, 5, 17)}),
        (1, 2, 7, 10, 16, {"dropout_p": 0.3, "seed": 5}),
        (1, 9, 1, 1, 64, {}),
        (2, 1, 2, 2, 32, {"causal": False}),
        (2, 2, 1, 63, 16, {}),
        (1, 9, 64, 64, 80, {"scale": 0.3}),
        (2, 2, 65, 127, 16, {}),
        (2, 2, 113, 203, 16, {}),
        (1, 2, 239, 1, 16, {}),
        (1, 2, 129, 128, 20, {}),
        (2, 2, 63, 40, 16, {"causal": False}),
        (0, 2, 8, 8, 16, {}),
        (2, 2, 0, 8, 16, {}),
        (2, 2, 4, 0, 16, {"causal": False}),
        (0, 2, 8, 8, 16, {"cu_seqlens": torch.zeros(2, dtype=torch.int32)}),
        (3, 2, 65, 65, 16, {"cu_seqlens": boundaries(195, 60, 61, 150), "causal": False}),
        (1, 2, 128, 128, 32, {"cu_seqlens": boundaries(128, 127, 128, 128), "dropout_p": 0.1, "seed": -3}),
        (2, 2, 70, 33, 16, {"dropout_p": 0.5, "seed": 2**63 + 1}),
        (2, 3, 65, 65, 16, {"dropout_p": 0.25, "seed": 1, "causal": False}),
    ]

    @property
    def op(self):
        return positional(ops.attention)

    def inputs(self, case, dtype, device, layout="contiguous", seed=0):
        B, H, T_q, T_k, D, options = case
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (
            rows(torch.randn(B, H, T, D, generator=generator).to(dtype).to(device), layout).requires_grad_()
            for T in (T_q, T_k, T_k)
        )
        options = {"causal": True, "scale": None, "dropout_p": 0.0, "seed": None, "cu_seqlens": None, **options}
        if options["cu_seqlens"] is not None:
            options["cu_seqlens"] = options["cu_seqlens"].to(device)
        return q, k, v, *options.values()

    def check_accuracy(self, args, roundings=1):
        """The gradients of q and k are sums of scale * (do . v - delta) k: their rounding is of do . v * k * scale.

        Where a row sees one column the difference is 0, but exactly so in the reference alone.
        """
        ours, torchs, exact = (
            results(f, args, t) for f, t in ((self.op, None), (reference, None), (reference, torch.float64))
        )
        q, k, v = (t.detach().double().cpu() for t in args[:3])
        do = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).double()  # as `results` has it
        dots = do @ v.mT
        largest = dots.abs().max().item() * max(q.abs().max(), k.abs().max()).item() if dots.numel() else 0.0
        size = max(1.0, largest * (args[4] or q.size(-1) ** -0.5) / (1 - args[5]))
        for names, smallest in (({"output 0", "gradient of argument 2"}, 1.0), (set(ours), size)):
            some = ({name: found[name] for name in names & set(ours)} for found in (ours, torchs, exact))
            assert_within_bound(*some, roundings, smallest)

    def raw_inputs(self, args):
        q, k, v, causal, scale, dropout_p, seed, cu_seqlens = args
        if seed is not None:
            seed = torch.tensor(seed, device=q.device)
        return q, k, v, causal, scale or q.size(-1) ** -0.5, dropout_p, seed, cu_seqlens

    bad_inputs = [
        (TypeError, "q must be a tensor, got list", lambda: ([1.0], torch.ones(1), torch.ones(1))),
        (TypeError, "k must be float32.*got torch.int64", lambda: (X, X.long(), X)),
        (TypeError, "v must have q's dtype torch.float32, got torch.float16", lambda: (X, X, X.half())),
        (ValueError, r"q must have shape \(B, H, T, D\), got \(4, 8\)", lambda: (X[0, 0], X, X)),
        (ValueError, r"k must have shape \(1, 2, T_k, 8\).*got \(1, 1, 4, 8\)", lambda: (X, X[:, :1], X)),
        (ValueError, r"v must have k's shape \(1, 2, 4, 8\), got \(1, 2, 3, 8\)", lambda: (X, X, X[:, :, :3])),
        (ValueError, "head dimension of at least 1", lambda: (X[..., :0], X[..., :0], X[..., :0])),
        (ValueError, "v is on meta", lambda: (X, X, X.to("meta"))),
        (ValueError, "scale must be finite and above 0, got -1", lambda: (X, X, X, True, -1.0)),
        (ValueError, "scale must be finite and above 0, got nan", lambda: (X, X, X, True, math.nan)),
        (ValueError, "dropout_p must be at least 0 and below 1, got 1", lambda: (X, X, X, True, None, 1.0)),
        (TypeError, "seed must be an int or a tensor, got str", lambda: (X, X, X, True, None, 0.1, "1")),
        (ValueError, "seed must be one int64", lambda: (X, X, X, True, None, 0.1, torch.ones(2).long())),
        (TypeError, "cu_seqlens must be an int32 tensor, got torch.int64", lambda: with_documents(CU.long())),
        (TypeError, "cu_seqlens must be an int32 tensor, got list", lambda: with_documents([0, 4])),
        (ValueError, r"cu_seqlens must have shape \(n \+ 1,\), got \(1,\)", lambda: with_documents(CU[:1])),
        (ValueError, "begin with 0 and end with B . T = 4, got 0 and 3", lambda: with_documents(boundaries(3))),
        (ValueError, "must not decrease", lambda: with_documents(boundaries(4, 3, 2))),
        (ValueError, "as many rows of k as of q, got 1 and 4", lambda: with_documents(CU, X[:, :, :1])),
        (ValueError, "cu_seqlens is on meta", lambda: with_documents(CU.to("meta"))),
    ]

    def test_double_backward_says_that_it_is_not_there(self):
        self.kernel_or_skip()
        words = {0: "derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented"}
        for i in range(3):  # plain attention is torch's own function, and what it raises
            args = self.inputs(self.cases[i], torch.float32, "cpu")

            def gradient(args=args):
                return torch.autograd.grad(self.op(*args).square().sum(), args[:3], create_graph=True)[0].sum()

            with pytest.raises(RuntimeError, match=words.get(i, "attention: double backward is not supported")):
                gradient().backward()
            with ops.using("reference"):
                gradient().backward()

    def test_without_the_extension_only_dropout_takes_the_reference(self, monkeypatch):
        monkeypatch.setattr(attention_cpu, "HAS_DROPOUT", False)
        for case in self.cases[:3]:
            args = self.inputs(case, torch.float32, "cpu")
            taken = same(results(self.op, args), results(reference, args))
            assert taken == bool(case[-1].get("dropout_p"))
            self.check_accuracy(args)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize(("T_q", "T_k"), [(1000, 1000), (1024, 1024), (1023, 1024), (1024, 1023), (799, 3)])
    def test_long(self, T_q, T_k, device):
        for dtype in (torch.float32, torch.bfloat16):
            self.check_accuracy(self.inputs((1, 2, T_q, T_k, 64, {}), dtype, device))

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("D", [16, 32, 64, 80, 96, 128, 256, 40])
    def test_head_dims_on_gpus(self, D, dtype):
        cu = boundaries(2 * 300, 5, 100, 101, 299, 450)
        for options in ({}, {"causal": False}, {"cu_seqlens": cu}, {"dropout_p": 0.2, "seed": 9, "cu_seqlens": cu}):
            self.check_accuracy(self.inputs((2, 3, 300, 300, D, options), dtype, "cuda"))
        for T_q, T_k in ((1, 777), (3, 5000), (16, 100), (200, 300), (300, 200)):
            self.check_accuracy(self.inputs((2, 3, T_q, T_k, D, {}), dtype, "cuda"))

    @given(
        B=st.integers(1, 3), H=st.integers(1, 3), T_q=st.integers(1, 40), T_k=st.integers(1, 40),
        D=st.integers(1, 20), dtype=st.sampled_from(DTYPES), causal=st.booleans(),
        layout=st.sampled_from(["contiguous", "strided", "transposed", "offset"]),
        dropout_p=st.sampled_from([0.0, 0.0, 0.4]), cuts=st.none() | st.lists(st.integers(0, 120), max_size=8),
        seed=st.integers(0, 2**16),
    )  # fmt: skip
    @settings(max_examples=60, deadline=None)
    def test_random_shapes(self, B, H, T_q, T_k, D, dtype, causal, layout, dropout_p, cuts, seed):
        options = {"causal": causal, "dropout_p": dropout_p, "seed": seed}
        if cuts is not None:
            T_k = T_q
            options["cu_seqlens"] = boundaries(B * T_q, *sorted(min(c, B * T_q) for c in cuts))
        self.check_accuracy(self.inputs((B, H, T_q, T_k, D, options), dtype, "cpu", layout, seed), roundings=16)

    @pytest.mark.skipif(not attention_cpu.HAS_CAUSAL, reason="its kernel for causal training needs AVX-512")
    @given(
        B=st.integers(1, 3), H=st.integers(2, 4), T=st.integers(1, 140), D=st.sampled_from([16, 32, 48, 64, 80, 128]),
        layout=st.sampled_from(["contiguous", "strided", "transposed", "offset"]),
        cuts=st.none() | st.lists(st.integers(0, 420), max_size=8), scale=st.sampled_from([None, 0.9]),
        seed=st.integers(0, 2**16),
    )  # fmt: skip
    @settings(max_examples=60, deadline=None)
    def test_the_kernel_for_causal_training_at_random_shapes(self, B, H, T, D, layout, cuts, scale, seed):
        """Also far below where it is the faster one."""
        options = {"scale": scale}
        if cuts is not None:
            options["cu_seqlens"] = boundaries(B * T, *sorted(min(c, B * T) for c in cuts))
        args = self.inputs((B, H, T, T, D, options), torch.float32, "cpu", layout, seed)
        with mock.patch.object(attention_cpu, "MIN_SCORES", 1):
            assert attention_cpu.takes_causal(*args[:2], True, 0.0, args[7]) == (T > 32 or cuts is not None)
            self.check_accuracy(args, roundings=16)
            again = [torch.autograd.grad(ops.attention(*args[:3], cu_seqlens=args[7]).sin().sum(), args[:3])]
            again += [torch.autograd.grad(ops.attention(*args[:3], cu_seqlens=args[7]).sin().sum(), args[:3])]
        assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))

    @pytest.mark.skipif(not attention_cpu.HAS_CAUSAL, reason="its kernel for causal training needs AVX-512")
    def test_what_the_kernel_for_causal_training_takes(self):
        q = torch.randn(2, 4, 128, 32)
        assert attention_cpu.takes_causal(q, q, True, 0.0, None)
        for other in (q.double(), q.bfloat16(), q[..., :20], q[:, :, :32], q[:1, :1]):
            assert not attention_cpu.takes_causal(other, other, True, 0.0, None)
        assert not attention_cpu.takes_causal(q, q, False, 0.0, None)
        assert not attention_cpu.takes_causal(q, q, True, 0.1, None)
        assert not attention_cpu.takes_causal(q[:, :, :100], q, True, 0.0, None)
        assert not attention_cpu.takes_causal(*2 * [torch.empty(2, 4, 4096, 32)], True, 0.0, None)
        with pytest.raises(RuntimeError, match=r"v must be \(B, H, T, D\), float32, D a multiple of 16"):
            torch.ops.fastgpt.attention_causal_(
                q, q, q[..., :8], q.clone(), q[..., 0].clone(), torch.tensor([[0, 0, 128]]), 1.0
            )

    @pytest.mark.skipif(not attention_cpu.HAS_CAUSAL, reason="its kernel for causal training needs AVX-512")
    def test_a_nan_stays_in_what_it_reaches(self):
        """A row with a NaN, and those after it that see it, have one; those before it do not."""
        q = torch.randn(2, 4, 128, 32)
        q[:, :, 70, 3] = torch.nan
        for y in (ops.attention(q, q.nan_to_num(), q.nan_to_num()), ops.attention(q.nan_to_num(), q, q.nan_to_num())):
            assert y[:, :, :70].isfinite().all()
            assert y[:, :, 70].isnan().all()

    @pytest.mark.parametrize("device", DEVICES)
    def test_views_of_a_fused_projection_are_taken_as_they_are(self, device):
        B, T, H, D = 3, 33, 4, 16
        qkv = torch.randn(B, T, 3, H, D, device=device, requires_grad=True)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = ops.attention(q, k, v)
        assert y.transpose(1, 2).is_contiguous()  # (B, T, H, D): the heads are joined without a copy
        (grad,) = torch.autograd.grad(y.square().sum(), qkv)
        apart = [t.detach().contiguous().requires_grad_() for t in (q, k, v)]
        again = ops.attention(*apart)
        grads = torch.autograd.grad(again.square().sum(), apart)
        assert torch.equal(y, again)
        assert all(torch.equal(grad.permute(2, 0, 3, 1, 4)[i], g) for i, g in enumerate(grads))

    @pytest.mark.parametrize("device", DEVICES)
    def test_rows_that_see_nothing_are_zero_and_have_no_gradient(self, device):
        q, k, v, *_ = args = self.inputs((2, 2, 50, 20, 16, {}), torch.float32, device)
        y = ops.attention(q, k, v)
        y.sum().backward()
        assert (y[:, :, :30] == 0).all()
        assert (q.grad[:, :, :30] == 0).all()
        assert all(t.grad.isfinite().all() for t in args[:3])

    @pytest.mark.parametrize("device", DEVICES)
    def test_documents_are_as_if_alone(self, device):
        """Also where a document crosses a batch row's end, and with the boundaries padded to a fixed length."""
        q, k, v, *_ = self.inputs((2, 2, 50, 50, 16, {}), torch.float32, device)
        cu = boundaries(100, 20, 20, 70, 100, 100).to(device)
        for causal in (True, False):
            y = ops.attention(q, k, v, causal=causal, cu_seqlens=cu)
            for b, s, e in [(0, 0, 20), (0, 20, 50), (1, 0, 20), (1, 20, 50)]:
                part = (slice(b, b + 1), slice(None), slice(s, e))
                alone = ops.attention(q[part], k[part], v[part], causal=causal)
                torch.testing.assert_close(y[part], alone, atol=2e-6, rtol=1e-5)

    @pytest.mark.parametrize("device", DEVICES)
    def test_logits_far_apart_stay_finite(self, device):
        """One weight is 1 and the rest underflow; in 16 bits scores reach their largest, in fp32 an lse of -1e4."""
        for dtype in DTYPES:
            q, k, v, *_ = self.inputs((1, 2, 70, 70, 16, {}), dtype, device)
            for big in (torch.full_like(q, 30.0), torch.full_like(q, -30.0)):
                q2, k2 = big.detach().requires_grad_(), torch.full_like(k, 30.0).requires_grad_()
                y = ops.attention(q2, k2, v, scale=1.0)
                grads = torch.autograd.grad(y.sum(), (q2, k2, v))
                assert y.isfinite().all()
                assert all(g.isfinite().all() for g in grads)
            # Wide scores, so that rows differ in where their weight is.
            self.check_accuracy(((q * 20).detach().requires_grad_(), k, v, True, None, 0.0, None, None), roundings=64)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    def test_dropout_drops_what_it_says(self, p, device):
        """With v = 1 a row is the sum of the weights kept: on average 1. And with seeds, masks differ."""
        q = torch.zeros(2, 4, 256, 16, device=device)
        v = torch.ones_like(q)
        y = ops.attention(q, q, v, causal=False, dropout_p=p, seed=1)[..., 0]
        deviation = math.sqrt(p / (1 - p) / y.size(-1) / y.numel())
        assert abs(y.mean().item() - 1) < 4 * deviation
        assert abs(y.var().item() / (p / (1 - p) / y.size(-1)) - 1) < 0.2
        other = ops.attention(q, q, v, causal=False, dropout_p=p, seed=2)[..., 0]
        assert not torch.equal(y, other)
        assert abs(torch.corrcoef(torch.stack([y.flatten(), other.flatten()]))[0, 1].item()) < 0.1
        again = ops.attention(q, q, v, causal=False, dropout_p=p, seed=torch.tensor(1, device=device))[..., 0]
        assert torch.equal(y, again)

    @pytest.mark.parametrize("device", DEVICES)
    def test_without_a_seed_torchs_generator_gives_it(self, device):
        q = torch.randn(1, 2, 32, 16, device=device)
        torch.manual_seed(3)
        first, second = (ops.attention(q, q, q, dropout_p=0.5) for _ in range(2))
        torch.manual_seed(3)
        assert torch.equal(first, ops.attention(q, q, q, dropout_p=0.5))
        assert not torch.equal(first, second)

    def test_autocast_changes_nothing_of_dropout(self):
        q = torch.randn(1, 2, 32, 16, dtype=torch.bfloat16, requires_grad=True)
        plain = ops.attention(q, q, q, dropout_p=0.5, seed=1)
        with torch.autocast("cpu", torch.bfloat16):
            cast = ops.attention(q, q, q, dropout_p=0.5, seed=1)
            (grad,) = torch.autograd.grad(cast.sum(), q)
        assert torch.equal(plain, cast)
        assert torch.equal(torch.autograd.grad(plain.sum(), q)[0], grad)

    @pytest.mark.parametrize("device", DEVICES)
    def test_no_dropout_needs_no_random_number(self, device):
        q = torch.randn(1, 2, 32, 16, device=device)
        state = torch.get_rng_state()
        assert torch.equal(ops.attention(q, q, q), ops.attention(q, q, q, dropout_p=1e-6))
        assert torch.equal(state, torch.get_rng_state())

    def test_without_gradients_it_is_the_same(self):
        for case in self.cases:
            args = self.inputs(case, torch.float32, "cpu")
            with torch.no_grad():
                bare = self.op(*args)
            assert torch.equal(bare, self.op(*args).detach())

    @pytest.mark.parametrize("device", DEVICES)
    def test_checkpointing_draws_the_same_mask_again(self, device):
        q = torch.randn(1, 2, 32, 16, device=device, requires_grad=True)
        torch.manual_seed(0)
        (want,) = torch.autograd.grad(ops.attention(q, q, q, dropout_p=0.5).sum(), q)
        torch.manual_seed(0)
        y = torch.utils.checkpoint.checkpoint(lambda x: ops.attention(x, x, x, dropout_p=0.5), q, use_reentrant=False)
        (got,) = torch.autograd.grad(y.sum(), q)
        assert torch.equal(want, got)

    def test_a_shape_in_the_table_goes_to_sdpa(self, monkeypatch):
        entry = attention_table.Entry(90, 64, 512, 1024, "a test")
        assert not attention_table.sdpa_is_faster(90, 64, 512)
        assert "no GPU has been measured" in attention_table.describe()
        monkeypatch.setattr(attention_table, "TABLE", (entry,))
        assert attention_table.sdpa_is_faster(90, 64, 512)
        assert attention_table.sdpa_is_faster(90, 64, 1024)
        assert not any(attention_table.sdpa_is_faster(*key) for key in [(80, 64, 512), (90, 128, 512), (90, 64, 1025)])
        assert "sm_90 D 64 T 512 to 1024 (a test)" in attention_table.describe()

    @pytest.mark.gpu
    def test_a_shape_in_the_table_goes_to_sdpa_on_a_gpu(self, monkeypatch):
        major, minor = torch.cuda.get_device_capability()
        entry = attention_table.Entry(10 * major + minor, 64, 1, 4096, "a test")
        q = torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16)
        mine = ops.attention(q, q, q)
        monkeypatch.setattr(attention_table, "TABLE", (entry,))
        theirs = ops.attention(q, q, q)
        assert torch.equal(theirs, F.scaled_dot_product_attention(q, q, q, is_causal=True))
        torch.testing.assert_close(mine, theirs, atol=0.02, rtol=0.02)
        # What SDPA cannot do, or does not do the same way, stays.
        assert torch.equal(
            ops.attention(q, q, q, dropout_p=0.5, seed=1),
            torch.ops.fastgpt.attention(q, q, q, True, 64**-0.5, 0.5, torch.tensor(1, device="cuda"), None)[0],
        )

    @pytest.mark.gpu
    def test_wrong_boundaries_on_a_gpu_read_nothing_out_of_bounds(self):
        q = torch.randn(2, 2, 100, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for cu in ([5, 3, 9999], [-7, 0, 10**9], [200, 0], [300, 400, 500]):
            y = ops.attention(q, q, q, cu_seqlens=torch.tensor(cu, dtype=torch.int32, device="cuda"))
            y.sum().backward()
        torch.cuda.synchronize()

    @pytest.mark.gpu
    def test_an_unpacked_double_falls_back_on_a_gpu(self):
        for D, dtype in ((64, torch.float64), (320, torch.float32)):
            self.check_accuracy(self.inputs((1, 2, 40, 40, D, {}), dtype, "cuda"))

    def test_compiled_with_dropout_of_an_unknown_seed(self):
        torch._dynamo.reset()
        compiled = torch.compile(functools.partial(ops.attention, dropout_p=0.5), fullgraph=True, backend="aot_eager")
        q = torch.zeros(1, 2, 64, 16, requires_grad=True)
        y = compiled(q, q, torch.ones_like(q))
        assert abs(y.mean().item() - 1) < 0.3
        assert (y == 0).any() or y.var() > 0
        y.sum().backward()


class TestPhilox:
    def test_known_words(self):
        """Two counters of the ten-round variant published with the algorithm, and what seven rounds of it give."""
        zero = torch.zeros((), dtype=torch.int64)
        ones = torch.full((), 0xFFFFFFFF)
        key = torch.tensor(-1)  # all 64 bits
        for rounds, seed, c, want in [
            (10, zero, zero, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
            (10, key, ones, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ]:
            words = philox.philox(seed, c, c, c, c, rounds)
            assert " ".join(f"{w.item():08x}" for w in words) == want
        assert philox.philox(zero, *[zero] * 4) != philox.philox(zero, *[zero] * 4, 10)

    def test_mask_does_not_depend_on_how_much_of_it_is_asked_for(self):
        seed = torch.tensor(123456789012345)
        whole = philox.keep_mask(seed, 4, 40, 61, 0.3)
        assert torch.equal(whole[:3, :17, :30], philox.keep_mask(seed, 3, 17, 30, 0.3))
        assert abs(whole.float().mean().item() - 0.7) < 0.02

    @pytest.mark.skipif(registry.implementation("layer_norm", "cpu").name == "reference", reason="needs the extension")
    def test_the_extension_draws_the_same(self):
        seed = torch.tensor(-987654321987654321)
        B, H, T_q, T_k = 2, 3, 37, 45
        q = torch.zeros(B, H, T_q, 8)
        y = ops.attention(q, q.new_zeros(B, H, T_k, 8), torch.eye(T_k).expand(B, H, T_k, T_k)[..., :8].contiguous(),
                          causal=False, dropout_p=0.4, seed=seed)  # fmt: skip
        kept = philox.keep_mask(seed, B * H, T_q, T_k, 0.4).view(B, H, T_q, T_k)
        assert torch.equal(y > 0, kept[..., :8])
