"""Which implementation each op takes on each device, and why.

An op has one accelerated implementation per device type, registered with torch's dispatcher, and one plain-torch
reference. The kernel is taken wherever it is there; otherwise the reference is. `using("reference")` and the
environment variable `FASTGPT_OPS=reference` force the reference, to compare and to debug.

An op's file defines its schemas (`fastgpt::<op>` and `fastgpt::<op>_backward`), their fake kernels and what Python
implements of them, then calls `differentiable` and `register`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Mode = Literal["auto", "reference"]
DEVICE_TYPES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # of the tensors that ops compute with
EXTENSION = Path(__file__).parents[1] / "_C.abi3.so"


@dataclass(frozen=True)
class Implementation:
    """What an op runs on a device type: `name` is "C++", "Triton", "reference" and the like; `reason` says why."""

    op: str
    device: str
    name: str
    reason: str


def _load_extension() -> str | None:
    """Loads fastgpt/_C.abi3.so; returns None, or why its kernels are not there."""
    if not EXTENSION.exists():
        return (
            "fastgpt/_C.abi3.so was not built (no C++ compiler or no torch when fastgpt was installed): install both, "
            "then `pip install -v --no-build-isolation --force-reinstall --no-deps` fastgpt again"
        )
    try:
        torch.ops.load_library(str(EXTENSION))
    except OSError as error:
        return f"fastgpt/_C.abi3.so does not load ({str(error).splitlines()[0]}): build it again for this torch"
    return None


_missing = _load_extension()
_mode: Mode = "reference" if os.environ.get("FASTGPT_OPS") == "reference" else "auto"
_kernels: dict[str, dict[str, str]] = {}  # op -> device type -> the kind of kernel that the op has for it
_because: dict[tuple[str, str], str] = {}  # (op, device type) -> why its kernel is taken
_present: set[tuple[str, str]] = set()  # (op, device type) whose kernel is really there


def register(op: str, *, cpu: str, cuda: str, because: str | dict[str, str] = "its kernel is built and loaded") -> None:
    """Called once by each op's file, after its schema and what Python implements of it.

    Args:
        cpu, cuda: the kind of kernel that the op has there: "C++", "CUDA C++", "Triton" or a library's name.
        because: why that is taken where it is there, for `fastgpt info`; by device type where it differs.
    """
    _kernels[op] = {"cpu": cpu, "cuda": cuda}
    for device in DEVICE_TYPES:
        _because[op, device] = because if isinstance(because, str) else because[device]
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgpt::{op}", device.upper()):
            _present.add((op, device))


def differentiable(
    op: str,
    *,
    save: Callable[..., None],
    backward: Callable[..., Any],
    visible: int = 1,
    launcher: Callable[..., Any] | None = None,
) -> Any:
    """Makes `fastgpt::<op>` differentiable and returns what the op's public function calls.

    Under torch.compile, and under functorch's transforms, that is the registered op. In eager mode it is an
    autograd.Function that calls the op below autograd: torch's Python autograd for registered ops costs 15 us a call
    more, forward and again backward, where a kernel takes 5 to 50.

    Args:
        save: `save(ctx, inputs, outputs)`, as torch.library.register_autograd's `setup_context`.
        backward: `backward(ctx, *gradients)`; it has a gradient for each visible output in front, and calls
            `fastgpt::<op>_backward` through `call_below_autograd`. `ctx.direct` says whether it is the eager one: then
            nobody else has seen the outputs that are not visible, and it may write over them.
        visible: how many of the op's outputs its callers see; those after them are for backward, and not returned.
        launcher: the implementation of an op that Python implements, for eager mode to call without the dispatcher.

    Returns:
        a function of the op's arguments, which returns the visible output, or a tuple of them if they are several.
    """
    registered = getattr(torch.ops.fastgpt, op).default
    single = len(registered._schema.returns) == 1

    def shown(output: Any) -> Any:
        return output if single else output[0] if visible == 1 else tuple(output[:visible])

    def save_registered(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if not single:
            ctx.mark_non_differentiable(*output[visible:])
        ctx.direct = False
        save(ctx, inputs, output)

    def refuse(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f'{op}: double backward is not supported by its kernels; use `with ops.using("reference"):`')

    torch.library.register_autograd(f"fastgpt::{op}", backward, setup_context=save_registered)
    torch.library.register_autograd(f"fastgpt::{op}_backward", refuse)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = (launcher or registered)(*args)
            ctx.direct = True
            save(ctx, args, output)
            return shown(output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    Direct.__name__ = Direct.__qualname__ = op

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or is_transformed():
            return shown(registered(*args))
        return Direct.apply(*args)

    return call


def is_transformed() -> bool:
    """Whether functorch or a dispatch mode (fake tensors, tracing) must see the registered op."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0


def call_below_autograd(op: str, *args: Any) -> Any:
    """Calls `fastgpt::<op>` in a backward: without autograd, unless that is to be differentiated, which is refused."""
    registered = getattr(torch.ops.fastgpt, op).default
    if torch.is_grad_enabled():
        return registered(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return registered(*args)


def takes_kernel(op: str, x: Tensor) -> bool:
    """Whether `op` on `x` runs its kernel, not its reference. A dictionary lookup: torch.compile traces through it."""
    return _mode == "auto" and (op, x.device.type) in _present


def implementation(op: str, device: str) -> Implementation:
    """The implementation that `op` takes on a device type ("cpu", "cuda") now, and why."""
    kind = _kernels[op].get(device)
    if _mode == "reference":
        return Implementation(op, device, "reference", 'forced by FASTGPT_OPS=reference or ops.using("reference")')
    if (op, device) in _present:
        assert kind is not None
        return Implementation(op, device, kind, _because[op, device])
    if kind is None:
        return Implementation(op, device, "reference", f"it has no kernel for {device}")
    if kind == "Triton":
        why = "Triton does not import" if torch.version.cuda else "torch was built without CUDA"
        return Implementation(op, device, "reference", why)
    if _missing:
        return Implementation(op, device, "reference", _missing)
    return Implementation(
        op, device, "reference", f"the extension was built without {kind}: torch or nvcc had no CUDA then"
    )


def implementations() -> list[Implementation]:
    """One row for each op and device type."""
    return [implementation(op, device) for op in sorted(_kernels) for device in DEVICE_TYPES]


@contextmanager
def using(mode: Mode) -> Iterator[None]:
    """Within it, ops take their reference (`"reference"`) or their usual choice (`"auto"`), in the whole process."""
    global _mode
    if mode not in ("auto", "reference"):
        raise ValueError(f'using: mode must be "auto" or "reference", got {mode!r}')
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


def extension_line() -> str:
    """One line on the extension, for people: printed after installation and by `fastgpt info`."""
    if _missing:
        return f"extension: not loaded, ops take their references: {_missing}"
    return f"extension: loaded, {len(_present)} kernels ({', '.join(f'{op} on {dev}' for op, dev in sorted(_present))})"
