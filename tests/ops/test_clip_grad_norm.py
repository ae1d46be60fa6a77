import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DEVICES, DTYPES

from fastgpt import ops
from fastgpt.ops import clip_grad_norm_reference, registry

# Around pieces of 65,536 and 8,192 elements, odd, one and none; 0-dim.
SHAPES = [(3, 5), (), (0,), (1,), (2, 0, 3), (65536,), (65537,), (257, 513), (8191,), (8193,), (7,)]


def gradients(dtype=torch.float32, device="cpu", scale=1.0, seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * scale).to(dtype).to(device) for shape in shapes]


def exact_norm(grads):
    return math.sqrt(sum(g.double().square().sum().item() for g in grads))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_norm_and_factor_are_the_exact_ones_rounded(dtype, device, max_norm):
    grads = gradients(dtype, device)
    before = [g.clone() for g in grads]
    norm, factor = ops.clip_grad_norm(grads, max_norm)
    want = exact_norm(grads)
    assert norm.shape == factor.shape == ()
    assert norm.dtype == factor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norm.device == grads[0].device
    eps = torch.finfo(norm.dtype).eps
    assert norm.item() == pytest.approx(want, rel=eps if dtype != torch.float64 else 1e-13)
    assert factor.item() == pytest.approx(
        min(1, max_norm / (want + 1e-6)), rel=eps if dtype != torch.float64 else 1e-13
    )
    assert all(torch.equal(g, b) for g, b in zip(grads, before, strict=True))


@pytest.mark.parametrize("max_norm", [0.0, 0.1, 3.0, 1e4, math.inf])
def test_is_what_torch_clips_by(max_norm):
    grads = gradients(scale=0.01)
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    norm, factor = ops.clip_grad_norm(grads, max_norm)
    torch.testing.assert_close(norm, torch.nn.utils.clip_grad_norm_(params, max_norm))
    for p, g in zip(params, grads, strict=True):
        torch.testing.assert_close(p.grad, g * factor)


@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=9),
    dtypes=st.lists(st.sampled_from([*DTYPES, torch.float64]), min_size=9, max_size=9),
    exponent=st.integers(-30, 30),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_random_lists_of_mixed_dtypes(sizes, dtypes, exponent, strided, seed):
    """Also far outside of where fp32 squares overflow or vanish."""
    grads = gradients(shapes=[(n,) for n in sizes], seed=seed, scale=10.0**exponent)
    grads = [g.to(d) for g, d in zip(grads, dtypes, strict=False)]
    if strided:
        grads = [torch.stack([g, g * torch.nan], 1)[:, 0] for g in grads]
    norm, factor = ops.clip_grad_norm(grads, 2.0)
    ref_norm, ref_factor = clip_grad_norm_reference(grads, 2.0)
    torch.testing.assert_close(norm, ref_norm, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(factor, ref_factor, rtol=1e-6, atol=0, equal_nan=True)
    want = exact_norm(grads)
    if math.isfinite(want):
        assert norm.item() == pytest.approx(want, rel=1e-6, abs=1e-45)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [0, 65535, 65536, -1])
def test_what_is_not_finite_is_in_the_norm_and_makes_the_factor_nan(dtype, device, at):
    for value in (math.nan, math.inf, -math.inf):
        grads = gradients(dtype, device, shapes=[(3,), (65600,)])
        grads[1][at] = value
        norm, factor = ops.clip_grad_norm(grads, 1.0)
        assert norm.isnan() if math.isnan(value) else norm.item() == math.inf
        assert factor.isnan()


@pytest.mark.parametrize("device", DEVICES)
def test_a_norm_too_large_for_its_dtype_makes_the_factor_nan(device):
    for fn in (ops.clip_grad_norm, clip_grad_norm_reference):
        norm, factor = fn([torch.full((4,), 3e38, device=device)], 1.0)
        assert norm == math.inf
        assert factor.isnan()
        norm, factor = fn([torch.full((4,), 3e38, device=device, dtype=torch.float64)], 1.0)
        assert norm.isfinite()
        assert factor.item() == pytest.approx(1 / norm.item())


@pytest.mark.parametrize("device", DEVICES)
def test_bitwise_the_same_every_time_and_for_any_threads(device):
    grads = gradients(device=device)
    first = ops.clip_grad_norm(grads, 0.7)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, ops.clip_grad_norm(grads, 0.7), strict=True))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        again = ops.clip_grad_norm(grads, 0.7)
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_more_tensors_than_a_launch_takes(device):
    grads = gradients(device=device, shapes=[(i % 5,) for i in range(2100)])
    assert ops.clip_grad_norm(grads, 1.0)[0].item() == pytest.approx(exact_norm(grads), rel=1e-6)


def test_no_gradients():
    norm, factor = ops.clip_grad_norm([], 1.0)
    assert (norm, factor) == (0, 1)
    norm, factor = ops.clip_grad_norm([torch.ones(0)], 1.0)
    assert (norm, factor) == (0, 1)


def test_opcheck():
    if registry.implementation("clip_grad_norm", "cpu").name == "reference":
        pytest.skip("no kernel here")
    for dtype in (torch.float32, torch.float64):
        torch.library.opcheck(torch.ops.fastgpt.clip_grad_norm.default, (gradients(dtype), 0.5))


def test_compiles_whole():
    torch._dynamo.reset()
    compiled = torch.compile(lambda grads: ops.clip_grad_norm(grads, 0.5), fullgraph=True, backend="aot_eager")
    grads = gradients()
    for a, b in zip(compiled(grads), ops.clip_grad_norm(grads, 0.5), strict=True):
        assert torch.equal(a, b)


def test_reference_can_be_forced():
    grads = gradients()
    with ops.using("reference"):
        forced = ops.clip_grad_norm(grads, 0.5)
    for a, b in zip(forced, clip_grad_norm_reference(grads, 0.5), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("error", "words", "grads", "max_norm"),
    [
        (TypeError, r"grads\[1\] must be a tensor, got NoneType", [torch.ones(1), None], 1.0),
        (TypeError, r"grads\[0\] must be dense and float32.*got torch.int64", [torch.ones(1).long()], 1.0),
        (TypeError, r"grads\[0\] must be dense.*torch.sparse_coo", [torch.eye(2).to_sparse()], 1.0),
        (ValueError, r"grads\[1\] is on meta", [torch.ones(1), torch.ones(1, device="meta")], 1.0),
        (ValueError, "max_norm must be at least 0, got -1", [torch.ones(1)], -1.0),
        (ValueError, "max_norm must be at least 0, got nan", [torch.ones(1)], math.nan),
    ],
)
def test_bad_input_names_the_argument(error, words, grads, max_norm):
    with pytest.raises(error, match=words) as caught:
        ops.clip_grad_norm(grads, max_norm)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("clip_grad_norm: ")
