import pytest
import torch
from oracle import DTYPES, RowContract, random_rows

from fastgpt import ops
from fastgpt.ops import add_layer_norm_reference, layer_norm_reference


class TestLayerNorm(RowContract):
    name = "layer_norm"
    reference = staticmethod(layer_norm_reference)
    # And each of the CUDA kernels' layouts of a row, with more rows than a small GPU has places for.
    cases = [*RowContract.cases, (3, 900), (13, 1028), (5, 6000)]

    def inputs(self, case, dtype, device, layout="contiguous", seed=0):
        make = random_rows(dtype, device, layout, seed)
        return make(*case, shift=0.5), make(case[-1], scale=0.2, shift=1.0), make(case[-1], scale=0.2), 1e-5

    bad_inputs = [
        (TypeError, "x must be a tensor, got list", lambda: ([1.0], torch.ones(1), torch.ones(1))),
        (
            TypeError,
            "x must be float32.*got torch.int64",
            lambda: (torch.ones(2, 3).long(), torch.ones(3), torch.ones(3)),
        ),
        (
            TypeError,
            "weight must have x's dtype",
            lambda: (torch.ones(2, 3), torch.ones(3).half(), torch.ones(3).half()),
        ),
        (
            TypeError,
            "bias must have weight's dtype",
            lambda: (torch.ones(2, 3), torch.ones(3), torch.ones(3).half()),
        ),
        (
            ValueError,
            r"weight must have shape \(3,\).*got \(4,\)",
            lambda: (torch.ones(2, 3), torch.ones(4), torch.ones(3)),
        ),
        (
            ValueError,
            r"bias must have shape \(3,\).*got \(1, 3\)",
            lambda: (torch.ones(2, 3), torch.ones(3), torch.ones(1, 3)),
        ),
        (
            ValueError,
            r"at least 1, got shape \(2, 0\)",
            lambda: (torch.ones(2, 0), torch.ones(0), torch.ones(0)),
        ),
        (ValueError, r"at least 1, got shape \(\)", lambda: (torch.ones(()), torch.ones(1), torch.ones(1))),
        (
            ValueError,
            "eps must be at least 0",
            lambda: (torch.ones(2, 3), torch.ones(3), torch.ones(3), -1.0),
        ),
        (
            ValueError,
            "eps must be at least 0",
            lambda: (torch.ones(2, 3), torch.ones(3), torch.ones(3), float("nan")),
        ),
        (
            ValueError,
            "weight is on meta",
            lambda: (torch.ones(2, 3), torch.ones(3, device="meta"), torch.ones(3)),
        ),
    ]

    def test_a_large_mean_does_not_cancel(self):
        """E[x^2] - E[x]^2 would lose everything: mean 1000, deviation 0.01; 769 columns, so padded lanes would show."""
        x = (torch.randn(4, 769, generator=torch.Generator().manual_seed(0)) * 0.01 + 1000).requires_grad_()
        self.check_accuracy((x, torch.ones(769, requires_grad=True), torch.zeros(769, requires_grad=True), 1e-5))

    def test_constant_rows_give_the_bias(self):
        y = ops.layer_norm(torch.full((2, 6), 3.0), torch.ones(6), torch.arange(6.0))
        assert torch.equal(y, torch.arange(6.0).expand(2, 6))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_nan_and_infinity_pass_through_as_nan(self, dtype):
        x = torch.ones(3, 8, dtype=dtype)
        x[0, 1], x[1, 2] = torch.nan, torch.inf
        y = ops.layer_norm(x, torch.ones(8, dtype=dtype), torch.zeros(8, dtype=dtype))
        assert y[:2].isnan().all()
        assert y[2].isfinite().all()

    def test_direct_calls_with_wrong_shapes_do_not_crash(self):
        self.kernel_or_skip()
        one = torch.ones
        with pytest.raises(RuntimeError, match="weight must be 1-D"):
            torch.ops.fastgpt.layer_norm(one(2, 3), one(2), one(3), 1e-5)
        with pytest.raises(RuntimeError, match="mean and rstd"):
            torch.ops.fastgpt.layer_norm_backward(one(2, 3), one(2, 3), one(3), one(1), one(1))
        with pytest.raises(RuntimeError, match="dy must have"):
            torch.ops.fastgpt.layer_norm_backward(one(1, 3), one(2, 3), one(3), one(2), one(2))


class TestAddLayerNorm(RowContract):
    name = "add_layer_norm"
    reference = staticmethod(add_layer_norm_reference)
    cases = TestLayerNorm.cases

    def inputs(self, case, dtype, device, layout="contiguous", seed=0):
        make = random_rows(dtype, device, layout, seed)
        return (
            make(*case, scale=0.5, shift=0.25),
            make(*case, shift=0.25),
            make(case[-1], scale=0.2, shift=1.0),
            make(case[-1], scale=0.2),
            1e-5,
        )

    bad_inputs = [
        (TypeError, "x must be a tensor, got list", lambda: ([1.0], torch.ones(1), torch.ones(1), torch.ones(1))),
        (
            TypeError,
            "residual must be a tensor, got NoneType",
            lambda: (torch.ones(2, 3), None, torch.ones(3), torch.ones(3)),
        ),
        (
            TypeError,
            "residual must have x's dtype torch.float16, got torch.float32",
            lambda: (torch.ones(2, 3).half(), torch.ones(2, 3), torch.ones(3), torch.ones(3)),
        ),
        (
            ValueError,
            r"residual must have x's shape \(2, 3\), got \(3,\)",
            lambda: (torch.ones(2, 3), torch.ones(3), torch.ones(3), torch.ones(3)),
        ),
        (
            ValueError,
            "residual is on meta",
            lambda: (torch.ones(2, 3), torch.ones(2, 3, device="meta"), torch.ones(3), torch.ones(3)),
        ),
        (
            ValueError,
            r"weight must have shape \(3,\).*got \(4,\)",
            lambda: (torch.ones(2, 3), torch.ones(2, 3), torch.ones(4), torch.ones(3)),
        ),
        (
            ValueError,
            "eps must be at least 0",
            lambda: (torch.ones(2, 3), torch.ones(2, 3), torch.ones(3), torch.ones(3), -1.0),
        ),
    ]

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
    def test_it_is_layer_norm_of_the_rounded_sum(self, dtype):
        for case in self.cases:
            x, residual, weight, bias, eps = self.inputs(case, dtype, "cpu")
            total, norm = ops.add_layer_norm(x, residual, weight, bias, eps)
            assert torch.equal(total, residual + x)
            assert torch.equal(norm, ops.layer_norm(residual + x, weight, bias, eps))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_every_16_bit_number_is_converted_right(self, dtype):
        """To fp32 and, rounded, back: normal, subnormal, overflowing, infinite, NaN."""
        every = torch.arange(2**16).to(torch.int32).to(torch.uint16).view(dtype)
        parameters = torch.ones(256, dtype=dtype), torch.zeros(256, dtype=dtype)
        for seed in range(8):
            other = every[torch.randperm(2**16, generator=torch.Generator().manual_seed(seed))]
            x, residual = (every, torch.zeros_like(every)) if seed == 0 else (every, other)
            total, _ = ops.add_layer_norm(x.view(256, 256), residual.view(256, 256), *parameters)
            expected = residual + x
            assert torch.equal(total.flatten().isnan(), expected.isnan())
            number = ~expected.isnan()
            assert torch.equal(total.flatten()[number], expected[number])

    @pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["sum", "norm"])
    def test_one_output_may_go_unused(self, used):
        args = self.inputs((9, 33), torch.float32, "cpu")

        def gradients(fn):
            leaves = [a.detach().requires_grad_() for a in args[:4]]
            outputs = fn(*leaves)
            sum(out.square().sum() for out, use in zip(outputs, used, strict=True) if use).backward()
            return [leaf.grad for leaf in leaves]

        for ours, plain in zip(gradients(ops.add_layer_norm), gradients(add_layer_norm_reference), strict=True):
            assert (ours is None) == (plain is None)
            if ours is not None:
                assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-5)

    def test_x_may_be_its_own_residual(self):
        x, _, weight, bias, eps = self.inputs((9, 33), torch.float32, "cpu")
        ops.add_layer_norm(x, x, weight, bias, eps)[0].sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 2.0))

    def test_gradients_are_not_shared(self):
        """One tensor serves x and residual in the graph; on the leaves, adding to one must leave the other."""
        x, residual, weight, bias, eps = self.inputs((4, 5), torch.float32, "cpu")
        ops.add_layer_norm(x, residual, weight, bias, eps)[1].square().sum().backward()
        before = residual.grad.clone()
        x.grad.add_(1.0)
        assert torch.equal(residual.grad, before)

    def test_nan_stays_in_its_row(self):
        x, residual = torch.ones(3, 8), torch.ones(3, 8)
        residual[1, 2] = torch.nan
        total, norm = ops.add_layer_norm(x, residual, torch.ones(8), torch.zeros(8))
        assert total.isnan().sum() == 1
        assert norm[1].isnan().all()
        assert norm[[0, 2]].isfinite().all()

    def test_direct_calls_with_wrong_shapes_do_not_crash(self):
        self.kernel_or_skip()
        with pytest.raises(RuntimeError, match="residual must have"):
            torch.ops.fastgpt.add_layer_norm(torch.ones(2, 3), torch.ones(1, 3), torch.ones(3), torch.ones(3), 1e-5)
        with pytest.raises(RuntimeError, match="dsum must have"):
            torch.ops.fastgpt.add_layer_norm_backward(
                torch.ones(2, 3), torch.ones(2, 3).half(), torch.ones(2, 3), torch.ones(3), torch.ones(2), torch.ones(2)
            )
