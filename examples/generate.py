"""Generate over ranks: each has its own prompt, of its own length, and serves its experts until all are done.

    torchrun --nproc-per-node 2 examples/generate.py [FOLDER]

FOLDER is a transformers checkpoint of any MoE family; without one a tiny Mixtral with random weights is asked.
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, CompileConfig, MixtralConfig, MixtralForCausalLM

import epops


def load(folder: str | None) -> torch.nn.Module:
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=128, eos_token_id=None,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", nargs="?")
    options.add_argument("--eager", action="store_true", help="do not compile the decoding step")
    options = options.parse_args()

    local_rank = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available() and torch.cuda.device_count() > local_rank
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")

    with epops.ExpertGroup(name="ep", max_tokens=64) as group:
        model = epops.parallelize(load(options.folder), group).to(device).eval()
        prompt = torch.arange(5 + 3 * group.rank, device=device)[None] + 10
        settings = {} if options.eager else {"compile_config": CompileConfig(backend="epops", fullgraph=True)}
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8 + 4 * group.rank,
            do_sample=False,
            cache_implementation="static",
            pad_token_id=0,
            **settings,
        )
        # One write with its newline: lines of ranks that share a terminal do not mix.
        sys.stdout.write(f"rank {group.rank}: {prompt[0].tolist()} → {written[0, prompt.shape[1] :].tolist()}\n")
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
