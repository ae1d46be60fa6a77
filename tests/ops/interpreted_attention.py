"""Attention's Triton kernels without a GPU, under Triton's interpreter: test_triton_attention.py runs this file.

Small tiles stand in for the real ones, so that short sequences have several. In fp32 and fp16: the interpreter's bf16
matmul is wrong. On a GPU the harness in test_attention.py runs the same clauses on the device.
"""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_within_bound

from fastgpt.ops import attention_reference, philox
from fastgpt.ops.attention_spans import spans
from fastgpt.ops.triton import attention_launch as launch
from fastgpt.ops.triton.attention_launch import Tile

assert os.environ.get("TRITON_INTERPRET"), "run test_triton_attention.py"

# What numpy, which interprets, warns of where the kernels mean it: 1 / 0 and log(0) in rows that see nothing, and tail
# columns whose weight is inf until it is masked.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what}:RuntimeWarning") for what in ("divide by zero", "overflow encountered")
]


def boundaries(tokens, *inside):
    return torch.tensor([0, *inside, tokens], dtype=torch.int32)


def make(B, H, T_q, T_k, D, dtype=torch.float32, seed=0):
    """q, k, v as views of what a projection gives, (B, T, H, D), and the output's gradient, with other strides."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, T, H, D, generator=generator).to(dtype).transpose(1, 2) for T in (T_q, T_k, T_k))
    return q, k, v, torch.randn(B, H, T_q, D, generator=generator).to(dtype)


def kernels(q, k, v, do, causal=True, dropout_p=0.0, seed=None, cu=None, tile=(32, 16), splits=None):
    seed = None if seed is None else torch.tensor(seed)
    rest = (causal, q.size(-1) ** -0.5, dropout_p, seed, cu)
    m, n = tile
    out, lse = launch.forward(q, k, v, *rest, tile=Tile(m, n, 4, 1), splits=splits)
    grads = launch.backward(do, q, k, v, out, lse, *rest, tiles=(Tile(m, n, 4, 1), Tile(n, m, 4, 1)))
    return dict(zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True)), lse


def expected(q, k, v, do, dtype, causal=True, dropout_p=0.0, seed=None, cu=None):
    q, k, v = (t.to(dtype).detach().requires_grad_() for t in (q, k, v))
    out = attention_reference(q, k, v, causal=causal, dropout_p=dropout_p, seed=seed, cu_seqlens=cu)
    grads = torch.autograd.grad(out, (q, k, v), do.to(dtype))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def check(tensors, tile=(32, 16), splits=None, roundings=1, **options):
    q, k, v, do = tensors
    found, lse = kernels(*tensors, tile=tile, splits=splits, **options)
    terms = (do.double() @ v.double().mT).abs().max() * max(q.abs().max(), k.abs().max()) * q.size(-1) ** -0.5
    size = max(1.0, terms.item() / (1 - options.get("dropout_p", 0.0)))  # of what cancels in dq and dk
    plain, exact = (expected(*tensors, dtype, **options) for dtype in (q.dtype, torch.float64))
    for names, smallest in ((("out", "dv"), 1.0), (("dq", "dk"), size)):
        assert_within_bound(*({n: d[n] for n in names} for d in (found, plain, exact)), roundings, smallest)
    return found, lse


@pytest.mark.parametrize(
    ("B", "H", "T_q", "T_k", "D"),
    [
        (1, 1, 1, 1, 16),
        (2, 3, 65, 65, 16),
        (1, 9, 33, 33, 16),
        (1, 2, 31, 52, 16),  # what (113, 203) is to tiles four times as large
        (1, 1, 60, 1, 16),  # (239, 1)
        (1, 1, 100, 3, 16),  # (799, 3)
        (1, 1, 127, 128, 32),
        (1, 1, 128, 127, 32),
        (2, 1, 2, 2, 64),
        (1, 2, 40, 40, 80),
        (1, 1, 40, 40, 96),
        (1, 1, 33, 33, 20),  # no head dimension of any model, but it works
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_shapes(B, H, T_q, T_k, D, causal):
    # One column: dk is 0 in the reference, and here a sum over the rows of what is left of differences.
    _, lse = check(make(B, H, T_q, T_k, D), causal=causal, roundings=8 if T_k == 1 else 1)
    blind = max(0, T_q - T_k) if causal else 0
    assert (lse[:, :, :blind] == math.inf).all()
    assert lse[:, :, blind:].isfinite().all()


@pytest.mark.parametrize("tile", [(16, 16), (16, 32), (32, 32)])
def test_tiles(tile):
    check(make(1, 2, 70, 70, 16), tile=tile)
    check(make(1, 1, 70, 70, 16), tile=tile, cu=boundaries(70, 9, 10, 40), dropout_p=0.2, seed=1)


def test_16_bits():
    check(make(1, 2, 65, 65, 16, torch.float16))
    check(make(1, 2, 33, 50, 16, torch.float16), dropout_p=0.3, seed=4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "cu",
    [
        boundaries(130),
        boundaries(130, *range(1, 130)),
        boundaries(130, 3, 3, 20, 66, 81, 129, 130, 130),  # one across the batch's two rows, three empty
        boundaries(130, 48, 64, 65, 112),
    ],
    ids=["one", "tokens", "mixed", "at tiles"],
)
def test_documents(cu, causal):
    check(make(2, 1, 65, 65, 16), causal=causal, cu=cu)


def test_spans_are_those_of_plain_torch():
    for T, cu in ((65, boundaries(130, 3, 3, 20, 66, 81, 129)), (600, boundaries(1200, 599)), (1, boundaries(2))):
        q = torch.empty(2, 1, T, 16)
        start, end = launch.spans(cu, 2, T)
        want = spans(q, q, False, cu)
        assert torch.equal(start.long(), want[0])
        assert torch.equal(end.long(), want[1])


def test_spans_of_wrong_boundaries_stay_in_bounds():
    for cu in ([5, 3, 9999], [-7, 0, 10**9], [200, 0], [300, 400, 500]):
        start, end = launch.spans(torch.tensor(cu, dtype=torch.int32), 2, 100)
        token = torch.arange(100)
        assert (start >= 0).all()
        assert (start <= token).all()
        assert (end > token).all()
        assert (end <= 100).all()


@pytest.mark.parametrize("causal", [True, False])
def test_dropout_has_the_references_mask_forward_and_backward(causal):
    check(make(2, 2, 33, 40, 16), causal=causal, dropout_p=0.4, seed=2**40 + 3)


def test_dropout_drops_what_the_mask_says():
    """With v the unit vectors, the output is the weights."""
    q, k, _, do = make(1, 2, 40, 64, 64)
    v = torch.eye(64).expand(1, 2, 64, 64)
    found, _ = kernels(q, k, v, do, causal=False, dropout_p=0.4, seed=-5)
    kept = philox.keep_mask(torch.tensor(-5), 2, 40, 64, 0.4)
    assert torch.equal(found["out"][0] > 0, kept)


@pytest.mark.parametrize(
    ("B", "T_q", "T_k", "splits"), [(1, 1, 200, 4), (1, 1, 200, 13), (2, 3, 40, 2), (2, 16, 90, 6), (2, 9, 5, 1)]
)
def test_columns_split_over_programs(B, T_q, T_k, splits):
    tensors = make(B, 2, T_q, T_k, 16)
    split, lse = check(tensors, tile=(16, 16), splits=splits)
    whole, lse_whole = kernels(*tensors, tile=(16, 16))
    torch.testing.assert_close(split["out"], whole["out"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, lse_whole, atol=1e-5, rtol=1e-5)


def test_the_number_of_splits_fills_the_gpu():
    slots = 132 * 4
    assert launch.splits_for(heads=4096, blocks=64, slots=slots) == 1  # full already
    assert launch.splits_for(heads=1, blocks=1, slots=slots) == 1
    for heads in (12, 50, 96, 128, 200):  # one query of GPT-2, and where integer heuristics leave a GPU half empty
        for blocks in (8, 16, 64, 500):
            splits = launch.splits_for(heads, blocks, slots)
            each = -(-blocks // splits)
            waves = -(-heads * splits // slots)
            assert 1 <= splits <= min(blocks, launch.MAX_SPLITS)
            assert (splits - 1) * each < blocks  # none has nothing to do
            ideal = heads * blocks / slots
            # Within a third of a perfect division, or no program has more than 8 blocks, or splits are at their limit.
            assert waves * each <= 4 / 3 * ideal + 2 or each <= 8 or splits > launch.MAX_SPLITS // 2


def test_any_strides_give_the_same_bits():
    q, k, v, do = make(2, 2, 40, 40, 16)
    want, _ = kernels(q, k, v, do)
    wide = torch.full((2, 40, 3, 5, 16), torch.nan)  # more heads than are used
    for i, t in enumerate((q, k, v)):
        wide[:, :, i, :2] = t.transpose(1, 2)
    fused = [wide[:, :, i, :2].transpose(1, 2) for i in range(3)]
    swapped = [t.transpose(0, 3).contiguous().transpose(0, 3) for t in (q, k, v)]  # last dimension far apart
    for other in (fused, swapped, [t.contiguous() for t in (q, k, v)]):
        found, _ = kernels(*other, do.transpose(1, 2).contiguous().transpose(1, 2))
        assert all(torch.equal(found[name], want[name]) for name in want)


def test_outputs_lie_with_the_heads_last():
    found, _ = kernels(*make(2, 3, 20, 20, 16))
    assert all(t.transpose(1, 2).is_contiguous() for t in found.values())


def test_dirty_memory_and_repeats_change_nothing():
    q, k, v, do = make(1, 2, 50, 35, 20)

    def padded(t):  # in the middle of a block of NaN, on no aligned address
        flat = torch.full((t.numel() + 200,), torch.nan)
        flat[101 : 101 + t.numel()] = t.flatten()
        return flat[101 : 101 + t.numel()].view(t.shape)

    for options in ({}, {"dropout_p": 0.3, "seed": 3}):
        want, lse = kernels(q, k, v, do, **options)
        for _ in range(2):
            dirt = [torch.full_like(q, torch.nan) for _ in range(20)]
            del dirt
            found, again = kernels(*map(padded, (q, k, v, do)), **options)
            assert torch.equal(lse, again)
            assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("shape", [(0, 2, 8, 8), (2, 0, 8, 8), (2, 2, 0, 8), (2, 2, 4, 0)])
def test_nothing_at_all(shape):
    B, H, T_q, T_k = shape
    found, lse = kernels(*make(B, H, T_q, T_k, 16))
    assert found["out"].shape == (B, H, T_q, 16)
    assert (found["out"] == 0).all()
    assert all((found[name] == 0).all() for name in ("dq", "dk", "dv"))
    assert (lse == math.inf).all()


def test_far_apart_logits_stay_finite():
    """lse is far below -128 here: a tail column, of score 0, would have a weight of inf if it were not masked."""
    q, k, v, do = make(1, 1, 33, 33, 16)
    found, lse = kernels(q * 0 - 10, k * 0 + 10, v, do)
    assert lse.max() < -500
    assert all(t.isfinite().all() for t in found.values())
    torch.testing.assert_close(found["out"][0, 0, -1], v[0, 0].mean(0), atol=1e-6, rtol=1e-5)


@given(
    B=st.integers(1, 2), H=st.integers(1, 2), T_q=st.integers(1, 50), T_k=st.integers(1, 50), D=st.integers(1, 32),
    causal=st.booleans(), dropout_p=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 2**16),
    cuts=st.none() | st.lists(st.integers(0, 100), max_size=6), tile=st.sampled_from([(16, 16), (32, 16), (16, 32)]),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_random_shapes(B, H, T_q, T_k, D, causal, dropout_p, seed, cuts, tile):
    options = {"causal": causal, "dropout_p": dropout_p, "seed": seed}
    if cuts is not None:
        T_k = T_q
        options["cu"] = boundaries(B * T_q, *sorted(min(c, B * T_q) for c in cuts))
    check(make(B, H, T_q, T_k, D, seed=seed), tile=tile, roundings=16, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("T_q", "T_k"), [(113, 203), (239, 1), (799, 3), (1000, 1000), (1023, 1024), (1024, 1023), (128, 128), (129, 129)]
)
def test_lengths_that_the_trusted_libraries_use(T_q, T_k):
    check(make(1, 1, T_q, T_k, 64), tile=(128, 64))
