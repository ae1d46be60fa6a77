"""The contract of an op as one test class: subclass it, say what the op is, and pytest runs every clause.

The oracle is the op's plain-torch reference in float64. The bound on an error is relative to what plain torch itself
makes at the same dtype: at most twice that, plus one rounding.

A subclass gives:
    name        the op's name, as in `torch.ops.fastgpt.<name>` and `ops.<name>`
    reference   its plain-torch definition
    cases       shapes, of whatever `inputs` understands
    inputs()    the op's arguments for one case; tensors that need gradients have requires_grad set
    bad_inputs  (exception, what its message must name, arguments)
and where they differ from the usual:
    raw_inputs()  the arguments of `torch.ops.fastgpt.<name>` for those of the public function
    smallest      the size of the terms that make up results, where that is not 1 (gradients of a mean, say)
    library_sums  whether a library's matmuls sum, in an order that strides may change
"""

import functools
import shutil
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastgpt import ops
from fastgpt.ops import registry

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def rows(tensor: Tensor, layout: str) -> Tensor:
    """The same values as `tensor` with other strides."""
    if layout == "contiguous" or tensor.dim() == 0:
        return tensor
    filler = torch.nan if tensor.is_floating_point() else 7
    if layout == "strided":  # every other element of a buffer twice as wide
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] * 2), filler)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "offset":  # starts in the middle of a buffer, on no 16-byte boundary
        flat = tensor.new_full((tensor.numel() + 1,), filler)
        flat[1:] = tensor.flatten()
        return flat[1:].view(tensor.shape)
    raise AssertionError(layout)


def random_rows(dtype: torch.dtype, device: str, layout: str, seed: int) -> Callable[..., Tensor]:
    """make(*shape, scale=1.0, shift=0.0) gives normal numbers that need a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        made = (torch.randn(shape, generator=generator) * scale + shift).to(dtype).to(device)
        return rows(made, layout).requires_grad_()

    return make


def results(fn: Callable[..., Any], args: tuple[Any, ...], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of fn(*args), the gradients for fixed ones of the outputs; with `dtype`, computed in it."""
    floats = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    leaves = [
        a.detach().to(dtype or a.dtype).requires_grad_(a.requires_grad) if any(a is f for f in floats) else a
        for a in args
    ]
    y = fn(*leaves)
    outputs = (y,) if isinstance(y, Tensor) else tuple(y)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator).to(floats[0].dtype).to(out) for out in outputs]
    if any(out.requires_grad for out in outputs):
        torch.autograd.backward(outputs, grads)
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            assert leaf.grad is not None
            found[f"gradient of argument {i}"] = leaf.grad
    return found


def assert_within_bound(
    ours: dict[str, Tensor],
    torchs: dict[str, Tensor],
    exact: dict[str, Tensor],
    roundings: int = 1,
    smallest: float = 1.0,
) -> None:
    assert ours.keys() == exact.keys()
    for name, want in exact.items():
        got, plain = ours[name], torchs[name]
        assert got.shape == want.shape, name
        assert got.dtype == plain.dtype, name
        if want.numel() == 0:
            continue
        error = (got.double() - want).abs().max().item()
        # The rounding is of the largest term: inputs are of size 1, and a sum that cancels to less still rounded those.
        rounding = roundings * torch.finfo(got.dtype).eps * max(smallest, want.abs().max().item())
        allowed = 2 * (plain.double() - want).abs().max().item() + rounding
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[k].nan_to_num(nan=7.0), b[k].nan_to_num(nan=7.0)) for k in a)


class OpContract:
    name: str
    reference: Callable[..., Tensor]
    cases: ClassVar[list[Any]]
    bad_inputs: ClassVar[list[tuple[type[Exception], str, Callable[[], tuple[Any, ...]]]]]
    smallest: ClassVar[float] = 1.0
    library_sums: ClassVar[bool] = False

    def inputs(
        self, case: Any, dtype: torch.dtype, device: str, layout: str = "contiguous", seed: int = 0
    ) -> tuple[Any, ...]:
        raise NotImplementedError

    def raw_inputs(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args

    @property
    def op(self) -> Callable[..., Tensor]:
        return getattr(ops, self.name)

    @property
    def raw(self) -> Any:
        return getattr(torch.ops.fastgpt, self.name).default

    def ref(self) -> Callable[..., Tensor]:
        return type(self).__dict__["reference"].__func__

    def kernel_or_skip(self, device: str = "cpu") -> None:
        if registry.implementation(self.name, device).name == "reference":
            pytest.skip(
                f"{self.name} has no kernel for {device} here: {registry.implementation(self.name, device).reason}"
            )

    def check_accuracy(self, args: tuple[Any, ...], roundings: int = 1) -> None:
        """`roundings` above 1 is for tiny random tensors: torch draws an error of 0 there now and then."""
        ref = self.ref()
        ours, torchs, exact = results(self.op, args), results(ref, args), results(ref, args, torch.float64)
        assert_within_bound(ours, torchs, exact, roundings, self.smallest)

    # One clause a test, below. Cases come from the subclass, so they loop inside: one id a clause, dtype and device.

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_error_is_at_most_twice_torchs(self, dtype: torch.dtype, device: str) -> None:
        for case in self.cases:
            self.check_accuracy(self.inputs(case, dtype, device))

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("layout", ["strided", "transposed", "offset"])
    def test_any_strides(self, layout: str, device: str) -> None:
        for case in self.cases:
            moved = self.inputs(case, torch.float32, device, layout)
            if layout == "offset" or self.library_sums:  # narrower accesses add in another order
                self.check_accuracy(moved)
            else:
                plain = self.inputs(case, torch.float32, device)
                assert same(results(self.op, plain), results(self.op, moved)), case

    @pytest.mark.parametrize("device", DEVICES)
    def test_bitwise_the_same_every_time(self, device: str) -> None:
        args = self.inputs(self.cases[-1], torch.float32, device)
        first = results(self.op, args)
        for _ in range(100):
            assert same(first, results(self.op, args))

    @pytest.mark.parametrize("device", DEVICES)
    def test_reads_no_memory_that_is_not_its_own(self, device: str) -> None:
        """Its outputs and scratch come from freed blocks full of NaN: an element left unwritten would show."""
        for case in self.cases:
            args = self.inputs(case, torch.float32, device)
            want = results(self.op, args)
            floats = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
            dirt = [torch.full_like(a, torch.nan) for a in floats for _ in range(8)]
            del dirt
            assert same(want, results(self.op, args)), case

    @pytest.mark.parametrize("device", DEVICES)
    def test_writes_no_memory_that_is_not_its_own(self, device: str) -> None:
        """Its outputs and scratch take every second of a row of equal blocks; the canaries between them must live."""
        for case in self.cases:
            args = self.inputs(case, torch.float32, device)
            shapes = {tuple(t.shape) for t in results(self.op, args).values()}
            blocks = [torch.full(shape, 7.0, device=device) for shape in shapes for _ in range(16)]
            canaries = blocks[::2]
            del blocks
            results(self.op, args)
            assert all((c == 7.0).all() for c in canaries), case

    @pytest.mark.parametrize("device", DEVICES)
    def test_opcheck(self, device: str) -> None:
        self.kernel_or_skip(device)
        for case in self.cases[:3]:
            torch.library.opcheck(self.raw, self.raw_inputs(self.inputs(case, torch.float32, device)))

    def test_gradcheck(self) -> None:
        """Of the kernel itself, in float64, where it takes that; else of the reference that stands in for it."""
        for case in self.cases[:3]:
            args = self.inputs(case, torch.float64, "cpu")
            torch.autograd.gradcheck(self.op, args, fast_mode=True)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compiles_whole(self, backend: str, device: str) -> None:
        if backend == "inductor" and not shutil.which("c++"):
            pytest.skip("inductor needs a C++ compiler")
        torch._dynamo.reset()
        compiled = torch.compile(functools.partial(self.op), fullgraph=True, backend=backend)
        for case in self.cases[:3]:
            args = self.inputs(case, torch.float32, device)
            ref = self.ref()
            ours, torchs, exact = results(compiled, args), results(ref, args), results(ref, args, torch.float64)
            assert_within_bound(ours, torchs, exact, smallest=self.smallest)

    def test_double_backward_says_that_it_is_not_there(self) -> None:
        self.kernel_or_skip()
        args = self.inputs(self.cases[0], torch.float32, "cpu")
        wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]

        def gradient() -> Tensor:
            y = self.op(*args)
            outputs = (y,) if isinstance(y, Tensor) else y
            total = sum(out.square().sum() for out in outputs)
            return torch.autograd.grad(total, wanted, create_graph=True)[0].sum()

        with pytest.raises(RuntimeError, match=f"{self.name}: double backward"):
            gradient().backward()
        with ops.using("reference"):
            gradient().backward()

    def test_reference_can_be_forced(self) -> None:
        args = self.inputs(self.cases[0], torch.float32, "cpu")
        with ops.using("reference"):
            assert registry.implementation(self.name, "cpu").name == "reference"
            assert same(results(self.op, args), results(self.ref(), args))

    def test_bad_input_names_the_argument(self) -> None:
        for error, words, make in self.bad_inputs:
            with pytest.raises(error, match=words) as caught:
                self.op(*make())
            assert "\n" not in str(caught.value)
            assert str(caught.value).startswith(f"{self.name}: ")


class RowContract(OpContract):
    """Of an op on the rows of one tensor or several, whose shape is the case, with parameters of a row's width."""

    # Odd widths and row counts around vector and block sizes, one element, no rows, three dimensions, GPT-2's own.
    cases = [
        (3, 5),
        (2, 3, 8),
        (1, 1),
        (0, 16),
        (2, 0, 7),
        (7,),
        (1, 769),
        (63, 64),
        (65, 127),
        (129, 129),
        (130, 1000),
        (5, 3072),
        (64, 768),
    ]

    @given(
        batch=st.integers(0, 9),
        width=st.integers(1, 300),
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(["contiguous", "strided", "transposed", "offset"]),
        seed=st.integers(0, 2**16),
    )
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    def test_random_shapes(self, batch: int, width: int, dtype: torch.dtype, layout: str, seed: int) -> None:
        self.check_accuracy(self.inputs((batch, width), dtype, "cpu", layout, seed), roundings=16)

    def test_many_rows_are_split_over_threads(self) -> None:
        self.check_accuracy(self.inputs((1031, 257), torch.float32, "cpu"))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_16_bit_rows_with_fp32_parameters(self, dtype: torch.dtype) -> None:
        wide = self.inputs((33, 100), torch.float32, "cpu")
        args = tuple(
            n if isinstance(n, Tensor) and n.dim() > 1 else w
            for n, w in zip(self.inputs((33, 100), dtype, "cpu"), wide, strict=True)
        )
        ours = results(self.op, args)
        assert_within_bound(ours, results(self.ref(), args), results(self.ref(), args, torch.float64))
        for i, arg in enumerate(args):
            if isinstance(arg, Tensor):
                assert ours[f"gradient of argument {i}"].dtype == (dtype if arg.dim() > 1 else torch.float32)
