import pytest
import torch

from fastgpt import ops


def plain(qkv, n_head):
    B, T, C3 = qkv.shape
    return qkv.view(B, T, 3, n_head, C3 // 3 // n_head).permute(2, 0, 3, 1, 4).unbind()


@pytest.mark.parametrize(
    ("B", "T", "H", "D"), [(2, 5, 3, 16), (1, 1, 1, 2), (3, 7, 2, 5), (0, 4, 2, 8), (4, 96, 4, 16)]
)
def test_is_the_view_and_its_gradient_the_same(B, T, H, D):
    qkv = torch.randn(B, T, 3 * H * D, requires_grad=True)
    ours, theirs = ops.split_heads(qkv, H), plain(qkv, H)
    grads = [torch.randn(B, H, T, D) for _ in range(3)]
    for a, b in zip(ours, theirs, strict=True):
        assert a.data_ptr() == b.data_ptr()
        assert a.shape == b.shape
        assert a.stride() == b.stride()
    assert torch.equal(*(torch.autograd.grad(x, qkv, grads)[0] for x in (ours, theirs)))


def test_attentions_gradients_are_not_copied(monkeypatch):
    stacked = []
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda *args: stacked.append(1) or stack(*args))
    for T, dropout_p in ((96, 0.0), (7, 0.0), (96, 0.3)):  # what the C++ kernel takes, and what others do
        qkv = torch.randn(4, T, 3 * 4 * 16, requires_grad=True)
        (got,) = torch.autograd.grad(ops.attention(*ops.split_heads(qkv, 4), dropout_p=dropout_p, seed=1).sum(), qkv)
        (want,) = torch.autograd.grad(ops.attention(*plain(qkv, 4), dropout_p=dropout_p, seed=1).sum(), qkv)
        assert torch.equal(got, want)
        if (T, dropout_p) == (96, 0.0):
            from fastgpt.ops import attention_cpu

            assert len(stacked) == (0 if attention_cpu.HAS_CAUSAL else 1)


def test_gradients_that_only_look_like_one_tensor_are_stacked():
    qkv = torch.randn(2, 4, 24, requires_grad=True)
    q, k, v = ops.split_heads(qkv, 2)
    dq, dk, dv = torch.randn(2, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
    for grads in ((dq, dk, dv), (dq, dv, dk), (dq, dq, dq)):
        want = torch.stack(grads).permute(1, 3, 0, 2, 4).reshape(2, 4, 24)
        assert torch.equal(torch.autograd.grad((q, k, v), qkv, grads, retain_graph=True)[0], want)


def test_compiles_and_differentiates_twice():
    qkv = torch.randn(2, 4, 24, requires_grad=True, dtype=torch.float64)
    fn = torch.compile(lambda x: torch.cat(ops.split_heads(x, 2)), fullgraph=True, backend="aot_eager")
    assert torch.equal(fn(qkv), torch.cat(plain(qkv, 2)))
    assert torch.autograd.gradgradcheck(lambda x: sum(t.pow(3).sum() for t in ops.split_heads(x, 2)), qkv)


def test_a_shape_that_does_not_fit():
    with pytest.raises(ValueError, match=r"split_heads: qkv must have shape \(B, T, 3 \* 5 \* D\), got \(2, 4, 24\)"):
        ops.split_heads(torch.randn(2, 4, 24), 5)
