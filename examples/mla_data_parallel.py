"""Latent attention (MLA) over ranks: projections split by heads, the core data-parallel over requests, one graph for all steps.

python examples/mla_data_parallel.py --ranks 2                                     # starts CPU ranks by itself
torchrun --nproc-per-node 2 examples/mla_data_parallel.py --device cuda            # one GPU a rank

An untrained DeepSeek-V3 of transformers serves requests that begin and end at different times.  Every rank projects its heads
of all tokens, but caches and attends only for its own requests: its cache is R times smaller.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache

import epops
from epops import nn
from epops.testing import captured, count_ops

REQUESTS, LENGTH, CHUNK = 12, 24, 6  # slots over all ranks; tokens a request; new tokens a request and step


def tiny(heads: int, layers: int) -> DeepseekV3ForCausalLM:
    """The same weights on every rank."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, kv_lora_rank=32, q_lora_rank=48, qk_rope_head_dim=8, qk_nope_head_dim=16,
        v_head_dim=16, n_group=1, topk_group=1, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=layers,
        max_position_embeddings=LENGTH, attn_implementation="eager",
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def workload(ranks: int, steps: int) -> list[list[nn.Chunk]]:
    """What a scheduler might do: requests arrive (rank 0 gets most, the last rank none at first), are prefilled in chunks, decode,
    and end.  The same on every rank."""
    make = random.Random(1)
    slots = -(-REQUESTS // ranks)
    live: dict[tuple[int, int], list[int]] = {}  # (rank, slot) → tokens so far, tokens of the prompt that are left
    plan = []
    for step in range(steps):
        chunks = []
        for (rank, slot), state in list(live.items()):
            count = min(state[1], CHUNK) or 1
            if state[0] + count > LENGTH:
                del live[rank, slot]
                continue
            chunks.append(nn.Chunk(rank, slot, state[0], [make.randrange(128) for _ in range(count)]))
            state[0], state[1] = state[0] + count, max(state[1] - count, 0)
        for rank in range(ranks):
            free = [slot for slot in range(slots) if (rank, slot) not in live]
            first = steps // 3 if rank == ranks - 1 else 0
            if free and step >= first and step % (rank + 2) == 0:
                live[rank, free[0]] = [0, make.randint(1, LENGTH // 2)]
        plan.append(chunks)
    return plan


class Server(torch.nn.Module):
    """One step of a model and its cache: tensors in, hidden states out, nothing read on the host."""

    def __init__(self, model: DeepseekV3ForCausalLM, cache: nn.LatentCache) -> None:
        super().__init__()
        self.model = model
        self.cache = cache

    def forward(self, batch: nn.Batch) -> torch.Tensor:
        step = nn.begin(self.model, batch, self.cache)
        out = self.model.model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, past_key_values=step.cache, mla_step=step
        )
        return out.last_hidden_state[0]


class Plain:
    """The plain model in one process, with a cache for each request."""

    def __init__(self, model: DeepseekV3ForCausalLM) -> None:
        self.model = model
        self.caches: dict[tuple[int, int], DynamicCache] = {}

    def hidden(self, chunk: nn.Chunk, device: torch.device) -> torch.Tensor:
        if chunk.start == 0:
            self.caches[chunk[:2]] = DynamicCache(config=self.model.config)
        ids = torch.tensor([chunk.tokens], device=device)
        positions = chunk.start + torch.arange(len(chunk.tokens), device=device).unsqueeze(0)
        return self.model.model(
            input_ids=ids, position_ids=positions, past_key_values=self.caches[chunk[:2]]
        ).last_hidden_state[0]


def serve(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Every step of the workload on this rank, compared with the plain model."""
    found: dict[str, Any] = {}
    whole = tiny(options.heads, options.layers).to(device)
    with epops.ExpertGroup(name="mla", timeout=120) as group, torch.no_grad():
        slots = -(-REQUESTS // group.size)
        bounds = {"max_tokens": 8 * REQUESTS // 2, "rank_tokens": slots * CHUNK, "num_slots": slots}
        bounds.update(chunk_tokens=CHUNK, max_length=LENGTH)
        model = copy.deepcopy(whole)
        nn.shard_mla(model, group)
        cache = nn.LatentCache(model.config, slots, LENGTH, device=device)
        found["cache"] = cache.num_bytes
        found["duplicated"] = nn.LatentCache(model.config, REQUESTS, LENGTH, device="meta").num_bytes
        server, plain = Server(model, cache), Plain(whole)
        plan = workload(group.size, options.steps)

        def batch_of(chunks: list[nn.Chunk]) -> tuple[nn.Batch, list[list[int]]]:
            return nn.lay_out(chunks, rank=group.rank, ep_size=group.size, device=device, **bounds)

        # What the passes make of the step: no exchange takes place here.
        graph = captured(server, batch_of(plan[0])[0])[0]
        found["exchanges"] = count_ops(graph.before, "epops.all_to_all")
        found["copies"] = count_ops(graph.before, "clone"), count_ops(graph, "clone")
        found["fused"], found["beside"] = graph.rewrites["fuse_transpose"], graph.rewrites["overlap"]

        run = server if options.eager else torch.compile(server, fullgraph=True, backend="epops", mode=options.mode)
        torch._dynamo.utils.counters.clear()
        largest, tokens = 0.0, []
        for chunks in plan:
            batch, places = batch_of(chunks)
            got = run(batch)
            tokens.append(
                [sum(len(chunk.tokens) for chunk in chunks if chunk.rank == rank) for rank in range(group.size)]
            )
            for chunk, place in zip(chunks, places):
                expected = plain.hidden(chunk, device)
                largest = max(largest, float((got[place] - expected).abs().max() / expected.abs().max()))
        found["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        found["tokens"], found["difference"], found["transport"] = tokens, largest, repr(group.transport)
    return found


def show(found: dict[str, Any], ranks: int) -> str:
    """The table."""
    tokens = found["tokens"]
    each = [f"{min(step[rank] for step in tokens)} … {max(step[rank] for step in tokens)}" for rank in range(ranks)]
    rows = [
        ("ranks", f"{ranks}, {found['transport']}"),
        ("tokens of a step, by owner", ", ".join(each) + f" in {len(tokens)} steps"),
        ("cache a rank, tensor-parallel core", f"{found['duplicated']} bytes"),
        (
            "cache a rank, data-parallel core",
            f"{found['cache']} bytes, {found['duplicated'] / found['cache']:.2f} times less",
        ),
        ("largest difference from the plain model", f"{found['difference']:.1e} of the largest value"),
        ("exchanges in the graph", f"{found['exchanges']}, {found['fused']} of them with transposes folded in"),
        ("copies in the graph", f"{found['copies'][0]} before the passes, {found['copies'][1]} after"),
        ("exchanges beside other work", f"{found['beside']}"),
        ("graphs compiled", f"{found['graphs']}, recompiles {max(found['graphs'] - 1, 0)}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def rank_main(rank: int, options: argparse.Namespace, store: str | None) -> None:
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
        torch.cuda.set_device(device)
    backend = "nccl" if options.device == "cuda" else "gloo"
    if store is None:
        dist.init_process_group(backend)
    else:
        torch.set_num_threads(1)
        dist.init_process_group(
            backend, store=dist.FileStore(store, options.ranks), rank=rank, world_size=options.ranks
        )
    found = serve(options, device)
    if dist.get_rank() == 0:
        print(show(found, dist.get_world_size()), flush=True)
    dist.destroy_process_group()
    assert found["difference"] < options.tolerance, f"rank {rank} differs from the plain model by {found['difference']}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes to start, unless torchrun did")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--mode", help='of torch.compile, for example "reduce-overhead" for CUDA graphs')
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of the largest value, float32")
    options = parser.parse_args(arguments)
    if "RANK" in os.environ:
        rank_main(int(os.environ["RANK"]), options, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, (options, os.path.join(folder, "store")), options.ranks)


if __name__ == "__main__":
    main()
