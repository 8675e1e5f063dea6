"""FSDP2 around a sharded model: its collectives run beside the exchanges, which hold multiprocessors while they wait."""

from __future__ import annotations

import pytest
import torch

from .test_nvlink import run_ranks

pytestmark = pytest.mark.gpu

STEPS = 12
SHAPE = {"hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 512}


def batch(rank, step, tokens):
    made = torch.Generator().manual_seed(97 * step + rank)
    return torch.randint(0, SHAPE["vocab_size"], (1, tokens), generator=made).cuda()


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


def training_scenario(rank, world, transport, tokens):
    """Each step's loss is that of the one-process model on the same batches, which both ranks train too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import epops
    from epops import zoo

    torch.backends.cuda.matmul.allow_tf32 = False
    alone = zoo.tiny("mixtral", **SHAPE).cuda()
    slow = torch.optim.SGD(alone.parameters(), lr=0.02)
    mesh = init_device_mesh("cuda", (world,))
    with epops.ExpertGroup(None, "fsdp", max_tokens=tokens, device="cuda", transport=transport, timeout=10.0) as group:
        model = epops.parallelize(zoo.tiny("mixtral", **SHAPE).cuda(), group)
        ignored = set(epops.expert_parameters(model))
        layers = list(model.model.layers)
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params=ignored)
        fully_shard(model, mesh=mesh, ignored_params=ignored)
        for number, layer in enumerate(layers):
            layer.set_modules_to_forward_prefetch(layers[number + 1 :])
            layer.set_modules_to_backward_prefetch(layers[:number][::-1])
        # A group of their own: optimizers on CUDA take all tensors of a group at once, and cannot mix sharded ones with others.
        own = {id(p) for p in ignored}
        groups = [[p for p in model.parameters() if (id(p) in own) == mine] for mine in (False, True)]
        optimizer = torch.optim.SGD([{"params": some} for some in groups], lr=0.02)
        for step in range(STEPS):
            everyone = [batch(r, step, tokens - 3 * r) for r in range(world)]
            wanted = [loss_of(alone, ids) for ids in everyone]
            slow.zero_grad()
            (sum(wanted) / world).backward()
            slow.step()
            loss = loss_of(model, everyone[rank])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            where = f"step {step} of rank {rank}"
            torch.testing.assert_close(loss, wanted[rank], rtol=1e-3, atol=1e-4, msg=where)
        torch.cuda.synchronize()
        group.check()


@pytest.mark.parametrize("tokens", [100, 1500])
@pytest.mark.parametrize("transport", ["nvlink", "c10d"])
def test_fsdp2_with_prefetch_trains_beside_the_exchanges(transport, tokens):
    run_ranks(training_scenario, transport, tokens)
