"""Checkpoint folders as the hub has them, loaded sharded: the model is from_pretrained's, and no foreign expert is read."""

from __future__ import annotations

import copy
import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import epops
from epops import zoo
from epops.serving import Engine, load
from epops.serving.checkpoint import Checkpoint

from ..ranks import run_ranks
from .asked import answer, requests
from .test_engine import run

HUB_NAMES = {
    "mixtral": r"model\.layers\.\d+\.block_sparse_moe\.experts\.(\d+)\.w[123]\.weight",
    "qwen3_moe": r"model\.layers\.\d+\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight",
    "deepseek_v3": r"model\.layers\.\d+\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight",
    "gpt_oss": None,  # the hub has its experts stacked, as the model does
}


def _check(rank: int, size: int, family: str, folder: str) -> dict[str, Any]:
    whole = zoo.tiny(family)
    batch = zoo.inputs(family, whole, seed=rank)
    read: dict[str, int] = {}
    close = Checkpoint.close

    def noted(self: Checkpoint) -> None:
        read.update(self.read)
        close(self)

    Checkpoint.close = noted  # type: ignore[method-assign]
    try:
        with epops.ExpertGroup(None, max_tokens=16) as group:
            model = load(folder, group)
            expected = epops.parallelize(copy.deepcopy(whole), group)
            ours, theirs = dict(model.named_parameters()), dict(expected.named_parameters())
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                assert torch.equal(ours[name], value), name
            buffers = dict(expected.named_buffers())
            for name, value in model.named_buffers():
                assert torch.equal(value, buffers[name]), name
            assert torch.equal(model(**batch).logits, expected(**batch).logits)
    finally:
        Checkpoint.close = close  # type: ignore[method-assign]
    return read


@pytest.mark.parametrize("family", HUB_NAMES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_rank_reads_its_own_experts_and_nothing_twice(family: str, size: int, tmp_path: Path) -> None:
    zoo.tiny(family).save_pretrained(tmp_path, max_shard_size="40KB")
    shapes = {name: Checkpoint(tmp_path).shape(name) for name in Checkpoint(tmp_path).files}
    pattern = HUB_NAMES[family]
    experts = {name for name in shapes if (re.fullmatch(pattern, name) if pattern else ".experts." in name)}
    assert experts, "the checkpoint is laid out as the hub's are"
    reads = run_ranks(_check, size, family, str(tmp_path))
    slots = -(-zoo.tweaks.EXPERTS // size)
    bytes_of = {name: 4 * shape.numel() for name, shape in shapes.items()}
    for rank, read in enumerate(reads):
        assert {n: b for n, b in read.items() if n not in experts} == {
            n: b for n, b in bytes_of.items() if n not in experts
        }
        held = range(rank * slots, min((rank + 1) * slots, zoo.tweaks.EXPERTS))
        if pattern:
            ours = {name for name in experts if int(re.fullmatch(pattern, name)[1]) in held}
            assert {name for name in read if name in experts} == ours
            assert all(read[name] == bytes_of[name] for name in ours)
        else:
            share = len(held) / zoo.tweaks.EXPERTS
            assert all(read.get(name, 0) == share * bytes_of[name] for name in experts)


def _same(rank: int, size: int, family: str, folder: str) -> None:
    with epops.ExpertGroup(None, max_tokens=16) as group:
        model = load(folder, group)
        expected = epops.parallelize(zoo.tiny(family), group)
        for kind in ("named_parameters", "named_buffers"):
            ours, theirs = dict(getattr(model, kind)()), dict(getattr(expected, kind)())
            assert ours.keys() == theirs.keys()
            assert not [name for name in theirs if not torch.equal(ours[name], theirs[name])]


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.families())
def test_every_causal_family_loads_as_it_was_saved(family: str, tmp_path: Path) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model = zoo.tiny(family)
    if type(model).__name__ not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        pytest.skip(f"{type(model).__name__} is no causal language model of transformers' auto classes")
    model.save_pretrained(tmp_path)
    run_ranks(_same, 2, family, str(tmp_path))


def _serve(rank: int, size: int, folder: str) -> None:
    whole = zoo.tiny("qwen3_moe")
    asked = requests(whole, rank, 3)
    with epops.ExpertGroup(None, max_tokens=16) as group:
        model = load(folder, group)
        engine = Engine(model, group, buckets=(1, 4), max_length=24, compiled=False)
        assert run(engine, asked) == [answer(whole, **one) for one in asked]


def test_a_loaded_model_answers(tmp_path: Path) -> None:
    zoo.tiny("qwen3_moe").save_pretrained(tmp_path)
    run_ranks(_serve, 2, str(tmp_path))


def _check_dtypes(rank: int, size: int, folder: str) -> None:
    from transformers import AutoModelForCausalLM

    with epops.ExpertGroup(None, max_tokens=16) as group:
        for dtype in (None, "bfloat16", torch.float16):
            model = load(folder, group, dtype=dtype)
            expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
            kinds = {name: value.dtype for name, value in expected.named_parameters()}
            assert {name: value.dtype for name, value in model.named_parameters()} == kinds
            for (name, ours), theirs in zip(model.named_buffers(), expected.buffers()):
                assert torch.equal(ours, theirs), name
            head = model.get_output_embeddings().weight
            assert (head is model.get_input_embeddings().weight) == model.config.tie_word_embeddings
            assert model.generation_config.eos_token_id == expected.generation_config.eos_token_id


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("tied", [False, True])
def test_dtypes_tied_weights_and_generation_settings_are_those_of_from_pretrained(
    family: str, tied: bool, tmp_path: Path
) -> None:
    zoo.tiny(family, tie_word_embeddings=tied).to(torch.bfloat16).save_pretrained(tmp_path)
    run_ranks(_check_dtypes, 1, str(tmp_path))


def _check_refused(rank: int, size: int, folder: str, said: str) -> None:
    with epops.ExpertGroup(None, max_tokens=16) as group:
        with pytest.raises(ValueError, match=said):
            load(folder, group)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("empty", "expected a transformers checkpoint, got .* without a config.json"),
        ("unknown", "expected a model that this transformers knows, got .*code of a checkpoint is never run"),
        ("quantized", "expected weights that are not quantized"),
        ("pickles", r"expected \*.safetensors files in .*, got none"),
        (
            "missing",
            "expected all weights of MixtralForCausalLM, got none for model.norm.weight; the checkpoint is incomplete",
        ),
        ("shape", r"model.norm.weight: expected \(32,\) as the configuration says, got \(5,\)"),
        ("file", "lacks model-00001.*, which its index names"),
    ],
)
def test_folders_that_cannot_be_loaded_are_named_with_a_remedy(what: str, said: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = zoo.tiny("mixtral")
    if what != "empty":
        model.save_pretrained(tmp_path, max_shard_size="40KB" if what == "file" else "1GB")
    config = tmp_path / "config.json"
    weights = tmp_path / "model.safetensors"
    if what in ("unknown", "quantized"):
        more = {"quantization_config": {"quant_method": "fp8"}} if what == "quantized" else {"model_type": "new_moe"}
        config.write_text(json.dumps({**json.loads(config.read_text()), **more}))
    elif what == "pickles":
        weights.rename(tmp_path / "pytorch_model.bin")
    elif what in ("missing", "shape"):
        tensors = load_file(weights)
        tensors.pop("model.norm.weight")
        if what == "shape":
            tensors["model.norm.weight"] = torch.ones(5)
        save_file(tensors, weights)
    elif what == "file":
        next(tmp_path.glob("model-00001-*")).unlink()
    run_ranks(_check_refused, 1, str(tmp_path), said)


def _check_random(rank: int, size: int) -> list[Any]:
    config = zoo.build.configuration("deepseek_v3")
    with epops.ExpertGroup(None, max_tokens=16) as group:
        model = load(config, group, seed=3)
        again = load(config, group, seed=3)
        for ours, theirs in zip(model.state_dict().values(), again.state_dict().values()):
            assert torch.equal(
                ours.to_local() if hasattr(ours, "to_local") else ours,
                theirs.to_local() if hasattr(theirs, "to_local") else theirs,
            )
        engine = Engine(model, group, buckets=(1, 2), max_length=24, compiled=False)
        tokens = run(engine, [{"prompt_ids": [5, 6, 7], "max_new_tokens": 5, "eos_token_id": None}])
        experts = {id(p) for p in epops.expert_parameters(model)}
        others = [float(p.double().sum()) for p in model.parameters() if id(p) not in experts]
        own = [float(p.double().sum()) for p in model.parameters() if id(p) in experts]
        return [tokens, others, own]


def test_random_weights_are_equal_on_all_ranks_but_for_the_experts() -> None:
    first, second = run_ranks(_check_random, 2)
    assert first[:2] == second[:2] and not set(first[2]) & set(second[2])


MEGABYTE = 2**20


def _check_memory(rank: int, size: int, folder: str) -> list[int]:
    import ctypes

    # Blocks of 64 KiB and more go back to the system when they are freed, so that what is in use can be seen.
    ctypes.CDLL(None).mallopt(-3, 2**16)

    def anonymous() -> int:
        return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

    peak = [0]
    tensor = Checkpoint.tensor

    def watched(self: Checkpoint, *args: Any) -> torch.Tensor:
        peak[0] = max(peak[0], anonymous())
        return tensor(self, *args)

    Checkpoint.tensor = watched  # type: ignore[method-assign]
    try:
        with epops.ExpertGroup(None, max_tokens=16) as group:
            load(Path(folder).parent / "small", group)
            before = anonymous()
            peak[0] = before
            model = load(folder, group)
            held = sum(p.numel() * p.element_size() for p in model.parameters())
            peak[0] = max(peak[0], anonymous())
            return [held, peak[0] - before]
    finally:
        Checkpoint.tensor = tensor  # type: ignore[method-assign]


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="memory is read from Linux's /proc, and glibc is told to free"
)
def test_host_memory_is_this_ranks_share_and_one_tensor(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3}
    zoo.tiny("mixtral").save_pretrained(tmp_path / "small")
    whole = zoo.tiny("mixtral", **sizes)
    whole.save_pretrained(tmp_path / "large", max_shard_size="8MB")
    layer = 4 * sum(p.numel() for p in whole.model.layers[0].mlp.experts.parameters())
    assert 3 * layer > 50 * MEGABYTE
    for held, used in run_ranks(_check_memory, 2, str(tmp_path / "large"), fresh=True):
        # Beside the weights, at most one stacked tensor's halves before they are put together (a third of a layer's rows each).
        assert held - 2 * MEGABYTE < used < held + layer / 3 + 4 * MEGABYTE, (held, used)
