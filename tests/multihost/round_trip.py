"""One rank of the two-host test: tokens to experts on both hosts and back, and their gradients, in integers."""

from __future__ import annotations

import socket

import torch
import torch.distributed as dist

import epops


def main() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    num_experts, top_k, tokens = 2 * size + 1, 2, 3 + 2 * rank
    with epops.ExpertGroup(dist.group.WORLD, "ep", num_experts=num_experts, max_tokens=16) as group:
        generator = torch.Generator().manual_seed(rank)
        x = torch.randint(-4, 5, (tokens, 16), generator=generator).float().requires_grad_()
        chosen = torch.rand(tokens, num_experts, generator=generator).argsort(dim=1)[:, :top_k].to(torch.int32)
        weights = torch.randint(1, 4, (tokens, top_k), generator=generator).float()
        received = epops.dispatch(x, chosen, weights, group=group)
        # Expert e multiplies by e + 1; a slot's expert is known from its rank and its number.
        first = group.local_experts(num_experts).start
        factor = (received.row_expert + first + 1).clamp(min=0).unsqueeze(1)
        out = epops.combine(
            received.rows * factor, received.route, received.row_weights, group=group, num_tokens=tokens, top_k=top_k
        ).out
        total = (weights * (chosen + 1)).sum(dim=1, keepdim=True)
        torch.testing.assert_close(out, x.detach() * total, rtol=0, atol=0)
        out.sum().backward()
        torch.testing.assert_close(x.grad, total.expand_as(x), rtol=0, atol=0)
        addresses = [None] * size
        dist.all_gather_object(addresses, [name for _, name in socket.if_nameindex() if name != "lo"])
    assert len({str(names) for names in addresses}) == 2, f"the ranks are not on two hosts: {addresses}"
    print(f"rank {rank} of {size}: {int((received.row_expert >= 0).sum())} rows received, values and gradients exact")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
