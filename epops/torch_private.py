"""The one module that touches torch's private interfaces; everything is feature-tested, nothing is version-tested."""

from __future__ import annotations

from typing import Any

import torch


def mark_static(tensor: torch.Tensor) -> None:
    """Tell compilers that ``tensor`` stays where it is, so that a CUDA graph may write it in place instead of copying it in."""
    torch._dynamo.mark_static_address(tensor)


def scaled_grouped_mm(
    rows: torch.Tensor,
    weight: torch.Tensor,
    expert_ends: torch.Tensor,
    row_scales: torch.Tensor,
    weight_scales: torch.Tensor,
) -> torch.Tensor:
    """Torch's grouped GEMM of fp8 rows (C, in) and weights (L, in, out), a scale a row and an output: (C, out) bfloat16."""
    if not hasattr(torch, "_scaled_grouped_mm"):
        raise RuntimeError(
            f"epops.grouped_mm: row_scales: expected a torch with _scaled_grouped_mm, got {torch.__version__}; use bfloat16 rows"
        )
    return torch._scaled_grouped_mm(rows, weight, row_scales, weight_scales, offs=expert_ends, out_dtype=torch.bfloat16)


def is_capturing() -> bool:
    """Whether the current CUDA stream is being captured into a graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def preserve_node_ordering(graph: torch.fx.Graph, after: dict[torch.fx.Node, Any]) -> None:
    """Make each key of ``after`` run after the nodes of its value, through Inductor's scheduler and memory planner too."""
    from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering as preserve
    from torch.utils._ordered_set import OrderedSet

    preserve(graph, {node: OrderedSet(before) for node, before in after.items()})


def is_joint(graph: torch.fx.Graph) -> bool:
    """Whether a graph is that of forward and backward together: it takes the gradients of its own results."""
    return any(map(is_tangent, graph.nodes))


def is_tangent(node: torch.fx.Node) -> bool:
    """Whether a node of a joint graph is the gradient of a result, one of its inputs."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def is_control_deps(node: torch.fx.Node) -> bool:
    """Whether ``node`` is Inductor's ordering wrapper around another node."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "control_deps"


def traced(function: Any, fakes: Any) -> torch.fx.Graph:
    """The graph of ``function(*fakes)`` in the operators that Inductor's passes see; inputs are fake tensors."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = torch._guards.detect_fake_mode(fakes)
    assert mode is not None, "fake tensors have a mode"
    with mode, torch.no_grad():
        module = make_fx(function, decomposition_table=select_decomp_table())(*fakes)
    module.graph.eliminate_dead_code()
    return module.graph


def private_backend(kind: str, process_group: Any, prefix: str, timeout: float) -> Any:
    """A gloo or nccl communicator of our own over the ranks of ``process_group``, named by ``prefix`` on all of them.

    ``new_group`` is not used: without the whole world it names a group after how many groups a rank holds, so that ranks with
    different histories never meet, and a name freed by a destroyed group leads to that group's dead addresses.
    """
    from datetime import timedelta

    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    store = dist.PrefixStore(prefix, distributed_c10d._get_default_store())
    rank, size = process_group.rank(), process_group.size()
    if kind == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=timeout))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout)
    return dist.ProcessGroupNCCL(store, rank, size, options)


_kept: set[int] = set()


def never_destroy(communicator: Any) -> None:
    """Keep ``communicator`` until the process has ended, past Python's own end.

    Since NCCL 2.26 a communicator's destructor waits until every CUDA graph that holds its exchanges is gone
    (docs.nvidia.com/dl-cuda-graph, Process Hang).  Nothing says in which order Python drops graphs and communicators, so one
    that a graph holds is never dropped.
    """
    import ctypes

    if id(communicator) not in _kept:
        _kept.add(id(communicator))
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(communicator))


def private_store(prefix: str) -> Any:
    """The default store under ``prefix``: what ranks tell each other before they have a communicator.

    Its timeout stays the user's: wait for a key with ``store.wait([key], timeout)`` before reading it.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    return dist.PrefixStore(prefix, distributed_c10d._get_default_store())


def graphs_backend(seen: Any, *, run: bool) -> Any:
    """A backend for torch.compile that goes Inductor's way to where its passes after autograd begin, and stops there.

    ``seen(module, kind)`` gets each graph, "joint", "inference", "forward" or "backward", as the custom pass before Inductor's own
    sees it, and may change it.  ``run``: graphs then run node by node; otherwise they return zeros of the right shapes.
    """
    from torch._functorch import config as aot_config
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.custom_graph_pass import CustomGraphPass

    def apply(custom: Any, graph: torch.fx.Graph) -> None:
        for entry in custom if isinstance(custom, (list, tuple)) else () if custom is None else (custom,):
            entry(graph)

    class Joint(CustomGraphPass):
        def __init__(self, earlier: Any) -> None:
            self.earlier = earlier

        def __call__(self, graph: torch.fx.Graph) -> None:
            apply(self.earlier, graph)
            if is_joint(graph):
                seen(graph.owning_module, "joint")

        def uuid(self) -> Any:
            return None

    from torch._inductor.fx_passes import post_grad

    def inner(module: torch.fx.GraphModule, inputs: Any, **settings: Any) -> Any:
        inference = bool(settings.get("is_inference", False))
        post_grad.view_to_reshape(module)
        module.graph.eliminate_dead_code()
        if inference and config.reorder_for_locality:
            post_grad.reorder_for_locality(module.graph)
        apply(config.post_grad_custom_pre_pass, module.graph)
        seen(module, "inference" if inference else "backward" if settings.get("is_backward", False) else "forward")
        module.recompile()
        outputs = next(iter(reversed(module.graph.nodes))).args[0]

        def call(args: list[Any]) -> Any:
            given = list(args)
            args.clear()
            if run:
                return _NodeByNode(module).run(*given)
            return [_zeros_like(getattr(node, "meta", {}).get("val", node)) for node in outputs]

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        joint = Joint(config.joint_custom_pre_pass)
        settings = config.patch(fx_graph_cache=False, joint_custom_pre_pass=joint)
        with aot_config.patch(enable_autograd_cache=False), settings:
            return compile_fx(module, inputs, inner_compile=inner)

    return backend


class _NodeByNode(torch.fx.Interpreter):
    """Runs a graph in its order.  Ordering wrappers are looked through: torch 2.11 has no kernel that runs them."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "__name__", "") == "control_deps":
            _, wrapped, *rest = args
            return wrapped(*rest, **kwargs)
        return super().call_function(target, args, kwargs)


def _zeros_like(fake: Any) -> Any:
    """Zeros of the sizes that a fake tensor has in this run; a symbolic number as that number."""

    def number(size: Any) -> int:
        hint = size if isinstance(size, int) else getattr(size.node, "hint", None)
        return 1 if hint is None else int(hint)

    if isinstance(fake, torch.Tensor):
        sizes, strides = [[number(item) for item in items] for items in (fake.shape, fake.stride())]
        return torch.empty_strided(sizes, strides, dtype=fake.dtype, device=fake.device).zero_()
    return number(fake) if isinstance(fake, torch.SymInt) else fake


def eager_backward_compile() -> Any:
    """Context in which the backward is compiled with the forward, so that both are in the cache when the first rank is done."""
    import contextlib

    from torch._functorch import config

    if hasattr(config, "force_non_lazy_backward_lowering"):
        return config.patch(force_non_lazy_backward_lowering=True)
    return contextlib.nullcontext()


def on_compile(begin: Any, end: Any) -> list[Any] | None:
    """Have ``begin`` and ``end`` called around every compile of this process, until ``torch.compiler.reset``.

    Returns the list of what is called when one begins, which a reset empties; None where torch does not say when it compiles.
    """
    try:
        from torch._dynamo.callback import callback_handler
    except ImportError:
        return None
    callback_handler.register_start_callback(begin)
    callback_handler.register_end_callback(end)
    return callback_handler.start_callbacks


def is_compile_pending() -> bool | None:
    """Whether a compile has begun whose end torch will tell; None where torch does not count them."""
    try:
        from torch._dynamo.callback import callback_handler
    except ImportError:
        return None
    pending = getattr(callback_handler, "_CompilationCallbackHandler__pending_callbacks_counter", None)
    return None if pending is None else pending > 0


def symmetric_empty(num_bytes: int, device: torch.device) -> torch.Tensor:
    """(num_bytes,) uint8 on ``device`` that peers can map; see `symmetric_addresses`."""
    from torch.distributed import _symmetric_memory

    return _symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)


# With "1", torch maps memory of GPUs that it takes for one: it tells the ranks' GPUs apart by host and number alone.
OVERLAPPING_GPUS = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"


def symmetric_addresses(tensor: torch.Tensor, process_group: Any) -> tuple[Any, list[int]]:
    """Map the tensors that all ranks of ``process_group`` made by `symmetric_empty`: a handle to keep, and an address a rank."""
    from torch._C._distributed_c10d import _SymmetricMemory

    handle = _SymmetricMemory.rendezvous(tensor, process_group.group_name)
    return handle, [int(pointer) for pointer in handle.buffer_ptrs]


def fsdp_parameters(model: torch.nn.Module) -> set[tuple[int, str]]:
    """(id of the module, name) of every parameter that ``fully_shard`` manages below ``model``."""
    if not torch.distributed.is_available():
        return set()
    from torch.distributed.fsdp import FSDPModule

    found = set()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
            for group in groups:
                for parameter in group.fsdp_params if group is not None else ():
                    info = parameter._module_info
                    found.add((id(info.module), info.param_name))
    return found


def fake_world(size: int) -> None:
    """Make the default process group one of ``size`` ranks that are not there: graphs are captured over it, nothing is sent."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)


def below_autograd() -> Any:
    """Context in which the dispatcher passes the autograd keys by; for calls whose gradient is somebody else's work."""
    return torch._C._AutoDispatchBelowAutograd()


def transforms_active() -> bool:
    """Whether a transform of torch.func (vmap, grad, functionalize) is running."""
    return torch._C._are_functorch_transforms_active()
