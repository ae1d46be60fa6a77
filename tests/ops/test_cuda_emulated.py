"""The CUDA kernels on a CPU (emulation.py): the clauses of each op's contract that ask of values, and faults to find.

Every CUDA source takes the contracts of the ops that it implements, from tests/ops/test_<op>.py.
"""

import importlib
import inspect
from pathlib import Path

import emulation
import pytest
import torch
from oracle import DTYPES, OpContract, results, same

SOURCES = sorted(emulation.CUDA.glob("*.cu"))
MOST = 2**15  # elements of the largest case: the emulator takes some 0.1 us each


def contracts() -> list[tuple[Path, type[OpContract]]]:
    found = []
    for source in SOURCES:
        names = emulation.op_names(source)
        for name in dict.fromkeys([source.stem, *names]):
            if not Path(__file__).with_name(f"test_{name}.py").exists():
                continue
            module = importlib.import_module(f"test_{name}")
            for _, contract in inspect.getmembers(module, inspect.isclass):
                own = issubclass(contract, OpContract) and contract.__module__ == module.__name__
                if own and contract.name in names:
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


def test_bitwise_the_same_whichever_thread_is_first(contract):
    args = contract.inputs(contract.cases[-1], torch.float32, "cpu")
    first = results(contract.op, args)
    for _ in range(3):
        assert same(first, results(contract.op, args))


def test_reads_no_memory_that_is_not_its_own(contract):
    contract.test_reads_no_memory_that_is_not_its_own("cpu")


def test_writes_no_memory_that_is_not_its_own(contract):
    contract.test_writes_no_memory_that_is_not_its_own("cpu")


def test_gradcheck(contract):
    contract.test_gradcheck()


def test_every_source_has_a_contract():
    """Or is of an op over lists of tensors (test_cuda_emulated_lists.py)."""
    assert {source.stem for source, _ in contracts()} | {"adamw_step", "clip_grad_norm"} == {s.stem for s in SOURCES}


FAULTS = {  # in the order of cuda_emulation/faults.cu's enumeration, which begins with no fault
    "no barrier before a read": "race: .* byte 0 of shared memory",
    "no barrier before a write": "race: ",
    "one too far": "outside: reads 4 bytes, at byte 1200 of 1200 of a tensor",
    "written too far": "outside: writes 4 bytes, at byte 12 of 12 of a tensor",
    "const": "writes byte .* of a tensor whose pointer is const",
    "misaligned": "emulation.h:.* a misaligned",
    "scratch too small": "outside: writes 4 bytes, at byte .* of 8 of shared memory",
    "index": "faults.cu:.* an index outside its array",
    "dynamic too small": "outside: writes 4 bytes, at byte 256 of 256 of shared memory|race: ",
    "barrier in a branch": "a barrier that thread .* does not reach|race: reads byte 0 of shared memory",
    "barrier elsewhere": "a barrier that thread .* does not reach",
    "early exit": "takes no part in it|a barrier that not all threads reach",
    "shuffle out of range": "a shuffle by 32 in a width of 32",
    "shuffle of an absent lane": "a shuffle reads lane 8, which takes no part",
    "race in a warp": "race: writes byte .* of shared memory",
    "blocks race": "race: writes byte 0 of a tensor that block . wrote",
    "no DeviceGuard": "without a DeviceGuard",
    "too much shared memory": "more dynamic shared memory than was allowed",
    "overflow": "an integer overflow",
}


@pytest.fixture(scope="module")
def row_sums():
    schemas = {"row_sums": "(Tensor x, Tensor count, int fault) -> Tensor"}
    return emulation.build(emulation.RUNTIME / "faults.cu", schemas).row_sums


def test_a_right_kernel_has_no_fault(row_sums):
    x, count = torch.randn(5, 100), torch.zeros(1, dtype=torch.int32)
    torch.testing.assert_close(row_sums(x, count, 0), x.sum(1))
    assert count.item() == 5


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(row_sums, fault):
    """A checker that cannot fail is worth nothing. Twice, because threads then run the other way round."""
    for _ in range(2):
        with pytest.raises(RuntimeError, match=FAULTS[fault]):
            row_sums(torch.randn(3, 100), torch.zeros(1, dtype=torch.int32), 1 + list(FAULTS).index(fault))


def test_shared_memory_that_was_never_written_is_nan(row_sums):
    assert row_sums(torch.randn(3, 100), torch.zeros(1, dtype=torch.int32), 1 + len(FAULTS)).isnan().all()
