import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, OpContract, assert_within_bound, results, rows, same

from fastgpt import ops
from fastgpt.ops import lora_linear_reference


class TestLoraLinear(OpContract):
    name = "lora_linear"
    reference = staticmethod(lora_linear_reference)
    library_sums = True
    # (shape of x, out, rank): ranks from 1 to 256, also above the widths; no rows, one to three dimensions.
    cases = [
        ((3, 5), 4, 2),
        ((2, 3, 8), 6, 1),
        ((7,), 3, 4),
        ((0, 16), 8, 2),
        ((1, 1), 1, 1),
        ((2, 0, 7), 5, 3),
        ((63, 65), 129, 8),
        ((127, 100), 33, 16),
        ((130, 64), 64, 256),
        ((64, 192), 576, 16),
    ]

    def inputs(self, case, dtype, device, layout="contiguous", seed=0, bias=True):
        shape, out, rank = case
        generator = torch.Generator().manual_seed(seed)

        def make(*shape, scale=1.0):
            t = (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)
            return rows(t, layout).requires_grad_()

        width = shape[-1]
        weight = make(out, width, scale=width**-0.5)
        lora_a, lora_b = make(rank, width, scale=width**-0.5), make(out, rank, scale=0.5 * rank**-0.5)
        return make(*shape), weight, make(out) if bias else None, lora_a, lora_b, 2.0

    def raw_inputs(self, args):
        keep = torch.ones(args[0].shape, dtype=torch.bool, device=args[0].device)
        return (*args, keep, 1.0, None, None, None)

    bad_inputs = [
        (TypeError, "x must be a tensor, got list", lambda: ([1.0], *[torch.ones(1, 1)] * 4, 1.0)),
        (
            TypeError,
            "bias must be a tensor, got int",
            lambda: (*[torch.ones(1, 1)] * 2, 3, *[torch.ones(1, 1)] * 2, 1.0),
        ),
        (
            TypeError,
            "x must be float32.*got torch.int64",
            lambda: (torch.ones(2, 3).long(), torch.ones(4, 3), None, torch.ones(1, 3), torch.ones(4, 1), 1.0),
        ),
        (
            TypeError,
            "lora_a must have x's dtype torch.float32, got torch.float64",
            lambda: (torch.ones(2, 3), torch.ones(4, 3), None, torch.ones(1, 3).double(), torch.ones(4, 1), 1.0),
        ),
        (
            ValueError,
            r"weight \(out, in\), got \(2, 3\) and \(4, 2\)",
            lambda: (torch.ones(2, 3), torch.ones(4, 2), None, torch.ones(1, 3), torch.ones(4, 1), 1.0),
        ),
        (
            ValueError,
            r"lora_a must have shape \(r, in\) with r of at least 1, got \(0, 3\)",
            lambda: (torch.ones(2, 3), torch.ones(4, 3), None, torch.ones(0, 3), torch.ones(4, 0), 1.0),
        ),
        (
            ValueError,
            r"lora_b must have shape \(4, 1\), got \(1, 4\)",
            lambda: (torch.ones(2, 3), torch.ones(4, 3), None, torch.ones(1, 3), torch.ones(1, 4), 1.0),
        ),
        (
            ValueError,
            r"bias must have shape \(4,\), got \(3,\)",
            lambda: (torch.ones(2, 3), torch.ones(4, 3), torch.ones(3), torch.ones(1, 3), torch.ones(4, 1), 1.0),
        ),
        (
            ValueError,
            "weight is on meta",
            lambda: (
                torch.ones(2, 3),
                torch.ones(4, 3, device="meta"),
                None,
                torch.ones(1, 3),
                torch.ones(4, 1),
                1.0,
            ),
        ),
        (
            ValueError,
            r"dropout_p must be in \[0, 1\), got 1.0",
            lambda: (torch.ones(2, 3), torch.ones(4, 3), None, torch.ones(1, 3), torch.ones(4, 1), 1.0, 1.0),
        ),
    ]

    @given(
        batch=st.integers(0, 9),
        width=st.integers(1, 60),
        out=st.integers(1, 60),
        rank=st.integers(1, 20),
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(["contiguous", "strided", "transposed", "offset"]),
        bias=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    @settings(max_examples=60, deadline=None)
    def test_random_shapes(self, batch, width, out, rank, dtype, layout, bias, seed):
        self.check_accuracy(self.inputs(((batch, width), out, rank), dtype, "cpu", layout, seed, bias), roundings=16)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_without_bias(self, dtype):
        for case in self.cases:
            self.check_accuracy(self.inputs(case, dtype, "cpu", bias=False))

    @pytest.mark.parametrize("trained", [(3, 4), (0, 3, 4), (0,), (2,), (1, 2)])
    def test_gradients_only_of_what_wants_them(self, trained):
        args = self.inputs(((6, 10), 7, 3), torch.float32, "cpu")
        args = tuple(
            a.detach().requires_grad_(i in trained) if isinstance(a, torch.Tensor) else a for i, a in enumerate(args)
        )
        self.check_accuracy(args)
        found = results(ops.lora_linear, args)
        assert found.keys() == {"output 0", *(f"gradient of argument {i}" for i in trained)}

    def test_an_adapter_of_zeros_changes_nothing(self):
        x, weight, bias, lora_a, lora_b, scaling = self.inputs(((9, 16), 12, 4), torch.float32, "cpu")
        y = ops.lora_linear(x, weight, bias, lora_a, torch.zeros_like(lora_b), scaling)
        torch.testing.assert_close(y, F.linear(x, weight, bias))

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_dropout_acts_on_the_adapters_input_alone_and_the_same_both_ways(self, device):
        args = (*self.inputs(((33, 40), 24, 8), torch.float32, device), 0.5)

        def seeded(op):
            def run(*args):
                torch.manual_seed(3)
                return op(*args)

            return run

        ours, ref = seeded(ops.lora_linear), seeded(lora_linear_reference)
        assert_within_bound(results(ours, args), results(ref, args), results(ref, args, torch.float64))
        x, weight = args[:2]
        half = ops.lora_linear(
            x, torch.zeros_like(weight), None, torch.eye(40, device=device), torch.eye(40, device=device)[:24], 1.0, 0.5
        )
        kept = half / x[:, :24]
        assert ((kept.abs() < 1e-6) | ((kept - 2).abs() < 1e-5)).all()
        assert 0.4 < (kept.abs() < 1e-6).float().mean() < 0.6

    def test_autocast_makes_all_of_it_16_bit_and_the_gradients_fp32(self):
        args = self.inputs(((8, 16), 12, 4), torch.float32, "cpu")
        with torch.autocast("cpu", torch.bfloat16):
            found = results(ops.lora_linear, args)
            want = results(lora_linear_reference, args)
        assert found["output 0"].dtype == torch.bfloat16
        assert found["gradient of argument 3"].dtype == torch.float32
        for name in found:
            torch.testing.assert_close(found[name].float(), want[name].float(), rtol=0.05, atol=0.1)

    def test_double_precision_is_double(self):
        args = self.inputs(((9, 16), 12, 4), torch.float64, "cpu")
        ours, ref = results(ops.lora_linear, args), results(lora_linear_reference, args)
        assert all(torch.allclose(ours[k], ref[k], rtol=1e-12, atol=1e-13) for k in ref)
        assert same(ours, results(ops.lora_linear, args))
