"""Expert modules that are alike, as one module over grouped rows: their linear layers become grouped GEMMs.

A plain model holds its experts as E modules of one class. `trace` reads what one of them does to a row and returns the
same graph with (L, …) stacked parameters, for rows that lie grouped by expert. Whatever couples rows, or holds parameters
that it cannot stack, is refused; `prove` runs both on random rows.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .adapter import refuse
from .experts import Rows, bias, linear

TRANSPOSES = ("t", "transpose", "mT", "T")


class _Tracer(fx.Tracer):
    """Traces into everything but torch's own modules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)


def gathered(rows: Rows, stacked: Tensor) -> Tensor:
    """A per-expert vector or scalar as a value a row, for elementwise use."""
    return bias(rows, stacked if stacked.dim() > 1 else stacked[:, None])


def trace(expert: nn.Module, where: str) -> fx.GraphModule:
    """The graph ``(rows) → y`` of an expert; parameters keep their names and shapes, to be replaced by stacked ones."""
    try:
        graph = _Tracer().trace(expert)
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise refuse(where, f"the expert {type(expert).__name__} cannot be traced: {said}") from error
    root = copy.copy(expert)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise refuse(
            where, f"expected an expert of one argument, its rows; {type(expert).__name__} takes {len(inputs)}"
        )
    with graph.inserting_before(inputs[0]):
        rows = graph.placeholder("rows")
    with graph.inserting_after(inputs[0]):
        x = graph.call_function(getattr, (rows, "x"))
    inputs[0].replace_all_uses_with(x)
    graph.erase_node(inputs[0])
    for node in list(graph.nodes):
        _rewrite(graph, node, rows, expert, where)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph.lint()
    return fx.GraphModule(root, graph)


def _rewrite(graph: fx.Graph, node: fx.Node, rows: fx.Node, expert: nn.Module, where: str) -> None:
    if node.op == "call_module":
        module = expert.get_submodule(str(node.target))
        held = list(module.parameters())
        if not held:
            return
        if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
            found = f"{type(module).__name__} with {len(held)} parameters"
            raise refuse(where, f"expected nn.Linear at {node.target} of an expert, got {found}")
        with graph.inserting_before(node):
            weight = graph.get_attr(f"{node.target}.weight")
            offset = graph.get_attr(f"{node.target}.bias") if module.bias is not None else None
            grouped = graph.call_function(linear, (rows, node.args[0], weight, offset), {"fused": True})
        node.replace_all_uses_with(grouped)
        graph.erase_node(node)
    elif node.op == "get_attr":
        _rewrite_parameter(graph, node, rows, expert, where)


def _rewrite_parameter(graph: fx.Graph, node: fx.Node, rows: fx.Node, expert: nn.Module, where: str) -> None:
    """A parameter that the expert's own forward reads."""
    value: Any = expert
    for part in str(node.target).split("."):
        value = getattr(value, part)
    for user in list(node.users):
        if user.op == "call_function" and user.target is linear:
            continue
        if value.dim() == 2 and _is_product(user, node):
            _rewrite_product(graph, user, node, rows, transposed=user.target is not F.linear)
        elif value.dim() == 2 and _is_transpose(user):
            for product in list(user.users):
                if not _is_product(product, user):
                    break
                _rewrite_product(graph, product, user, rows, transposed=product.target is F.linear, weight=node)
        elif value.dim() <= 1:
            with graph.inserting_before(user):
                user.replace_input_with(node, graph.call_function(gathered, (rows, node)))
        else:
            shape = tuple(value.shape)
            raise refuse(
                where, f"expected the {shape} parameter {node.target} in a product with rows, got {user.target}"
            )


def _is_product(user: fx.Node, weight: fx.Node) -> bool:
    targets = (F.linear, torch.matmul, torch.mm, operator.matmul)
    return user.op == "call_function" and user.target in targets and len(user.args) > 1 and user.args[1] is weight


def _is_transpose(user: fx.Node) -> bool:
    if user.op == "call_method":
        return user.target in TRANSPOSES
    return user.op == "call_function" and user.target is getattr and user.args[1] in TRANSPOSES


def _rewrite_product(
    graph: fx.Graph, user: fx.Node, operand: fx.Node, rows: fx.Node, *, transposed: bool, weight: fx.Node | None = None
) -> None:
    offset = user.args[2] if len(user.args) > 2 else user.kwargs.get("bias")
    with graph.inserting_before(user):
        flat = weight if weight is not None else operand
        grouped = graph.call_function(
            linear, (rows, user.args[0], flat, offset), {"transposed": transposed, "fused": True}
        )
    user.replace_all_uses_with(grouped)
    graph.erase_node(user)


def parameter_names(graph: fx.GraphModule) -> list[str]:
    """Parameters that the graph reads, in order, each once."""
    return list(dict.fromkeys(str(node.target) for node in graph.graph.nodes if node.op == "get_attr"))


def set_parameter(root: nn.Module, path: str, value: nn.Parameter) -> None:
    """Put ``value`` where ``path`` leads, making plain modules on the way where there are none."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.register_parameter(name, value)


def prove(graph: fx.GraphModule, experts: list[nn.Module], where: str) -> None:
    """Run the graph, with the first experts stacked, and the experts themselves on random rows; raise if they differ."""
    samples = [sample(expert) for expert in experts[:2]]
    hidden = _input_size(graph, samples[0], where)
    counts = [3, 2][: len(samples)]
    x = torch.randn(sum(counts), hidden, generator=torch.Generator().manual_seed(0))
    stacked = fx.GraphModule(copy.deepcopy(samples[0]), graph.graph)
    for name in parameter_names(graph):
        set_parameter(stacked, name, nn.Parameter(torch.stack([s.get_parameter(name).detach() for s in samples])))
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    slots = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(counts)).to(torch.int32)
    stacked.eval()
    with torch.no_grad():
        got = stacked(Rows(x, torch.ones(len(x)), slots, ends))
        expected = torch.cat([s(part) for s, part in zip(samples, x.split(counts))])
    if got.shape != expected.shape or not torch.allclose(
        got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    ):
        raise refuse(where, f"the expert {type(experts[0]).__name__} over grouped rows differs from the expert itself")


def sample(module: nn.Module) -> nn.Module:
    """A float32 CPU copy in eval mode that a probe can run.  Of a meta module: random values that take next to no memory."""
    if not any(p.is_meta for p in module.parameters()):
        return copy.deepcopy(module).to(device="cpu", dtype=torch.float32).eval()
    copied = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    for owner in copied.modules():
        for name, tensor in list(owner._parameters.items()):
            if tensor is not None:
                owner._parameters[name] = nn.Parameter(_thin(tensor, generator))
        for name, tensor in list(owner._buffers.items()):
            if tensor is not None:
                zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
                owner._buffers[name] = _thin(tensor, generator) if tensor.is_floating_point() else zeros
    return copied.eval()


def _thin(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random float32 values, constant along the last dim of a matrix, which is then stored once."""
    if like.dim() < 2:
        return torch.randn(like.shape, generator=generator)
    return (torch.randn((*like.shape[:-1], 1), generator=generator) * like.shape[-1] ** -0.5).expand(like.shape)


def _input_size(graph: fx.GraphModule, expert: nn.Module, where: str) -> int:
    """Columns of the rows: what the first product with them takes."""
    x = next(node for node in graph.graph.nodes if node.target is getattr and node.args[1] == "x")
    for node in graph.graph.nodes:
        if node.target is linear and node.args[1] is x:
            weight = expert.get_parameter(str(node.args[2].target))
            return weight.shape[0] if node.kwargs.get("transposed") else weight.shape[1]
    raise refuse(where, f"the input of the expert {type(expert).__name__} goes into no linear layer")


class StackedExperts:
    """Expert modules of one container, ready to become one grouped module: what an adapter's plan is made of."""

    CHILD = "stacked"

    def __init__(self, experts: dict[str, nn.Module], where: str) -> None:
        """``experts``: path of each below the module that is planned for, in the order of expert ids."""
        self.paths = list(experts)
        modules = list(experts.values())
        kinds = {type(module).__name__ for module in modules}
        shapes = [{n: tuple(p.shape) for n, p in module.named_parameters()} for module in modules]
        if len(kinds) > 1 or any(shape != shapes[0] for shape in shapes):
            found = [shape for i, shape in enumerate(shapes) if shape not in shapes[:i]][:2]
            raise refuse(where, f"expected experts of one class and shape, got {sorted(kinds)} with parameters {found}")
        parameters = [p for module in modules for p in module.parameters()]
        if len({id(p) for p in parameters}) < len(parameters):
            raise refuse(
                where, f"expected experts with parameters of their own, got {kinds.pop()} modules that share some"
            )
        if any(True for _ in modules[0].buffers()):
            raise refuse(where, f"the expert {type(modules[0]).__name__} has buffers, which cannot be stacked")
        self.graph = trace(modules[0], where)
        self.parameters = parameter_names(self.graph)
        unread = sorted(set(shapes[0]) - set(self.parameters))
        if unread:
            raise refuse(where, f"the expert's forward does not read its parameters {unread}")
        prove(self.graph, modules, where)

    def names(self) -> dict[str, tuple[str, ...]]:
        """`Plan.names`: stacked tensor → the unsharded layout's tensors."""
        return {f"{self.CHILD}.{name}": tuple(f"{path}.{name}" for path in self.paths) for name in self.parameters}

    def adopt(self, module: nn.Module) -> fx.GraphModule:
        """Put the grouped module, whose parameters are on ``module`` already, in the place of the experts."""
        graph = self.graph
        stacked = module.get_submodule(self.CHILD)
        for name in self.parameters:
            set_parameter(graph, name, stacked.get_parameter(name))
        for path in self.paths:
            parent, _, name = path.rpartition(".")
            del module.get_submodule(parent)._modules[name]
        module._modules[self.CHILD] = graph
        graph.train(module.training)
        return graph
