import copy
from statistics import NormalDist

import emulation
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, OpContract, results, rows, same
from torch import nn

from fastgpt import ops
from fastgpt.ops import NF4Weight, dequantize_nf4_reference, nf4

ALL_DTYPES = [*DTYPES, torch.float64]
TABLE = torch.tensor(nf4.NF4, dtype=torch.float64)


def normal(*shape, scale=1.0, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def of_tensors(fn):
    """fn(NF4Weight) as a function of its tensors, as the contract wants them."""

    def call(codes, absmax, scale, mean, numel, dtype):
        return fn(NF4Weight(codes, absmax, scale, mean, (numel,), dtype))

    return call


def in_float64(weight):
    """(the weight's blocks, each block's largest magnitude, the nearest values to each weight), without rounding."""
    flat = weight.double().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % 64)).view(-1, 64)
    a = blocks.abs().amax(1, keepdim=True)
    each = blocks / a.masked_fill(a == 0, 1)
    nearest = TABLE[(each[..., None] - TABLE).abs().argmin(-1)] * a
    return blocks, a[:, 0], nearest


class TestDequantizeNf4(OpContract):
    name = "dequantize_nf4"
    reference = staticmethod(of_tensors(dequantize_nf4_reference))
    cases = [5, 0, 1, 63, 64, 65, 96, 127, 1000, 64 * 256 - 1, 64 * 256 + 1, 3 * 64 * 256 + 40]  # weights
    op = property(lambda self: of_tensors(ops.dequantize_nf4))
    bad_inputs = []

    def inputs(self, case, dtype, device, layout="contiguous", seed=0):
        """Any codes and any absmax, those too that make the largest magnitude of a block negative."""
        generator = torch.Generator().manual_seed(seed)
        blocks = -(-case // 64)
        tensors = (
            torch.randint(256, (blocks, 32), generator=generator, dtype=torch.uint8),
            torch.randint(-127, 128, (blocks,), generator=generator, dtype=torch.int8),
            torch.rand(-(-blocks // 256), generator=generator) / 100,
            torch.rand(1, generator=generator),
        )
        return (*(rows(t.to(device), layout) for t in tensors), case, dtype)

    def test_gradcheck(self):
        """It has no gradient, and says so."""
        assert not self.op(*self.inputs(100, torch.float32, "cpu")).requires_grad

    test_double_backward_says_that_it_is_not_there = None

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    @pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
    def test_its_bits_are_the_references(self, dtype, device):
        for case in self.cases:
            args = self.inputs(case, dtype, device)
            ours, plain = self.op(*args), self.ref()(*args)
            assert ours.dtype == plain.dtype == dtype
            assert torch.equal(ours, plain), case

    def test_its_bits_are_those_of_the_definition_weight_by_weight(self):
        *tensors, numel, dtype = self.inputs(64 * 256 + 70, torch.float32, "cpu")
        codes, absmax, scale, mean = (t.numpy() for t in tensors)
        found = self.op(*tensors, numel, dtype).numpy()
        for i in range(0, numel, 7):
            block, at = divmod(i, 64)
            code = codes[block, at] & 15 if at < 32 else codes[block, at - 32] >> 4
            a = np.float32(absmax[block]) * scale[block // 256] + mean[0]
            assert found[i] == np.float32(nf4.NF4[code]) * a, i

    def test_many_blocks_are_split_over_threads(self):
        args = self.inputs(64 * 5000 + 3, torch.bfloat16, "cpu")
        assert torch.equal(self.op(*args), self.ref()(*args))

    def test_bad_input_names_the_argument(self):
        weight = ops.quantize_nf4(torch.ones(3))
        with pytest.raises(TypeError, match=r"^dequantize_nf4: weight must be an NF4Weight, got Tensor$"):
            ops.dequantize_nf4(torch.ones(3))
        with pytest.raises(TypeError, match=r"^dequantize_nf4: dtype must be float32.*, got torch.int8$"):
            ops.dequantize_nf4(weight, torch.int8)

    def test_direct_calls_with_wrong_shapes_do_not_crash(self):
        self.kernel_or_skip()
        *tensors, numel, dtype = self.inputs(64 * 300, torch.float32, "cpu")
        op = torch.ops.fastgpt.dequantize_nf4
        for i, name in enumerate(("codes", "absmax", "scale", "mean")):
            for wrong in (tensors[i][:0], tensors[i].double()):
                with pytest.raises(RuntimeError, match=f"dequantize_nf4: {name} must be"):
                    op(*tensors[:i], wrong, *tensors[i + 1 :], numel, dtype)
        for wrong in (numel + 1, numel - 64, -1):
            with pytest.raises(RuntimeError, match="codes must be"):
                op(*tensors, wrong, dtype)
        with pytest.raises(RuntimeError, match="dtype must be"):
            op(*tensors, numel, torch.int64)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_the_gpu_kernels_bits_are_the_references(dtype):
    contract = TestDequantizeNf4()
    with emulation.active(emulation.CUDA / "nf4.cu"):
        for layout in ("contiguous", "offset"):
            for case in (n for n in contract.cases if n < 20_000):
                args = contract.inputs(case, dtype, "cpu", layout)
                assert torch.equal(contract.op(*args), contract.ref()(*args)), case


def test_the_values_are_the_papers_quantiles():
    quantile, most = NormalDist().inv_cdf, (31 / 32 + 29 / 30) / 2
    low = [quantile(1 - most + i * (most - 0.5) / 7) for i in range(8)]
    high = [quantile(0.5 + i * (most - 0.5) / 8) for i in range(1, 9)]
    assert [v / quantile(most) for v in low + high] == pytest.approx(nf4.NF4, abs=2e-7)
    assert nf4.NF4[7] == 0


def test_the_error_on_normal_weights_is_the_best_that_its_values_allow():
    """That of a quantizer in float64 without the second quantization, which costs next to nothing."""
    weight = normal(1024, 768, scale=0.02)
    error = ops.quantize_nf4(weight).dequantize().double() - weight
    blocks, _, nearest = in_float64(weight)
    relative = error.square().mean().sqrt() / weight.double().square().mean().sqrt()
    best = (nearest - blocks).square().mean().sqrt() / blocks.square().mean().sqrt()
    assert relative == pytest.approx(best.item(), rel=2e-3)
    assert relative == pytest.approx(0.092, abs=5e-4)
    assert error.abs().mean() / 0.02 == pytest.approx(0.0728, abs=5e-4)


@given(
    numel=st.integers(1, 3000),
    dtype=st.sampled_from(ALL_DTYPES),
    spread=st.sampled_from([0.0, 1.0, 5.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_each_weight_is_the_nearest_there_is(numel, dtype, spread, seed):
    """To what its block's magnitude is read back as, and that is within half a step."""
    wild = normal(numel, seed=seed) * (normal(numel, seed=seed + 1) * spread).exp()
    weight = wild.clamp(-6e4, 6e4).to(dtype)  # which float16 takes
    held = ops.quantize_nf4(weight)
    assert held.shape == weight.shape
    assert held.dtype == dtype
    assert held.dequantize().dtype == dtype
    blocks, a, _ = in_float64(weight)
    read = held.absmax.double() * held.scale.double().repeat_interleave(256)[: len(a)] + held.mean.double()
    rounding = 1e-6 * a.max()
    assert ((read - a).abs() <= held.scale.double().repeat_interleave(256)[: len(a)] / 2 + rounding).all()
    best = (blocks[..., None] - TABLE * read[:, None, None]).abs().amin(-1).flatten()[:numel]
    error = (held.dequantize(torch.float64) - weight.double()).abs()
    assert (error <= best + rounding).all()


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_zeros_and_equal_blocks_are_exact(dtype):
    for value in (0.0, 1.0, -0.375, 100.0):
        weight = torch.full((5, 77), value, dtype=dtype)
        assert torch.equal(ops.quantize_nf4(weight).dequantize(), weight)
    mixed = normal(40, 64).to(dtype)
    mixed[::3] = 0
    assert (ops.quantize_nf4(mixed).dequantize()[::3] == 0).all()


@pytest.mark.parametrize("power", [-90, 100])
def test_a_power_of_two_changes_the_scale_and_the_mean_alone(power):
    weight = normal(70, 300)
    one, other = ops.quantize_nf4(weight), ops.quantize_nf4(weight * 2.0**power)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.absmax, other.absmax)
    assert torch.equal(one.dequantize() * 2.0**power, other.dequantize())


def test_the_largest_and_the_smallest_numbers():
    most = torch.nextafter(torch.tensor(2.0**127), torch.tensor(0.0))
    weight = torch.stack([most, -most, torch.tensor(1.0), torch.tensor(0.0)]).repeat_interleave(64)
    held = ops.quantize_nf4(weight).dequantize()
    assert held.isfinite().all()
    assert ((held - weight).abs() <= most / 254 * 1.001).all()  # half a step of the scale
    tiny = normal(1000) * 2.0**-140  # of 9 bits
    assert (ops.quantize_nf4(tiny).dequantize() - tiny).abs().max() < 2.0**-140


def test_an_outlier_costs_its_group_little_and_the_others_nothing():
    weight = normal(3 * 64 * 256)
    weight[70] = 1000
    error = (ops.quantize_nf4(weight).dequantize() - weight)[128:].square().view(-1, 64).mean(1).sqrt()
    assert error[:254].mean() < 0.13
    assert error[254:].mean() == pytest.approx(0.092, abs=2e-3)


def test_chunks_change_nothing(monkeypatch):
    weight = normal(1001, 33)
    whole = ops.quantize_nf4(weight)
    monkeypatch.setattr(nf4, "_CHUNK", 100)
    assert all(map(torch.equal, ops.quantize_nf4(weight).tensors(), whole.tensors()))
    assert all(map(torch.equal, ops.quantize_nf4(weight.t().contiguous().t()).tensors(), whole.tensors()))


def test_what_cannot_be_quantized_is_named():
    bad = [
        (TypeError, "weight must be a tensor, got list", [1.0]),
        (TypeError, "weight must be float32.*got torch.int8", torch.ones(3, dtype=torch.int8)),
        (ValueError, r"at least one element, got shape \(0, 3\)", torch.ones(0, 3)),
        (ValueError, r"finite and below 2\^127", torch.tensor([1.0, torch.inf])),
        (ValueError, r"finite and below 2\^127", torch.tensor([1.0, -torch.inf])),
        (ValueError, r"finite and below 2\^127", torch.tensor([torch.nan, 1.0])),
        (ValueError, r"finite and below 2\^127", torch.tensor([2.0**127])),
        (ValueError, r"finite and below 2\^127", torch.tensor([1e200], dtype=torch.float64)),
    ]
    for error, words, weight in bad:
        with pytest.raises(error, match=f"^quantize_nf4: .*{words}"):
            ops.quantize_nf4(weight)


def test_a_weight_takes_4_127_bits():
    held = ops.quantize_nf4(normal(768, 3072))
    assert sum(t.nbytes for t in held.tensors()) * 8 / (768 * 3072) == pytest.approx(4.127, abs=1e-3)


class Frozen(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = ops.quantize_nf4(weight)
        self.bias = nn.Parameter(torch.zeros(1))


def test_as_a_submodule_it_moves_and_is_saved_and_a_cast_is_of_what_it_gives():
    module = Frozen(normal(20, 30))
    before = module.weight.dequantize()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        cast = copy.deepcopy(module).to(dtype)
        assert torch.equal(cast.weight.dequantize(), before.to(dtype))
        assert torch.equal(cast.weight.dequantize(torch.float32), before)
        assert torch.equal(cast.float().weight.dequantize(), before)
    other = Frozen(normal(20, 30, seed=1))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight.dequantize(), before)
    moved = module.to("meta").weight
    assert moved.device.type == "meta"
    assert [t.dtype for t in moved.tensors()] == [torch.uint8, torch.int8, torch.float32, torch.float32]
    with pytest.raises(RuntimeError, match=r"weight\.codes"):
        Frozen(normal(20, 40)).load_state_dict(other.state_dict())


# ---- lora_linear on it


def adapted(dtype, rows=7, n_in=50, n_out=41, rank=3):
    """lora_linear's arguments with a weight that it holds in 4 bits, and those with that weight made whole."""
    held = ops.quantize_nf4(normal(n_out, n_in, scale=n_in**-0.5))
    x, bias = normal(rows, n_in, seed=1).to(dtype).requires_grad_(), normal(n_out, seed=2).to(dtype)
    lora_a = normal(rank, n_in, scale=n_in**-0.5, seed=3).to(dtype).requires_grad_()
    lora_b = normal(n_out, rank, seed=4).to(dtype).requires_grad_()
    rest = (bias, lora_a, lora_b, 0.5)
    return (x, held, *rest), (x, held.dequantize(dtype), *rest)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_lora_linear_gives_the_bits_that_the_whole_weight_gives(mode, dtype, dropout_p):
    four, whole = adapted(dtype)

    def run(*args):
        torch.manual_seed(0)
        return ops.lora_linear(*args, dropout_p)

    with ops.using(mode):
        found, want = results(run, four), results(run, whole)
    assert found.keys() == {"output 0", *(f"gradient of argument {i}" for i in (0, 3, 4))}
    assert same(found, want)


def test_lora_linear_on_it_under_autocast():
    (x, held, *rest), _ = adapted(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(ops.lora_linear, (x, held, *rest))
        want = results(ops.lora_linear, (x, held.dequantize(torch.bfloat16).float(), *rest))
    assert found["output 0"].dtype == torch.bfloat16
    assert found["gradient of argument 3"].dtype == torch.float32
    assert same(found, want)


def test_lora_linear_saves_its_4_bits_alone():
    four, _ = adapted(torch.float32, n_in=64, n_out=96)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.lora_linear(*four)
    assert all(t.numel() < 64 * 96 for t in saved)
    assert any(t.data_ptr() == four[1].codes.data_ptr() for t in saved)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_lora_linear_on_it_compiles_whole(backend):
    torch._dynamo.reset()
    compiled = torch.compile(ops.lora_linear, fullgraph=True, backend=backend)
    four, _ = adapted(torch.float32)
    found, want = results(compiled, four), results(ops.lora_linear, four)
    assert all(torch.allclose(found[k], want[k], rtol=1e-5, atol=1e-5) for k in want)


def test_lora_linear_on_it_passes_opcheck():
    (x, held, *rest), _ = adapted(torch.float32)
    codes, *others = held.tensors()
    torch.library.opcheck(torch.ops.fastgpt.lora_linear.default, (x, codes, *rest, None, 1.0, *others))


def test_what_lora_linear_cannot_take_is_named():
    (x, held, *rest), _ = adapted(torch.float32)
    with pytest.raises(TypeError, match=r"^lora_linear: weight must be a tensor or an NF4Weight, got list"):
        ops.lora_linear(x, [1.0], *rest)
    with pytest.raises(ValueError, match=r"^lora_linear: x must have .* got \(7, 50\) and \(41, 40\)"):
        ops.lora_linear(x, ops.quantize_nf4(normal(41, 40)), *rest)
    with pytest.raises(ValueError, match=r"^lora_linear: x must have .* got \(7, 50\) and \(2050,\)"):
        ops.lora_linear(x, ops.quantize_nf4(normal(2050)), *rest)
    with pytest.raises(ValueError, match=r"^lora_linear: weight is on meta but x is on cpu"):
        ops.lora_linear(x, held.to("meta"), *rest)
