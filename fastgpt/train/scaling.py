"""How much memory a training step takes on each GPU, and how much it sends to the others: computed, not measured.

    python -m fastgpt.train.scaling                  # prints the tables
    python -m fastgpt.train.scaling docs/scaling.md  # writes them between the page's marks

A step here is one forward and backward pass of B sequences of T tokens on each GPU and one AdamW update, without
dropout. Letters: N = B T rows, C = n_embd, H = n_head, L = n_layer, V = vocab_size, n = GPUs. GB are 10^9 bytes.
tests/train/test_scaling.py holds the formulas against small models that really run.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from fastgpt.errors import UserError
from fastgpt.files import atomic_write
from fastgpt.model.config import GPTConfig
from fastgpt.ops.linear_cross_entropy import CHUNK_ROWS
from fastgpt.train.speed import DATA_SHEET

BEGIN, END = "<!-- scaling:begin -->", "<!-- scaling:end -->"

# Bytes per second out of each GPU, by the data sheets of an H100 or H200 SXM: NVLink's 900 GB/s are both directions.
NVLINK = 450e9
# Between nodes of 8 GPUs, each GPU has an adapter of 400 Gbit/s (InfiniBand NDR). A ring enters and leaves a node once,
# and there are as many rings as adapters, each with its part of the bytes: together they go at 8 * 50 GB/s.
GPUS_PER_NODE = 8
NETWORK = GPUS_PER_NODE * 50e9
PEAK = DATA_SHEET["H100"]
MFU = 0.4

Precision = Literal["fp32", "bf16", "bf16-weights"]
Parallel = Literal["one", "ddp", "fsdp"]


@dataclass(frozen=True)
class Setup:
    """What is trained, and how.

    Attributes:
        batch_size: B, sequences in one forward pass of one GPU.
        block_size: T, tokens in each.
        precision: "fp32"; "bf16", which is autocast over float32 weights, and with fsdp the weights as they are
            gathered; "bf16-weights", with float32 masters in the optimizer.
        parallel: "one" GPU; "ddp", all of the model on each; "fsdp", each block's weights gathered when it is run and
            let go after its forward pass, those around the blocks gathered once a step.
        ranks: n, GPUs.
        recompute: only the blocks' inputs are kept for backward.
        device: whose chunks of logits to count, "cuda" or "cpu".
    """

    config: GPTConfig
    batch_size: int
    block_size: int = 1024
    precision: Precision = "bf16"
    parallel: Parallel = "one"
    ranks: int = 1
    recompute: bool = False
    device: str = "cuda"

    def __post_init__(self) -> None:
        if self.parallel == "fsdp" and self.precision == "bf16-weights":
            raise ValueError("fsdp keeps float32 weights and gathers them in bfloat16: its precision is bf16")
        if (self.parallel == "one") != (self.ranks == 1):
            raise ValueError(f"{self.parallel} does not go with {self.ranks} ranks")

    @property
    def rows(self) -> int:
        return self.batch_size * self.block_size

    @property
    def autocast(self) -> bool:
        """Whether the matmuls' weights are float32 parameters that have a bfloat16 copy."""
        return self.precision == "bf16" and self.parallel != "fsdp"

    @property
    def weight_bytes(self) -> int:
        """Of a weight as the model computes with it, outside autocast; the residual stream has this dtype too."""
        return 4 if self.precision == "fp32" or self.autocast else 2

    @property
    def matmul_bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU. `peak` has all of them at once, as with gradients that accumulate, or ddp's buckets."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    working: int

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        return self.states + self.gathered + self.activations + self.working


@dataclass(frozen=True)
class Communication:
    """Bytes that each GPU sends in a step.

    Attributes:
        all_reduce: of ddp's gradients; a ring sends everything twice, once to reduce and once to spread the sums.
        all_gather: of fsdp's weights, in the dtype that is computed with: the blocks' twice, for forward and backward,
            those around them once.
        reduce_scatter: of fsdp's gradients, in float32.
    """

    all_reduce: float = 0.0
    all_gather: float = 0.0
    reduce_scatter: float = 0.0

    @property
    def total(self) -> float:
        return self.all_reduce + self.all_gather + self.reduce_scatter


@dataclass(frozen=True)
class Times:
    """Seconds. `exposed` is what of `communication` no computation can hide."""

    compute: float
    communication: float
    exposed: float


def block_parameters(config: GPTConfig) -> int:
    """Of one block: 12 C^2 in its four matrices, 9 C in their biases, 4 C in two norms."""
    return 12 * config.n_embd**2 + 13 * config.n_embd


def rest_parameters(config: GPTConfig) -> int:
    """Around the blocks: the token embedding, whose rows are padded to a multiple of 64, positions, the last norm."""
    tables = 1 if config.tie_word_embeddings else 2
    return (tables * config.padded_vocab_size + config.n_positions + 2) * config.n_embd


def parameters(config: GPTConfig) -> int:
    return config.n_layer * block_parameters(config) + rest_parameters(config)


def activations(setup: Setup) -> int:
    """Bytes that autograd keeps from forward to backward, the parameters themselves left out.

    A block keeps, in elements of a row: of the residual stream, which has the weights' dtype, the sum before each of
    its two norms (2 C); of what the matmuls read or write, both norms (2 C), q, k and v (3 C), attention's output (C),
    and the MLP's hidden layer before and after GELU (8 C); in float32 attention's logsumexp (H) and the norms' means
    and rstds (4). After the blocks there are the last norm's sum, mean and rstd, and its output, which the classifier
    reads; its gradient and the classifier's whole gradient in float32 (V C), both of which `linear_cross_entropy` makes
    in its forward; ids and targets of 8 bytes. Autocast keeps a bfloat16 copy of the blocks' matrices, and of the bias
    that GELU adds.

    With `recompute` a block keeps what it is called with, both parts of the residual stream: the sum so far and the
    last MLP's output, which is still to be added. The first block has only one.
    """
    c, N = setup.config, setup.rows
    C, L = c.n_embd, c.n_layer
    stream, matmul = N * C * setup.weight_bytes, N * C * setup.matmul_bytes
    head = stream + 8 * N + 2 * matmul + 4 * c.vocab_size * C + 16 * N + 4
    if setup.recompute:
        return L * (stream + matmul) - matmul + head
    return L * (_block_activations(setup) + _block_copies(setup)) + head


def _block_activations(setup: Setup) -> int:
    c, N = setup.config, setup.rows
    return N * c.n_embd * (2 * setup.weight_bytes + 14 * setup.matmul_bytes) + 4 * N * (c.n_head + 4)


def _block_copies(setup: Setup) -> int:
    """Autocast's bfloat16 copies of a block's matrices, and of one bias."""
    C = setup.config.n_embd
    return 2 * (12 * C * C + 4 * C) if setup.autocast else 0


def logits_chunk(setup: Setup) -> int:
    """The buffer that `linear_cross_entropy` makes its logits in: chunks of equally many rows, as few as may be."""
    N, size = setup.rows, setup.matmul_bytes
    chunks = -(-N // (CHUNK_ROWS[setup.device] * 4 // size))
    return min(N, -(-N // chunks // 64) * 64) * setup.config.padded_vocab_size * size


def working(setup: Setup) -> int:
    """Bytes beside states and `activations` where they are most, which is where forward ends and backward begins.

    Forward ends with a chunk of logits and, under autocast, a bfloat16 copy of the classifier; with `recompute` the
    copies of the blocks' matrices are still there. Backward begins with the classifier's gradient copied to the padded
    table's shape. It goes on in the last block, with `recompute` after that has made again what it keeps: there the
    gradients are two streams more than what was let go by then, and the MLP's matrix of 4 C^2 has one of its own, to be
    added to the one that is there.
    """
    c, C = setup.config, setup.config.n_embd
    forward = logits_chunk(setup) + 2 * c.vocab_size * C * setup.autocast
    table = setup.weight_bytes * c.padded_vocab_size * C
    block = (2 * setup.rows * C + 4 * C * C) * setup.weight_bytes
    if setup.recompute:
        forward += c.n_layer * _block_copies(setup)
        block += _block_activations(setup) + _block_copies(setup)
    return max(forward, table, block)


def gathered(setup: Setup) -> int:
    """Bytes of whole weights and gradients that fsdp holds for a while; an estimate from above.

    The weights around the blocks from the step's beginning to its end; of a block the weights that are computed with,
    the next one's on their way and as they are unpacked, the gradients, and these in float32 on their way out.
    """
    if setup.parallel != "fsdp":
        return 0
    size = setup.matmul_bytes
    return size * rest_parameters(setup.config) + (4 * size + 4) * block_parameters(setup.config)


def memory(setup: Setup) -> Memory:
    """What a step takes. AdamW has two moments in float32, and the float32 masters of weights that have 16 bits.

    fsdp keeps an n-th of weights, gradients and moments on each GPU, all of them in float32.
    """
    P = parameters(setup.config)
    shards = setup.ranks if setup.parallel == "fsdp" else 1
    masters = setup.precision == "bf16-weights"
    size = 2 if masters else 4
    return Memory(
        weights=size * P // shards,
        gradients=size * P // shards,
        optimizer=(8 + 4 * masters) * P // shards,
        gathered=gathered(setup),
        activations=activations(setup),
        working=working(setup),
    )


def communication(setup: Setup) -> Communication:
    """What each GPU sends in a step, by rings, in which a collective over n GPUs sends (n - 1) / n of its bytes."""
    c = setup.config
    blocks, rest = c.n_layer * block_parameters(c), rest_parameters(c)
    share = (setup.ranks - 1) / setup.ranks
    if setup.parallel == "fsdp":
        return Communication(
            all_gather=share * setup.matmul_bytes * (2 * blocks + rest), reduce_scatter=share * 4 * (blocks + rest)
        )
    return Communication(all_reduce=2 * share * setup.weight_bytes * (blocks + rest))


def times(setup: Setup) -> Times:
    """A step's seconds at MFU of PEAK and at the links' full bandwidth; what collectives wait for beside is not in it.

    Forward is a third of the computation, and `recompute` makes it twice. Blocks' weights are gathered beside the block
    before, and gradients reduced beside the blocks that follow in backward. Nothing is left to hide what is around the
    blocks behind: fsdp gathers it before the first block, and the tied embedding's gradient, a part of which backward
    makes last, is reduced after it.
    """
    c, n = setup.config, setup.ranks
    forward = setup.rows * c.flops_per_token(setup.block_size) / 3 / (MFU * PEAK)
    backward = (3 if setup.recompute else 2) * forward
    per_byte = (n - 1) / n / (NVLINK if n <= GPUS_PER_NODE else min(NVLINK, NETWORK))
    blocks, rest = c.n_layer * block_parameters(c), rest_parameters(c)
    exposed = 0.0
    if setup.parallel == "ddp":
        each = 2 * setup.weight_bytes * per_byte
        exposed = rest * each + max(0.0, blocks * each - backward)
    if setup.parallel == "fsdp":
        gather, reduce = setup.matmul_bytes * per_byte, 4 * per_byte
        exposed = rest * (gather + reduce)
        exposed += max(0.0, blocks * gather - forward) + max(0.0, blocks * (gather + reduce) - backward)
    sent = communication(setup).total
    return Times(forward + backward, sent * per_byte * n / (n - 1) if n > 1 else 0.0, exposed)


# The tables' models, each with as many sequences of 1,024 tokens as make a GPU busy and fit into 80 GB.
BATCH_SIZES = {"gpt2": 32, "gpt2-medium": 16, "gpt2-large": 16, "gpt2-xl": 8}
MODES: list[tuple[Parallel, int]] = [("one", 1), ("ddp", 8), ("fsdp", 8), ("ddp", 64), ("fsdp", 64)]


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", "---", *["--:"] * (len(columns) - 2)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def tables() -> str:
    """The page's three tables, as Markdown."""
    kept: list[list[str]] = []
    sent: list[list[str]] = []
    dtypes: list[list[str]] = []
    for name, B in BATCH_SIZES.items():
        config = GPTConfig.preset(name)
        model = f"{name}, B {B}"
        for parallel, n in MODES:
            setup = Setup(config, B, parallel=parallel, ranks=n)
            gpus = f"{n}, {parallel}"
            if parallel != "ddp":  # ddp's are those of one GPU
                m, again = memory(setup), memory(replace(setup, recompute=True))
                parts = [m.weights, m.gradients, m.optimizer, m.gathered, m.activations, m.working, m.peak, again.peak]
                kept.append([model, "1; 8 or 64, ddp" if n == 1 else gpus, *map(_gb, parts)])
            if n > 1:
                t, total = times(setup), communication(setup).total
                milliseconds = [f"{1e3 * s:.1f}" for s in (t.communication, t.compute, t.exposed)]
                sent.append([model, gpus, _gb(total), *milliseconds, f"{t.exposed / (t.compute + t.exposed):.1%}"])
        for precision in get_args(Precision):
            setup = Setup(config, B, precision=precision)
            m, again = memory(setup), memory(replace(setup, recompute=True))
            dtypes.append([model, precision, *map(_gb, [m.states, m.activations, m.working, m.peak, again.peak])])
    states = ["weights", "gradients", "AdamW", "gathered"]
    ends = ["activations", "working", "peak", "peak with `--recompute`"]
    return "\n\n".join(
        [
            "Memory of each GPU, GB, bf16, T 1,024:",
            _table(["model", "GPUs", *states, *ends], kept),
            "One GPU by precision, GB:",
            _table(["model", "precision", "weights, gradients, AdamW", *ends], dtypes),
            "Communication of each GPU in a step, bf16, T 1,024:",
            _table(["model", "GPUs", "GB sent", "ms to send", "ms to compute", "ms exposed", "of the step"], sent),
        ]
    )


def update(page: Path) -> None:
    """Replaces what stands between the two marks in `page` by the tables.

    Raises:
        UserError: the file or one of its marks is not there.
    """
    text = page.read_text() if page.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{page} must be a page with the lines `{BEGIN}` and `{END}` once each, in that order")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    atomic_write(page, f"{before}\n{tables()}\n{after}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        update(Path(sys.argv[1]))
    else:
        print(tables())
