"""Transport nvlink, one process a GPU: the public ops, gradients, CUDA graphs, ranks that stall and ranks that die.

Where there is one GPU, ``EPOPS_TESTS_SHARE_GPU=1`` puts both processes on it: they have it by turns, some milliseconds each, which
is slow and shows no overlap, but the kernels, the mapped memory and the timeouts are those of two GPUs.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import time
import traceback

import pytest
import torch
import torch.multiprocessing as mp

from .devices import need_gpus, take_gpu

pytestmark = pytest.mark.gpu


def serve(scenario, rank, world, port, results, extra):
    """One rank: runs ``scenario(rank, world, *extra)`` and reports None or a traceback."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    import torch.distributed as dist

    try:
        take_gpu(rank, world)
        dist.init_process_group("cpu:gloo,cuda:nccl", rank=rank, world_size=world)
        scenario(rank, world, *extra)
        results.put((rank, None))
    except BaseException:
        results.put((rank, traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
        os._exit(0)


def run_ranks(scenario, *extra, world=None, limit=90.0, meddle=None):
    """Run the scenario on every GPU; ``meddle(processes)`` may disturb them.  Ranks that were killed need not report."""
    world = world or max(2, torch.cuda.device_count())
    need_gpus(world)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=serve, args=(scenario, r, world, port, results, extra)) for r in range(world)]
    for process in ranks:
        process.start()
    killed = set(meddle(ranks) if meddle else ())
    deadline, missing = time.monotonic() + limit, set(range(world)) - killed
    failures = []
    try:
        while missing and time.monotonic() < deadline:
            try:
                rank, error = results.get(timeout=0.5)
            except queue.Empty:
                continue
            missing.discard(rank)
            if error:
                failures.append(f"rank {rank}:\n{error}")
                break
    finally:
        for process in ranks:
            process.kill()
    assert not failures, "\n".join(failures)
    assert not missing, f"ranks {sorted(missing)} did not finish in {limit:g} s"


def make(name, shape, **settings):
    import epops

    return epops.ExpertGroup(
        None, name, max_tokens=shape.max_tokens, num_experts=shape.num_experts, num_slots=shape.num_slots,
        alignment=shape.alignment, device="cuda", transport="nvlink", **settings,
    )  # fmt: skip


def same(got, want, what):
    got = got.detach().cpu()
    assert got.shape == want.shape and torch.equal(got.view(torch.uint8), want.contiguous().view(torch.uint8)), what


def pair_scenario(rank, world):
    import epops

    from .ranks import Shape, expected_combine, expected_dispatch, random_batch

    for tokens, hidden, layout in (
        (7, 256, "expert"),
        (128, 7168, "expert"),
        (300, 2880, "expert"),
        (1500, 512, "expert"),
        (64, 2880, "rank"),
    ):
        shape = Shape(
            world, tokens, 8, 32 * world - 1, 32, hidden, layout=layout, alignment=16 if layout == "expert" else 1
        )
        with make("pair", shape) as group:
            assert group.transport.name == "nvlink", repr(group)
            for seed in range(4):
                batches = [random_batch(shape, r, seed) for r in range(world)]
                want = expected_dispatch(shape, batches)
                x, idx, w = (t.cuda() for t in batches[rank])
                sent = epops.dispatch(x, idx, w, group=group, layout=layout)
                end = int(want[rank][0].expert_ends[-1])
                same(sent.rows[:end], want[rank][0].rows[:end], f"rows {shape}")
                made = torch.Generator().manual_seed(seed)
                ys = [torch.randn(shape.rows, hidden, generator=made).bfloat16() for _ in range(world)]
                ws = [torch.rand(shape.rows, generator=made) for _ in range(world)]
                outs = expected_combine(shape, ys, ws, want, [b.x for b in batches], out_dtype=torch.bfloat16)
                back = epops.combine(
                    ys[rank].cuda(),
                    sent.route,
                    ws[rank].cuda(),
                    x,
                    group=group,
                    layout=layout,
                    num_tokens=tokens,
                    top_k=8,
                )
                same(back.out, outs[rank], f"combine {shape} seed {seed}")
            group.check()
            torch.cuda.synchronize()


def gradient_scenario(rank, world):
    """x, weights and y get the gradients of the one-process model: rows scaled by their expert's number, summed."""
    import epops

    from .ranks import Shape, random_batch

    shape = Shape(world, 90, 4, 8 * world, 8, 256, alignment=4)
    with make("grads", shape) as group:
        batch = random_batch(shape, rank, 5, dtype=torch.float32)
        x = batch.x.cuda().requires_grad_()
        w = batch.topk_weights.cuda().requires_grad_()
        sent = epops.dispatch(x, batch.topk_idx.cuda(), w, group=group)
        factor = torch.where(sent.row_expert >= 0, sent.row_expert + rank * 8 + 1.0, 0.0).unsqueeze(1)
        y = torch.where(factor > 0, sent.rows, 0.0) * factor
        back = epops.combine(y, sent.route, sent.row_weights, group=group, num_tokens=90, top_k=4)
        grad = torch.randn(90, 256, generator=torch.Generator().manual_seed(3))
        back.out.backward(grad.cuda())
        x_ref = batch.x.clone().requires_grad_()
        w_ref = batch.topk_weights.clone().requires_grad_()
        scale = torch.where(batch.topk_idx >= 0, batch.topk_idx + 1.0, 0.0)
        out = x_ref * (w_ref * scale).sum(dim=1, keepdim=True)
        out.backward(grad)
        torch.testing.assert_close(back.out.detach().cpu(), out.detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.grad.cpu(), x_ref.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(w.grad.cpu(), w_ref.grad, rtol=1e-3, atol=1e-3)
        group.check()


class Step:
    """dispatch → rows times two → combine on fixed buffers, so that it can be captured; and what it should give."""

    def __init__(self, group, shape, rank):
        self.group, self.shape, self.rank = group, shape, rank
        self.x = torch.zeros(shape.max_tokens, shape.hidden, dtype=torch.bfloat16, device="cuda")
        self.idx = torch.full((shape.max_tokens, shape.top_k), -1, dtype=torch.int64, device="cuda")
        self.w = torch.zeros(shape.max_tokens, shape.top_k, device="cuda")

    def load(self, seed):
        from .ranks import random_batch

        batch = random_batch(self.shape, self.rank, seed)
        self.x.copy_(batch.x), self.idx.copy_(batch.topk_idx), self.w.copy_(batch.topk_weights)

    def __call__(self, combine=True):
        import epops

        sent = epops.dispatch(self.x, self.idx, self.w, group=self.group, max_tokens=self.shape.max_tokens)
        if combine:
            self.out = epops.combine(
                sent.rows * 2, sent.route, sent.row_weights, group=self.group, max_tokens=self.shape.max_tokens,
                num_tokens=self.shape.max_tokens, top_k=self.shape.top_k,
            ).out  # fmt: skip
        return sent

    def expected(self, seed, mask=None):
        from .ranks import expected_combine, expected_dispatch, random_batch

        batches = [random_batch(self.shape, r, seed) for r in range(self.shape.num_ranks)]
        want = expected_dispatch(self.shape, batches, mask=mask)
        ys = [grouped.rows * 2 for grouped, _ in want]
        ws = [grouped.row_weights for grouped, _ in want]
        return expected_combine(self.shape, ys, ws, want, [None] * len(batches), out_dtype=torch.bfloat16)[self.rank]


def graph_scenario(rank, world, replays):
    """Graphs of three batch sizes, one with an odd number of ops, by turns with each other and with eager calls."""
    from .ranks import Shape

    small = Shape(world, 6, 4, 8 * world, 8, 256, alignment=4)
    middle = small._replace(max_tokens=200)
    large = small._replace(max_tokens=1100)
    with make("graphs", large) as group:
        steps = [Step(group, shape, rank) for shape in (small, middle, large)]
        for step in steps:
            step.load(0)
            step()
        torch.cuda.synchronize()
        graphs = []
        for number, step in enumerate(steps):
            stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.graph(graph, stream=stream):
                step()
                if number == 1:
                    step(combine=False)
            graphs.append((graph, step.out))
        order = torch.Generator().manual_seed(1)
        for turn in range(replays):
            number = int(torch.randint(3, (), generator=order))
            step, checked = steps[number], turn % 40 == 0
            if turn % 8 == 0:
                step.load(turn)
            if turn % 8 == 0 and turn % 16 == 8:
                step()
                out = step.out
            else:
                graphs[number][0].replay()
                out = graphs[number][1]
            if checked:
                same(out, step.expected(turn), f"turn {turn}, graph {number}")
        torch.cuda.synchronize()
        group.check()


def halves_scenario(rank, world, transport, tokens):
    """Started halves with work beside them give what whole ops give: eager, and in a graph that is replayed with new routing."""
    import epops

    from .ranks import Shape

    shape = Shape(world, tokens, 4, 8 * world, 8, 256, alignment=4)
    made = {"max_tokens": tokens, "num_experts": 8 * world, "alignment": 4, "device": "cuda", "transport": transport}
    with epops.ExpertGroup(None, "halves", **made) as group:
        step, square = Step(group, shape, rank), torch.randn(512, 512, device="cuda")
        settings = {"group": group, "max_tokens": tokens, "num_tokens": tokens, "top_k": 4}

        def halves():
            arguments = step.x, step.idx, step.w
            ticket = epops.dispatch_start(*arguments, group=group, max_tokens=tokens)
            beside = [square @ square for _ in range(8)]  # takes memory that was free when the start was given its own
            sent = epops.dispatch_wait(ticket, *arguments, group=group, max_tokens=tokens)
            y = sent.rows * 2
            ticket = epops.combine_start(y, sent.route, sent.row_weights, **settings)
            beside += [square @ square for _ in range(8)]
            # A whole op between the halves comes behind them.
            again = epops.combine(y, sent.route, sent.row_weights, **settings).out
            late = epops.combine_wait(ticket, y, sent.route, sent.row_weights, step.x, **settings).out
            return again, late, beside[-1]

        def check(results, seed):
            again, late, beside = results
            want = step.expected(seed)
            if transport == "nvlink":
                same(again, want, f"seed {seed}")
            torch.testing.assert_close(again.cpu(), want, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(late, (again.float() + step.x.float()).bfloat16(), rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(beside, square @ square, rtol=1e-3, atol=1e-3)

        for seed in range(3):
            step.load(seed)
            check(halves(), seed)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = halves()
        for seed in range(3, 60):
            step.load(seed)
            graph.replay()
            if seed % 8 == 0:
                check(results, seed)
        torch.cuda.synchronize()
        group.check()
    graph.reset()


def stall_scenario(rank, world, graphed):
    """The last rank sleeps past the timeout: the others lose it and go on, it finds itself excluded."""
    import epops

    from .ranks import Shape

    shape = Shape(world, 20, 4, 8 * world, 8, 256, alignment=4)
    group = make("stall", shape, timeout=1.0)
    step = Step(group, shape, rank)
    step.load(0)
    step()
    torch.cuda.synchronize()
    run = step
    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
        run()
        torch.cuda.synchronize()
    last = world - 1
    if rank == last:
        time.sleep(2.0)
    start = time.monotonic()
    run()
    torch.cuda.synchronize()
    assert time.monotonic() - start < 3.0, "a lost peer costs one timeout, not one a wait"
    with pytest.raises(epops.PeerError, match="excluded" if rank == last else "did not arrive"):
        group.check()
    if rank != last:
        mask = torch.ones(world, dtype=torch.int64)
        mask[last] = 0
        for seed in (3, 4):
            step.load(seed)
            start = time.monotonic()
            run()
            torch.cuda.synchronize()
            assert time.monotonic() - start < 0.5, "the mask keeps later steps from waiting"
            same(step.out, step.expected(seed, mask), f"step {seed} without the lost rank")
    assert torch.ones(4, device="cuda").sum().item() == 4, "the process is usable"


def death_scenario(rank, world, graphed, gate):
    """The last rank is killed while steps run."""
    import epops

    from .ranks import Shape

    shape = Shape(world, 20, 4, 8 * world, 8, 256, alignment=4)
    group = make("death", shape, timeout=1.0)
    step = Step(group, shape, rank)
    step.load(0)
    step()
    torch.cuda.synchronize()
    run = step
    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    gate.put(rank)
    deadline = time.monotonic() + 20
    lost = None
    while lost is None and time.monotonic() < deadline:
        run()
        torch.cuda.synchronize()
        try:
            group.check()
        except epops.PeerError as error:
            lost = str(error)
    assert lost and f"peer {world - 1}" in lost, lost
    mask = torch.ones(world, dtype=torch.int64)
    mask[world - 1] = 0
    for seed in (3, 4):
        step.load(seed)
        run()
        torch.cuda.synchronize()
        same(step.out, step.expected(seed, mask), f"step {seed} without the dead rank")


def test_dispatch_and_combine_are_the_reference():
    run_ranks(pair_scenario)


def test_gradients_are_those_of_one_process():
    run_ranks(gradient_scenario)


def test_graphs_replay_with_new_routing():
    run_ranks(graph_scenario, 3000)


@pytest.mark.parametrize(("transport", "tokens"), [("nvlink", 40), ("nvlink", 1500), ("c10d", 40)])
def test_started_halves_are_the_whole(transport, tokens):
    run_ranks(halves_scenario, transport, tokens)


@pytest.mark.parametrize("graphed", [False, True])
def test_a_rank_that_stalls_is_left_behind(graphed):
    run_ranks(stall_scenario, graphed)


@pytest.mark.parametrize("graphed", [False, True])
def test_a_rank_that_is_killed_is_left_behind(graphed):
    gate = mp.get_context("spawn").Queue()

    def kill_last(processes):
        for _ in processes:
            gate.get(timeout=60)
        time.sleep(0.3)
        os.kill(processes[-1].pid, signal.SIGKILL)
        return [len(processes) - 1]

    run_ranks(death_scenario, graphed, gate, meddle=kill_last)


def workspace_scenario(rank, world):
    """Peer memory at 128 tokens and its release, in a loop."""
    import torch.distributed as dist

    from .ranks import Shape

    shape = Shape(world, 128, 8, 256, 256 // world, 7168, alignment=16)
    free, gloo = [], dist.new_group(backend="gloo")
    for _ in range(6):
        with make("memory", shape) as group:
            step = Step(group, shape, rank)
            step.load(1)
            step()
            torch.cuda.synchronize()
            if world == 2:
                assert group.transport.workspace_bytes <= 16 << 20, repr(group)
            assert f"{group.transport.workspace_bytes / 2**20:.1f} MiB" in repr(group)
        del step
        torch.cuda.empty_cache()
        dist.barrier(gloo)  # whoever shares the GPU has given back its own
        free.append(torch.cuda.mem_get_info()[0])
        dist.barrier(gloo)
    assert max(free[2:]) - min(free[2:]) < 4 << 20, f"close leaves memory behind: {free}"


def test_peer_memory_is_small_and_given_back():
    run_ranks(workspace_scenario)
