"""fastgpt info"""

import os
import platform
import shutil

import torch
from rich.console import Console
from rich.table import Table

import fastgpt
from fastgpt import bpe
from fastgpt.ops import implementations, registry


def info() -> None:
    """Print versions, devices, and for each op which implementation it takes on each device and why."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"fastgpt {fastgpt.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    console.print(
        f"cpu: {os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            console.print(f"cuda:{i}: {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        console.print(f"cuda: no GPU seen (this torch is {built})")
    console.print(f"C++ compiler: {shutil.which('c++') or 'none'}; nvcc: {shutil.which('nvcc') or 'none'}")
    console.print(registry.extension_line())
    console.print(bpe.trainer_line())
    table = Table("op", "device", "implementation", "why")
    for row in implementations():
        table.add_row(row.op, row.device, row.name, row.reason)
    console.print(table)
