"""Dispatch and combine by hand: every expert doubles, trebles … its rows, and the results come back weighted.

torchrun --nproc-per-node 2 examples/ops.py
python examples/ops.py                              # one rank
"""

import os

import torch
import torch.distributed as dist

import epops

NUM_EXPERTS, TOP_K, HIDDEN = 6, 2, 8


def main() -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    # All ranks make the group together, once; from then on it is found by its name.
    with epops.ExpertGroup(name="ep", num_experts=NUM_EXPERTS, max_tokens=16) as group:
        torch.manual_seed(group.rank)
        num_tokens = 4 + group.rank  # ranks may have different numbers of tokens, up to max_tokens
        x = torch.randn(num_tokens, HIDDEN, requires_grad=True)
        weights, topk_idx = torch.rand(num_tokens, NUM_EXPERTS).softmax(-1).topk(TOP_K)

        sent = epops.dispatch(x, topk_idx, weights, group=group)
        print(
            f"rank {group.rank}: {sent.expert_counts.tolist()} rows for its experts {[*group.local_experts(NUM_EXPERTS)]}"
        )

        # Rows are grouped by expert, ready for a grouped GEMM.  Here expert e multiplies by e + 1.
        factors = torch.arange(1, group.num_slots + 1) + group.rank * group.num_slots
        experts = torch.eye(HIDDEN) * factors[:, None, None]
        y = epops.grouped_mm(sent.rows, experts, sent.expert_ends)

        back = epops.combine(y, sent.route, sent.row_weights, group=group, num_tokens=num_tokens, top_k=TOP_K)
        factor = (weights * (topk_idx + 1)).sum(-1, keepdim=True)
        torch.testing.assert_close(back.out, x * factor)
        back.out.sum().backward()
        torch.testing.assert_close(x.grad, factor.expand_as(x))
        print(f"rank {group.rank}: {num_tokens} tokens came back right, and so did their gradients")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
