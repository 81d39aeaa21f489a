"""The grammar of `targets=`, `exclude=` and `trainable=`: from regexes, suffixes and predicates to modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias, cast

from torch import nn

from glora.config import GLoRAConfig
from glora.model.modules import NamedModule
from glora.spec import LayerSpec
from glora.text import format_names

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
Selection: TypeAlias = str | Sequence[str] | Predicate
Targets: TypeAlias = Selection | Mapping[str, GLoRAConfig]
Trainable: TypeAlias = str | Sequence[str | nn.Module] | Predicate | nn.Module

ALL_LINEAR = "all-linear"


def choose(found: list[NamedModule], targets: Targets, config: GLoRAConfig | None) -> tuple[dict[int, LayerSpec], bool]:
    """The linear layers that `targets=` reaches.

    Returns:
        Module id to what the layer gets, and whether the targets name their layers (a list or a mapping) or sweep them
        in.

    Raises:
        ValueError: a target that matches nothing, a mapping's key that is wholly shadowed by earlier ones, a config
            beside a mapping, a value of the wrong kind.
    """
    if isinstance(targets, Mapping):
        if config is not None:
            raise ValueError(
                "targets= as a mapping gives each pattern its own config, and config= was given beside it. "
                "Drop config=, or put it in the mapping."
            )
        return dict(_choose_by_mapping(found, cast("Mapping[str, GLoRAConfig]", targets))), True
    config = GLoRAConfig() if config is None else config
    if not isinstance(config, GLoRAConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"config= must be a glora.GLoRAConfig or None; found {config!r}.")
    matched = select(found, targets, "targets", nn.Linear)
    if not matched:
        raise ValueError(
            f"targets= must reach at least one nn.Linear; found {targets!r}, in a model with "
            f"{sum(isinstance(f.module, nn.Linear) for f in found)} of them."
        )
    layer = LayerSpec(config)
    return {id(f.module): layer for f in matched}, not (isinstance(targets, str) or callable(targets))


def _choose_by_mapping(found: list[NamedModule], targets: Mapping[str, GLoRAConfig]) -> Iterator[tuple[int, LayerSpec]]:
    if not targets:
        raise ValueError("targets= must reach at least one nn.Linear; found an empty mapping.")
    taken: set[int] = set()
    for pattern, config in targets.items():
        if not isinstance(pattern, str) or not isinstance(config, GLoRAConfig):  # pyright: ignore
            raise ValueError(f"targets= as a mapping goes from regex to GLoRAConfig; found {pattern!r}: {config!r}.")
        matched = select(found, pattern, "targets", nn.Linear)
        new = [id(f.module) for f in matched if id(f.module) not in taken]
        if not new:
            raise ValueError(
                f"The first pattern of targets= that matches a layer gives its config; every layer that {pattern!r} "
                f"matches ({format_names(f.path for f in matched)}) is taken by an earlier one. Move it forward, "
                f"or drop it."
            )
        taken.update(new)
        spec = LayerSpec(config)
        yield from ((layer, spec) for layer in new)


def select(
    found: list[NamedModule], selection: Trainable | Targets, role: str, kind: type[nn.Module]
) -> list[NamedModule]:
    """The modules of a kind that a selection reaches; every entry, pattern or predicate must reach at least one.

    Args:
        found: the model's modules.
        selection: a regex that matches a whole path, a list of path suffixes (whole dotted components; for trainable=
            modules too), a predicate `(path, module) -> bool`, or "all-linear".
        role: the argument's name, for messages.
        kind: nn.Linear, or nn.Module for trainable=.
    """
    of_kind = [f for f in found if isinstance(f.module, kind)]
    if isinstance(selection, nn.Module):
        selection = [selection]
    if isinstance(selection, str):
        if selection == ALL_LINEAR:
            return [f for f in found if isinstance(f.module, nn.Linear)]
        return _match(of_kind, found, selection, role, _regex(selection, role))
    if callable(selection):
        matched = [f for f in of_kind if any(selection(path, f.module) for path in f.aliases)]
        if not matched:
            raise ValueError(f"{role}= must reach at least one module; the predicate was False for all {len(of_kind)}.")
        return matched
    if isinstance(selection, Mapping) or not isinstance(selection, Iterable):  # pyright: ignore
        raise ValueError(
            f"{role}= must be a regex, a list of path suffixes, a predicate (path, module) -> bool or {ALL_LINEAR!r}; "
            f"found {selection!r}."
        )
    reached: set[int] = set()
    for entry in selection:
        if isinstance(entry, nn.Module) and role == "trainable":
            if not any(f.module is entry for f in found):
                raise ValueError(
                    f"trainable= must hold modules of the model; found a {type(entry).__name__} outside it."
                )
            reached.add(id(entry))
        elif isinstance(entry, str) and entry:
            reached.update(id(f.module) for f in _match(of_kind, found, entry, role, _suffix(entry)))
        else:
            raise ValueError(f"{role}= as a list must hold path suffixes; found {entry!r}.")
    return [f for f in of_kind if id(f.module) in reached]


def _match(
    of_kind: list[NamedModule], found: list[NamedModule], text: str, role: str, test: Callable[[str], bool]
) -> list[NamedModule]:
    matched = [f for f in of_kind if any(test(path) for path in f.aliases)]
    if matched:
        return matched
    rule = f"{role}= must match at least one module; {text!r} matches"
    others = [f for f in found if any(test(path) for path in f.aliases)]
    if others:
        inside = [f for f in others if any(isinstance(module, nn.Linear) for module in f.module.modules())]
        below = re.escape(inside[0].path) + r"\..*" if inside else ""
        raise ValueError(
            f"{rule} no nn.Linear, only {format_names(dict.fromkeys(type(f.module).__name__ for f in others))} "
            f"({format_names(f.path for f in others)}). "
            + (
                f"Name the linear layers below it, with a regex such as {below!r}."
                if inside
                else "Only nn.Linear and its subclasses can be adapted; train others as a whole with trainable=."
            )
        )
    is_list = test.__name__ == "suffix"
    hint = "" if is_list else f"A string is a regex for the whole path; for path suffixes pass a list, [{text!r}]. "
    words = re.findall(r"\w{3,}", text)
    near = [f.path for f in of_kind if any(word in f.path for word in words)]
    raise ValueError(f"{rule} none. {hint}There are: {format_names(near or (f.path for f in of_kind))}.")


def _regex(pattern: str, role: str) -> Callable[[str], bool]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{role}= as a string must be a regex; {pattern!r} is none ({error}).") from error

    def regex(path: str) -> bool:
        return compiled.fullmatch(path) is not None

    return regex


def _suffix(entry: str) -> Callable[[str], bool]:
    def suffix(path: str) -> bool:
        return path == entry or path.endswith(f".{entry}")

    return suffix


def output_embeddings(found: list[NamedModule]) -> set[int]:
    """Ids of the modules that the models in the tree call their output embeddings (as transformers' models do).

    `"all-linear"` leaves them out, as PEFT does: an output embedding is large, and often tied to the input's.
    """
    outputs: set[int] = set()
    for f in found:
        getter = getattr(f.module, "get_output_embeddings", None)
        if callable(getter):
            try:
                outputs.add(id(getter()))
            except (AttributeError, NotImplementedError):  # a base class's stub: this model has none
                continue
    return outputs
