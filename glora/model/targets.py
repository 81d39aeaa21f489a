"""The grammar of `targets=`, `exclude=` and `trainable=`: from regexes, suffixes and predicates to what they reach."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import TypeAlias, TypeVar, cast

from torch import nn

from glora.config import GLoRAConfig
from glora.model.walk import Owner, Site
from glora.spec import LayerSpec, join
from glora.text import brief, format_names

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
Selection: TypeAlias = str | Sequence[str] | Predicate
Targets: TypeAlias = Selection | Mapping[str, GLoRAConfig]
Trainable: TypeAlias = str | Sequence[str | nn.Module] | Predicate | nn.Module

Place = TypeVar("Place", Owner, Site)

ALL_LINEAR = "all-linear"


def choose(
    all_sites: list[Site], targets: Targets, config: GLoRAConfig | None, walk: list[Owner]
) -> tuple[dict[tuple[int, str], LayerSpec], bool]:
    """The matrices that `targets=` reaches.

    Returns:
        Key of a matrix to what it gets, and whether the targets name their layers (a list or a mapping) or sweep them
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
        return dict(_choose_by_mapping(all_sites, cast("Mapping[str, GLoRAConfig]", targets), walk)), True
    config = GLoRAConfig() if config is None else config
    if not isinstance(config, GLoRAConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"config= must be a glora.GLoRAConfig or None; found {brief(config)}. Pass an instance, as "
            f"glora.GLoRAConfig.lora(rank=8)."
        )
    matched = select(all_sites, targets, "targets", walk)
    if not matched:
        named_only = sorted({type(s.module).__name__ for s in all_sites if not s.matrix.swept})
        raise ValueError(
            f"targets= must reach at least one layer; found {targets!r}, in a model with "
            f"{sum(s.matrix.swept for s in all_sites)} of them."
            + (f" What is reached by name alone: {format_names(named_only)}." if named_only else "")
        )
    layer = LayerSpec(config)
    return {site.key: layer for site in matched}, not (isinstance(targets, str) or callable(targets))


def _choose_by_mapping(
    all_sites: list[Site], targets: Mapping[str, GLoRAConfig], walk: list[Owner]
) -> Iterator[tuple[tuple[int, str], LayerSpec]]:
    if not targets:
        raise ValueError("targets= must reach at least one layer; found an empty mapping.")
    taken: set[tuple[int, str]] = set()
    for pattern, config in targets.items():
        if not isinstance(pattern, str) or not isinstance(config, GLoRAConfig):  # pyright: ignore
            raise ValueError(
                f"targets= as a mapping goes from regex to GLoRAConfig; found {pattern!r}: {brief(config)}. Pass an "
                f"instance for each regex, as {{r'.*q_proj': glora.GLoRAConfig.lora(rank=8)}}."
            )
        matched = select(all_sites, pattern, "targets", walk)
        new = [site.key for site in matched if site.key not in taken]
        if not new:
            raise ValueError(
                f"The first pattern of targets= that matches a layer gives its config; every layer that {pattern!r} "
                f"matches ({format_names(site.path for site in matched)}) is taken by an earlier one. Move it forward, "
                f"or drop it."
            )
        taken.update(new)
        spec = LayerSpec(config)
        yield from ((key, spec) for key in new)


def select(places: list[Place], selection: Trainable | Targets, role: str, walk: list[Owner]) -> list[Place]:
    """The modules or matrices that a selection reaches; every entry, pattern or predicate must reach at least one.

    Args:
        places: what can be reached: all matrices, or for trainable= all modules.
        selection: a regex that matches a whole path, a list of path suffixes (whole dotted components; for trainable=
            modules too), a predicate `(path, module) -> bool`, or "all-linear".
        role: the argument's name, for messages.
        walk: all of the model, for messages.
    """
    if isinstance(selection, nn.Module):
        selection = [selection]
    if isinstance(selection, str):
        if selection == ALL_LINEAR:
            return [p for p in places if _is_swept(p)]
        return _without_embeddings(_match(places, walk, selection, role, _regex(selection, role)))
    if callable(selection) and not isinstance(selection, type):
        seen = _without_embeddings(places)
        matched = [p for p in seen if any(selection(path, p.module) for path in p.aliases)]
        if not matched:
            raise ValueError(f"{role}= must reach at least one module; the predicate was False for all {len(seen)}.")
        return matched
    if isinstance(selection, Mapping) or not isinstance(selection, Iterable):  # pyright: ignore
        raise ValueError(
            f"{role}= must be a regex, a list of path suffixes, a predicate (path, module) -> bool or {ALL_LINEAR!r}; "
            f"found {brief(selection)}. {_instead(selection, walk)}"
        )
    reached: set[int] = set()
    for entry in selection:
        if isinstance(entry, nn.Module) and role == "trainable":
            if not any(p.module is entry for p in places):
                raise ValueError(
                    f"trainable= must hold modules of the model; found a {type(entry).__name__} outside it."
                )
            reached.update(id(p) for p in places if p.module is entry)
        elif isinstance(entry, str) and entry:
            reached.update(id(p) for p in _match(places, walk, entry, role, _suffix(entry)))
        else:
            raise ValueError(
                f"{role}= as a list must hold path suffixes; found {brief(entry)}. {_instead(entry, walk)}"
            )
    return [p for p in places if id(p) in reached]


def _without_embeddings(matched: list[Place]) -> list[Place]:
    """What a regex or predicate reaches of these: embeddings only where there is nothing else."""
    others = [p for p in matched if not (isinstance(p, Site) and isinstance(p.module, nn.Embedding))]
    return others or matched


def _is_swept(place: Owner | Site) -> bool:
    return place.matrix.swept if isinstance(place, Site) else isinstance(place.module, nn.Linear)


def _match(places: list[Place], walk: list[Owner], text: str, role: str, test: Callable[[str], bool]) -> list[Place]:
    matched = [p for p in places if any(test(path) for path in p.aliases)]
    if matched:
        return matched
    rule = f"{role}= must match at least one module; {text!r} matches"
    others = [m for m in walk if any(test(path) for path in m.aliases)]
    others += [m for m in walk if any(test(join(path, name)) for path in m.aliases for name in m.tensors)]
    if others:
        kinds = format_names(dict.fromkeys(_kind(m.module) for m in others))
        ids = {id(p.module) for p in places}
        below = [m for m in others if any(id(module) in ids for module in m.module.modules())]
        raise ValueError(
            f"{rule} none that can be adapted, only {kinds} ({format_names(dict.fromkeys(m.path for m in others))}). "
            + _remedy(others, below[0].path if below else None)
        )
    if get_close_matches(text, [ALL_LINEAR], cutoff=0.8):
        hint = f"For every linear layer pass the string {ALL_LINEAR!r}. "
    elif test.__name__ == "regex":
        hint = (
            f"A string is a regex for the whole path, as {'.*' + text!r}; for path suffixes pass a list, [{text!r}]. "
        )
    elif re.search(r"[^\w.-]", text):
        hint = "A list holds path suffixes, dotted names as they are; a regex is passed as a string. "
    else:
        hint = ""
    words = re.findall(r"\w{3,}", text)
    near = _nearest(text, places) or [p.path for p in places if any(word in p.path for word in words)]
    raise ValueError(f"{rule} none. {hint}There are: {format_names(near or (p.path for p in places))}.")


def _kind(module: nn.Module) -> str:
    """The name of its class; with the package, where another than torch has one."""
    package, name = type(module).__module__.partition(".")[0], type(module).__name__
    return f"{package}'s {name}" if hasattr(nn, name) and package != "torch" else name


def _instead(found: object, walk: list[Owner]) -> str:
    """What to pass in place of something that is no name of a layer."""
    if isinstance(found, GLoRAConfig):
        return "Pass it as config=."
    if isinstance(found, type) and issubclass(found, nn.Module):
        return f"For layers of a class pass lambda path, module: isinstance(module, {found.__name__})."
    if isinstance(found, nn.Module):
        path = next((owner.path for owner in walk if owner.module is found), None)
        return "It is no module of the model." if path is None else f"Pass its path, [{path!r}]."
    return "Names of layers are a list, as ['q_proj', 'v_proj']."


def _nearest(text: str, places: Iterable[Owner | Site]) -> list[str]:
    """The paths whose ends are spelt most like what somebody wrote."""
    count = text.count(".") + 1
    paths_of: dict[str, list[str]] = {}
    for place in places:
        paths_of.setdefault(".".join(place.path.split(".")[-count:]), []).append(place.path)
    return [path for end in get_close_matches(text, paths_of) for path in paths_of[end]]


def _remedy(found: list[Owner], below: str | None) -> str:
    """What to do about a pattern that reaches no matrix, only these modules."""
    if below is not None:
        pattern = re.escape(below) + r"\..*"
        return f"Name the layers below it, with a regex such as {pattern!r}."
    if any(isinstance(m.module, nn.EmbeddingBag) for m in found):
        return "An EmbeddingBag looks rows up and sums them, and no path is there for that. Train it with trainable=."
    return (
        "Linear layers, Conv1D, embeddings, convolutions, attention's in_proj and fused experts can be; train another "
        "module as a whole with trainable=, or say how it holds its matrix with glora.register_matrix."
    )


def _regex(pattern: str, role: str) -> Callable[[str], bool]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{role}= as a string must be a regex; {pattern!r} is none ({error}). '.*' stands for any "
            f"characters; names as they are go into a list."
        ) from error

    def regex(path: str) -> bool:
        return compiled.fullmatch(path) is not None

    return regex


def _suffix(entry: str) -> Callable[[str], bool]:
    def suffix(path: str) -> bool:
        return path == entry or path.endswith(f".{entry}")

    return suffix
