import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import DEVICES, assert_within_bound, rows

from fastgpt import ops
from fastgpt.ops import adamw_step_reference, registry

# Around vectors of 16 bytes and chunks of 4,096; one element, none, 0-dim; more than one chunk.
SHAPES = [(3, 5), (), (0,), (1,), (2, 0, 3), (4096,), (4097,), (8191,), (129, 257), (7,), (64, 64), (17, 1)]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
KINDS = {  # dtype of params and grads, with masters or not
    "float32": (torch.float32, False),
    "float64": (torch.float64, False),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "bfloat16 masters": (torch.bfloat16, True),
    "float16 masters": (torch.float16, True),
}


def lists(kind="float32", device="cpu", shapes=SHAPES, seed=0, step=3, layout="contiguous"):
    """params, grads, exp_avgs, exp_avg_sqs and masters, as they are some steps on."""
    dtype, with_masters = KINDS[kind]
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(seed)

    def make(kind, scale):
        drawn = [(torch.randn(shape, generator=generator) * scale).to(kind).to(device) for shape in shapes]
        return [rows(t, layout) for t in drawn]

    masters = make(torch.float32, 1.0) if with_masters else None
    params = [rows(m.to(dtype), layout) for m in masters] if masters else make(dtype, 1.0)
    grads = make(dtype, 0.1)
    exp_avgs = make(sums, 0.1 * (step > 1))
    exp_avg_sqs = [rows(t.square(), layout) for t in make(sums, 0.1 * (step > 1))]
    return params, grads, exp_avgs, exp_avg_sqs, masters


def run(fn, given, **options):
    """fn on copies of the lists; what it changed, by name."""
    params, grads, m, v, masters = [[t.clone() for t in part] if part else None for part in given]
    fn(params, grads, m, v, masters=masters, **{**OPTIONS, "step": 3, **options})
    for g, before in zip(grads, given[1], strict=True):
        assert torch.equal(g, before)
    parts = {"params": params, "exp_avgs": m, "exp_avg_sqs": v} | ({"masters": masters} if masters else {})
    return {f"{name}[{i}]": t for name, part in parts.items() for i, t in enumerate(part)}


def in_double(given):
    """The same numbers in float64. A 16-bit parameter with a master is the rounded master."""
    params, grads, m, v, masters = given
    return [[t.double() for t in part] for part in (masters or params, grads, m, v)] + [None]


def check_accuracy(given, roundings=2, **options):
    ours, plain = run(ops.adamw_step, given, **options), run(adamw_step_reference, given, **options)
    exact = run(adamw_step_reference, in_double(given), **options)
    if given[4]:
        exact |= {f"masters[{i}]": exact[f"params[{i}]"] for i in range(len(given[0]))}
    assert_within_bound(ours, plain, exact, roundings=roundings)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 2, 1000])
def test_error_is_at_most_twice_torchs(kind, step, device):
    check_accuracy(lists(kind, device, step=step), step=step, grad_scale=0.3)


@example(
    sizes=[838], kind="bfloat16 masters", step=1, lr=0.09375, betas=(0.0, 0.0), eps=1e-8, weight_decay=0.0,
    grad_scale=0.046875, seed=0,
)  # fmt: skip
@given(
    sizes=st.lists(st.integers(0, 9000), min_size=1, max_size=6),
    kind=st.sampled_from(sorted(KINDS)),
    step=st.integers(1, 100_000),
    lr=st.floats(0, 0.1),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.9999)),
    eps=st.sampled_from([1e-8, 1e-5, 0.1]),
    weight_decay=st.floats(0, 0.5),
    grad_scale=st.floats(0.01, 1),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=80, deadline=None)
def test_random_lists_and_options(sizes, kind, seed, **options):
    check_accuracy(lists(kind, shapes=[(n,) for n in sizes], seed=seed), roundings=16, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_matches_torchs_adamw_over_100_steps(clip, device):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).to(device) for shape in SHAPES]
    theirs = [torch.nn.Parameter(t.clone()) for t in start]
    plain = torch.optim.AdamW(theirs, fused=True, **OPTIONS)
    ours = [t.clone() for t in start]
    m, v = ([torch.zeros_like(t) for t in start] for _ in range(2))
    for step in range(1, 101):
        grads = [torch.randn(t.shape, generator=generator).to(device) for t in start]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        factor = 1.0
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs, clip)
            _, factor = ops.clip_grad_norm(grads, clip)
        plain.step()
        ops.adamw_step(ours, grads, m, v, step=step, grad_scale=factor, **OPTIONS)
    for i, p in enumerate(theirs):
        torch.testing.assert_close(ours[i], p.detach(), rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(m[i], plain.state[p]["exp_avg"], rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(v[i], plain.state[p]["exp_avg_sq"], rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_keep_what_a_16_bit_parameter_would_lose(dtype):
    """100 steps that are each less than a rounding of the parameter; it is always its master rounded."""
    master = [torch.ones(5)]
    params, grads = [master[0].to(dtype)], [torch.ones(5, dtype=dtype)]
    m, v = [torch.zeros(5)], [torch.zeros(5)]
    for step in range(1, 101):
        ops.adamw_step(
            params, grads, m, v, step=step, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, masters=master
        )
        assert torch.equal(params[0], master[0].to(dtype))
    torch.testing.assert_close(master[0], torch.full((5,), 0.99), rtol=1e-5, atol=0)
    assert (params[0] < 1).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scalars_may_be_tensors(dtype, device):
    """Also a step in float32, in which 0.95^3 must not be computed; and a step as int64."""
    given = lists(device=device)
    want = run(ops.adamw_step, given, step=3, lr=0.5, grad_scale=0.25)
    step, lr, grad_scale = (torch.tensor(s, dtype=dtype, device=device) for s in (3.0, 0.5, 0.25))
    for number in (step, step.long()):
        found = run(ops.adamw_step, given, step=number, lr=lr, grad_scale=grad_scale)
        assert all(torch.equal(want[k], found[k]) for k in want)
        with ops.using("reference"):
            found = run(ops.adamw_step, given, step=number, lr=lr, grad_scale=grad_scale)
        for k in want:
            torch.testing.assert_close(found[k], want[k], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["strided", "transposed", "offset"])
def test_any_strides(layout, kind, device):
    plain, moved = lists(kind, device), lists(kind, device, layout=layout)
    want = run(ops.adamw_step, plain)
    params, grads, m, v, masters = moved
    ops.adamw_step(params, grads, m, v, masters=masters, step=3, **OPTIONS)
    for name, part in {"params": params, "exp_avgs": m, "exp_avg_sqs": v, "masters": masters or []}.items():
        for i, t in enumerate(part):
            assert torch.equal(t, want[f"{name}[{i}]"]), (name, i)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gap", [1, 64])
def test_writes_no_memory_that_is_not_its_own(gap, kind, device):
    """Each list is views into one buffer with canaries between them, on a 16-byte boundary and not."""
    given = lists(kind, device)
    want = run(ops.adamw_step, given)
    views, buffers = [], []
    for part in given:
        if part is None:
            views.append(None)
            continue
        buffer = torch.full((sum(t.numel() + gap for t in part) + gap,), 7.0, dtype=part[0].dtype, device=device)
        spans, at = [], gap
        for t in part:
            view = buffer[at : at + t.numel()].view(t.shape)
            spans.append(view.copy_(t))
            at += t.numel() + gap
        views.append(spans)
        buffers.append((buffer, part))
    ops.adamw_step(*views[:4], masters=views[4], step=3, **OPTIONS)
    for name, part in zip(("params", "grads", "exp_avgs", "exp_avg_sqs", "masters"), views, strict=True):
        for i, t in enumerate(part or []):
            assert torch.equal(t, given[1][i] if name == "grads" else want[f"{name}[{i}]"])
    for buffer, part in buffers:
        at = 0
        for t in part:
            assert (buffer[at : at + gap] == 7).all()
            at += gap + t.numel()
        assert (buffer[at:] == 7).all()


@pytest.mark.parametrize("device", DEVICES)
def test_bitwise_the_same_every_time_and_for_any_threads(device):
    given = lists(device=device)
    first = run(ops.adamw_step, given)
    for _ in range(20):
        again = run(ops.adamw_step, given)
        assert all(torch.equal(first[k], again[k]) for k in first)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        again = run(ops.adamw_step, given)
        torch.set_num_threads(2)
        assert all(torch.equal(first[k], again[k]) for k in first)


@pytest.mark.parametrize("device", DEVICES)
def test_more_tensors_than_a_launch_takes(device):
    check_accuracy(lists(device=device, shapes=[(i % 7,) for i in range(1300)]))


def test_parameters_that_need_gradients_and_their_versions():
    """A graph that saved a parameter must notice that it was changed."""
    params, grads, m, v, _ = lists(shapes=[(3, 5), (4,)])
    params = [torch.nn.Parameter(p) for p in params]
    y = (params[0] * params[0]).sum()
    ops.adamw_step(params, grads, m, v, step=1, **OPTIONS)
    assert all(p.requires_grad and p.is_leaf for p in params)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_what_is_not_finite_stays_in_its_element():
    params, grads, m, v, _ = lists(shapes=[(40,)])
    grads[0][3], grads[0][33] = math.nan, math.inf
    ops.adamw_step(params, grads, m, v, step=1, **OPTIONS)
    assert params[0].isnan().nonzero().flatten().tolist() == [3, 33]


@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_that_is_not_finite_changes_nothing(kind, device, mode):
    """Neither decay nor moments, whatever the gradients are; as a number and as a tensor."""
    given = lists(kind, device)
    given[1][0][0, 0], given[1][4][1] = math.nan, math.inf
    params, grads, m, v, masters = [[t.clone() for t in part] if part else None for part in given]
    for scale in (math.nan, math.inf, -math.inf):
        for s in (scale, torch.tensor(scale, device=device), torch.tensor(scale, dtype=torch.float64)):
            with ops.using(mode):
                ops.adamw_step(params, grads, m, v, masters=masters, step=3, grad_scale=s, **OPTIONS)
    for part, want in zip((params, m, v, masters or []), (given[0], *given[2:4], given[4] or []), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, want, strict=True))


def test_no_parameters():
    ops.adamw_step([], [], [], [], step=1, **OPTIONS)


@pytest.mark.parametrize("kind", ["float32", "bfloat16 masters"])
def test_opcheck(kind):
    if registry.implementation("adamw_step", "cpu").name == "reference":
        pytest.skip("no kernel here")
    params, grads, m, v, masters = lists(kind, shapes=SHAPES[:4])
    one = torch.tensor(1.0)
    arguments = (params, grads, m, v, masters or [], one, one, one, 0.9, 0.95, 1e-8, 0.1)
    torch.library.opcheck(torch.ops.fastgpt.adamw_step.default, arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiles_whole(backend):
    """A whole step, clipping included; the scalars are tensors, so that their values are no part of the graph."""
    torch._dynamo.reset()
    given = lists(shapes=[(3, 5), (4097,), (1,)])

    def update(params, grads, m, v, masters, step, lr, **options):
        _, factor = ops.clip_grad_norm(grads, 0.5)
        ops.adamw_step(params, grads, m, v, step=step, lr=lr, grad_scale=factor, **options)

    compiled = torch.compile(update, fullgraph=True, backend=backend)
    for number in (1.0, 2.0):
        options = {"step": torch.tensor(number), "lr": torch.tensor(0.1 * number)}
        want, found = run(update, given, **options), run(compiled, given, **options)
        for k in want:
            torch.testing.assert_close(found[k], want[k])


@pytest.mark.gpu
def test_a_cuda_graph_replays_with_new_scalars():
    given = [[t.cuda() for t in part] if part else None for part in lists()]
    step, lr = torch.tensor(1.0, device="cuda"), torch.tensor(0.1, device="cuda")

    def update(params, grads, m, v):
        _, factor = ops.clip_grad_norm(grads, 0.5)
        ops.adamw_step(params, grads, m, v, step=step, grad_scale=factor, **{**OPTIONS, "lr": lr})

    mine = [[t.clone() for t in part] for part in given[:4]]
    with torch.cuda.stream(torch.cuda.Stream()):
        update(*[[t.clone() for t in part] for part in given[:4]])  # a first call loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(*mine)
    for number in (1.0, 2.0):
        step.fill_(number)
        lr.fill_(0.1 * number)
        graph.replay()
        update(*given[:4])
        for part, want in zip(mine, given, strict=False):
            assert all(torch.equal(a, b) for a, b in zip(part, want, strict=True))


def test_reference_can_be_forced():
    given = lists()
    with ops.using("reference"):
        assert registry.implementation("adamw_step", "cpu").name == "reference"
        forced = run(ops.adamw_step, given)
    want = run(adamw_step_reference, given)
    assert all(torch.equal(want[k], forced[k]) for k in want)


def bad(**changes):
    params, grads, m, v, _ = lists(shapes=[(3,), (2, 2)])
    options = {"params": params, "grads": grads, "exp_avgs": m, "exp_avg_sqs": v, "step": 1, **OPTIONS}
    return options | changes


ONES = [torch.ones(3), torch.ones(2, 2)]


@pytest.mark.parametrize(
    ("error", "words", "changes"),
    [
        (ValueError, "grads must be 2 tensors as params, got 1", {"grads": ONES[:1]}),
        (ValueError, "masters must be 2 tensors as params, got 1", {"masters": ONES[:1]}),
        (TypeError, r"exp_avgs\[1\] must be a tensor, got NoneType", {"exp_avgs": [ONES[0], None]}),
        (TypeError, r"params\[0\] must be float32.*got torch.int64", {"params": [t.long() for t in ONES]}),
        (TypeError, r"params\[1\] must be dense and torch.float32", {"params": [ONES[0], ONES[1].double()]}),
        (TypeError, r"grads\[1\] must be dense and torch.float32", {"grads": [ONES[0], ONES[1].bfloat16()]}),
        (TypeError, r"grads\[1\] must be dense.*torch.sparse_coo", {"grads": [ONES[0], torch.eye(2).to_sparse()]}),
        (TypeError, r"exp_avg_sqs\[0\] must be dense and torch.float32", {"exp_avg_sqs": [t.half() for t in ONES]}),
        (TypeError, "masters are for bfloat16 and float16 params", {"masters": ONES}),
        (
            ValueError,
            r"exp_avgs\[1\] must have its parameter's shape \(2, 2\), got \(4,\)",
            {"exp_avgs": [ONES[0], torch.ones(4)]},
        ),
        (ValueError, r"grads\[1\] is on meta", {"grads": [ONES[0], torch.ones(2, 2, device="meta")]}),
        (ValueError, "step must be at least 1, got 0", {"step": 0}),
        (ValueError, "step must be a number or a 0-dim", {"step": torch.ones(1)}),
        (ValueError, "grad_scale must be a number or a 0-dim.*int32", {"grad_scale": torch.tensor(1).int()}),
        (ValueError, "lr is on meta", {"lr": torch.ones((), device="meta")}),
        (ValueError, "lr must be at least 0, got -0.1", {"lr": -0.1}),
        (ValueError, "betas must be two numbers in", {"betas": (0.9, 1.0)}),
        (ValueError, "eps must be at least 0", {"eps": -1e-8}),
        (ValueError, "weight_decay must be at least 0", {"weight_decay": math.nan}),
    ],
)
def test_bad_input_names_the_argument(error, words, changes):
    options = bad(**changes)
    before = [p.clone() for p in options["params"]]
    with pytest.raises(error, match=words) as caught:
        ops.adamw_step(**options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("adamw_step: ")
    assert all(torch.equal(p, b) for p, b in zip(options["params"], before, strict=True))


def test_direct_calls_with_wrong_lists_do_not_crash():
    if registry.implementation("adamw_step", "cpu").name == "reference":
        pytest.skip("no kernel here")
    op = torch.ops.fastgpt.adamw_step.default
    one, options = torch.tensor(1.0), (0.9, 0.95, 1e-8, 0.1)
    with pytest.raises(RuntimeError, match="grads must be as many"):
        op(ONES, ONES[:1], ONES, ONES, [], one, one, one, *options)
    with pytest.raises(RuntimeError, match=r"exp_avgs\[1\] must be contiguous"):
        op(ONES, ONES, [ONES[0], torch.ones(3)], ONES, [], one, one, one, *options)
    with pytest.raises(RuntimeError, match=r"params\[1\] must be contiguous"):
        op([ONES[0], torch.ones(2, 4)[:, ::2]], ONES, ONES, ONES, [], one, one, one, *options)
    with pytest.raises(RuntimeError, match="lr must be one number"):
        op(ONES, ONES, ONES, ONES, [], one, torch.ones(2), one, *options)
