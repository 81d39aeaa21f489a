"""TRL's trainers with the base model as their reference, without a second model in memory."""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import sys
from typing import Any, cast

from torch import nn

from glora.model.adapters import adapters
from glora.model.change import refuse_while_swapped
from glora.model.merge import remove
from glora.model.walk import Model
from glora.text import format_names
from glora.undo import undone

# Note [The base as a reference]
# DPO, KTO and GRPO compare the model with a reference: the base, for an adapter that starts from it. `glora.disabled`
# around a forward pass gives the base, but TRL replaces the `forward` of the model that it is given, and of the
# reference: a module that forwards under `disabled` is bypassed, and the model compared with itself (rewards of exactly
# 0). So the reference is a model of its own: other modules, the same frozen tensors, no adapters. Nothing is switched,
# so that graphs that are pending and other threads see nothing of it.
_CREATE = "create_model_from_path"


def reference(model: Model) -> Model:
    """The base model, as a model of its own that shares the frozen tensors: DPO's and KTO's `ref_model=`, say.

    It has plain modules, no adapters and no `trainable=` heads, and is in eval mode. It takes no memory but its
    modules', and follows the tensors where they are moved in place (`model.to`). A `forward` that was put on an
    instance (by a trainer before) is left out; accelerate's hooks are kept.

    Args:
        model: the adapted model; its base must be frozen. Not under fully_shard, FSDP or DeepSpeed, which hold tensors
            for one model alone.

    Returns:
        The base model.

    Raises:
        ValueError: no adapters; parameters of the base that train, so that it would not stay what it is.
        RuntimeError: inside `glora.merged` or `glora.route`.

    Example:
        >>> import torch, glora
        >>> base = torch.nn.Linear(4, 2).requires_grad_(False)
        >>> x = torch.randn(3, 4)
        >>> before = base(x)
        >>> model = glora.apply(base, config=glora.GLoRAConfig(init="random"))
        >>> torch.equal(reference(model)(x), before), torch.equal(model(x), before)
        (True, False)
    """
    if not adapters(model):
        raise ValueError("A reference is the base model under adapters; found a model without any. Call glora.apply.")
    refuse_while_swapped(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def freeze_again() -> None:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad = flag

    shared: dict[int, Any] = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    base = copy.deepcopy(model, shared)
    with undone(freeze_again):
        remove(base)  # with the flags from before the first `apply`
    training = [key for key, parameter in base.named_parameters() if parameter.requires_grad]
    if training:
        raise ValueError(
            f"A reference must stay as it is, and shares the base model's tensors; {format_names(training)} train. "
            f"Freeze them (freeze=True), or give the trainer a model of its own as the reference."
        )
    for module in base.modules():
        if "_hf_hook" not in vars(module):
            vars(module).pop("forward", None)
    return base.eval()


class BaseReference:
    """A mixin of TRL's trainers: the reference of an adapted model is its base, which stands in memory once.

    For DPO, KTO, GRPO and RLOO, and others that make their reference themselves or take it as `ref_model`. (One that
    needs no reference, as GRPO with `beta=0`, makes none.) Metrics, losses and gradients are those of a separately
    loaded base.

    Raises:
        ValueError: while the trainer is made: as `reference` raises; `sync_ref_model=True`, since a base does not
            follow the model; another `ref_model`.
        RuntimeError: FSDP or DeepSpeed; a trainer that neither takes a reference nor makes one as these do.

    Example:
        >>> from trl import GRPOTrainer  # doctest: +SKIP
        >>> class Trainer(BaseReference, GRPOTrainer):  # doctest: +SKIP
        ...     pass
        >>> Trainer(model, reward_funcs=reward, args=args, train_dataset=data).train()  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        init = cast("Any", super()).__init__
        given = inspect.signature(init).bind_partial(model, *args, **kwargs)
        _check(given.arguments)
        if "ref_model" in inspect.signature(init).parameters:
            given.arguments["ref_model"] = reference(model)
            init(*given.args, **given.kwargs)
            return
        # TRL makes a reference by a function that the module of each trainer has imported.
        modules = [sys.modules[name] for name in dict.fromkeys(kind.__module__ for kind in type(self).__mro__)]
        before = {module: vars(module)[_CREATE] for module in modules if _CREATE in vars(module)}
        if not before:
            raise RuntimeError(
                f"The base as a reference is for trainers that take a ref_model, or make one as TRL's GRPO does; found "
                f"{type(self).__name__}, which does neither. See glora.integrations.trl.reference."
            )

        def create(*_: object, **__: object) -> nn.Module:
            return reference(model)

        def give_back() -> None:
            for module, function in before.items():
                setattr(module, _CREATE, function)

        with undone(give_back):
            for module in before:
                setattr(module, _CREATE, create)
            init(*given.args, **given.kwargs)


def _check(given: dict[str, Any]) -> None:
    """Refuse what cannot be, before the trainer is made."""
    model, args = given["model"], given.get("args")
    if not isinstance(model, nn.Module):
        raise ValueError(f"The base as a reference needs the adapted model itself; found {model!r}. Load it first.")
    if given.get("ref_model") is not None:
        raise ValueError("The reference is the base model; found another ref_model. Leave it out, or the mixin.")
    if getattr(args, "sync_ref_model", False):
        raise ValueError(
            "The base as a reference stays as it is; found sync_ref_model=True, which moves the reference towards the "
            "model. Set it to False, or leave the mixin out."
        )
    flags = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    if any(getattr(args, name, None) for name in ("fsdp", "deepspeed")) or any(
        os.environ.get(f) == "true" for f in flags
    ):
        raise RuntimeError(
            "The base as a reference shares its tensors with the model; found FSDP or DeepSpeed, which hold tensors "
            "for one model alone. Leave the mixin out: TRL then loads a reference of its own."
        )
