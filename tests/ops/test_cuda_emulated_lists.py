"""The CUDA kernels of ops over lists of tensors on a CPU (emulation.py): their own tests that need no GPU, and those of
embedding that say what a GPU does and a CPU does not."""

import emulation
import pytest
import test_adamw_step as adamw
import test_clip_grad_norm as clip
import torch
from oracle import DTYPES
from test_embedding import args

from fastgpt import ops


@pytest.fixture
def emulated_adamw():
    with emulation.active(emulation.CUDA / "adamw_step.cu"):
        yield


@pytest.fixture
def emulated_clip():
    with emulation.active(emulation.CUDA / "clip_grad_norm.cu"):
        yield


@pytest.mark.usefixtures("emulated_adamw")
class TestAdamWStep:
    @pytest.mark.parametrize("kind", adamw.KINDS)
    def test_error_is_at_most_twice_torchs(self, kind):
        adamw.check_accuracy(adamw.lists(kind), grad_scale=0.3)

    @pytest.mark.parametrize("kind", adamw.KINDS)
    @pytest.mark.parametrize("layout", ["strided", "offset"])
    def test_any_strides(self, layout, kind):
        adamw.test_any_strides(layout, kind, "cpu")

    @pytest.mark.parametrize("kind", adamw.KINDS)
    @pytest.mark.parametrize("gap", [1, 64])
    def test_writes_no_memory_that_is_not_its_own(self, gap, kind):
        adamw.test_writes_no_memory_that_is_not_its_own(gap, kind, "cpu")

    def test_scalars_may_be_tensors(self):
        adamw.test_scalars_may_be_tensors(torch.float32, "cpu")

    @pytest.mark.parametrize("kind", adamw.KINDS)
    def test_a_scale_that_is_not_finite_changes_nothing(self, kind):
        adamw.test_a_scale_that_is_not_finite_changes_nothing(kind, "cpu", "auto")

    def test_more_tensors_than_a_launch_takes(self):
        adamw.test_more_tensors_than_a_launch_takes("cpu")

    def test_a_list_that_fills_its_launches(self):
        """And no elements at all."""
        adamw.check_accuracy(adamw.lists(shapes=[(2,)] * 1200))
        adamw.check_accuracy(adamw.lists(shapes=[(0,), (3, 0)]))


@pytest.mark.usefixtures("emulated_clip")
class TestClipGradNorm:
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
    def test_norm_and_factor_are_the_exact_ones_rounded(self, dtype):
        clip.test_norm_and_factor_are_the_exact_ones_rounded(dtype, "cpu", 0.5)

    def test_mixed_dtypes(self):
        grads = [g.to(d) for g, d in zip(clip.gradients(), [*DTYPES, torch.float64] * 9, strict=False)]
        assert ops.clip_grad_norm(grads, 1.0)[0].item() == pytest.approx(clip.exact_norm(grads), rel=1e-12)

    def test_what_is_not_finite_is_in_the_norm_and_makes_the_factor_nan(self):
        clip.test_what_is_not_finite_is_in_the_norm_and_makes_the_factor_nan(torch.bfloat16, "cpu", 65536)
        clip.test_a_norm_too_large_for_its_dtype_makes_the_factor_nan("cpu")

    def test_more_tensors_than_a_launch_takes(self):
        clip.test_more_tensors_than_a_launch_takes("cpu")

    def test_no_elements(self):
        norm, factor = ops.clip_grad_norm([torch.ones(0)], 1.0)
        assert (norm, factor) == (0, 1)


def test_a_wrong_id_on_a_gpu_gives_nan_and_no_gradient():
    with emulation.active(emulation.CUDA / "embedding.cu"):
        ids, wte, wpe = args(((0, 7, -1, 2),))
        wte.requires_grad_()
        y = ops.embedding(ids, wte, wpe)
        assert y[0, 1:3].isnan().all()
        assert torch.equal(y[0, ::3], torch.full((2, 3), 2.0))
        y.backward(torch.ones_like(y))
        assert wte.grad.sum(1).tolist() == [3, 0, 3, 0, 0]


def test_runs_of_an_id_that_end_where_blocks_do():
    """An id's tokens are 1 to 100, so that runs begin, end and go on at every position of a block of 32."""
    with emulation.active(emulation.CUDA / "embedding.cu"):
        counts = torch.tensor([32, 1, 31, 64, 100, 28, 5, 32, 3])
        ids = torch.arange(9).repeat_interleave(counts)[torch.randperm(296, generator=torch.Generator().manual_seed(0))]
        wte, wpe = torch.zeros(9, 2, requires_grad=True), torch.zeros(37, 2)
        y = ops.embedding(ids.view(8, 37), wte, wpe)
        y.backward(torch.ones_like(y))
        assert wte.grad[:, 1].tolist() == counts.tolist()
