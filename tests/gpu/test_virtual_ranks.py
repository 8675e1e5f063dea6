"""dispatch, combine and their gradients for R ranks on one GPU that run at once, against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch

from epops import layout as words

if torch.cuda.is_available():
    from epops.transport import kernels

    from .ranks import Batch, Ranks, Shape, expected_combine, expected_dispatch, random_batch, slots_of

pytestmark = pytest.mark.gpu


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    """The same bytes; an fp8 NaN is any NaN, and so is that of a scale."""
    got, want = got.cpu().contiguous(), want.contiguous()
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if got.dtype == torch.float32:
        got, want = (torch.where(item.isnan(), torch.nan, item) for item in (got, want))
    raw = [item.view(torch.uint8) for item in (got, want)]
    if got.dtype == torch.float8_e4m3fn:
        raw = [torch.where(item & 0x7F == 0x7F, 0x7F, item) for item in raw]
    return torch.equal(*raw)


def check_rows(shape, rank, got, want, send_slot, batch, seed):
    """Everything that dispatch returned on one rank; rows after the last end are anybody's guess, gaps are zero."""
    grouped = want
    here = f"{shape} rank {rank} seed {seed}"
    assert torch.equal(got.expert_counts.cpu(), grouped.expert_counts), f"expert_counts, {here}"
    assert torch.equal(got.expert_ends.cpu(), grouped.expert_ends), f"expert_ends, {here}"
    assert torch.equal(got.row_source.cpu(), grouped.row_source), f"row_source, {here}"
    assert torch.equal(got.row_expert.cpu(), grouped.row_expert), f"row_expert, {here}"
    assert same_bits(got.row_weights, grouped.row_weights), f"row_weights, {here}"
    rows, expected = got.rows.cpu(), grouped.rows
    if shape.layout == "batched":
        valid = grouped.row_source >= 0
        rows, expected = rows[valid], expected[valid]
    else:
        end = int(grouped.expert_ends[-1]) if grouped.expert_ends.numel() else 0
        valid = slice(0, end)
        rows, expected = rows[:end], expected[:end]
    assert same_bits(rows, expected), f"rows, {here}"
    if grouped.scales.numel():
        assert same_bits(got.scales.cpu()[valid], grouped.scales[valid]), f"scales, {here}"
    head = 32 + shape.num_ranks
    route = got.route.cpu()
    assert route[0] == words.ROUTE_MAGIC and route[12] == int(grouped.num_rows), f"route header, {here}"
    split = head + send_slot.numel()
    assert torch.equal(route[head:split], send_slot.reshape(-1).to(torch.int32)), f"send_slot, {here}"
    assert torch.equal(route[split:], grouped.recv_row.reshape(-1).to(torch.int32)), f"recv_row, {here}"


def run_pair(
    ranks, shape, seed, *, quant=None, dtype=None, addend=True, weighted=True, batches=None, mask=None, repeat=1
):
    dtype = dtype or torch.bfloat16
    device = ranks.device
    batches = batches or [random_batch(shape, rank, seed, dtype=dtype) for rank in range(shape.num_ranks)]
    want = expected_dispatch(shape, batches, quant=quant, mask=mask)
    inputs = [[t.to(device) for t in batch] for batch in batches]
    expert_slot = slots_of(shape).to(device)
    alive = (torch.ones(shape.num_ranks, dtype=torch.int64) if mask is None else mask).to(device)
    settings = dict(
        num_experts=shape.num_experts, num_slots=shape.num_slots, max_tokens=shape.max_tokens, layout=shape.layout
    )
    plan = ranks.plan("dispatch", shape.max_tokens, shape.hidden)

    def send(rank):
        return kernels.dispatch(
            ranks.workspaces[rank], plan, expert_slot, alive, *inputs[rank],
            capacity=shape.rows, alignment=shape.alignment, quant=quant, **settings,
        )  # fmt: skip

    for _ in range(repeat):
        got = ranks.run(send)
        for rank in range(shape.num_ranks):
            check_rows(shape, rank, got[rank], want[rank][0], want[rank][1], batches[rank], seed)
    made = torch.Generator().manual_seed(seed)
    lead = (shape.num_slots, shape.num_ranks * shape.max_tokens) if shape.layout == "batched" else (shape.rows,)
    ys = [torch.randn(*lead, shape.hidden, generator=made).to(dtype) for _ in range(shape.num_ranks)]
    weights = [None] * shape.num_ranks
    if weighted:
        weights = [torch.rand(*lead, generator=made) for _ in range(shape.num_ranks)]
    addends = [torch.randn(b.x.shape, generator=made).to(dtype) if addend else None for b in batches]
    scales = dict(out_scale=0.5, addend_scale=2.0) if addend else {}
    outs = expected_combine(shape, ys, weights, want, addends, out_dtype=dtype, **scales)
    y_gpu = [y.to(device) for y in ys]
    w_gpu = [None if w is None else w.to(device) for w in weights]
    a_gpu = [None if a is None else a.to(device) for a in addends]
    plan = ranks.plan("combine", shape.max_tokens, shape.hidden)

    def back(rank):
        return kernels.combine(
            ranks.workspaces[rank], plan, y_gpu[rank], got[rank].route, w_gpu[rank], a_gpu[rank],
            num_tokens=batches[rank].x.shape[0], top_k=shape.top_k, out_dtype=dtype, **scales, **settings,
        )  # fmt: skip

    for _ in range(repeat):
        answers = ranks.run(back)
        for rank in range(shape.num_ranks):
            assert int(answers[rank][2][0]) == 0, f"status {answers[rank][2].tolist()}, {shape} rank {rank}"
            assert same_bits(answers[rank][0], outs[rank]), f"combine, {shape} rank {rank} seed {seed}"
    return got, answers, want


def sizes_for(shape, itemsize=2):
    return kernels.Sizes(shape.max_tokens, shape.top_k, shape.num_slots, shape.hidden * itemsize + 1024)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7, 8, 12, 16, 24, 32, 72])
def test_any_number_of_ranks(num_ranks):
    experts = num_ranks * 4 - (1 if num_ranks > 2 else 0)
    shape = Shape(num_ranks, 13, 4, experts, 4, 256, tokens=(13, 5, 0, 7))
    ranks = Ranks(num_ranks, sizes_for(shape))
    for seed in range(3):
        run_pair(ranks, shape, seed)
    run_pair(ranks, shape, 9, quant=kernels.QuantSettings())


@pytest.mark.parametrize("num_ranks", [1, 2, 7, 16, 72])
@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize(("lines", "apart"), [(0, 0), (256, 256), (256, 0)], ids=["counts", "lines", "apart"])
def test_few_tokens_in_every_way(num_ranks, layout, lines, apart):
    """The ways that rows travel, whatever the defaults choose; behind counts some blocks have several chunks and some none."""
    shape = Shape(
        num_ranks, 45, 4, num_ranks * 4, 4, 256, 16 if layout == "expert" else 1, layout, tokens=(45, 5, 0, 31)
    )
    tuning = kernels.Tuning(
        dispatch_line_tokens=lines, combine_line_tokens=lines, apart_tokens=apart, line_senders=3, num_sms=8
    )
    ranks = Ranks(num_ranks, sizes_for(shape), tuning=tuning)
    for seed in range(2):
        run_pair(ranks, shape, seed, repeat=2)
    run_pair(ranks, shape, 9, quant=kernels.QuantSettings())


STREAMS = dict(combine_stream_tokens=0, num_sms=8)


def must_stream(monkeypatch):
    """Every combine has to go by csrc/combine_streams.cu; returns what the kernel was given for rows, call by call."""
    given, chosen = [], kernels.room.stream_rows

    def choose(p, shared):
        chosen(p, shared)
        assert p.launch.rows_as == kernels.STREAMED, f"hidden {p.hidden}"
        given.append((p.stream_steps, p.stream_rows, p.launch.send_warps))

    monkeypatch.setattr(kernels.room, "stream_rows", choose)
    if not kernels.has_bulk_copies(torch.cuda.current_device()):
        pytest.skip("sm_90 or newer only")
    return given


@pytest.mark.parametrize(
    ("layout", "num_ranks"),
    [
        *(("expert", num) for num in (1, 2, 3, 7, 16, 72)),
        *(("rank", num) for num in (1, 2, 3, 7, 16, 72)),
        *(("batched", num) for num in (1, 2, 3, 7, 16)),
    ],
)
def test_combine_by_streams(monkeypatch, num_ranks, layout):
    given = must_stream(monkeypatch)
    shape = Shape(
        num_ranks, 45, 4, num_ranks * 4, 4, 256, 16 if layout == "expert" else 1, layout, tokens=(45, 5, 0, 31)
    )
    ranks = Ranks(num_ranks, sizes_for(shape), tuning=kernels.Tuning(**STREAMS))
    run_pair(ranks, shape, 1, repeat=3)
    run_pair(ranks, shape, 2, dtype=torch.float16, addend=False)
    run_pair(ranks, shape, 3, weighted=False)
    assert len(given) == 5 * num_ranks


@pytest.mark.parametrize("hidden", [64, 2880, 4096, 7168, 8192, 16384])
def test_combine_by_streams_of_every_hidden_size(monkeypatch, hidden):
    must_stream(monkeypatch)
    shape = Shape(3, 133, 5, 20, 7, hidden)
    ranks = Ranks(3, sizes_for(shape), tuning=kernels.Tuning(**STREAMS))
    run_pair(ranks, shape, 1)
    run_pair(ranks, shape, 2, dtype=torch.float16, addend=False)


@pytest.mark.parametrize(
    "shape", [(2, 20, 32, 1024, 512), (2, 24, 1, 2, 1), (4, 300, 3, 37, 10), (2, 1500, 8, 256, 128)]
)
def test_combine_by_streams_of_many_choices(monkeypatch, shape):
    must_stream(monkeypatch)
    num_ranks, tokens, top_k, experts, slots = shape
    made = Shape(num_ranks, tokens, top_k, experts, slots, 1024)
    ranks = Ranks(num_ranks, sizes_for(made), tuning=kernels.Tuning(**STREAMS))
    run_pair(ranks, made, 5, repeat=2)
    run_pair(ranks, made, 6, addend=False, weighted=False)


def to_one_expert(shape, value):
    """Every token of every rank chooses one expert, or with -1 none."""
    batches = []
    for rank in range(shape.num_ranks):
        batch = random_batch(shape, rank, 1)
        idx = torch.full_like(batch.topk_idx, -1)
        idx[:, 0] = value
        batches.append(Batch(batch.x, idx, batch.topk_weights))
    return batches


def test_combine_by_streams_of_nothing_dropped_rows_and_one_expert(monkeypatch):
    must_stream(monkeypatch)
    shape = Shape(3, 70, 2, 12, 4, 256)
    ranks = Ranks(3, sizes_for(shape), tuning=kernels.Tuning(**STREAMS))
    run_pair(ranks, shape, 2, mask=torch.tensor([1, 1, 1]))
    for value in (0, 7, -1):
        batches = to_one_expert(shape, value)
        for addend in (True, False):
            run_pair(ranks, shape, 1, batches=batches, addend=addend)
    few = Shape(2, 50, 4, 8, 4, 256, alignment=4, capacity=40)
    _, _, want = run_pair(Ranks(2, sizes_for(few), tuning=kernels.Tuning(**STREAMS)), few, 2)
    assert all(int(grouped.num_dropped) > 0 for grouped, _ in want)


def test_ranks_that_combine_in_different_ways(monkeypatch):
    """Each rank chooses for itself: what travels is the same."""
    shape = Shape(4, 90, 4, 16, 4, 1024)
    # The driver loads a kernel when it is first launched, which waits for all that run, others' that wait for it among them.
    for settings in (STREAMS, dict(combine_stream_tokens=1024, combine_line_tokens=0)):
        run_pair(Ranks(4, sizes_for(shape), tuning=kernels.Tuning(**settings)), shape, 3)
    ranks = Ranks(4, sizes_for(shape), tuning=kernels.Tuning(**STREAMS))
    call, own = kernels.combine, ranks.workspaces

    def by_rank(ws, plan, *rest, **named):
        streams = next(rank for rank, mine in enumerate(own) if mine is ws) % 2 == 0
        return call(ws, plan if streams else plan._replace(rows_as=kernels.COUNTED), *rest, **named)

    monkeypatch.setattr(kernels, "combine", by_rank)
    for seed in range(3):
        run_pair(ranks, shape, seed, repeat=2)


@pytest.mark.parametrize("how", ["streams", "lines"])
def test_combine_beside_a_rank_that_never_comes(monkeypatch, how):
    """Its answers count as zero after the timeout, rows that are here are added, and the next op does not wait again."""
    settings = STREAMS if how == "streams" else {}
    if settings:
        must_stream(monkeypatch)
    shape = Shape(3, 60, 4, 12, 4, 512)
    ranks = Ranks(3, sizes_for(shape), timeout=0.5, tuning=kernels.Tuning(**settings))
    batches = [random_batch(shape, rank, 7) for rank in range(3)]
    got, _, want = run_pair(ranks, shape, 7, batches=batches)
    made = torch.Generator().manual_seed(7)
    ys = [torch.randn(shape.rows, 512, generator=made).bfloat16() for _ in range(3)]
    outs = expected_combine(shape, ys, [None] * 3, want, [None] * 3, out_dtype=torch.bfloat16, lost=(2,))
    y_gpu = [y.to(ranks.device) for y in ys]
    plan = ranks.plan("combine", 60, 512)

    def back(rank):
        if rank == 2:
            return None
        return kernels.combine(
            ranks.workspaces[rank], plan, y_gpu[rank], got[rank].route, num_experts=12, num_slots=4, max_tokens=60,
            num_tokens=60, top_k=4, layout="expert", out_dtype=torch.bfloat16,
        )  # fmt: skip

    for _ in range(2):
        answers = ranks.run(back)
        for rank in range(2):
            assert same_bits(answers[rank][0], outs[rank]), f"rank {rank}"
            assert int(answers[rank][2][0]) & words.STATUS_TIMEOUT


def test_memory_is_what_crosses_the_wire():
    """At 4096 tokens: at most 1.1 times the rows of one dispatch (fp8 and scales) and one combine (bf16)."""
    wire = 4096 * (7168 + 7168 // 128 * 4 + 2 * 7168)
    _, num_bytes = kernels.lay_out(0, 2, kernels.Sizes(4096, 8, 128, 2 * 7168), 1.0)
    assert num_bytes <= 1.1 * wire, f"{num_bytes / wire:.2f} times"
    _, num_bytes = kernels.lay_out(0, 2, kernels.Sizes(128, 8, 128, 2 * 7168), 1.0)
    assert num_bytes <= 16 << 20


@pytest.mark.parametrize("layout", words.LAYOUTS)
@pytest.mark.parametrize("max_tokens", [1, 16, 128, 200, 500, 1025, 1500])
def test_every_layout_on_every_path(layout, max_tokens):
    if layout == "batched" and max_tokens > 200:
        pytest.skip("decode sizes only")
    shape = Shape(2, max_tokens, 8, 32, 16, 512, alignment=8 if layout == "expert" else 1, layout=layout)
    ranks = Ranks(2, sizes_for(shape))
    for quant in (None, kernels.QuantSettings()):
        run_pair(ranks, shape, 3, quant=quant, repeat=2)


@pytest.mark.parametrize("hidden", [16, 2880, 3584, 7168, 8192, 16384])
def test_every_hidden_size(hidden):
    shape = Shape(3, 33, 5, 20, 7, hidden)
    ranks = Ranks(3, sizes_for(shape, 4))
    run_pair(ranks, shape, 1)
    run_pair(ranks, shape, 2, quant=kernels.QuantSettings(scale_format="ue8m0", scale_layout="column"))
    run_pair(ranks, shape, 3, dtype=torch.float32)


@pytest.mark.parametrize("math", ["divide", "multiply", "reciprocal", "reciprocal_exact", "reciprocal_amax"])
@pytest.mark.parametrize("fmt", words.SCALE_FORMATS)
def test_quantizer_is_the_reference_bit_for_bit(math, fmt):
    shape = Shape(2, 40, 2, 8, 4, 1024)
    ranks = Ranks(2, sizes_for(shape, 4))
    for block in (0, 64, 128, 512):
        for eps_on, eps in (("amax", 1e-4), ("scale", 1e-3)):
            for dtype in (torch.bfloat16, torch.float32, torch.float16):
                quant = kernels.QuantSettings(block=block, scale_format=fmt, scale_math=math, eps_on=eps_on, eps=eps)
                run_pair(ranks, shape, block + 1, quant=quant, dtype=dtype)


@pytest.mark.parametrize("math", ["divide", "multiply", "reciprocal"])
def test_quantizer_of_zeros_denormals_and_infinities(math):
    """Zeros keep their sign, and scales of hardly more than zeros, or of infinities, are those of torch."""
    shape = Shape(2, 40, 2, 8, 4, 1024)
    ranks = Ranks(2, sizes_for(shape, 4))
    for dtype in (torch.bfloat16, torch.float32):
        batches = [random_batch(shape, rank, 5, dtype=dtype) for rank in range(2)]
        for batch in batches:
            powers = torch.linspace(-133, 126, len(batch.x) - 3).exp2()
            batch.x[3:] *= powers[:, None].to(dtype)
            batch.x[:, ::5], batch.x[0], batch.x[1, 7], batch.x[2] = -0.0, -0.0, torch.inf, torch.finfo(dtype).max
        for eps_on, eps in (("amax", 1e-30), ("amax", 1e-4), ("scale", 1e-40)):
            for block in (0, 128):
                quant = kernels.QuantSettings(block=block, scale_math=math, eps_on=eps_on, eps=eps)
                run_pair(ranks, shape, 5, quant=quant, dtype=dtype, batches=batches)


@pytest.mark.parametrize("hidden", [16, 512, 1152, 2880, 7168, 16384, 21504])
@pytest.mark.parametrize("lines", [0, 256])
def test_usual_quantizer_of_blocks_unlike_their_neighbours(hidden, lines):
    """Rows of any number of steps and pieces, with blocks that the path of two steps at a time is not right for."""
    shape = Shape(2, 45, 4, 8, 4, hidden, tokens=(45, 0))
    ranks = Ranks(2, sizes_for(shape, 4), tuning=kernels.Tuning(dispatch_line_tokens=lines, num_sms=8))
    for dtype in (torch.bfloat16, torch.float16):
        batches = [random_batch(shape, rank, 7, dtype=dtype) for rank in range(2)]
        x = batches[0].x
        odd = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).max, torch.finfo(dtype).tiny]
        for token in range(1, len(x)):  # the first token is ordinary
            block = token * 5 % -(-hidden // 128)
            value = odd[token % len(odd)]
            if token % 3 == 0:
                x[token, block * 128 : block * 128 + 128] = value
            else:
                x[token, min(block * 128 + token * 7 % 128, hidden - 1)] = value
        for eps in (1e-4, 0.0):
            run_pair(ranks, shape, 7, quant=kernels.QuantSettings(eps=eps), dtype=dtype, batches=batches)


@pytest.mark.parametrize("shape", [(2, 20, 32, 1024, 512), (2, 24, 1, 2, 1), (4, 300, 3, 37, 10), (2, 17, 8, 256, 128)])
def test_many_experts_and_many_choices(shape):
    num_ranks, tokens, top_k, experts, slots = shape
    made = Shape(num_ranks, tokens, top_k, experts, slots, 128)
    ranks = Ranks(num_ranks, sizes_for(made))
    run_pair(ranks, made, 5)
    run_pair(ranks, made, 6, addend=False, weighted=False)


def test_all_tokens_to_one_expert_and_none_at_all():
    shape = Shape(3, 70, 2, 12, 4, 256)
    ranks = Ranks(3, sizes_for(shape))
    for value in (0, 7, -1):
        batches = to_one_expert(shape, value)
        run_pair(ranks, shape, 1, batches=batches)


def test_hostile_indices_act_as_not_selected():
    shape = Shape(2, 60, 6, 16, 8, 256)
    ranks = Ranks(2, sizes_for(shape))
    batches = []
    for rank in range(2):
        batch = random_batch(shape, rank, 4)
        idx = batch.topk_idx.clone()
        idx[::3, 0] = 1 << 40
        idx[1::3, 1] = -(1 << 50)
        idx[2::3, 2] = 16
        idx[:, 4] = idx[:, 3]
        batches.append(Batch(batch.x, idx, batch.topk_weights))
    got, _, _ = run_pair(ranks, shape, 4, batches=batches)
    for result in got:
        assert int(result.status[0]) == words.STATUS_BAD_INDEX | words.STATUS_DUPLICATE
        assert int(result.status[3]) > 0 and int(result.status[4]) > 0


def test_rows_that_do_not_fit_are_dropped_in_order_and_counted():
    shape = Shape(2, 50, 4, 8, 4, 256, alignment=4, capacity=40)
    ranks = Ranks(2, sizes_for(shape))
    got, _, want = run_pair(ranks, shape, 2)
    for result, (grouped, _) in zip(got, want, strict=True):
        assert int(result.status[2]) == int(grouped.num_dropped) > 0
        assert int(result.status[0]) & words.STATUS_OVERFLOW


def test_a_rank_outside_the_mask_gets_nothing():
    shape = Shape(4, 30, 4, 16, 4, 256)
    ranks = Ranks(4, sizes_for(shape))
    mask = torch.tensor([1, 1, 1, 1])
    run_pair(ranks, shape, 1, mask=mask)


def test_many_ops_in_a_row_and_shapes_by_turns():
    big = Shape(2, 600, 8, 64, 32, 256)
    small = Shape(2, 9, 3, 10, 5, 128, layout="rank")
    ranks = Ranks(2, sizes_for(big))
    for seed in range(12):
        run_pair(ranks, big if seed % 3 == 0 else small, seed)


@pytest.mark.parametrize("layout", words.LAYOUTS)
@pytest.mark.parametrize("max_tokens", [19, 300, 1100])
def test_gradients(layout, max_tokens):
    if layout == "batched" and max_tokens > 300:
        pytest.skip("decode sizes only")
    from epops.reference import combine as ref

    shape = Shape(3, max_tokens, 4, 12, 4, 256, alignment=4 if layout == "expert" else 1, layout=layout)
    ranks = Ranks(3, sizes_for(shape))
    device = ranks.device
    got, _, want = run_pair(ranks, shape, 8)
    settings = dict(num_experts=12, num_slots=4, max_tokens=max_tokens, layout=layout, top_k=4)
    made = torch.Generator().manual_seed(1)
    lead = got[0].row_source.shape
    ys = [torch.randn(*lead, 256, generator=made).bfloat16() for _ in range(3)]
    ws = [torch.rand(*lead, generator=made) for _ in range(3)]
    grads = [torch.randn(max_tokens, 256, generator=made).bfloat16() for _ in range(3)]
    dev = [[t.to(device) for t in group] for group in (ys, ws, grads)]
    plan = ranks.plan("combine_backward", max_tokens)
    back = ranks.run(
        lambda r: kernels.combine_backward(
            ranks.workspaces[r],
            plan,
            dev[2][r],
            dev[0][r],
            got[r].route,
            dev[1][r],
            out_scale=0.5,
            grad_scale=3.0,
            **settings,
        )
    )
    for rank in range(3):
        recv = want[rank][0].recv_row
        flat = torch.cat(grads).reshape(3 * max_tokens, -1)
        grad_y, grad_w = ref.scatter_gradients(
            flat, recv.reshape(-1, 4), ys[rank], None, ws[rank], layout=layout, out_scale=0.5, grad_scale=3.0
        )
        assert same_bits(back[rank][0], grad_y), f"grad_y rank {rank}"
        assert torch.allclose(back[rank][1].cpu(), grad_w, rtol=1e-4, atol=1e-4), f"grad_row_weights rank {rank}"
    grad_w_shape = (*lead, 4) if layout == "rank" else lead
    gws = [torch.rand(*grad_w_shape, generator=made) for _ in range(3)]
    gw_dev = [g.to(device) for g in gws]
    plan = ranks.plan("combine", max_tokens)
    back = ranks.run(
        lambda r: kernels.combine(
            ranks.workspaces[r], plan, dev[0][r], got[r].route, None, None, gw_dev[r],
            num_tokens=max_tokens, out_dtype=torch.bfloat16, op="dispatch_backward", **settings,
        )
    )  # fmt: skip
    outs = expected_combine(shape, ys, [None] * 3, want, [None] * 3, out_dtype=torch.bfloat16)
    for rank in range(3):
        assert same_bits(back[rank][0], outs[rank]), f"grad_x rank {rank}"
        total = torch.zeros(max_tokens, 4)
        for peer in range(3):
            total += ref.weight_gradients(gws[peer], want[peer][0].recv_row[rank], layout=layout)
        assert torch.equal(back[rank][1].cpu(), total), f"grad_topk_weights rank {rank}"
