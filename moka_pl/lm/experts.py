"""Experts whose weights are fused into one tensor, as linear layers of their own.

transformers keeps the matrices of a block's experts in parameters of three dimensions. Split, each expert has
layers that can be quantised and adapted like any other; the block then computes one expert after another.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moka_pl._compat import expert_gate

_KEYS = ("gate_up_proj", "up_proj", "down_proj")
_TRIED = 8


class SplitExperts(nn.ModuleDict):
    """The experts of one block by their numbers: ``y = Σ_e w_e · down_e(gate(gate_up_e(x)))``.

    Args:
        fused: The experts, each parameter (E, m, n), or (E, n, m) where it is transposed. The layers' weights
            are views of it unless it is transposed.
    """

    shell: Any  # the module that was split, which knows how to compute; no part of this one

    def __init__(self, fused: nn.Module) -> None:
        count = len(fused.down_proj)  # type: ignore[arg-type]
        super().__init__({str(number): nn.Module() for number in range(count)})
        for key, weights, bias in _parameters(fused):
            for number, weight in enumerate(stored(fused, weights.detach())):  # (m, n)
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
                layer.weight = nn.Parameter(weight, requires_grad=weights.requires_grad)
                if bias is not None:
                    layer.bias = nn.Parameter(bias.detach()[number], requires_grad=bias.requires_grad)
                self[str(number)].add_module(key, layer)
        object.__setattr__(self, "shell", fused)
        self.train(fused.training)

    def forward(self, hidden: Tensor, *routes: Tensor) -> Tensor:
        """Returns what the experts make of the tokens.

        Args:
            hidden: The tokens, shape (T, d); without routes those of the first expert, of the second, ….
            *routes: The experts of each token, (T, k), and their weights, (T, k); none in LLaMA 4.
        """
        if not routes:
            parts = hidden.view(len(self), -1, hidden.shape[-1])  # (E, T / E, d)
            return torch.cat([self._expert(number, part) for number, part in enumerate(parts)])
        index, weights = routes
        out = torch.zeros_like(hidden)
        hit = [number for number in torch.unique(index).tolist() if number < len(self)]
        for number in hit:
            token, slot = torch.where(index == number)  # (N,)
            made = self._expert(number, hidden[token]) * weights[token, slot, None]  # (N, d)
            out.index_add_(0, token, made.to(out.dtype))
        return out + self._unused(set(hit)).to(out.dtype) if torch.is_grad_enabled() else out

    def _expert(self, number: int, x: Tensor) -> Tensor:
        expert: Any = self[str(number)]
        if not hasattr(expert, "gate_up_proj"):
            inner = self.shell.act_fn(expert.up_proj(x))  # (N, m)
        elif (apply := expert_gate(self.shell)) is not None:
            inner = apply(expert.gate_up_proj(x))  # (N, m)
        else:
            gate, up = expert.gate_up_proj(x).chunk(2, dim=-1)  # (N, m) each
            inner = up * self.shell.act_fn(gate)  # (N, m)
        return expert.down_proj(inner)  # type: ignore[no-any-return]

    def _unused(self, hit: set[int]) -> Tensor:
        """Zero, for gradients of what is trained of experts without tokens: DDP waits for all of them."""
        kept = [p for key, expert in self.items() if int(key) not in hit for p in expert.parameters()]
        sums = [parameter.sum() for parameter in kept if parameter.requires_grad]
        return 0.0 * torch.stack(sums).sum() if sums else torch.zeros((), device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.parameters()).device

    def release(self) -> None:
        """Lets go of the fused weights."""
        for key, _, bias in list(_parameters(self.shell)):
            setattr(self.shell, key, None)
            if bias is not None:
                setattr(self.shell, f"{key}_bias", None)

    def fused(self) -> nn.Module:
        """Returns the module that was split, with the present weights."""
        for key in _KEYS:
            layers: list[Any] = [getattr(e, key) for e in self.values() if hasattr(e, key)]
            if not layers:
                continue
            weights = torch.stack([layer.weight.detach() for layer in layers])  # (E, m, n)
            required = layers[0].weight.requires_grad
            setattr(self.shell, key, nn.Parameter(stored(self.shell, weights), requires_grad=required))
            if layers[0].bias is not None:
                biases = torch.stack([layer.bias.detach() for layer in layers])  # (E, m)
                setattr(self.shell, f"{key}_bias", nn.Parameter(biases, requires_grad=required))
        return self.shell.train(self.training)  # type: ignore[no-any-return]


def stored(module: Any, weights: Tensor) -> Tensor:
    """Returns matrices (E, m, n) as the parameter of fused experts has them, or the other way round."""
    turned = getattr(module, "is_transposed", True)  # LLaMA 4 does not say that it multiplies from the left
    return weights.transpose(1, 2).contiguous() if turned else weights


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the names and modules of fused experts that can be split."""
    for name, module in model.named_modules():
        down = getattr(module, "down_proj", None)
        if not isinstance(down, nn.Parameter) or down.dim() != 3:
            continue
        computed = hasattr(module, "act_fn") or expert_gate(module) is not None
        if computed and not getattr(module, "has_post_expert_norm", False):
            yield name, module


def has_experts(model: nn.Module) -> bool:
    """Whether tokens of a model choose experts, split or fused."""
    split = any(isinstance(module, SplitExperts) for module in model.modules())
    return split or next(fused_experts(model), None) is not None


def split_names(model: nn.Module) -> list[str]:
    """Returns the names that the linear layers of fused experts would have."""
    return [
        f"{name}.{number}.{key}"
        for name, module in fused_experts(model)
        for number in range(len(module.down_proj))  # type: ignore[arg-type]
        for key, _, _ in _parameters(module)
    ]


def split_experts(model: nn.Module) -> None:
    """Splits the fused experts of a model, but for those that it cannot compute as they do themselves."""
    known: dict[type, bool] = {}
    for name, module in list(fused_experts(model)):
        split, kind = SplitExperts(module), type(module)
        if kind not in known:
            known[kind] = split.device.type == "meta" or _computes_alike(module, split)
        if known[kind]:
            split.release()
            model.set_submodule(name, split)


def fuse_experts(model: nn.Module) -> None:
    """Undoes :func:`split_experts` where all experts are plain linear layers."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SplitExperts):
            layers = [layer for expert in module.values() for layer in expert.children()]
            if all(type(layer) is nn.Linear for layer in layers):
                model.set_submodule(name, module.fused())


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter | None]]:
    """Yields the parameters of fused experts, with their biases."""
    for key in _KEYS:
        if isinstance(weights := getattr(module, key, None), nn.Parameter):
            yield key, weights, getattr(module, f"{key}_bias", None)


@torch.no_grad()
def _computes_alike(fused: Any, split: SplitExperts) -> bool:
    """Whether both make the same of a few random tokens."""
    expert: Any = split["0"]
    weight = expert.down_proj.weight  # (d, m)
    count, generator = len(split), torch.Generator().manual_seed(0)
    x = torch.randn(_TRIED * count, len(weight), generator=generator).to(weight)  # (T, d)
    routes: tuple[Tensor, ...] = ()
    if expert_gate(fused) is not None:
        index = torch.arange(2 * len(x), device=x.device).view(-1, 2) % count  # (T, 2)
        routes = (index, torch.full_like(index, 0.5, dtype=x.dtype))
    one, other = fused(x, *routes).float(), split(x, *routes).float()
    return bool((one - other).abs().max() <= 3e-2 * one.abs().max())
