"""What is attached where: decided here in full, with every check, before anything changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from glora.config import WEIGHT_PATHS, GLoRAConfig
from glora.layer.heads import Head
from glora.layer.parametrization import Bias, Weight
from glora.model.checks import Ties, find_ties, refuse_while_swapped, unsupported_head, unsupported_matrix
from glora.model.planned import Plan, PlannedHead, PlannedLayer, Skipped, plan_heads
from glora.model.reach import reach
from glora.model.targets import ALL_LINEAR, Selection, Targets, Trainable, choose, output_embeddings, select
from glora.model.task_heads import AUTO, task_heads
from glora.model.walk import Owner, Site, owners, site_of, sites
from glora.spec import AdapterFileError, AdapterSpec, LayerSpec, TensorSpec, join, like, mismatches, tied_names
from glora.text import format_names, format_problems

# Note [One planner]
# An adapter is described by a `LayerSpec` for each layer, whether it comes from `targets=` and `config=`, from a file,
# or from another library's. `_plan_layer` compares a description with the module that it is for. What becomes of a
# layer that does not take it is up to the caller: `plan` skips it or raises, `plan_spec` collects all and raises.


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
        >>> print(glora.plan(model, config=glora.GLoRAConfig(A="none", rank=2)))
        adapter 'default': 2 layers, 64 trainable parameters
        module  forms                              rank  parameters
        0       B=lora C=vector D=vector E=vector  2             44
        2       B=lora (no bias)                   2             20
    """
    modules = _modules_for(model, name)
    ties = find_ties(modules)
    heads = _chosen_heads(modules, trainable)
    matrices = sites(modules)
    chosen, by_name = choose(matrices, targets, config, modules)
    outputs, excluded = output_embeddings(modules), {m.key for m in select(matrices, exclude, "exclude", modules)}
    whole = {id(head.module): "trainable as a whole" for head in heads}
    shared = [named.module for head in heads for named, _ in head.places]
    whole = {id(module): "tied to what trains as a whole" for module in shared} | whole
    layers: list[PlannedLayer] = []
    skipped: list[Skipped] = []
    without_bias: list[str] = []
    for at in matrices:
        spec = chosen.get(at.key)
        if spec is None:
            continue
        if id(at.module) in whole or at.key in excluded or (targets == ALL_LINEAR and id(at.module) in outputs):
            why = whole.get(id(at.module)) or ("excluded" if at.key in excluded else "output embeddings")
            skipped.append(Skipped(at.path, why))
            continue
        layer = _plan_layer(at, spec, ties, without_a_bias="CDE")
        if isinstance(layer, str):
            if by_name:
                raise ValueError(f"Every layer that targets= names must be adaptable; {at.path!r} is not: {layer}")
            skipped.append(Skipped(at.path, layer, unsupported=True))
            continue
        # A created bias never has a D, and nobody misses it.
        lost = set(spec.config.paths) - set(layer.paths) - ({"D"} if spec.config.create_bias else set())
        if lost:
            without_bias.append(at.path)
        if layer.paths:
            layers.append(layer)
        else:
            skipped.append(Skipped(at.path, "its paths need a bias" if lost else "every path is none"))
    if not layers:
        why = "; ".join(f"{row.path!r}: {row.reason}" for row in skipped[:5])
        raise ValueError(
            f"There must be something to train; all {len(skipped)} layers that targets= reaches are left out ({why}). "
            f"Widen targets=, choose other forms, or for layers without a bias pass create_bias=True in the config."
        )
    reached = {layer.at.key for layer in layers} | {(id(h.module), tensor) for h in heads for tensor in h.named.tensors}
    share = reach(modules, reached, outputs)
    return Plan(name, tuple(layers), tuple(heads), tuple(skipped), tuple(without_bias), share)


def plan_spec(model: nn.Module, spec: AdapterSpec, source: object, name: str) -> Plan:
    """How a described adapter goes onto a model, tensors included.

    Args:
        model: the model.
        spec: the adapter; its tensors must be there.
        source: the file that it came from, for messages.
        name: its name in the model.

    Raises:
        AdapterFileError: a layer that is not there, of another shape, or that cannot be adapted; a tensor missing, left
            over or of another shape.
        ValueError: a name that is taken.
        RuntimeError: inside `glora.merged` or `glora.route`.
    """
    modules = _modules_for(model, name)
    ties = find_ties(modules)
    reached = {alias: named for named in modules for alias in named.aliases}
    known = {alias: at for at in sites(modules) for alias in at.aliases}
    problems: list[str] = []
    layers: list[PlannedLayer] = []
    heads: list[PlannedHead] = []
    wanted: dict[str, TensorSpec] = {}
    optional: set[str] = set()
    for path, layer_spec in spec.layers.items():
        layer = at = _described(path, layer_spec, known, reached)
        if not isinstance(at, str):
            layer = _plan_layer(at, layer_spec, ties, without_a_bias="D" if layer_spec.bias is None else "")
        if not isinstance(layer, PlannedLayer):
            problems.append(f"{path!r}: {layer}")
            continue
        layers.append(layer)
        prefix = join(path, "")
        wanted |= {prefix + key: TensorSpec(shape) for key, shape in layer.shapes.items()}
        if layer_spec.bias is None:
            optional.add(prefix + "D.value")
    for path, names in spec.heads.items():
        reason = _misfit_of_head(reached.get(path), (*names, *tied_names(spec.ties, path)))
        if reason is not None:
            problems.append(f"{path!r}: {reason}")
    problems += _misfits_of_ties(spec.ties, reached)
    if not problems:
        heads = plan_heads(modules, [replace(reached[path], path=path) for path in spec.heads])
        problems += [f"{head.path!r}: {reason}" for head, reason in _unsupported_heads(modules, heads)]
        for head in heads:
            wanted |= {join(head.path, name): like(head.named.tensors[name]) for name in head.names}
            here = [join(named.path, name) for named, name in head.places]
            new = [key for key in here if key not in spec.ties]
            problems += [f"{key!r} is tied to the head {head.path!r} here alone" for key in new]
    heads_here = [reached[path] for path in spec.heads if path in reached]
    places = [layer.at.key for layer in layers] + [(id(h.module), name) for h in heads_here for name in h.tensors]
    if len(set(places)) != len(places):
        problems.append("two of its entries reach the same module, by different paths")
    if not problems:
        problems += mismatches(spec.tensors, wanted, optional=optional, needs_data=False)
    if not problems and not heads and not any(layer.paths for layer in layers):
        problems.append("it adapts nothing")
    if problems:
        raise AdapterFileError(
            f"An adapter must fit the model that it is loaded into; {source} does not, and nothing was changed. "
            f"Found: {format_problems(problems)}. Load it into the architecture that it was trained on."
        )
    return Plan(name, tuple(layers), tuple(heads))


def _described(path: str, spec: LayerSpec, known: Mapping[str, Site], modules: Mapping[str, Owner]) -> Site | str:
    """The matrix that a described layer goes to: as the model holds it, or where glora does not know, as described."""
    if path in known:
        at = replace(known[path], path=path)
        if spec.matrix is not None and (spec.matrix.pattern, spec.matrix.bias) != (at.matrix.pattern, at.matrix.bias):
            return f"it is held as {at.matrix.pattern!r} where {spec.matrix.pattern!r} is adapted"
        return at
    if spec.matrix is None or spec.matrix.is_linear:
        if path not in modules:
            return "there is no such module"
        return f"it is a {type(modules[path].module).__name__}, which is no layer that can be adapted"
    owner = spec.matrix.module_path(path)
    if owner not in modules or spec.matrix.path(owner) != path or spec.matrix.weight not in modules[owner].tensors:
        return "there is no such module"
    return replace(site_of(modules[owner], spec.matrix), path=path)


def _plan_layer(at: Site, spec: LayerSpec, ties: Ties, *, without_a_bias: str) -> PlannedLayer | str:
    """A described layer compared with its matrix; or why the matrix does not take it, and what to do about it.

    Args:
        without_a_bias: the paths that are left out where there is no bias, rather than being a reason.
    """
    reason = unsupported_matrix(at, spec.config, ties)
    if reason is not None:
        return reason
    *batch, out_features, in_features = at.weight.shape
    shape = *batch, out_features, in_features
    described = *(batch if spec.batch is None else spec.batch), spec.out_features, spec.in_features
    if len(shape) != len(described) or any(s not in (None, own) for s, own in zip(described, shape, strict=True)):
        return f"a weight of {shape} where {described} is adapted"
    if spec.bias not in (None, at.has_own_bias):
        return f"{'a' if at.has_own_bias else 'no'} bias where {'a' if spec.bias else 'no'} bias is adapted"
    wanted = spec.config.paths
    if at.has_own_bias:
        return PlannedLayer(at, spec.config, wanted)
    # A created bias has no D: it would scale zeros, and never learn. A module that has no place for a bias gets none.
    creates = spec.config.create_bias and at.matrix.bias in at.module._parameters
    kept = tuple([path for path in wanted if path in WEIGHT_PATHS or (creates and path != "D")])
    if not set(wanted) - set(kept) - ({"D"} if creates else set()) <= set(without_a_bias):
        return "it has no bias for the paths C, D and E"
    return PlannedLayer(at, spec.config, kept, creates_bias=any(path not in WEIGHT_PATHS for path in kept))


def _chosen_heads(modules: list[Owner], trainable: Trainable) -> list[PlannedHead]:
    if trainable == AUTO:
        chosen = {id(named.module): named for named in task_heads(modules)}
        if not chosen:
            raise ValueError(
                f"trainable={AUTO!r} takes the modules that a task class of transformers has beside its backbone; this "
                f"{type(modules[0].module).__name__} has none (a language model's output layer is not new to it). Name "
                f"the modules: trainable=[...]."
            )
    else:
        chosen = _named_heads(modules, trainable)
    heads = plan_heads(modules, chosen.values())
    for head, reason in _unsupported_heads(modules, heads):
        raise ValueError(f"Every module that trainable= reaches must be fit for it; {head.path!r} is not: {reason}")
    return heads


def _unsupported_heads(modules: list[Owner], heads: list[PlannedHead]) -> Iterator[tuple[PlannedHead, str]]:
    """The heads that cannot train as a whole, and why."""
    overlaps = find_ties(modules, one_parameter=False) if heads else {}
    for head in heads:
        reason = unsupported_head(head, overlaps)
        if reason is not None:
            yield head, reason


def _named_heads(modules: list[Owner], trainable: Trainable) -> dict[int, Owner]:
    """The modules with tensors of their own at or below those that `trainable=` reaches."""
    by_id = {id(named.module): named for named in modules}
    heads: dict[int, Owner] = {}
    for reached in select(modules, trainable, "trainable", modules):
        if not any(True for _ in reached.module.parameters()):
            raise ValueError(f"trainable= must reach modules with parameters; {reached.path!r} has none.")
        for inside in owners(reached.module):
            if inside.tensors:
                heads[id(inside.module)] = by_id[id(inside.module)]
    return heads


def _misfits_of_ties(ties: Mapping[str, str], reached: Mapping[str, Owner]) -> Iterator[str]:
    """Where the model does not have one Parameter in two places, as the adapter's model had."""
    for places in ties.items():
        tensors: list[object] = []
        for path, _, name in (key.rpartition(".") for key in places):
            tensors.append(reached[path].tensors.get(name) if path in reached else None)
        if tensors[0] is None or tensors[0] is not tensors[1]:
            yield f"{places[0]!r} is not tied to {places[1]!r} here"


def _misfit_of_head(named: Owner | None, names: tuple[str, ...]) -> str | None:
    if named is None:
        return "there is no such module"
    if sorted(names) != sorted(named.tensors):
        return f"tensors {format_names(sorted(named.tensors))} where {format_names(sorted(names))} are saved"
    return None


def _modules_for(model: nn.Module, name: str) -> list[Owner]:
    """The model's modules, for a new adapter of this name."""
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"model must be a torch.nn.Module; found a {type(model).__name__}.")
    refuse_while_swapped(model)
    taken = any(hasattr(kind(), str(name)) for kind in (Weight, Bias, Head))
    if not isinstance(name, str) or not name or "." in name or taken:  # pyright: ignore
        raise ValueError(
            f"An adapter's name must be a string, not empty, without dots, no attribute of nn.Module; found {name!r}."
        )
    modules = owners(model)
    for named in modules:
        if name in named.adapter_names:
            raise ValueError(
                f"An adapter's name must be new to the model; {name!r} is attached already (at {named.path!r}). Choose "
                f"another name=, write into it with glora.load_state_dict, or drop it with glora.delete(model, name)."
            )
    return modules
