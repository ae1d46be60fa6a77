"""The machine that a figure was measured on, as its results say it."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

import fastgpt
from fastgpt.cpus import cpus


def device_name(device: str) -> str:
    """What the maker calls the CPU or GPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine_name(device: str) -> str:
    """A folder's name: "intel-xeon-2-cores", "nvidia-h200"."""
    name = re.sub(r"\((r|tm|c)\)|@.*|\b\d+-core\b|\bcpu\b|\bprocessor\b", " ", device_name(device).lower())
    if device == "cpu":
        name += f" {cpus()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def environment(device: str) -> dict[str, str | int]:
    """Versions, date, device, threads, and its clock as far as it can be read."""
    found: dict[str, str | int] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device_name": device_name(device),
        "cores": cpus(),
        "threads": torch.get_num_threads(),
        "fastgpt": fastgpt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    for package in ("triton", "peft"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
        found["capability"] = f"{properties.major}.{properties.minor}"
        with contextlib.suppress(ImportError, RuntimeError):  # asks a library that torch does not bring
            found["clock_mhz"] = torch.cuda.clock_rate()
    else:
        frequency = Path("/sys/devices/system/cpu/cpu0/cpufreq")
        for key, file in (("governor", "scaling_governor"), ("clock_khz", "scaling_cur_freq")):
            if (frequency / file).exists():
                found[key] = (frequency / file).read_text().strip()
    return found


class Neighbours:
    """How many of the cores that this process may use others took, from when this was made until now."""

    def __init__(self) -> None:
        self.start = self._now()

    def cores(self) -> float | None:
        """None where the system does not tell (other than Linux)."""
        now = self._now()
        if now is None or self.start is None or now[0] == self.start[0]:
            return None
        wall, busy, own = (b - a for a, b in zip(self.start, now, strict=True))
        return max(0.0, (busy - own) / wall)

    def _now(self) -> tuple[float, float, float] | None:
        """Wall time, busy time of those cores, this process's own time, in seconds."""
        try:
            lines = Path("/proc/stat").read_text().splitlines()
        except OSError:
            return None
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        ticks = 0
        for line in lines:
            name, *values = line.split()
            if name in mine:
                user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, values[:8])
                ticks += user + nice + system + irq + softirq + steal
        times = os.times()
        return times.elapsed, ticks / os.sysconf("SC_CLK_TCK"), sum(times[:4])
