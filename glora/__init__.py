r"""GLoRA: five small trainable paths on any frozen linear layer, through `torch.nn.utils.parametrize`.

$$W' = W_0 + W_0 \ast A + B, \qquad b' = b_0 + b_0 \odot D + E + W_0 C$$

Source: "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", arXiv 2306.07967.
"""

from glora import functional, ways
from glora.adapters import activate, adapters, disabled, merged, named_parameters, parameters, reset_parameters
from glora.attach import apply, delete, merge, remove
from glora.checkpoint import base_state_dict, load_state_dict, state_dict
from glora.config import GLoRAConfig
from glora.files import load, save
from glora.planning import Plan, plan
from glora.record import AdapterFileError
from glora.routing import route
from glora.summaries import Summary, summary

__version__ = "0.1.0"

__all__ = [
    "AdapterFileError",
    "GLoRAConfig",
    "Plan",
    "Summary",
    "activate",
    "adapters",
    "apply",
    "base_state_dict",
    "delete",
    "disabled",
    "functional",
    "load",
    "load_state_dict",
    "merge",
    "merged",
    "named_parameters",
    "parameters",
    "plan",
    "remove",
    "reset_parameters",
    "route",
    "save",
    "state_dict",
    "summary",
    "ways",
]
