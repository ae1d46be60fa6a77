import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, OpContract, assert_within_bound, results, rows

from fastgpt import ops
from fastgpt.ops import embedding_reference


def args(ids=((0, 1), (2, 3)), vocab=5, positions=4, width=3, dtype=torch.float32):
    ids = torch.tensor(ids) if not isinstance(ids, torch.Tensor) else ids
    return ids, torch.ones(vocab, width, dtype=dtype), torch.ones(positions, width, dtype=dtype)


class TestEmbedding(OpContract):
    name = "embedding"
    reference = staticmethod(embedding_reference)
    # B, T, V, C, P, offset. One token, no rows, one id for all, lengths around blocks of 32, odd widths, an offset.
    cases = [
        (2, 3, 5, 8, 4, 0),
        (1, 1, 1, 1, 1, 0),
        (3, 5, 7, 13, 9, 4),
        (0, 4, 5, 6, 4, 0),
        (2, 0, 5, 6, 4, 4),
        (2, 1, 11, 8, 16, 15),
        (2, 63, 3, 64, 64, 0),
        (3, 64, 1, 16, 64, 0),
        (1, 129, 2, 127, 130, 1),
        (2, 1000, 50, 65, 1024, 24),
        (1, 1023, 1000, 33, 1023, 0),
        (2, 100, 257, 768, 1024, 0),
    ]

    def inputs(self, case, dtype, device, layout="contiguous", seed=0):
        batch, length, vocab, width, positions, offset = case
        generator = torch.Generator().manual_seed(seed)

        def make(*shape):
            t = torch.randn(shape, generator=generator).to(dtype).to(device)
            return rows(t, layout).requires_grad_()

        ids = torch.randint(vocab, (batch, length), generator=generator).to(device)
        ids = ids.t().contiguous().t() if layout == "transposed" else ids
        return ids, make(vocab, width), make(positions, width), offset

    bad_inputs = [
        (TypeError, "ids must be a tensor, got list", lambda: ([[1]], torch.ones(2, 3), torch.ones(2, 3))),
        (TypeError, "ids must be int64, got torch.int32", lambda: args(torch.zeros(1, 1).int())),
        (TypeError, "wte must be float32.*got torch.int64", lambda: args(dtype=torch.int64)),
        (TypeError, "wpe must have wte's dtype", lambda: (*args()[:2], torch.ones(4, 3).half())),
        (ValueError, r"ids must have shape \(B, T\), got \(2,\)", lambda: args((0, 1))),
        (ValueError, r"wte must have shape \(V, C\), got \(5,\)", lambda: (args()[0], torch.ones(5), torch.ones(4, 3))),
        (ValueError, r"wpe must have shape \(P, C\), got \(4,\)", lambda: (*args()[:2], torch.ones(4))),
        (ValueError, r"wpe must have wte's width 3, got shape \(4, 1\)", lambda: (*args()[:2], torch.ones(4, 1))),
        (ValueError, "wpe is on meta but wte is on cpu", lambda: (*args()[:2], torch.ones(4, 3, device="meta"))),
        (TypeError, "offset must be an int, got float", lambda: (*args(), 1.0)),
        (ValueError, "offset must be at least 0, got -1", lambda: (*args(), -1)),
        (ValueError, "offset 3 plus ids' length 2 must be at most wpe's 4 rows", lambda: (*args(), 3)),
        (ValueError, r"ids must be in \[0, 5\), got 7", lambda: args(((0, 7), (8, -1)))),
        (ValueError, r"ids must be in \[0, 5\), got -1", lambda: args(((0, -1), (8, 7)))),
        (ValueError, r"ids must be in \[0, 5\), got 5", lambda: args(((0, 5),))),
        (ValueError, r"ids must be in \[0, 0\), got 0", lambda: args(((0,),), vocab=0)),
    ]

    @given(
        batch=st.integers(0, 5),
        length=st.integers(0, 70),
        vocab=st.integers(1, 90),
        width=st.integers(1, 40),
        offset=st.integers(0, 9),
        spare=st.integers(0, 9),
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(["contiguous", "strided", "transposed", "offset"]),
        seed=st.integers(0, 2**16),
    )
    @settings(max_examples=60, deadline=None)
    def test_random_shapes(self, batch, length, vocab, width, offset, spare, dtype, layout, seed):
        case = (batch, length, vocab, width, offset + length + spare, offset)
        self.check_accuracy(self.inputs(case, dtype, "cpu", layout, seed), roundings=16)

    def test_is_what_two_tables_give(self):
        ids, wte, wpe, _ = self.inputs((3, 17, 40, 24, 20, 0), torch.float32, "cpu")
        assert torch.equal(ops.embedding(ids, wte, wpe, 2), F.embedding(ids, wte) + wpe[2:19])

    def test_tables_without_columns(self):
        ids, wte, wpe = args(width=0)
        y = ops.embedding(ids, wte.requires_grad_(), wpe.requires_grad_())
        assert y.shape == (2, 2, 0)
        y.sum().backward()
        assert (wte.grad.shape, wpe.grad.shape) == ((5, 0), (4, 0))

    def test_rows_that_no_id_names_get_exactly_zero(self):
        wte, wpe = (torch.ones(n, 6, requires_grad=True) for n in (9, 8))
        dirt = [torch.full((n, 6), torch.nan) for n in (9, 8) for _ in range(8)]
        y = ops.embedding(torch.tensor([[4, 4, 7]]), wte, wpe, 2)
        dirt.clear()
        y.backward(torch.ones_like(y))
        tokens, positions = torch.zeros(9, 6), torch.zeros(8, 6)
        tokens[4], tokens[7], positions[2:5] = 2, 1, 1
        assert torch.equal(wte.grad, tokens)
        assert torch.equal(wpe.grad, positions)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_a_sum_over_many_tokens_keeps_growing(self, dtype):
        """In bf16 a running sum of ones stops at 256."""
        wte, wpe = torch.ones(2, 4, dtype=dtype, requires_grad=True), torch.ones(1, 4, dtype=dtype, requires_grad=True)
        y = ops.embedding(torch.zeros(1500, 1).long(), wte, wpe)
        y.backward(torch.ones_like(y))
        want = torch.tensor(1500.0).to(dtype).expand(4)
        assert torch.equal(wte.grad[0], want)
        assert torch.equal(wpe.grad[0], want)

    def test_gradients_do_not_depend_on_the_number_of_threads(self):
        """Tokens are spread as in text, most of them few ids', so that equal shares of the table are unequal work."""
        _, wte, wpe, _ = self.inputs((1, 1, 3000, 64, 1024, 0), torch.float32, "cpu")
        ids = (torch.rand(8, 1000, generator=torch.Generator().manual_seed(3)) ** 6 * 3000).long()
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(ops.embedding, (ids, wte, wpe, 24)))
        torch.set_num_threads(2)
        exact = results(embedding_reference, (ids, wte, wpe, 24), torch.float64)
        assert_within_bound(found[0], results(embedding_reference, (ids, wte, wpe, 24)), exact)
        for name, want in found[0].items():
            assert torch.equal(want, found[1][name])
            assert torch.equal(want, found[2][name])

    def test_a_new_offset_compiles_no_new_graph(self):
        ids, wte, wpe, _ = self.inputs((2, 1, 11, 8, 64, 0), torch.float32, "cpu")
        torch._dynamo.reset()
        compiled = torch.compile(ops.embedding, fullgraph=True, backend="eager", dynamic=True)
        compiled(ids, wte, wpe, 5)
        with torch.compiler.set_stance("fail_on_recompile"):
            for offset in (6, 7, 40):
                assert torch.equal(compiled(ids, wte, wpe, offset), ops.embedding(ids, wte, wpe, offset))

    def test_a_wrong_id_in_compiled_code_raises_too(self):
        self.kernel_or_skip()
        torch._dynamo.reset()
        compiled = torch.compile(ops.embedding, fullgraph=True, backend="aot_eager")
        with pytest.raises(RuntimeError, match=r"ids must be in \[0, 5\), got 7"):
            compiled(*args(((0, 7),)))

    def test_direct_calls_with_wrong_shapes_do_not_crash(self):
        self.kernel_or_skip()
        op, backward = torch.ops.fastgpt.embedding, torch.ops.fastgpt.embedding_backward
        ids, wte, wpe = args()
        with pytest.raises(RuntimeError, match="ids must be in"):
            op(ids + 4, wte, wpe, 0)
        with pytest.raises(RuntimeError, match=r"offset \+ T"):
            op(ids, wte, wpe, 3)
        with pytest.raises(RuntimeError, match="of one dtype"):
            op(ids, wte, torch.ones(4, 2), 0)
        with pytest.raises(RuntimeError, match="ids must be in"):
            backward(torch.ones(2, 2, 3), ids, 3, 4, 0)
        with pytest.raises(RuntimeError, match="dy must be"):
            backward(torch.ones(2, 1, 3), ids, 5, 4, 0)
        with pytest.raises(RuntimeError, match=r"offset \+ T"):
            backward(torch.ones(2, 2, 3), ids, 5, 4, 3)

    @pytest.mark.gpu
    def test_a_wrong_id_on_a_gpu_gives_nan_and_no_gradient(self):
        ids, wte, wpe = (t.cuda() for t in args(((0, 7, -1, 2),)))
        wte.requires_grad_()
        y = ops.embedding(ids, wte, wpe)
        assert y[0, 1:3].isnan().all()
        assert torch.equal(y[0, ::3], torch.full((2, 3), 2.0, device="cuda"))
        y.backward(torch.ones_like(y))
        assert wte.grad.sum(1).tolist() == [3, 0, 3, 0, 0]


@pytest.mark.skipif(not ops.registry.takes_kernel("embedding", torch.zeros(1)), reason="the extension is not built")
def test_backward_adds_to_a_gradient_that_is_there():
    op, torch_op = torch.ops.fastgpt.embedding_backward_add_.default, torch.ops.fastgpt.embedding_backward.default
    ids, dy, there = torch.randint(9, (3, 5)), torch.randn(3, 5, 8), torch.randn(9, 8)
    added = there.clone()
    dwpe = op(dy, ids, added, 7, 1)
    want_wte, want_wpe = torch_op(dy, ids, 9, 7, 1)
    torch.testing.assert_close(added, there + want_wte)
    assert torch.equal(dwpe, want_wpe)
    unseen = [v for v in range(9) if not (ids == v).any()]
    assert torch.equal(added[unseen], there[unseen])
    torch.library.opcheck(op, (dy, ids, there.clone(), 7, 1))
