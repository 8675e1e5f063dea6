"""Plain PyTorch models with routed experts, as people write them; none knows of epops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

H, I, E, K = 16, 24, 5, 2  # noqa: E741


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(H, I)
        self.w2 = nn.Linear(I, H, bias=False)
        self.w3 = nn.Linear(H, I, bias=False)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class OneHotLoop(nn.Module):
    """A mask of (E, K, T), where and index_add_, router logits beside the result."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList([MLP() for _ in range(E)])

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, width = hidden_states.shape
        hidden_states = hidden_states.view(-1, width)
        logits = self.gate(hidden_states)
        weights, chosen = torch.topk(F.softmax(logits, dim=1), K, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        result = torch.zeros_like(hidden_states)
        mask = F.one_hot(chosen, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            place, token = torch.where(mask[e])
            if token.numel() == 0:
                continue
            state = hidden_states[None, token].reshape(-1, width)
            result.index_add_(0, token, self.experts[e](state) * weights[token, place, None])
        return result.reshape(batch, length, width), logits


class EnumerateLoop(nn.Module):
    """enumerate over the list, += into rows, a shared expert afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(H, I), nn.GELU(), nn.Linear(I, H)) for _ in range(E)])
        self.shared = MLP()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, H)
        scores = torch.sigmoid(self.router(flat))
        top, idx = scores.topk(K, dim=-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            token, k = torch.where(idx == i)
            out[token] += top[token, k].unsqueeze(-1) * expert(flat[token])
        return (out + self.shared(flat)).view_as(x)


class MethodLoop(EnumerateLoop):
    """The loop in a method that forward calls, with other names, and rows that are added in one statement of three."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, H)
        top, idx = torch.sigmoid(self.router(flat)).topk(K, dim=-1)
        y, hit = self._mix(flat, selected=idx, scores=2 * top)
        return (y + self.shared(flat)).view_as(x) + 0 * hit

    def _mix(self, rows: Tensor, selected: Tensor, scores: Tensor, least: int = 0) -> tuple[Tensor, int]:
        """Nothing before and after it has a name of forward's."""
        result = torch.zeros_like(rows)
        for number in range(least, len(self.experts)):
            chosen = selected == number
            any_of = chosen.any(-1)
            weight = (scores * chosen).sum(-1, keepdim=True)[any_of]
            result[any_of] = result[any_of] + self.experts[number](rows[any_of]) * weight
        return result, E


class StackedInterleaved(nn.Module):
    """Experts in 3-D parameters, (in, out), gate and up interleaved, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E)
        self.w_up = nn.Parameter(torch.randn(E, H, 2 * I) * H**-0.5)
        self.w_up_bias = nn.Parameter(torch.randn(E, 2 * I))
        self.w_down = nn.Parameter(torch.randn(E, I, H) * I**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, H)
        probs, picked = self.router(flat).softmax(-1).topk(K, -1)
        y = flat.new_zeros(flat.shape)
        for e in range(E):
            rows, k = (picked == e).nonzero(as_tuple=True)
            h = flat[rows] @ self.w_up[e] + self.w_up_bias[e]
            h = F.silu(h[:, ::2]) * h[:, 1::2]
            y.index_add_(0, rows, (h @ self.w_down[e]) * probs[rows, k, None])
        return y.view(x.shape)


class Experts(nn.Module):
    """Experts stacked in 3-D parameters behind (x, weights, indices), computed for all experts at once."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(E, I, H) * H**-0.5)
        self.down = nn.Parameter(torch.randn(E, H, I) * I**-0.5)

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        every = torch.einsum("eth,edh->ted", torch.relu(torch.einsum("th,eih->eti", x, self.up)).square(), self.down)
        chosen = every.gather(1, indices[:, :, None].expand(-1, -1, x.shape[-1]))
        return (chosen * weights[:, :, None]).sum(1)


class Direct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, H)
        weights, indices = self.gate(flat).softmax(-1).topk(K, -1)
        return self.experts(flat, weights=weights, indices=indices).view_as(x)


class TitanRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)

    def forward(self, x: Tensor, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        scores = torch.sigmoid(self.gate(x).float())
        selected = torch.topk(scores + expert_bias, K, dim=1).indices
        counts = torch.histc(selected.view(-1).float(), bins=E, min=0, max=E)
        return scores.gather(1, selected), selected, counts


class TitanExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(E, I, H) * H**-0.5)
        self.w2 = nn.Parameter(torch.randn(E, H, I) * I**-0.5)
        self.w3 = nn.Parameter(torch.randn(E, I, H) * H**-0.5)
        self.use_grouped_mm = False

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
        parts = x.split([int(n) for n in num_tokens_per_expert])
        done = [(F.silu(p @ self.w1[e].T) * (p @ self.w3[e].T)) @ self.w2[e].T for e, p in enumerate(parts)]
        return torch.cat(done)


class Titan(nn.Module):
    """In the manner of torchtitan: rows sorted by expert, scored before or after."""

    score_before_experts = True

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts, self.shared_experts = TitanRouter(), TitanExperts(), MLP()
        self.register_buffer("expert_bias", torch.linspace(-0.1, 0.1, E))
        self.register_buffer("tokens_per_expert", torch.zeros(E), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, H)
        scores, selected, counts = self.router(flat, self.expert_bias)
        with torch.no_grad():
            self.tokens_per_expert.add_(counts)
        order = torch.argsort(selected.view(-1), stable=True)
        scored, token = scores.view(-1)[order, None], order // K
        rows = flat[token]
        rows = self.experts(rows * scored if self.score_before_experts else rows, counts)
        rows = rows if self.score_before_experts else rows * scored
        return self.shared_experts(flat).index_add(0, token, rows).view_as(x)


class TitanAfter(Titan):
    score_before_experts = False


class Capacity(nn.Module):
    """Drops tokens inside its loop: not a plain sum over experts, and to be refused."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList([MLP() for _ in range(E)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, H)
        weights, idx = self.gate(flat).softmax(-1).topk(K, -1)
        out = torch.zeros_like(flat)
        for e in range(E):
            token, k = torch.where(idx == e)
            token, k = token[:4], k[:4]
            out.index_add_(0, token, self.experts[e](flat[token]) * weights[token, k, None])
        return out.view_as(x)


class Stateful(nn.Module):
    """An expert with a norm of its own parameters, which cannot be stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList([nn.Sequential(nn.LayerNorm(H), nn.Linear(H, H)) for _ in range(E)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, H)
        weights, idx = self.gate(flat).softmax(-1).topk(K, -1)
        out = torch.zeros_like(flat)
        for e in range(E):
            token, k = torch.where(idx == e)
            out.index_add_(0, token, self.experts[e](flat[token]) * weights[token, k, None])
        return out.view_as(x)


class Shared(OneHotLoop):
    """Experts that are one module: each would get a copy of its own, and learn on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([self.experts[0]] * E)


class Model(nn.Module):
    """Two blocks of a kind, with a residual."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([kind(), kind()])
        self.head = nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block(x)
            x = x + (y[0] if isinstance(y, tuple) else y)
        return self.head(x)
