"""Decoding in CUDA graphs on the GPUs of one host: trees of Inductor's, whole steps, and the answers of the plain model."""

from __future__ import annotations

import copy

import pytest
import torch

from .test_nvlink import run_ranks

pytestmark = pytest.mark.gpu

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe")
LENGTH = 24


def decode(run, config, cache, ids, first):
    """Logits (B, T, V) of ``ids`` (B, T) that stand from position ``first`` on."""
    from epops.serving.attention import masks

    positions = torch.arange(first, first + ids.shape[1], device=ids.device).expand(ids.shape[0], -1).contiguous()
    cache.place.slots, cache.place.positions = None, positions
    mask = masks(config, positions, LENGTH, torch.float32)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    return run(**given, use_cache=True).logits


def graph_trees(rank, whole):
    """The compiled model itself, ranks with batches of their own size, prompts of other lengths between the steps."""
    import epops
    from epops.serving.attention import check_model
    from epops.serving.cache import SlotCache

    config = whole.config.get_text_config()
    make = torch.Generator().manual_seed(rank)
    ids = torch.randint(3, config.vocab_size, (2 + rank % 2, LENGTH), generator=make).cuda()
    with epops.ExpertGroup(None, "trees", max_tokens=64, timeout=300.0) as group, torch.no_grad():
        assert group.transport.name == "nvlink", repr(group)
        model = epops.parallelize(copy.deepcopy(whole), group)
        compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead", backend="epops")
        ours, plain = (SlotCache(check_model(whole), ids.shape[0], LENGTH) for _ in range(2))
        for run, cache in ((model, ours), (whole, plain)):
            decode(run, config, cache, ids[:, :3], 0)
        with torch._inductor.config.patch({"triton.cudagraph_or_error": True}):
            for at in range(3, 12):
                if at % 3 == 0:
                    model(input_ids=ids[:, : at + 2 * rank], use_cache=False)
                got = decode(compiled, config, ours, ids[:, at : at + 1], at)
                expected = decode(whole, config, plain, ids[:, at : at + 1], at)
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        counters = torch._dynamo.utils.counters
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
        assert not counters["inductor"]["cudagraph_skips"]
        assert torch._inductor.cudagraph_trees.get_container(torch.cuda.current_device()).tree_manager is not None


def whole_steps(rank, whole):
    """The engine: buckets, ranks with more and fewer requests and with none, prompts of any length between the steps."""
    import epops
    from epops.serving import Engine
    from tests.serving.asked import answer, requests

    asked = requests(whole, rank, (4, 1)[rank % 2])
    expected = [answer(whole, **one) for one in asked]
    buckets = (1, 3)
    with epops.ExpertGroup(None, "steps", max_tokens=16, timeout=300.0) as group:
        model = epops.parallelize(copy.deepcopy(whole), group)
        engine = Engine(model, group, buckets=buckets, max_length=LENGTH)
        engine.warm_up()
        steps = engine._steps
        assert len(steps.graphs) == len(buckets)
        for order in (1, -1):
            submitted = [engine.submit(**one) for one in asked[::order]]
            for _ in engine.run():
                pass
            assert [request.tokens for request in submitted] == expected[::order]
        assert set(engine.report.decode_steps) == set(buckets) and engine.report.prefills > 2
        assert len(steps.graphs) == len(buckets), "graphs are kept"
        assert not torch._dynamo.utils.counters["graph_break"]
        with torch.profiler.profile() as seen:
            steps.decode(3, {0: 5} if rank else {})
            torch.cuda.synchronize()
        counts = {event.key: event.count for event in seen.key_averages()}
        assert counts.get("cudaGraphLaunch") == 1, counts
        assert not [key for key in counts if key.startswith(("cudaLaunchKernel", "cuLaunchKernel"))], counts
        engine.close()


def family_scenario(rank, world, family):
    from epops import zoo

    # The same draws on the CPU and so on every rank; eager float32 products round alike wherever they run.
    whole = zoo.tiny(family).cuda()
    graph_trees(rank, whole)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    whole_steps(rank, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_decodes_in_graphs(family):
    run_ranks(family_scenario, family, world=2, limit=240.0)


def bfloat16_scenario(rank, world):
    """Torch's grouped GEMM and the rows' kernel in the graph, some rows idle and then a whole rank."""
    import epops
    from epops import zoo
    from epops.serving.attention import check_model
    from epops.serving.step import Steps, decode_step

    whole = zoo.tiny("qwen3_moe", dtype=torch.bfloat16).cuda()
    with epops.ExpertGroup(None, "bf16", max_tokens=8, timeout=300.0) as group, torch.no_grad():
        model = epops.parallelize(copy.deepcopy(whole), group)
        compiled = {"options": {"emulate_precision_casts": True}}
        steps = Steps(model, group, check_model(model), (2, 8), LENGTH, compiled, True)
        make = torch.Generator().manual_seed(rank)
        for number in range(12):
            bucket = (2, 8)[number % 2]
            rows = {slot: number + slot % 3 for slot in range(bucket - rank)} if number % 5 or rank else {}
            fed = torch.randint(3, 60, (8,), generator=make).cuda()
            steps.tokens.copy_(fed)
            logits = steps.decode(bucket, rows)
            slots = sorted(rows)
            ours = logits[slots].clone()
            positions = steps.control[0, :bucket, None]
            steps.cache.place.slots, steps.cache.place.positions = None, positions
            theirs = decode_step(whole, steps.cache, fed[:bucket].clone(), positions, LENGTH, torch.bfloat16)[slots]
            assert (ours - theirs).norm() <= 5e-2 * theirs.norm(), (number, (ours - theirs).norm() / theirs.norm())


def test_bfloat16_steps():
    run_ranks(bfloat16_scenario, world=2, limit=150.0)
