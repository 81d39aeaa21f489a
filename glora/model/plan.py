"""What is attached where: decided here in full, with every check, before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from torch import nn

from glora.config import BIAS_PATHS, WEIGHT_PATHS, GLoRAConfig
from glora.layer.heads import Head
from glora.layer.parametrization import Bias, Weight
from glora.model.change import refuse_while_swapped, walk_to_read
from glora.model.checks import Ties, find_ties, unsupported_head, unsupported_matrix
from glora.model.huggingface import AUTO, output_embeddings, task_heads
from glora.model.records import Plan, PlannedHead, PlannedLayer, Skipped, coverage, plan_heads
from glora.model.statistics import plan_statistics
from glora.model.targets import ALL_LINEAR, Selection, Targets, Trainable, choose, select
from glora.model.walk import Owner, Site, owners, site_of, sites
from glora.spec import AdapterFileError, AdapterSpec, LayerSpec, TensorSpec, join, like, mismatches, tied_names
from glora.text import format_names, format_problems

# Note [One planner]
# An adapter is described by a `LayerSpec` for each layer, whether it comes from `targets=` and `config=`, from a file,
# or from another library's. `_plan_layer` compares a description with the module that it is for. What becomes of a
# layer that does not take it is up to the caller: `plan_targets` skips it or raises, `plan_spec` collects all and
# raises.


def plan(
    model: nn.Module,
    targets: Targets = ALL_LINEAR,
    config: GLoRAConfig | None = None,
    *,
    exclude: Selection = (),
    trainable: Trainable = (),
    name: str = "default",
    freeze: bool = True,  # noqa: ARG001 - apply's signature; it decides about flags, not about what is attached
) -> Plan:
    """What `glora.apply` would do with the same arguments; attaches nothing.

    Returns:
        A `Plan`: the layers with their forms, rank and parameters, the heads, and what is skipped and why.

    Raises:
        ValueError: whatever `apply` would raise it for.

    Example:
        >>> import torch, glora
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2, bias=False))
        >>> print(glora.plan(model, config=glora.GLoRAConfig.glora(A="none", rank=2)))
        adapter 'default': 2 layers, 64 trainable parameters
        module  forms                              rank  parameters
        0       B=lora C=vector D=vector E=vector  2             44
        2       B=lora (no bias)                   2             20
    """
    refuse_while_swapped(model)
    return plan_targets(walk_to_read(model), targets, config, exclude=exclude, trainable=trainable, name=name)


def plan_targets(
    walk: list[Owner],
    targets: Targets,
    config: GLoRAConfig | None,
    *,
    exclude: Selection = (),
    trainable: Trainable = (),
    name: str,
) -> Plan:
    """`plan` of a model that has been walked."""
    _check_name(walk, name)
    ties, heads, all_sites = find_ties(walk), _chosen_heads(walk, trainable), sites(walk)
    chosen, by_name = choose(all_sites, targets, config, walk)
    outputs = output_embeddings(walk)
    excluded = {site.key for site in select(all_sites, exclude, "exclude", walk)}
    trained = {id(owner.module): "tied to what trains as a whole" for head in heads for owner, _ in head.places}
    trained |= {id(head.module): "trainable as a whole" for head in heads}
    layers: list[PlannedLayer] = []
    skipped: list[Skipped] = []
    without_bias: list[str] = []
    for site in all_sites:
        spec = chosen.get(site.key)
        if spec is None:
            continue
        reason = trained.get(id(site.module)) or ("excluded" if site.key in excluded else None)
        if reason is None and targets == ALL_LINEAR and id(site.module) in outputs:
            reason = "output embeddings"
        if reason is not None:
            skipped.append(Skipped(site.path, reason))
            continue
        layer = _plan_layer(site, spec, ties, without_a_bias="CDE")
        if isinstance(layer, str):
            if by_name:
                raise ValueError(f"Every layer that targets= names must be adaptable; {site.path!r} is not: {layer}")
            skipped.append(Skipped(site.path, layer, unsupported=True))
            continue
        # A created bias never has a D, and nobody misses it.
        lost = set(spec.config.paths) - set(layer.paths) - ({"D"} if spec.config.create_bias else set())
        if lost:
            without_bias.append(site.path)
        if layer.paths:
            layers.append(layer)
        else:
            skipped.append(Skipped(site.path, "its paths need a bias" if lost else "every path is none"))
    if not layers:
        reasons = "; ".join(f"{row.path!r}: {row.reason}" for row in skipped[:5])
        remedy = "pass create_bias=True in the config" if without_bias else "take them out of exclude= and trainable="
        raise ValueError(
            f"There must be something to train; all {len(skipped)} layers that targets= reaches are left out "
            f"({reasons}). Widen targets=, choose other forms, or {remedy}."
        )
    covered = {layer.site.key for layer in layers}
    covered |= {(id(head.module), tensor) for head in heads for tensor in head.owner.tensors}
    share = coverage(walk, all_sites, covered, outputs)
    kept = plan_statistics(walk, heads)
    return Plan(name, tuple(layers), tuple(heads), tuple(skipped), tuple(without_bias), share, kept)


def plan_spec(walk: list[Owner], spec: AdapterSpec, source: object, name: str, *, replaces: bool = False) -> Plan:
    """How a described adapter goes onto a model, tensors included.

    Args:
        walk: the model.
        spec: the adapter; its tensors must be there.
        source: the file that it came from, for messages.
        name: its name in the model.
        replaces: whether it goes in the place of an adapter of this name.

    Raises:
        AdapterFileError: a layer that is not there, of another shape, or that cannot be adapted; a tensor missing, left
            over or of another shape.
        ValueError: a name that is taken.
    """
    _check_name([] if replaces else walk, name)
    ties = find_ties(walk)
    owner_of = {alias: owner for owner in walk for alias in owner.aliases}
    known = {alias: site for site in sites(walk) for alias in site.aliases}
    problems: list[str] = []
    layers: list[PlannedLayer] = []
    heads: list[PlannedHead] = []
    wanted: dict[str, TensorSpec] = {}
    optional: set[str] = set()
    for path, layer_spec in spec.layers.items():
        layer = site = _described(path, layer_spec, known, owner_of)
        if not isinstance(site, str):
            layer = _plan_layer(site, layer_spec, ties, without_a_bias="D" if layer_spec.bias is None else "")
        if not isinstance(layer, PlannedLayer):
            problems.append(f"{path!r}: {layer}")
            continue
        layers.append(layer)
        prefix = join(path, "")
        wanted |= {prefix + key: tensor for key, tensor in layer.spec.tensors().items()}
        if layer_spec.bias is None:
            optional.add(prefix + "D.value")
    for path, names in spec.heads.items():
        reason = _why_not_head(owner_of.get(path), (*names, *tied_names(spec.ties, path)))
        if reason is not None:
            problems.append(f"{path!r}: {reason}")
    for path, names in spec.statistics.items():
        owner = owner_of.get(path)
        if owner is None or not set(names) <= owner.tensors.keys() & owner.module._buffers.keys():
            problems.append(f"{path!r}: there is no such module, with the buffers {format_names(names)}")
        else:
            wanted |= {join(path, name): like(owner.tensors[name]) for name in names}
    problems += _broken_ties(spec.ties, owner_of)
    if not problems:
        heads = plan_heads(walk, [replace(owner_of[path], path=path) for path in spec.heads])
        problems += [f"{head.path!r}: {reason}" for head, reason in _unsupported_heads(walk, heads)]
        for head in heads:
            wanted |= {join(head.path, name): like(head.owner.tensors[name]) for name in head.names}
            keys = [join(owner.path, name) for owner, name in head.places]
            new = [key for key in keys if key not in spec.ties]
            problems += [f"{key!r} is tied to the head {head.path!r} here alone" for key in new]
    trained = [owner_of[path] for path in spec.heads if path in owner_of]
    places = [layer.site.key for layer in layers] + [(id(o.module), name) for o in trained for name in o.tensors]
    if len(set(places)) != len(places):
        problems.append("two of its entries reach the same module, by different paths")
    if not problems:
        problems += mismatches(spec.tensors, wanted, optional=optional, needs_data=False)
    kept = {id(head.module): head for head in plan_statistics(walk, heads)}
    for path in spec.statistics:
        module = id(owner_of[path].module) if path in owner_of else None
        if module in kept:  # under the path that the file has
            kept[module] = replace(kept[module], owner=replace(owner_of[path], path=path))
        elif module is not None:
            problems.append(f"{path!r}: an adapter cannot have running statistics there")
    if not problems and not heads and not any(layer.paths for layer in layers):
        problems.append("it adapts nothing")
    if problems:
        raise AdapterFileError(
            f"An adapter must fit the model that it is loaded into; {source} does not, and nothing was changed. "
            f"Found: {format_problems(problems)}. Load it into the architecture that it was trained on."
        )
    return Plan(name, tuple(layers), tuple(heads), statistics=tuple(kept.values()))


def _described(path: str, spec: LayerSpec, known: Mapping[str, Site], owner_of: Mapping[str, Owner]) -> Site | str:
    """The matrix that a described layer goes to: as the model holds it, or where glora does not know, as described."""
    if path in known:
        held, adapted = known[path].matrix, spec.matrix
        if adapted is not None and (adapted.pattern, adapted.bias) != (held.pattern, held.bias):
            return f"it is held as {held.pattern!r} where {adapted.pattern!r} is adapted"
        return replace(known[path], path=path)
    if spec.matrix is None or spec.matrix.is_linear:
        if path not in owner_of:
            return "there is no such module"
        return f"it is a {type(owner_of[path].module).__name__}, which is no layer that can be adapted"
    module_path = spec.matrix.module_path(path)
    owner = owner_of.get(module_path)
    if owner is None or spec.matrix.path(module_path) != path or spec.matrix.weight not in owner.tensors:
        return "there is no such module"
    return replace(site_of(owner, spec.matrix), path=path)


def _plan_layer(site: Site, spec: LayerSpec, ties: Ties, *, without_a_bias: str) -> PlannedLayer | str:
    """A described layer compared with its matrix; or why the matrix does not take it, and what to do about it.

    Args:
        without_a_bias: the paths that are left out where there is no bias, rather than being a reason.
    """
    reason = unsupported_matrix(site, spec.config, ties)
    if reason is not None:
        return reason
    *batch, out_features, in_features = shape = tuple(site.weight.shape)
    described = *(batch if spec.batch is None else spec.batch), spec.out_features, spec.in_features
    if len(shape) != len(described) or any(s not in (None, own) for s, own in zip(described, shape, strict=True)):
        return f"a weight of {shape} where {described} is adapted"
    if spec.bias not in (None, site.has_own_bias):
        return f"{'a' if site.has_own_bias else 'no'} bias where {'a' if spec.bias else 'no'} bias is adapted"
    # A created bias has no D: it would scale zeros, and never learn. A module that has no place for a bias gets none.
    creates = spec.config.create_bias and not site.has_own_bias and site.matrix.bias in site.module._parameters
    kept = BIAS_PATHS if site.has_own_bias else ("C", "E") if creates else ()
    lost = {path for path in spec.config.paths if path not in (*WEIGHT_PATHS, *kept)}
    if not lost - ({"D"} if creates else set()) <= set(without_a_bias):
        return "it has no bias for the paths C, D and E"
    config = replace(spec.config, **dict.fromkeys(lost, "none")) if lost else spec.config  # pyright: ignore
    taken = LayerSpec(config, out_features, in_features, site.has_own_bias, site.matrix, tuple(batch))
    return PlannedLayer(site, taken, creates_bias=creates and not set(config.paths) <= set(WEIGHT_PATHS))


def _chosen_heads(walk: list[Owner], trainable: Trainable) -> list[PlannedHead]:
    if trainable == AUTO:
        chosen = {id(owner.module): owner for owner in task_heads(walk)}
        if not chosen:
            raise ValueError(
                f"trainable={AUTO!r} takes the modules that a task class of transformers has beside its backbone; this "
                f"{type(walk[0].module).__name__} has none (a language model's output layer is not new to it). Name "
                f"the modules: trainable=[...]."
            )
    else:
        chosen = _named_heads(walk, trainable)
    heads = plan_heads(walk, chosen.values())
    for head, reason in _unsupported_heads(walk, heads):
        raise ValueError(f"Every module that trainable= reaches must be fit for it; {head.path!r} is not: {reason}")
    return heads


def _unsupported_heads(walk: list[Owner], heads: list[PlannedHead]) -> Iterator[tuple[PlannedHead, str]]:
    """The heads that cannot train as a whole, and why."""
    overlaps = find_ties(walk, one_parameter=False) if heads else {}
    for head in heads:
        reason = unsupported_head(head, overlaps)
        if reason is not None:
            yield head, reason


def _named_heads(walk: list[Owner], trainable: Trainable) -> dict[int, Owner]:
    """The modules with tensors of their own at or below those that `trainable=` reaches."""
    by_id = {id(owner.module): owner for owner in walk}
    heads: dict[int, Owner] = {}
    for head in select(walk, trainable, "trainable", walk):
        if not any(True for _ in head.module.parameters()):
            raise ValueError(f"trainable= must reach modules with parameters; {head.path!r} has none.")
        below = [by_id[id(inside.module)] for inside in owners(head.module)]
        heads |= {id(owner.module): owner for owner in below if owner.tensors}
    return heads


def _broken_ties(ties: Mapping[str, str], owner_of: Mapping[str, Owner]) -> Iterator[str]:
    """Where the model does not have one Parameter in two places, as the adapter's model had."""
    for keys in ties.items():
        places = [key.rpartition(".") for key in keys]
        tensors = [owner_of[path].tensors.get(name) if path in owner_of else None for path, _, name in places]
        if tensors[0] is None or tensors[0] is not tensors[1]:
            yield f"{keys[0]!r} is not tied to {keys[1]!r} here"


def _why_not_head(owner: Owner | None, names: tuple[str, ...]) -> str | None:
    if owner is None:
        return "there is no such module"
    if sorted(names) != sorted(owner.tensors):
        return f"tensors {format_names(sorted(owner.tensors))} where {format_names(sorted(names))} are saved"
    return None


def _check_name(walk: Iterable[Owner], name: str) -> None:
    """Raise ValueError unless a new adapter can be called so."""
    taken = any(hasattr(kind(), str(name)) for kind in (Weight, Bias, Head))
    if not isinstance(name, str) or not name or "." in name or taken:  # pyright: ignore
        raise ValueError(
            f"An adapter's name must be a string, not empty, without dots, no attribute of nn.Module; found {name!r}."
        )
    for owner in walk:
        if name in owner.adapter_names:
            raise ValueError(
                f"An adapter's name must be new to the model; {name!r} is attached already (at {owner.place!r}). "
                f"Choose another name=, write into it with glora.load_state_dict, put a file in its place with "
                f"glora.load(..., replace=True), or drop it with glora.delete(model, name)."
            )
