import math

import pytest
import torch
from oracle import DTYPES, RowContract, random_rows, results

from fastgpt import ops
from fastgpt.ops import bias_gelu_reference


class TestBiasGelu(RowContract):
    name = "bias_gelu"
    reference = staticmethod(bias_gelu_reference)
    cases = [*RowContract.cases, (200, 128)]

    def inputs(self, case, dtype, device, layout="contiguous", seed=0):
        make = random_rows(dtype, device, layout, seed)
        return make(*case, scale=2.0), make(case[-1], scale=0.5)

    bad_inputs = [
        (TypeError, "x must be a tensor, got list", lambda: ([1.0], torch.ones(1))),
        (TypeError, "bias must be a tensor, got NoneType", lambda: (torch.ones(2, 3), None)),
        (TypeError, "x must be float32.*got torch.int64", lambda: (torch.ones(2, 3).long(), torch.ones(3))),
        (TypeError, "bias must have x's dtype", lambda: (torch.ones(2, 3), torch.ones(3).half())),
        (TypeError, "bias must have x's dtype", lambda: (torch.ones(2, 3).half(), torch.ones(3).bfloat16())),
        (ValueError, r"bias must have shape \(3,\).*got \(4,\)", lambda: (torch.ones(2, 3), torch.ones(4))),
        (ValueError, r"bias must have shape \(3,\).*got \(1, 3\)", lambda: (torch.ones(2, 3), torch.ones(1, 3))),
        (ValueError, r"at least 1, got shape \(2, 0\)", lambda: (torch.ones(2, 0), torch.ones(0))),
        (ValueError, r"at least 1, got shape \(\)", lambda: (torch.ones(()), torch.ones(1))),
        (ValueError, "bias is on meta", lambda: (torch.ones(2, 3), torch.ones(3, device="meta"))),
    ]

    def test_float64_is_exact(self):
        """To float64's own rounding, which is finer than a constant with too few digits."""
        args = self.inputs((33, 100), torch.float64, "cpu")
        ours, plain = results(ops.bias_gelu, args), results(bias_gelu_reference, args)
        for name in plain:
            assert torch.allclose(ours[name], plain[name], rtol=1e-13, atol=1e-13), name

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
    def test_large_values_saturate(self, dtype):
        """From 32 on the output is x or 0 and the gradient 1 or 0, up to the largest number there is."""
        large = torch.tensor([32.0, 100.0, 1000.0, torch.finfo(dtype).max], dtype=dtype)
        x = torch.cat([large, -large]).view(1, 8).repeat(5, 1).requires_grad_()
        y = ops.bias_gelu(x, torch.zeros(8, dtype=dtype))
        assert torch.equal(y[:, :4], x[:, :4])
        assert (y[:, 4:] == 0).all()
        if ops.implementations()[0].name != "reference":
            y.sum().backward()
            assert torch.equal(x.grad, (x > 0).to(dtype))

    def test_the_lower_tail_keeps_its_digits(self):
        """1 + tanh(z) cancels, to 0 below -5.4 in float32 and below -8.2 in float64; a sigmoid does not."""
        self.kernel_or_skip()
        x = torch.linspace(-9, -3, 997).view(1, -1)
        u = x.double()
        exact = u * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))
        # z is -62 at -9, and its rounding is an error of the exponential's digits.
        assert ((ops.bias_gelu(x, torch.zeros(997)) - exact) / exact).abs().max() < 2e-5

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_nan_passes_through(self, dtype):
        x = torch.ones(3, 8, dtype=dtype)
        x[1, 2] = torch.nan
        x.requires_grad_()
        bias = torch.zeros(8, dtype=dtype, requires_grad=True)
        y = ops.bias_gelu(x, bias)
        y.sum().backward()
        for t in (y, x.grad):
            assert t[1, 2].isnan()
            assert t.isnan().sum() == 1
        assert bias.grad[2].isnan()
        assert bias.grad.isnan().sum() == 1

    def test_direct_calls_with_wrong_shapes_do_not_crash(self):
        self.kernel_or_skip()
        one = torch.ones
        with pytest.raises(RuntimeError, match="bias must be 1-D"):
            torch.ops.fastgpt.bias_gelu(one(2, 3), one(2))
        with pytest.raises(RuntimeError, match="last dimension"):
            torch.ops.fastgpt.bias_gelu(one(2, 0), one(0))
        with pytest.raises(RuntimeError, match="dy must have"):
            torch.ops.fastgpt.bias_gelu_backward(one(1, 3), one(2, 3), one(3))
