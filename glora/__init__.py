r"""GLoRA: five small trainable paths on any frozen linear layer, through `torch.nn.utils.parametrize`.

$$W' = W_0 + W_0 \ast A + B, \qquad b' = b_0 + b_0 \odot D + E + W_0 C$$

Source: "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", arXiv 2306.07967.
"""

import importlib
from typing import TYPE_CHECKING, Any

from glora import functional
from glora.arithmetic.combine import combine
from glora.arithmetic.extract import extract
from glora.config import GLoRAConfig
from glora.files.adapter import load, save
from glora.integrations import plain_trainer as plain_trainer  # hangs itself on the door
from glora.matrices import register_matrix
from glora.model.adapters import activate, adapters, disabled, named_parameters, parameters, reset_parameters
from glora.model.attach import apply
from glora.model.merge import delete, merge, merged, remove
from glora.model.plan import plan
from glora.model.rates import parameter_groups
from glora.model.records import Plan
from glora.model.route import route
from glora.model.state import base_state_dict, load_state_dict, state_dict
from glora.model.summary import Summary, summary
from glora.spec import AdapterFileError
from glora.version import __version__

if TYPE_CHECKING:
    from glora import integrations, interop, search

__all__ = [
    "AdapterFileError",
    "GLoRAConfig",
    "Plan",
    "Summary",
    "__version__",
    "activate",
    "adapters",
    "apply",
    "base_state_dict",
    "combine",
    "delete",
    "disabled",
    "extract",
    "functional",
    "integrations",
    "interop",
    "load",
    "load_state_dict",
    "merge",
    "merged",
    "named_parameters",
    "parameter_groups",
    "parameters",
    "plan",
    "register_matrix",
    "remove",
    "reset_parameters",
    "route",
    "save",
    "search",
    "state_dict",
    "summary",
]


def __getattr__(name: str) -> Any:
    """`glora.integrations`, `glora.interop` and `glora.search`, imported when they are first asked for."""
    if name in ("integrations", "interop", "search"):
        return importlib.import_module(f"glora.{name}")
    raise AttributeError(f"module 'glora' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The module's names, with those that are not imported yet."""
    return sorted({*globals(), *__all__})
