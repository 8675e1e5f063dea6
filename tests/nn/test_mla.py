"""Latent attention over ranks gives what the plain model gives, in R times less cache."""

from __future__ import annotations

import pytest
import torch

import epops
from epops import nn
from epops.inspection.capture import all_passes, apply_passes
from epops.testing import assert_fused, count_ops
from epops.torch_private import graphs_backend
from tests.nn import plain
from tests.ops.test_all_to_all_padded import padded_group
from tests.ranks import run_ranks

BOUNDS = {"max_tokens": 9, "rank_tokens": 8, "num_slots": 4, "chunk_tokens": 4, "max_length": 10}


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def like_the_plain_model(
    rank: int, size: int, heads: int, q_lora_rank: int | None, core: str, padded: bool = False
) -> None:
    whole = plain.model(heads, q_lora_rank=q_lora_rank)
    with padded_group("mla") if padded else epops.ExpertGroup(name="mla") as group, torch.no_grad():
        model = plain.copied(whole)
        assert nn.shard_mla(model, group, core=core) == 2
        requests = plain.Requests(whole)
        cache = nn.LatentCache(
            model.config, BOUNDS["num_slots"] * (size if core == "heads" else 1), BOUNDS["max_length"]
        )
        for chunks in plain.steps(size):
            if core == "heads":  # one cache for the requests of all ranks, on every rank
                bounds = {**BOUNDS, "num_slots": 4 * size, "rank_tokens": 9}
                as_one = [chunk._replace(rank=0, slot=chunk.rank * 4 + chunk.slot) for chunk in chunks]
                batch, places = nn.lay_out(as_one, rank=0, ep_size=1, **bounds)
            else:
                batch, places = nn.lay_out(chunks, rank=rank, ep_size=size, **BOUNDS)
            step = nn.begin(model, batch, cache)
            got = model.model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, past_key_values=step.cache, mla_step=step
            ).last_hidden_state[0]
            for chunk, place in zip(chunks, places):
                close(got[place], requests.hidden(chunk))


@pytest.mark.parametrize("size", (1, 2, 3))
def test_prefill_and_decode(size: int) -> None:
    run_ranks(like_the_plain_model, size, 6, 16, "requests")


@pytest.mark.parametrize("heads", (3, 5))
def test_heads_that_ranks_do_not_divide(heads: int) -> None:
    run_ranks(like_the_plain_model, 3, heads, None, "requests")


def test_over_a_transport_that_reads_nothing_on_the_host() -> None:
    run_ranks(like_the_plain_model, 3, 5, None, "requests", True)


def test_the_tensor_parallel_core() -> None:
    run_ranks(like_the_plain_model, 2, 6, 16, "heads")


def loss_of(hidden: torch.Tensor, chunk: nn.Chunk) -> torch.Tensor:
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(sum(chunk.tokens)))
    return (hidden * weight).sin().sum()


def gradients(rank: int, size: int, compiled: bool) -> None:
    whole = plain.model(heads=5)
    chunks = [chunk for chunk in plain.steps(size)[0] + plain.steps(size)[3] if chunk.start == 0]
    with epops.ExpertGroup(name="mla", timeout=60) as group:
        model = plain.copied(whole)
        nn.shard_mla(model, group)
        batch, places = nn.lay_out(chunks, rank=rank, ep_size=size, **{**BOUNDS, "max_tokens": 15})

        def hidden(batch: nn.Batch) -> torch.Tensor:
            step = nn.begin(model, batch)
            out = model.model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, mla_step=step
            )
            return out.last_hidden_state[0]

        kinds: list[str] = []
        if compiled:
            got = torch.compile(
                hidden, backend=graphs_backend(lambda _, kind: kinds.append(kind), run=True), fullgraph=True
            )(batch)
        else:
            got = hidden(batch)
        sum(loss_of(got[place], chunk) for chunk, place in zip(chunks, places)).backward()
        sum(loss_of(plain.Requests(whole).hidden(chunk), chunk) for chunk in chunks).backward()
        assert [kind for kind in kinds if kind != "joint"] == (["forward", "backward"] if compiled else [])
        heads = [3, 2] if size == 2 else [2, 2, 1]
        first, count = sum(heads[:rank]), heads[rank]
        for name, parameter in whole.model.named_parameters():
            own = dict(model.model.named_parameters())[name]
            expected = parameter.grad
            if "q_b_proj" in name or "kv_b_proj" in name:
                width = parameter.shape[0] // 5
                expected = expected[first * width : (first + count) * width]
            elif "o_proj" in name:
                width = parameter.shape[1] // 5
                expected = expected[:, first * width : (first + count) * width]
            assert expected.any(), name
            close(own.grad, expected)


@pytest.mark.parametrize(("size", "compiled"), [(2, True), (3, False)])
def test_gradients(size: int, compiled: bool) -> None:
    run_ranks(gradients, size, compiled)


def one_graph(rank: int, size: int, heads: int) -> None:
    whole = plain.model(heads)
    graphs = []
    with epops.ExpertGroup(name="mla", timeout=60) as group, torch.no_grad():
        model = plain.copied(whole)
        nn.shard_mla(model, group)
        cache = nn.LatentCache(model.config, 4, 10)

        def step(batch: nn.Batch) -> torch.Tensor:
            step = nn.begin(model, batch, cache)
            return model.model(
                input_ids=batch.input_ids, position_ids=batch.position_ids, past_key_values=step.cache, mla_step=step
            ).last_hidden_state[0]

        def seen(module: torch.fx.GraphModule, kind: str) -> None:
            if kind != "joint":
                graphs.append(apply_passes(module, all_passes(), kind))

        run = torch.compile(step, backend=graphs_backend(seen, run=True), fullgraph=True)
        requests = plain.Requests(whole)
        shapes = set()
        for chunks in plain.steps(size):
            batch, places = nn.lay_out(chunks, rank=rank, ep_size=size, **BOUNDS)
            shapes.add(tuple(batch.rank_tokens.tolist()))
            got = run(batch)
            for chunk, place in zip(chunks, places):
                close(got[place], requests.hidden(chunk))
    assert len(shapes) >= 4 and len(graphs) == 1, "steps of other splits run in the graph of the first one"
    assert_fused(graphs, fuse_transpose=4, overlap=2)
    before, after = graphs[0].before, graphs[0].after
    assert count_ops(before, "epops.plan_all_to_all") == 2, "two plans, of all layers and both ways"
    assert count_ops(before, "epops.all_to_all") == 4 and count_ops(before, "clone") == count_ops(after, "clone") + 4
    assert count_ops(after, "epops.all_to_all") == count_ops(after, "epops.all_to_all_start") == 2
    # Each exchange stands alone: what it reads and gives is no copy of anything.
    assert not exchanged_copies(after)


def exchanged_copies(graph: torch.fx.GraphModule) -> list[str]:
    """Copies right in front of or behind an exchange."""
    found = []
    for node in graph.graph.nodes:
        if "epops.all_to_all" not in str(node.target):
            continue
        rows = [
            item for user in node.users if "getitem" in str(user.target) and user.args[1] == 0 for item in user.users
        ]
        source = node.args[1] if "wait" in str(node.target) else node.args[0]
        found += [item.name for item in [source, *rows] if "clone" in str(getattr(item, "target", ""))]
    return found


@pytest.mark.parametrize(("size", "heads"), [(2, 6), (3, 5)])
def test_one_compiled_graph_serves_all_steps_with_one_fused_exchange_each_way(size: int, heads: int) -> None:
    run_ranks(one_graph, size, heads)


def test_the_cache_is_as_many_times_smaller_as_there_are_ranks() -> None:
    config = plain.model().config
    all_requests = nn.LatentCache(config, 6 * 20, 512, device="meta").num_bytes
    for size in (2, 3, 5):
        own = nn.LatentCache(config, 6 * 20 // size, 512, device="meta").num_bytes
        row = config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * 4
        assert own - row == (all_requests - row) // size, "but for one row that takes other ranks' tokens"


def test_what_does_not_fit_is_named() -> None:
    with epops.ExpertGroup(name="mla") as group:
        with pytest.raises(ValueError, match="expected latent attention that caches its latents"):
            nn.shard_mla(torch.nn.Linear(2, 2), group)
        with pytest.raises(ValueError, match="core: expected one of requests, heads, got 'rows'"):
            nn.shard_mla(torch.nn.Linear(2, 2), group, core="rows")
        model = plain.model()
        nn.shard_mla(model, group)
        with pytest.raises(ValueError, match="got one that is split"):
            nn.shard_mla(model, group)
        with pytest.raises(ValueError, match="mla_step: expected the step that epops.nn.begin returned"):
            model(input_ids=torch.zeros(1, 3, dtype=torch.int64), use_cache=False)
        model = plain.model()
        model.model.layers[0].self_attn.attention_dropout = 0.1
        with pytest.raises(ValueError, match="attention_dropout 0, got 0.1"):
            nn.shard_mla(model, group)


def too_few_heads(rank: int, size: int) -> None:
    with epops.ExpertGroup(name="mla") as group:
        with pytest.raises(
            ValueError, match="one head for each of the 3 ranks of group 'mla', got 2 heads; use fewer ranks"
        ):
            nn.shard_mla(plain.model(heads=2), group)


def test_fewer_heads_than_ranks() -> None:
    run_ranks(too_few_heads, 3)


@pytest.mark.parametrize(
    ("chunks", "said"),
    [
        ([nn.Chunk(2, 0, 0, [1])], "ranks 0 … 1, got 2"),
        ([nn.Chunk(0, 4, 0, [1])], "slots 0 … 3, got 4"),
        ([nn.Chunk(0, 0, 0, [1]), nn.Chunk(0, 0, 1, [1])], "one chunk a slot, got two for slot 0 of rank 0"),
        ([nn.Chunk(0, 0, 0, [1] * 5)], "at most chunk_tokens = 4 tokens, got 5"),
        ([nn.Chunk(0, 0, 9, [1] * 2)], "positions 0 … 9, got 9 … 10"),
        (
            [nn.Chunk(0, slot, 0, [1] * 4) for slot in range(3)],
            "rank_tokens: expected a bound on the tokens of every rank, 12",
        ),
        (
            [nn.Chunk(slot % 2, slot, 0, [1] * 4) for slot in range(3)],
            "max_tokens: expected a bound on the tokens of the step, 12",
        ),
    ],
)
def test_a_step_that_does_not_fit_is_named(chunks: list[nn.Chunk], said: str) -> None:
    with pytest.raises(ValueError) as raised:
        nn.lay_out(chunks, rank=0, ep_size=2, **BOUNDS)
    assert said in str(raised.value)
