"""Train a transformers MoE model over ranks: shard its experts, compile it, average the other gradients.

torchrun --nproc-per-node 2 examples/train_moe.py                 # gloo on CPUs, nccl where each rank has a GPU
"""

import argparse
import os

import torch
import torch.distributed as dist
from transformers import MixtralConfig, MixtralForCausalLM

import epops

BATCH, LENGTH = 4, 32


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--eager", action="store_true", help="do not compile")
    options = options.parse_args()

    local_rank = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available() and torch.cuda.device_count() > local_rank
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")

    torch.manual_seed(0)  # every rank starts from the same weights …
    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = MixtralForCausalLM(config).to(device)

    with epops.ExpertGroup(name="ep", max_tokens=BATCH * LENGTH) as group:
        epops.parallelize(model, group)  # … and keeps its own experts
        forward = model if options.eager else torch.compile(model, fullgraph=True, backend="epops")
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        epops.parallelize_optimizer(optimizer, model)  # its state dict is that of the whole model, as the model's is

        torch.manual_seed(1 + group.rank)  # every rank has its own data: here, counting from random numbers
        for step in range(options.steps):
            ids = (torch.randint(256, (BATCH, 1)) + torch.arange(LENGTH)).remainder(256).to(device)
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            epops.average_gradients(model, group)  # all but the experts, whose gradients are whole already
            norm = epops.clip_grad_norm_(model.parameters(), 1.0, group)
            optimizer.step()
            optimizer.zero_grad()
            if group.rank == 0 and (step % 5 == 0 or step == options.steps - 1):
                print(f"step {step}: loss {loss.item():.3f}, gradient norm {norm.item():.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
