"""How fast this machine multiplies matrices: what `--precision auto` and MFU are decided by."""

import time

import torch
import torch.nn.functional as F

# Dense bf16 matmul rates of NVIDIA's data sheets, FLOP/s, by a part of the device's name; the first that fits counts.
DATA_SHEET = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def _random(device: torch.device, *shape: int) -> torch.Tensor:
    """Numbers from a generator of their own: a run's random state must not depend on what was measured."""
    return torch.randn(shape, device=device, generator=torch.Generator(device))


def _seconds(device: torch.device, x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype, budget: float) -> float:
    """Shortest time of x @ w.T in `dtype`, the casts from fp32 included, as autocast makes them."""
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        F.linear(x.to(dtype), w.to(dtype))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


@torch.no_grad()
def faster_precision(device: torch.device, rows: int, width: int) -> str:
    """ "bf16" where autocast multiplies (rows, width) x (width, 4 * width) at least 1.1x as fast as fp32, else "fp32".

    Measured, because it cannot be told from the name: bf16 is slower than fp32 on many CPUs without AMX.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    x, w = _random(device, min(rows, 4096), width), _random(device, 4 * width, width)
    fp32 = _seconds(device, x, w, torch.float32, 0.1)
    bf16 = _seconds(device, x, w, torch.bfloat16, 0.1)
    return "bf16" if fp32 > 1.1 * bf16 else "fp32"


def data_sheet_flops(device: torch.device, precision: str) -> tuple[float, str] | None:
    """What the maker says of dense matmuls, FLOP/s, and the name that it stands under; None for what is not listed."""
    if device.type == "cuda" and precision != "fp32":
        name = torch.cuda.get_device_name(device)
        for part, rate in DATA_SHEET.items():
            if part in name:
                return rate, f"{part} data sheet"
    return None


@torch.no_grad()
def matmul_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """The rate of a large square matmul measured now, FLOP/s, and what it was."""
    n = 4096 if device.type == "cuda" else 1024
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a, b = _random(device, n, n).to(dtype), _random(device, n, n).to(dtype)
    return 2 * n**3 / _seconds(device, a, b, dtype, 0.2), f"measured {n}x{n} {str(dtype)[6:]} matmul"


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """The rate that MFU is a share of, FLOP/s, and where it comes from: the data sheet, or a matmul measured now."""
    return data_sheet_flops(device, precision) or matmul_flops(device, precision)
