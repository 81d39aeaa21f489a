"""What newcomers get wrong: each mistake is told with the rule, what was found and what to do, and changes nothing.

Mistakes are written as people write them. A warning is an error in these tests, so that those that only warn are seen
to do it before anything has changed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import glora
from glora import GLoRAConfig
from glora.__main__ import main

save_file = pytest.importorskip("safetensors.torch").save_file
TARGETS = ["q_proj", "v_proj"]
TOKENS = torch.arange(12).reshape(3, 4)


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(size, size), nn.Linear(size, size, bias=False)
        self.norm = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.q_proj(x) + self.v_proj(x))


class Net(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, size)
        self.layers = nn.ModuleList([Block(size), Block(size)])
        self.classifier = nn.Linear(size, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x.mean(1))


def plain() -> Net:
    return Net()


def adapted() -> Net:
    return glora.apply(Net(), TARGETS)


def two() -> Net:
    return glora.apply(glora.apply(Net(), TARGETS, name="french"), TARGETS, name="german")


def quantised() -> Net:
    """As bitsandbytes leaves a layer: an int8 weight, whose scales stand elsewhere."""
    model = Net()
    model.layers[0].q_proj.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter of glora, one of PEFT, and the checkpoint of their base."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(12345)  # whichever test comes first: no other base has these weights
    model = Net()
    save_file(copy.deepcopy(model).state_dict(), folder / "base.safetensors")
    glora.apply(model, TARGETS)
    glora.save(model, folder / "adapter")
    glora.interop.save_peft(model, folder / "peft")
    return folder


class Mistake(NamedTuple):
    """What somebody writes, in which model, and the message: the rule, what was found, what to do."""

    code: Callable[[Any, Path], object]
    error: type[BaseException]
    rule: str
    found: str
    remedy: str
    model: Callable[[], nn.Module] = plain


def merge_and_train(model: nn.Module, _: Path) -> None:
    merged = glora.merge(copy.deepcopy(model))
    torch.optim.AdamW(glora.parameters(merged))


def apply_while_merged(model: nn.Module, _: Path) -> None:
    with glora.merged(model):
        glora.apply(model, TARGETS, name="second")


def route(names: Any) -> Callable[[nn.Module, Path], None]:
    def code(model: nn.Module, _: Path) -> None:
        with glora.route(model, names):
            model(TOKENS)

    return code


def state_dict_of(config: GLoRAConfig) -> dict[str, Tensor]:
    return glora.state_dict(glora.apply(Net(), TARGETS, config))


MATCH = "targets= must match at least one module"
KINDS = "targets= must be a regex, a list of path suffixes, a predicate"
ONLY = "name=None means the only adapter"
ATTACH = "Attach one first, with glora.apply or glora.load"
NAMES = "names must hold one adapter's name, or None, for each sample"
CONFIG = "config= must be a glora.GLoRAConfig or None"
STATE = "A state dict must fit the adapter that it is loaded into"
BASE = "An adapter is a change of the very weights that it was trained beside"
INSTANCE = "Pass an instance, as glora.GLoRAConfig.lora"

MISTAKES = {
    # Which layers.
    "a name of another model": Mistake(
        lambda m, _: glora.apply(m, ["query"]), ValueError, MATCH, "'query' matches none", "There are: .*q_proj"
    ),
    "one wrong name of two": Mistake(
        lambda m, _: glora.apply(m, ["q_proj", "o_proj"]),
        ValueError,
        MATCH,
        "'o_proj' matches none",
        "There are: .*v_proj",
    ),
    "a name as a regex": Mistake(
        lambda m, _: glora.apply(m, "q_proj"), ValueError, MATCH, "'q_proj' matches none", r"pass a list, \['q_proj'\]"
    ),
    "a name as a mapping's regex": Mistake(
        lambda m, _: glora.apply(m, {"q_proj": GLoRAConfig()}), ValueError, MATCH, "'q_proj'", r"regex .* '\.\*q_proj'"
    ),
    "a regex in a list": Mistake(
        lambda m, _: glora.apply(m, [r".*\.q_proj"]),
        ValueError,
        MATCH,
        "q_proj' matches none",
        "regex is passed as a string",
    ),
    "a glob": Mistake(
        lambda m, _: glora.apply(m, "*q_proj"),
        ValueError,
        "a string must be a regex",
        "'[*]q_proj' is none",
        r"'\.\*' stands",
    ),
    "all-linear misspelt": Mistake(
        lambda m, _: glora.apply(m, "all_linear"), ValueError, MATCH, "'all_linear'", "pass the string 'all-linear'"
    ),
    "all-linear in a list": Mistake(
        lambda m, _: glora.apply(m, ["all-linear"]), ValueError, MATCH, "'all-linear'", "pass the string 'all-linear'"
    ),
    "a class of layers": Mistake(
        lambda m, _: glora.apply(m, nn.Linear), ValueError, KINDS, "Linear", "lambda path, module: isinstance"
    ),
    "a list of layers": Mistake(
        lambda m, _: glora.apply(m, [m.layers[0].q_proj]),
        ValueError,
        "must hold path suffixes",
        r"found Linear\(",
        r"its path, \['layers.0.q_proj'\]",
    ),
    "a norm": Mistake(
        lambda m, _: glora.apply(m, ["norm"]), ValueError, MATCH, "only LayerNorm", "as a whole with trainable="
    ),
    "the config where targets belong": Mistake(
        lambda m, _: glora.apply(m, GLoRAConfig()), ValueError, KINDS, "found a GLoRAConfig", "Pass it as config="
    ),
    "layers that are trainable too": Mistake(
        lambda m, _: glora.apply(m, ["classifier"], trainable=["classifier"]),
        ValueError,
        "There must be something to train",
        "'classifier': trainable as a whole",
        "take them out of exclude= and trainable=",
    ),
    "biases of layers that have none": Mistake(
        lambda m, _: glora.apply(m, ["v_proj"], GLoRAConfig.bitfit()),
        ValueError,
        "There must be something to train",
        "its paths need a bias",
        "create_bias=True",
    ),
    "C, D and E on a layer without a bias": Mistake(
        lambda m, _: glora.apply(m, ["v_proj"], GLoRAConfig.glora()),
        UserWarning,
        "C, D and E are left out",
        "2 layers have no bias",
        "create_bias=True",
    ),
    "a low-rank change of a new head": Mistake(
        lambda m, _: glora.apply(m),
        UserWarning,
        "a change of weights that stay frozen and are not in its file",
        "classifier may be a head that is new",
        r"trainable=\['classifier'\]",
    ),
    "an int8 base of bitsandbytes": Mistake(
        lambda m, _: glora.apply(m, TARGETS),
        ValueError,
        "must be adaptable; 'layers.0.q_proj' is not",
        "torch.int8",
        "quantise with torchao",
        quantised,
    ),
    # Which adapter.
    "an option misspelt": Mistake(
        lambda m, _: glora.apply(m, TARGETS, GLoRAConfig(ranks=8)),
        TypeError,
        "it has A, B, C, D, E, rank",
        "no 'ranks'",
        "did you mean rank",
    ),
    "PEFT's name of an option": Mistake(
        lambda m, _: glora.apply(m, TARGETS, GLoRAConfig(r=8)),
        TypeError,
        "it has A, B, C, D, E, rank",
        "no 'r'",
        "did you mean rank",
    ),
    "an option without its name": Mistake(
        lambda m, _: glora.apply(m, TARGETS, GLoRAConfig(8)), TypeError, "options by name", r"found \(8,\)", "rank=8"
    ),
    "a rank of 0": Mistake(
        lambda m, _: glora.apply(m, TARGETS, GLoRAConfig(rank=0)),
        ValueError,
        "at least 1",
        "found 0",
        "the form 'none'",
    ),
    "a negative alpha": Mistake(
        lambda m, _: glora.apply(m, TARGETS, GLoRAConfig(alpha=-1)), ValueError, "positive", "found -1", "or None for"
    ),
    "a config's class": Mistake(
        lambda m, _: glora.apply(m, TARGETS, GLoRAConfig), ValueError, CONFIG, "found <class", INSTANCE
    ),
    "a preset that is not called": Mistake(
        lambda m, _: glora.apply(m, TARGETS, GLoRAConfig.lora), ValueError, CONFIG, "found a method", INSTANCE
    ),
    "a config as a dict": Mistake(
        lambda m, _: glora.apply(m, TARGETS, {"rank": 8}), ValueError, CONFIG, "found {'rank': 8}", INSTANCE
    ),
    "the model's class": Mistake(
        lambda m, _: glora.apply(type(m), TARGETS),
        ValueError,
        "must be a torch.nn.Module",
        "the class Net",
        "an instance",
    ),
    "a name that is taken": Mistake(
        lambda m, _: glora.apply(m, TARGETS, name="french"),
        ValueError,
        "name must be new to the model",
        "'french' is attached already",
        "Choose another name=",
        two,
    ),
    # In which order.
    "parameters before apply": Mistake(
        lambda m, _: glora.parameters(m), ValueError, ONLY, "the model has none", ATTACH
    ),
    "saved before apply": Mistake(lambda m, d: glora.save(m, d / "x"), ValueError, ONLY, "the model has none", ATTACH),
    "training after merge": Mistake(
        merge_and_train, ValueError, ONLY, "the model has none", "after glora.merge .* there is none", adapted
    ),
    "apply inside of merged": Mistake(
        apply_while_merged, RuntimeError, "cannot be changed", "'layers.0.q_proj' merged", "Leave the `with`", adapted
    ),
    # Several adapters.
    "no name, of two adapters": Mistake(
        lambda m, d: glora.save(m, d / "x"), ValueError, ONLY, "'french', 'german'", "Pass one of them as name=", two
    ),
    "an unknown adapter": Mistake(
        lambda m, _: glora.activate(m, "spanish"),
        KeyError,
        "'spanish' is not an adapter of the model",
        "has 'french', 'german'",
        "Pass one of them",
        two,
    ),
    "an adapter, before apply": Mistake(
        lambda m, _: glora.activate(m, "french"), KeyError, "is not an adapter", "which has none", ATTACH
    ),
    "a list of adapters": Mistake(
        lambda m, _: glora.activate(m, ["french", "german"]),
        ValueError,
        "an adapter's name, or a mapping",
        r"found \['french', 'german'\]",
        "{'a': 0.7, 'b': 0.3}",
        two,
    ),
    "a route of too few names": Mistake(
        route(["french", "german"]),
        ValueError,
        "was given 2 names",
        r"shape \(3, 4, 8\)",
        "Give one name a sample",
        two,
    ),
    "a route of an unknown name": Mistake(
        route(["french", None, "spanish"]),
        KeyError,
        "'spanish' is not an adapter",
        "'french', 'german'",
        "Pass one",
        two,
    ),
    "a route of one name": Mistake(route("french"), ValueError, NAMES, "found 'french'", "Pass a list as long", two),
    "a route of weights": Mistake(
        route({"french": 0.5}), ValueError, NAMES, "found {'french': 0.5}", "glora.activate", two
    ),
    "a rate of no number": Mistake(
        lambda m, _: glora.parameter_groups(m, "french"), ValueError, "positive number", "found 'french'", "table", two
    ),
    # Files.
    "saved to a file's name": Mistake(
        lambda m, d: glora.save(m, d / "a.safetensors"),
        ValueError,
        "writes a folder",
        "a.safetensors'",
        "Pass .*a'",
        adapted,
    ),
    "saved, arguments exchanged": Mistake(
        lambda m, d: glora.save(d, m),
        ValueError,
        "a model and then a folder",
        "Path and a Net",
        "takes a model",
        adapted,
    ),
    "a folder of PEFT": Mistake(
        lambda m, d: glora.load(m, d / "peft"),
        glora.AdapterFileError,
        "has its description in the file's metadata",
        "has none",
        "glora.interop.load_peft",
    ),
    "a folder of glora, as PEFT's": Mistake(
        lambda m, d: glora.interop.load_peft(m, d / "adapter"),
        FileNotFoundError,
        "a folder with adapter_config.json",
        "there is none",
        "glora.load reads glora's own",
    ),
    "the JSON beside the tensors": Mistake(
        lambda m, d: glora.load(m, d / "adapter" / "glora_config.json"),
        glora.AdapterFileError,
        "a folder with adapter_model.safetensors",
        "glora_config.json'",
        "Pass '.*adapter'",
    ),
    "a name on a hub": Mistake(
        lambda m, _: glora.load(m, "user/adapter"),
        FileNotFoundError,
        "a folder with adapter_model.safetensors",
        "none at 'user/adapter'",
        "snapshot_download",
    ),
    "loaded into another architecture": Mistake(
        lambda m, d: glora.load(m, d / "adapter"),
        glora.AdapterFileError,
        "must fit the model",
        "there is no such module",
        "Load it into the architecture",
        lambda: nn.Sequential(nn.Linear(8, 8)),
    ),
    "loaded into another size": Mistake(
        lambda m, d: glora.load(m, d / "adapter"),
        glora.AdapterFileError,
        "must fit the model",
        r"a weight of \(16, 16\) where \(8, 8\)",
        "Load it into the architecture",
        lambda: Net(16),
    ),
    "loaded onto another base": Mistake(
        lambda m, d: glora.load(m, d / "adapter"),
        UserWarning,
        BASE,
        "layers.0.q_proj.weight",
        "Take the base that it was",
    ),
    "extracted from another model": Mistake(
        lambda m, _: glora.extract(m, {"fc.weight": torch.zeros(8, 8)}, TARGETS),
        ValueError,
        "from the tensors that its layers and heads have",
        "of 'layers.0.q_proj.weight' found none",
        "take the checkpoint of this model",
    ),
    # State dicts.
    "a state dict of another rank": Mistake(
        lambda m, _: glora.load_state_dict(m, state_dict_of(GLoRAConfig(rank=4))),
        ValueError,
        STATE,
        r"shape \(8, 4\) where \(8, 8\) should be",
        "Attach with the config",
        adapted,
    ),
    "the model's state dict": Mistake(
        lambda m, _: glora.load_state_dict(m, m.state_dict()),
        ValueError,
        STATE,
        "missing: ",
        "model.load_state_dict",
        adapted,
    ),
    "the model's state dict, not strict": Mistake(
        lambda m, _: glora.load_state_dict(m, Net().state_dict(), strict=False),
        ValueError,
        STATE,
        "none of its keys, but embed.weight",
        "glora.state_dict gives",
        adapted,
    ),
    "a path as a state dict": Mistake(
        lambda m, d: glora.load_state_dict(m, str(d / "adapter")),
        ValueError,
        "must go from key to tensor",
        "found ",
        "glora.load reads files",
        adapted,
    ),
}


def held(model: nn.Module) -> dict[str, object]:
    """All that a mistake could have changed: types, flags, tensors."""
    tensors = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    return {"types": [type(module) for module in model.modules()], "flags": flags, "tensors": tensors}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named_and_changes_nothing(mistake: Mistake, files: Path) -> None:
    model = mistake.model()
    before, there = held(model), sorted(files.rglob("*"))
    with pytest.raises(mistake.error) as error:
        mistake.code(model, files)
    for words in (mistake.rule, mistake.found, mistake.remedy):
        assert re.search(words, str(error.value)), f"no {words!r} in: {error.value}"
    after = held(model)
    assert after["types"] == before["types"]
    assert after["flags"] == before["flags"]
    torch.testing.assert_close(after["tensors"], before["tensors"], rtol=0, atol=0)
    assert sorted(files.rglob("*")) == there
    if mistake.model not in (adapted, two):
        assert not any(map(parametrize.is_parametrized, model.modules()))


@pytest.mark.parametrize("name", ["disabled", "merged", "route"])
def test_a_context_manager_without_with_warns(name: str) -> None:
    model, arguments = two(), [["french", "german", None]] if name == "route" else []
    before = model(TOKENS)
    with pytest.warns(UserWarning, match=rf"inside a `with` block alone; .*Write `with glora\.{name}\(") as warned:
        getattr(glora, name)(model, *arguments)
    assert warned[0].filename == __file__
    torch.testing.assert_close(model(TOKENS), before, rtol=0, atol=0)


def test_context_managers_that_are_used_do_not_warn() -> None:
    model = two()
    disabled = glora.disabled(model)
    with disabled, glora.merged(model):
        pass
    decorated = glora.disabled(model)(lambda: glora.adapters(model))
    assert decorated() == decorated() == {"french": 0.0, "german": 0.0}
    del disabled, decorated
    with pytest.raises(TypeError, match="argument"):
        glora.disabled()  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (
            ["adapter", "base.safetensors", "out.safetensors"],
            "BASE ADAPTER OUT, in this order; found an adapter, .*, as",
        ),
        (
            ["base.safetensors", "out.safetensors", "adapter"],
            "file, .*; found .*adapter.* BASE ADAPTER OUT, in this order",
        ),
        (
            ["base.safetensors", "base.safetensors", "out.safetensors"],
            "low-rank factors .* checkpoint. Pass the adapter",
        ),
    ],
)
def test_exchanged_arguments_of_the_command(
    order: list[str], words: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = sorted(files.rglob("*"))
    assert main(["merge", *[str(files / name) for name in order]]) == 1
    assert re.search(words, capsys.readouterr().err)
    assert sorted(files.rglob("*")) == there


def test_a_pretrained_model_is_not_saved_with_adapters_on_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
        "vocab_size": 16,
    }
    model = transformers.BertModel(transformers.BertConfig(**sizes))
    glora.apply(model, ["query"])
    with pytest.raises(
        RuntimeError, match=r"plain keys, and adapters are attached to .*query.* glora\.save\(model, dir"
    ):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_model_that_peft_has_wrapped() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=TARGETS))
    before = held(model)
    with pytest.raises(ValueError, match=r"'q_proj' matches none that can be adapted, only peft's Linear .*q_proj"):
        glora.apply(model, TARGETS)
    with pytest.raises(UserWarning, match=r"PEFT's factors are adapters .*lora_A.default.* would .*model\.unload\(\)"):
        glora.apply(model, exclude=["classifier"])
    assert held(model)["flags"] == before["flags"]
    torch.testing.assert_close(held(model)["tensors"], before["tensors"], rtol=0, atol=0)
    glora.apply(model, ["base_layer"])
    assert glora.adapters(model) == {"default": 1.0}
