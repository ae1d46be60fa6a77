"""What is measured, one function an op: shapes, inputs, the library's kernels for the same, bytes and FLOPs.

To add an op, write its function and name it in KERNELS. It yields cases; fastgpt's op, its reference and the compiled
reference are taken from `fastgpt.ops` by the op's name, so that a case says only what else to compare with.

Bytes count each tensor that must be read or written once, FLOPs the matrix products that the math needs: what a
perfect kernel would move and compute. Inputs are of the size that they have in GPT-2 (weights of 0.02): products of
unit normals make softmax put out denormals, which slow a CPU's matmul down 20-fold.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt import ops


@dataclass(frozen=True)
class Contender:
    """Something to compare the op with. `args` replaces the case's where it keeps tensors of its own."""

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Work:
    """What a perfect kernel moves (bytes) and computes (FLOPs in matrix products)."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Case:
    """One shape of one op.

    Args:
        shape: for people, "4096 x 768".
        size, size_name: its place on the plot's axis, and that axis's name.
        passes: "forward" (without gradients if it is the only one), "backward", "both" (one after the other, as a
            training step has them) or "step" (no gradients at all) -> its work.
        ours, reference: the op and its definition, called as `ours(*args)`.
        library: the best kernels that torch and others have for the same.
        target: a shape that the project sets itself targets for: it goes into the short table and the README, with its
            forward and backward or what `headline` names.
        series: cases of one series are points of one line.
        dtype: of the tensors, where it is not the one that is measured in.
    """

    shape: str
    size: int
    size_name: str
    passes: dict[str, Work]
    args: tuple[Any, ...]
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    library: list[Contender]
    target: bool = False
    headline: tuple[str, ...] = ("forward", "backward", "step")
    series: str = ""
    dtype: torch.dtype | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Where:
    """Device, dtype, and which of an op's lists of shapes: "quick", "cpu" or "cuda"."""

    device: str
    dtype: torch.dtype
    sizes: str

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def pick(self, targets: set[Any], **lists: list[Any]) -> Iterator[tuple[Any, bool]]:
        """The shapes of the list named `sizes`, each with whether it is one of the targets."""
        for shape in lists[self.sizes]:
            yield shape, shape in targets or self.sizes == "quick"

    def randn(self, *shape: int, std: float = 1.0, grad: bool = False) -> Tensor:
        return (torch.randn(shape, device=self.device) * std).to(self.dtype).requires_grad_(grad)

    def randint(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, device=self.device)


def _op(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    return getattr(ops, name), getattr(ops, f"{name}_reference")


def layer_norm(where: Where) -> Iterator[Case]:
    shapes = where.pick(
        {(4096, 768), (8192, 768), (32768, 768), (16384, 4096)},
        quick=[(64, 96)],
        cpu=[(256, 768), (1024, 768), (4096, 768), (16384, 768)],
        cuda=[(1024, 768), (8192, 768), (32768, 768), (16384, 4096)],
    )
    ours, reference = _op("layer_norm")
    for (rows, width), target in shapes:
        tensor, stats = rows * width * where.itemsize, rows * 8
        yield Case(
            f"{rows} x {width}",
            rows * width,
            "elements",
            {
                "forward": Work(2 * tensor + stats),
                "backward": Work(3 * tensor + stats),
                "both": Work(5 * tensor + 2 * stats),
            },
            (where.randn(rows, width, grad=True), where.randn(width, grad=True), where.randn(width, grad=True)),
            ours,
            reference,
            [Contender("F.layer_norm", lambda x, w, b: F.layer_norm(x, (x.shape[-1],), w, b))],
            target=target,
        )


def add_layer_norm(where: Where) -> Iterator[Case]:
    def unfused(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return total, F.layer_norm(total, (total.shape[-1],), weight, bias)

    shapes = where.pick(
        {(4096, 768), (8192, 768), (32768, 768), (16384, 4096)},
        quick=[(64, 96)],
        cpu=[(256, 768), (1024, 768), (4096, 768), (16384, 768)],
        cuda=[(1024, 768), (8192, 768), (32768, 768), (16384, 4096)],
    )
    ours, reference = _op("add_layer_norm")
    for (rows, width), target in shapes:
        tensor, stats = rows * width * where.itemsize, rows * 8
        yield Case(
            f"{rows} x {width}",
            rows * width,
            "elements",
            {  # backward reads the sum and the gradients of both outputs; x and the residual share one gradient
                "forward": Work(4 * tensor + stats),
                "backward": Work(4 * tensor + stats),
                "both": Work(8 * tensor + 2 * stats),
            },
            (
                where.randn(rows, width, grad=True),
                where.randn(rows, width, grad=True),
                where.randn(width, grad=True),
                where.randn(width, grad=True),
            ),
            ours,
            reference,
            [Contender("add, F.layer_norm", unfused)],
            target=target,
        )


def bias_gelu(where: Where) -> Iterator[Case]:
    shapes = where.pick(
        {(4096, 3072), (8192, 3072), (32768, 3072)},
        quick=[(64, 96)],
        cpu=[(256, 3072), (1024, 3072), (2048, 3072), (4096, 3072)],
        cuda=[(1024, 3072), (8192, 3072), (32768, 3072)],
    )
    ours, reference = _op("bias_gelu")
    for (rows, width), target in shapes:
        tensor = rows * width * where.itemsize
        yield Case(
            f"{rows} x {width}",
            rows * width,
            "elements",
            {"forward": Work(2 * tensor), "backward": Work(3 * tensor), "both": Work(5 * tensor)},
            (where.randn(rows, width, grad=True), where.randn(width, grad=True)),
            ours,
            reference,
            [Contender("add, F.gelu", lambda x, b: F.gelu(x + b, approximate="tanh"))],
            target=target,
        )


def _sdpa(where: Where, causal: bool) -> list[Contender]:
    """SDPA; on a GPU each of its fused kernels by itself: which one it chooses depends on versions."""

    def choice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def pinned(backend: SDPBackend) -> Callable[..., Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return choice(q, k, v)

        return call

    if where.device == "cpu":
        return [Contender("SDPA", choice)]
    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    return [Contender(f"SDPA {name}", pinned(backend)) for name, backend in backends.items()]


def attention(where: Where) -> Iterator[Case]:
    targets = {(4, 12, 1024, 64), (8, 16, 4096, 64), (8, 16, 4096, 128), (16, 12, 1024, 64)}
    training = where.pick(  # batch, heads, length, head dim
        targets,
        quick=[(1, 2, 32, 16)],
        cpu=[(4, 12, 128, 64), (4, 12, 256, 64), (4, 12, 512, 64), (4, 12, 1024, 64)],
        cuda=[(8, 16, t, d) for d in (64, 128) for t in (512, 1024, 2048, 4096, 8192)] + [(16, 12, 1024, 64)],
    )
    decode = where.pick(
        targets,
        quick=[(1, 2, 32, 16)],
        cpu=[(4, 12, 256, 64), (4, 12, 1024, 64), (4, 12, 4096, 64)],
        cuda=[(8, 16, t, d) for d in (64, 128) for t in (1024, 4096, 16384)],
    )
    ours, reference = _op("attention")
    for (b, h, t, d), target in training:
        tensor, flops = b * h * t * d * where.itemsize, 2 * b * h * t * t * d  # half of 4 B H T^2 D: causal
        # (B, H, T, D) views of one fused projection, as a model has them
        qkv = where.randn(b, t, 3, h, d).permute(2, 0, 3, 1, 4)
        yield Case(
            f"B{b} H{h} T{t} D{d} causal",
            t,
            "sequence length",
            {  # backward: five products of that size, where forward has two
                "forward": Work(4 * tensor, flops),
                "backward": Work(8 * tensor, flops * 5 // 2),
                "both": Work(12 * tensor, flops * 7 // 2),
            },
            tuple(x.detach().requires_grad_() for x in qkv),
            ours,
            reference,
            _sdpa(where, causal=True),
            target=target,
            headline=("forward", "backward", "both") if where.device == "cuda" else ("forward", "backward"),
            series=f"B{b} H{h} D{d} causal",
        )
    for (b, h, t, d), target in decode:  # one query, which sees all keys
        yield Case(
            f"B{b} H{h} T{t} D{d} decode",
            t,
            "sequence length",
            {"forward": Work(2 * b * h * t * d * where.itemsize, 4 * b * h * t * d)},
            (where.randn(b, h, 1, d), where.randn(b, h, t, d), where.randn(b, h, t, d)),
            ours,
            reference,
            _sdpa(where, causal=False),
            target=target,
            series=f"B{b} H{h} D{d} decode",
        )


def linear_cross_entropy(where: Where) -> Iterator[Case]:
    shapes = where.pick(  # rows, width, vocabulary
        {(4096, 768, 50257), (8192, 768, 50304)},
        quick=[(64, 32, 211)],
        cpu=[(256, 768, 50257), (1024, 768, 50257), (4096, 768, 50257)],
        cuda=[(2048, 768, 50304), (8192, 768, 50304), (32768, 768, 50304)],
    )
    ours, reference = _op("linear_cross_entropy")
    for (rows, width, vocab), target in shapes:
        operands = (rows + vocab) * width * where.itemsize
        yield Case(
            f"{rows} x {width} x {vocab}",
            rows,
            "rows",
            {"both": Work(3 * operands, 6 * rows * width * vocab)},  # the op makes its gradient in its forward pass
            (
                where.randn(rows, width, grad=True),
                where.randn(vocab, width, std=0.02, grad=True),
                where.randint(vocab, rows),
            ),
            ours,
            reference,
            [Contender("F.linear, F.cross_entropy", lambda h, w, t: F.cross_entropy(F.linear(h, w), t))],
            target=target,
            headline=("both",),
        )


def lora_linear(where: Where) -> Iterator[Case]:
    shapes = where.pick(  # rows, in, out
        {(4096, 768, 768), (4096, 768, 3072), (8192, 4096, 4096)},
        quick=[(64, 32, 96)],
        cpu=[(n, 768, out) for out in (768, 3072) for n in (256, 1024, 4096)],
        cuda=[(n, 4096, 4096) for n in (1024, 2048, 8192)],
    )
    ours, reference = _op("lora_linear")
    rank, scaling = 16, 2.0
    for (rows, n_in, n_out), target in shapes:
        e = where.itemsize
        x, y, w = rows * n_in * e, rows * n_out * e, n_in * n_out * e
        product, adapter = 2 * rows * n_in * n_out, 2 * rows * rank * (n_in + n_out)
        weight, bias = where.randn(n_out, n_in, std=0.02), where.randn(n_out, std=0.02)
        peft = _peft(where, weight, bias, rank, scaling)
        args = (
            where.randn(rows, n_in, grad=True),
            weight,
            bias,
            where.randn(rank, n_in, std=0.02, grad=True),
            where.randn(n_out, rank, std=0.02, grad=True),
            scaling,
        )
        library = [Contender("frozen F.linear alone", F.linear, args[:3])]
        if peft is not None:
            library.append(Contender("PEFT", lambda x, *_, layer=peft: layer(x), (args[0], *peft.parameters())))
        held = ops.quantize_nf4(weight)
        four = (args[0], held, *args[2:])
        whole = [Contender("whole weight", ours, args)]
        missing = [] if peft is not None else ["PEFT's layer is left out: peft is not installed"]
        kinds = [(args, w, "", library, missing), (four, _nbytes(held), ", NF4", whole, [])]
        for arguments, frozen, kind, others, notes in kinds[: 2 if target else 1]:
            yield Case(
                f"{rows} x {n_in} -> {n_out}, r={rank}{kind}",
                rows,
                "rows",
                {  # W and b are frozen: backward has one product of full size, for x
                    "forward": Work(x + frozen + y, product + adapter),
                    "backward": Work(2 * x + frozen + y, product + 2 * adapter),
                    "both": Work(3 * x + 2 * frozen + 2 * y, 2 * product + 3 * adapter),
                },
                arguments,
                ours,
                reference,
                others,
                target=target,
                headline=("both",) if where.device == "cpu" else ("forward", "backward"),
                series=f"{n_in} -> {n_out}, r={rank}{kind}",
                notes=notes,
            )


def _nbytes(held: ops.NF4Weight) -> int:
    return sum(t.nbytes for t in held.tensors())


def _peft(where: Where, weight: Tensor, bias: Tensor, rank: int, scaling: float) -> torch.nn.Module | None:
    """PEFT's LoRA layer over that frozen linear, or None where peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        return None
    import peft

    base = torch.nn.Linear(weight.shape[1], weight.shape[0], device=where.device, dtype=where.dtype)
    base.load_state_dict({"weight": weight, "bias": bias})
    config = peft.LoraConfig(r=rank, lora_alpha=int(rank * scaling), target_modules=["0"], init_lora_weights=False)
    layer: torch.nn.Module = peft.inject_adapter_in_model(config, torch.nn.Sequential(base))
    return layer.to(device=where.device, dtype=where.dtype)


def dequantize_nf4(where: Where) -> Iterator[Case]:
    shapes = where.pick(  # a weight's
        {(3072, 768), (4096, 4096)},
        quick=[(96, 64)],
        cpu=[(768, 768), (3072, 768), (4096, 4096)],
        cuda=[(768, 768), (3072, 768), (4096, 4096)],
    )
    ours, reference = _op("dequantize_nf4")
    for (n_out, n_in), target in shapes:
        held = ops.quantize_nf4(where.randn(n_out, n_in, std=0.02))
        result = held.dequantize()
        yield Case(
            f"{n_out} x {n_in}",
            n_out * n_in,
            "weights",
            {"forward": Work(_nbytes(held) + result.nbytes)},
            (held,),
            ours,
            reference,
            [Contender("copy of the result", lambda _, result=result: result.clone())],
            target=target,
        )


def embedding(where: Where) -> Iterator[Case]:
    shapes = where.pick(  # batch, length, width, vocabulary
        {(4, 1024, 768, 50257), (8, 1024, 768, 50304)},
        quick=[(2, 32, 32, 211)],
        cpu=[(1, 1024, 768, 50257), (4, 1024, 768, 50257), (16, 1024, 768, 50257)],
        cuda=[(2, 1024, 768, 50304), (8, 1024, 768, 50304), (32, 1024, 768, 50304)],
    )
    ours, reference = _op("embedding")

    def lookups(ids: Tensor, wte: Tensor, wpe: Tensor) -> Tensor:
        return F.embedding(ids, wte) + wpe[: ids.shape[1]]

    for (b, t, c, vocab), target in shapes:
        e = where.itemsize
        tokens, positions, table = b * t * c * e, t * c * e, vocab * c * e
        yield Case(
            f"{b} x {t} x {c}, V={vocab}",
            b * t,
            "tokens",
            {  # backward writes both tables' gradients whole
                "forward": Work(2 * tokens + positions),
                "backward": Work(tokens + table + positions),
                "both": Work(3 * tokens + table + 2 * positions),
            },
            (
                where.randint(vocab, b, t),
                where.randn(vocab, c, std=0.02, grad=True),
                where.randn(t, c, std=0.02, grad=True),
            ),
            ours,
            reference,
            [Contender("F.embedding, add", lookups)],
            target=target,
        )


def gpt2_shapes(n_layer: int, width: int, vocab: int = 50257, positions: int = 1024) -> list[tuple[int, ...]]:
    """The shapes of GPT-2's parameters: 124M of them at 12 layers and 768."""
    block = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(vocab, width), (positions, width), *(block * n_layer), (width,), (width,)]


def adamw_step(where: Where) -> Iterator[Case]:
    models = where.pick(  # layers, width, vocabulary
        {(12, 768, 50257)},
        quick=[(1, 32, 211)],
        cpu=[(2, 128, 50257), (2, 768, 50257), (12, 768, 50257)],
        cuda=[(2, 128, 50257), (6, 384, 50257), (12, 768, 50257), (24, 1024, 50257)],
    )
    step, step_reference = _op("adamw_step")
    clip, clip_reference = _op("clip_grad_norm")
    options: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

    for (layers, width, vocab), target in models:
        shapes = gpt2_shapes(layers, width, vocab)
        params = [torch.randn(s, device=where.device).mul_(0.02).requires_grad_() for s in shapes]  # fp32 everywhere
        for p in params:
            p.grad = torch.randn_like(p).mul_(1e-6)  # a norm below 1: clipping passes over it and changes nothing
        grads = [p.grad for p in params]
        moments = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
        adamw = torch.optim.AdamW(params, fused=True, **options)
        count = sum(p.numel() for p in params)

        def ours(*, clipped: bool, p: Any = params, g: Any = grads, m: Any = moments) -> None:
            scale = clip(g, 1.0)[1] if clipped else 1.0
            step(p, g, *m, step=10, grad_scale=scale, **options)

        def reference(*, clipped: bool, p: Any = params, g: Any = grads, m: Any = moments) -> None:
            scale = clip_reference(g, 1.0)[1] if clipped else 1.0
            step_reference(p, g, *m, step=10, grad_scale=scale, **options)

        def fused(*, clipped: bool, p: Any = params, optimizer: Any = adamw) -> None:
            if clipped:
                torch.nn.utils.clip_grad_norm_(p, 1.0)
            optimizer.step()

        for clipped in (False, True):
            yield Case(
                f"{count / 1e6:.3g}M parameters{', clipped' if clipped else ''}",
                count,
                "parameters",
                {"step": Work((32 if clipped else 28) * count)},  # reads p, g, m, v; writes p, m, v; the norm reads g
                (),
                lambda clipped=clipped, fn=ours: fn(clipped=clipped),
                lambda clipped=clipped, fn=reference: fn(clipped=clipped),
                [Contender("AdamW(fused=True)", lambda clipped=clipped, fn=fused: fn(clipped=clipped))],
                target=target,
                series="with clip_grad_norm" if clipped else "step alone",
                dtype=torch.float32,
            )


KERNELS: dict[str, Callable[[Where], Iterator[Case]]] = {
    entry.__name__: entry
    for entry in (
        layer_norm,
        add_layer_norm,
        bias_gelu,
        attention,
        linear_cross_entropy,
        lora_linear,
        dequantize_nf4,
        embedding,
        adamw_step,
    )
}
