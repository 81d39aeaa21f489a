"""LyCORIS's own modules on drawn layers, and what they compute."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn

MODULES = {
    "lora": ("locon", "LoConModule"),
    "loha": ("loha", "LohaModule"),
    "lokr": ("lokr", "LokrModule"),
    "glora": ("glora", "GLoRAModule"),
    "ia3": ("ia3", "IA3Module"),
    "full": ("full", "FullModule"),
}
LAYERS: dict[str, Any] = {
    "linear": lambda i, o, bias: nn.Linear(i, o, bias=bias),
    "conv1d": lambda i, o, bias: nn.Conv1d(i, o, 3, padding=1, bias=bias),
    "conv2d 1x1": lambda i, o, bias: nn.Conv2d(i, o, 1, bias=bias),
    "conv2d 3x3": lambda i, o, bias: nn.Conv2d(i, o, 3, stride=2, padding=1, bias=bias),
    "conv2d 3x1": lambda i, o, bias: nn.Conv2d(i, o, (3, 1), padding=(1, 0), bias=bias),
    "conv3d": lambda i, o, bias: nn.Conv3d(i, o, (1, 2, 2), bias=bias),
    "grouped": lambda i, o, bias: nn.Conv2d(2 * i, 2 * o, 3, padding=1, groups=2, bias=bias),
    "depthwise": lambda i, _, bias: nn.Conv2d(i, i, 3, padding=1, groups=i, bias=bias),
}
INPUTS = {"linear": (5,), "conv1d": (5,), "conv3d": (3, 4, 5)}  # behind batch and channels; in front of a linear's


def module_of(algorithm: str) -> Any:
    file, name = MODULES[algorithm]
    return getattr(importlib.import_module(f"lycoris.modules.{file}"), name)


class Holder(nn.Module):
    """Layers under paths with dots and underscores."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.in_blocks = nn.ModuleList(layers)


@dataclass(frozen=True)
class Case:
    """One layer with one of LyCORIS's modules on it."""

    algorithm: str
    layer: str
    channels: tuple[int, int]
    rank: int
    alpha: float
    bias: bool
    seed: int
    options: dict[str, Any] = field(default_factory=dict)

    def model(self) -> Holder:
        torch.manual_seed(self.seed)
        return Holder(LAYERS[self.layer](*self.channels, self.bias)).eval()

    def input(self) -> Tensor:
        torch.manual_seed(self.seed + 1)
        model = self.model().in_blocks[0]
        if isinstance(model, nn.Linear):
            return torch.randn(2, 5, model.in_features)
        return torch.randn(2, model.in_channels, *INPUTS.get(self.layer, (5, 6)))

    def peer(self, prefix: str = "lycoris", model: Holder | None = None) -> Any:
        """LyCORIS's module with random tensors, as after training."""
        layer = (model or self.model()).in_blocks[0]
        torch.manual_seed(self.seed + 2)
        module = module_of(self.algorithm)(
            f"{prefix}_in_blocks_0", layer, lora_dim=self.rank, alpha=self.alpha, **self.options
        ).eval()
        if self.algorithm == "lokr" and module.use_w1 and module.use_w2:
            module.scale = 1.0  # as LyCORIS reads its file, which does not say the rank that rs_lora needs
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name == "dora_scale":
                    parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
                else:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return module

    def tensors(self, prefix: str = "lycoris") -> dict[str, Tensor]:
        """The file that LyCORIS writes."""
        module = self.peer(prefix)
        own = module.custom_state_dict() or module.state_dict()
        if self.algorithm == "full":
            own = {"diff": module.weight} | ({} if module.bias is None else {"diff_b": module.bias})
        return {f"{prefix}_in_blocks_0.{key}": tensor.detach().clone().contiguous() for key, tensor in own.items()}

    @torch.no_grad()
    def forward(self) -> Tensor:
        """What LyCORIS computes in a call."""
        model = self.model()
        module = self.peer(model=model)
        module.apply_to()
        try:
            return model.in_blocks[0](self.input())
        except RuntimeError as error:
            if self.algorithm == "lokr" and "view size" in str(error):
                reject()  # its own torch.kron takes no factor of these strides: there is nothing to compare with
            raise

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W' as LyCORIS computes it in its forward; its `get_merged_weight` scales LoHa and LoKr twice."""
        module = self.peer()
        if self.algorithm not in ("loha", "lokr"):
            return module.get_merged_weight()[0]
        weight = module.org_module[0].weight + module.get_weight(module.shape) * module.scalar
        return module.apply_weight_decompose(weight) if module.wd else weight


def cases(algorithms: Any = tuple(MODULES)) -> st.SearchStrategy[Case]:
    """Layers of every kind with every method that LyCORIS has on them."""

    @st.composite
    def draw_case(draw: st.DrawFn) -> Case:
        algorithm = draw(st.sampled_from(tuple(algorithms)))
        layers = [name for name in LAYERS if algorithm != "glora" or name not in ("grouped", "depthwise")]
        if algorithm == "ia3":
            layers = [name for name in layers if name not in ("grouped", "depthwise")]
        layer = draw(st.sampled_from(layers))
        options: dict[str, Any] = {}
        if algorithm in ("lora", "loha", "lokr"):
            options |= {"use_tucker": draw(st.booleans()), "weight_decompose": draw(st.booleans())}
            options |= {"wd_on_out": draw(st.booleans()), "rs_lora": draw(st.booleans())}
            options["use_scalar"] = draw(st.booleans())
        if algorithm == "glora":
            options["use_scalar"] = draw(st.booleans())
        if algorithm == "lokr":
            options |= {"decompose_both": draw(st.booleans()), "factor": draw(st.sampled_from([-1, 2, 3]))}
            options["full_matrix"] = draw(st.booleans())
        if algorithm == "ia3":
            options["train_on_input"] = draw(st.booleans())
        channels = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
        alpha = draw(st.sampled_from([1.0, 2.5, 4.0]))
        return Case(
            algorithm,
            layer,
            channels,
            draw(st.integers(1, 4)),
            alpha,
            draw(st.booleans()),
            draw(st.integers(0, 99)),
            options,
        )

    return draw_case()


def error_of(ours: Tensor, theirs: Tensor, base: Tensor) -> float:
    """The largest difference as a share of the largest effect, beside the rounding of the result in float32."""
    effect, rounding = float((theirs - base).abs().max()), 2e-6 * float(torch.maximum(base.abs(), theirs.abs()).max())
    error = float((ours - theirs).abs().max())
    assert error <= 1e-5 * effect + rounding, (error, effect, rounding)
    return error / effect if effect else 0.0
