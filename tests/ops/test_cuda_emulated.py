"""The CUDA kernels on a CPU (emulation.py): the clauses of each op's contract that need no GPU, and that the emulator
sees faults. Every csrc/cuda/<name>.cu takes the contract classes of tests/ops/test_<name>.py whose ops it implements."""

import importlib
import inspect
from pathlib import Path

import emulation
import pytest
import torch
from oracle import DTYPES, OpContract

from fastgpt import ops

SOURCES = sorted(p.stem for p in (Path(__file__).parents[2] / "csrc/cuda").glob("*.cu"))
MOST = 2**16  # elements of the largest case: the emulator takes some 0.1 us each


def contracts() -> list[tuple[str, type[OpContract]]]:
    found = []
    for source in SOURCES:
        module = importlib.import_module(f"test_{source}")
        for _, contract in inspect.getmembers(module, inspect.isclass):
            if issubclass(contract, OpContract) and getattr(contract, "name", "") in emulation.op_names(source):
                found.append((source, contract))
    return found


@pytest.fixture(scope="module", params=contracts(), ids=lambda p: p[1].name)
def contract(request):
    """An op's contract, its small cases, with the emulated kernel as its CPU kernel."""
    source, kind = request.param
    made = kind()

    def elements(case):
        return max(
            (a.numel() for a in made.inputs(case, torch.float32, "cpu") if isinstance(a, torch.Tensor)), default=0
        )

    made.cases = [case for case in kind.cases if elements(case) <= MOST]
    assert made.cases
    with emulation.active(source):
        yield made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_torchs(contract, dtype):
    contract.test_error_is_at_most_twice_torchs(dtype, "cpu")


@pytest.mark.parametrize("layout", ["strided", "transposed", "offset"])
def test_any_strides(contract, layout):
    contract.test_any_strides(layout, "cpu")


def test_bitwise_the_same_every_time(contract):
    contract.test_bitwise_the_same_every_time("cpu")


def test_reads_no_memory_that_is_not_its_own(contract):
    contract.test_reads_no_memory_that_is_not_its_own("cpu")


def test_writes_no_memory_that_is_not_its_own(contract):
    contract.test_writes_no_memory_that_is_not_its_own("cpu")


def test_gradcheck(contract):
    contract.test_gradcheck()


def test_every_source_has_a_contract():
    """Or is of an op over lists of tensors (test_cuda_emulated_lists.py)."""
    assert {source for source, _ in contracts()} | {"adamw_step", "clip_grad_norm"} == set(SOURCES)
