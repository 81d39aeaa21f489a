"""What PEFT saved computes here what it computes in PEFT: each method, over drawn configs and kinds of layers."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import glora
from glora import interop
from tests.helpers.marks import examples
from tests.helpers.peers import IDS, assert_same, every
from tests.helpers.state import snapshot

peft = pytest.importorskip("peft", reason="the extra `interop` brings it")

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own

TENSORS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
LINEAR, CONVS = ["q", "k", "c"], ["conv1", "conv2"]
RANKS = st.integers(1, 4)
Draw = Callable[[st.SearchStrategy[Any]], Any]


def some(draw: Draw, names: list[str]) -> list[str]:
    return draw(st.lists(st.sampled_from(names), min_size=1, unique=True))


def lora(draw: Draw) -> Any:
    dora = draw(st.booleans())
    places = some(draw, ["emb", *LINEAR, *CONVS])
    lora_bias = not dora and "emb" not in places and draw(st.booleans())
    return peft.LoraConfig(
        r=draw(RANKS),
        lora_alpha=draw(st.sampled_from([1, 3, 16])),
        use_rslora=draw(st.booleans()),
        use_dora=dora,
        lora_bias=lora_bias,
        bias=draw(st.sampled_from(["none", "lora_only", "all"])),
        target_modules=places,
        modules_to_save=draw(st.sampled_from([None, ["head"], ["norm", "head"]])),
        rank_pattern=draw(st.sampled_from([{}, {"q": 5, "conv1": 1}])),
        init_lora_weights=False,
    )


def experts(draw: Draw) -> Any:
    names = some(draw, ["gate_up_proj", "down_proj", "head.weight"])
    targets = [name if "." in name else f"experts.{name}" for name in names]
    return peft.LoraConfig(
        r=draw(RANKS),
        lora_alpha=draw(st.sampled_from([1, 3])),
        target_modules=draw(st.sampled_from([[], ["q", "conv1"]])),
        target_parameters=targets,
        init_lora_weights=False,
        alpha_pattern=draw(st.sampled_from([{}, {"experts.down_proj": 7}])),
    )


def adalora(draw: Draw) -> Any:
    places = some(draw, [*LINEAR, "conv2"])
    alpha = draw(st.sampled_from([-1, 4]))
    return peft.AdaLoraConfig(
        init_r=draw(RANKS), target_r=1, lora_alpha=alpha, total_step=9, target_modules=places, init_lora_weights=False
    )


def lycoris(draw: Draw) -> dict[str, Any]:
    return {
        "r": draw(RANKS),
        "alpha": draw(st.sampled_from([1, 3])),
        "rank_pattern": draw(st.sampled_from([{}, {"q": 5}])),
        "alpha_pattern": draw(st.sampled_from([{}, {"conv1": 7}])),
        "use_effective_conv2d": draw(st.booleans()),
        "target_modules": some(draw, ["q", "k", *CONVS]),
        "init_weights": False,
    }


def loha(draw: Draw) -> Any:
    return peft.LoHaConfig(**lycoris(draw))


def lokr(draw: Draw) -> Any:
    factor, given = draw(st.sampled_from([-1, 2])), lycoris(draw)
    # PEFT's own forward fails on a decomposed Conv1d of rank 1 (torch.kron of a kernel that it cannot view).
    assume(not ("conv1" in given["target_modules"] and given["use_effective_conv2d"] and given["r"] == 1))
    return peft.LoKrConfig(**given, decompose_both=draw(st.booleans()), decompose_factor=factor)


def vera(draw: Draw) -> Any:
    return peft.VeraConfig(
        r=draw(RANKS),
        projection_prng_key=draw(st.integers(0, 99)),
        save_projection=draw(st.booleans()),
        target_modules=some(draw, LINEAR),
        init_weights=False,
    )


def randlora(draw: Draw) -> Any:
    sparse = draw(st.sampled_from([{}, {"sparse": True}, {"very_sparse": True}]))
    return peft.RandLoraConfig(
        r=draw(RANKS),
        randlora_alpha=draw(st.integers(1, 4)),
        projection_prng_key=draw(st.integers(0, 99)),
        save_projection=draw(st.booleans()),
        target_modules=some(draw, LINEAR),
        init_weights=False,
        **sparse,
    )


def vblora(draw: Draw) -> Any:
    return peft.VBLoRAConfig(
        r=draw(RANKS),
        num_vectors=draw(st.sampled_from([7, 300])),
        vector_length=2,
        topk=draw(st.integers(1, 3)),
        save_only_topk_weights=draw(st.booleans()),
        target_modules=some(draw, LINEAR),
    )


def miss(draw: Draw) -> Any:
    mini = draw(st.booleans())
    return peft.MissConfig(
        r=draw(RANKS), mini_r=2, target_modules=some(draw, ["q", "k"]), init_weights="mini" if mini else False
    )


def hira(draw: Draw) -> Any:
    return peft.HiraConfig(r=draw(RANKS), target_modules=some(draw, ["emb", *LINEAR, *CONVS]), init_weights=False)


def ia3(draw: Draw) -> Any:
    places = some(draw, [*LINEAR, "conv2"])
    inputs = draw(st.sampled_from([[], places[:1], places]))
    return peft.IA3Config(target_modules=places, feedforward_modules=inputs, init_ia3_weights=False)


def glora_(draw: Draw) -> Any:
    forms = {"config_A_B": "lora", "config_C": "vector", "config_D_E": draw(st.sampled_from(["vector", "constant"]))}
    bias = draw(st.sampled_from(["none", "all", "glora_only"]))
    return peft.GloraConfig(r=draw(RANKS), target_modules=["q"], bias=bias, **forms)


def tokens(draw: Draw) -> Any:
    rows = draw(st.lists(st.integers(0, 8), min_size=1, max_size=4, unique=True))
    if draw(st.booleans()):
        return peft.TrainableTokensConfig(target_modules=["emb"], token_indices=rows, init_weights=False)
    return peft.LoraConfig(r=2, target_modules=["q"], trainable_token_indices={"emb": rows}, init_lora_weights=False)


def norms(_draw: Draw) -> Any:
    return peft.LNTuningConfig(target_modules=["norm"])


METHODS = [lora, experts, adalora, loha, lokr, vera, randlora, vblora, miss, hira, ia3, glora_, tokens, norms]


def trained(config: Any, seed: int, transposed: bool = False) -> nn.Module:
    model = peft.get_peft_model(every(seed, transposed), copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
@examples(20)
@given(data=st.data(), seed=st.integers(0, 9), transposed=st.booleans())
def test_it_computes_what_peft_computes(
    tmp_path_factory: Any, method: Callable[[Draw], Any], data: st.DataObject, seed: int, transposed: bool
) -> None:
    directory = tmp_path_factory.mktemp("in")
    theirs = trained(method(data.draw), seed, transposed)
    theirs.save_pretrained(directory)
    base = every(seed, transposed)
    ours = interop.load_peft(copy.deepcopy(base), directory).eval()
    wanted = theirs(IDS)
    assume(bool(wanted.isfinite().all()))  # a sparse RandLoRA of one row may have no entry at all, and be 0 / 0
    assert_same(ours(IDS), wanted, base(IDS))
    assert_same(glora.merge(ours)(IDS), wanted, base(IDS))
    # A file of torch.save is read alike.
    torch.save(load_file(directory / TENSORS), directory / PICKLED)
    (directory / TENSORS).unlink()
    again = interop.load_peft(copy.deepcopy(base), directory).eval()
    assert_same(again(IDS), wanted, base(IDS))


@pytest.mark.parametrize("method", [lora, loha, vera, randlora, miss, hira, tokens], ids=lambda m: m.__name__)
@examples(5)
@given(data=st.data())
def test_what_came_from_peft_is_saved_and_loaded_as_any_adapter(
    tmp_path_factory: Any, method: Callable[[Draw], Any], data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("saved")
    trained(method(data.draw), 0).save_pretrained(directory)
    ours = interop.load_peft(every(), directory).eval()
    glora.save(ours, directory / "ours")
    again = glora.load(every(), directory / "ours")
    assume(bool(ours(IDS).isfinite().all()))  # as above
    torch.testing.assert_close(again(IDS), ours(IDS))
    with glora.disabled(ours):
        assert torch.equal(ours(IDS), every()(IDS))


def test_adalora_after_its_budget_has_shrunk(tmp_path: Path) -> None:
    """Layers of different rank, some of none; the scale is that of the rank that it began with."""
    sizes = {"init_r": 4, "target_r": 1, "tinit": 0, "tfinal": 1, "deltaT": 1, "total_step": 4}
    config = peft.AdaLoraConfig(**sizes, lora_alpha=8, target_modules=["q", "k"], init_lora_weights=False)
    model = peft.get_peft_model(every(), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for step in range(5):
        optimizer.zero_grad()
        model(IDS).square().sum().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
    model.eval().save_pretrained(tmp_path)
    ranks = {len(tensor) for key, tensor in load_file(tmp_path / TENSORS).items() if key.endswith("lora_E")}
    assert min(ranks) < 4
    ours = interop.load_peft(every(), tmp_path)
    assert (model(IDS) - every()(IDS)).abs().max() > 0.01
    assert_same(ours(IDS), model(IDS), every()(IDS))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changes_the_base_is_read_as_pefts_conversion_writes_it(start: str, tmp_path: Path) -> None:
    model = peft.get_peft_model(every(), peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights=start)).eval()
    for folder in ("start", "plain"):
        model.save_pretrained(tmp_path / folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = interop.load_peft(every(), tmp_path / "converted")
    torch.testing.assert_close(ours(IDS), model(IDS), atol=1e-5, rtol=1e-5)
    with pytest.raises(glora.AdapterFileError, match=start):
        interop.load_peft(every(), tmp_path / "plain")


def llama(**options: Any) -> nn.Module:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes, **options)).eval()


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [3, 7]},
        {"trainable_token_indices": {"embed_tokens": [3, 7]}, "ensure_weight_tying": True},
    ],
)
def test_tied_embeddings_stay_tied(options: dict[str, Any], tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(tie_word_embeddings=True), peft.LoraConfig(target_modules=["q_proj"], **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(tmp_path)
    ours = interop.load_peft(llama(tie_word_embeddings=True), tmp_path)
    assert_same(ours(IDS).logits, model(IDS).logits, llama(tie_word_embeddings=True)(IDS).logits)
    assert torch.equal(ours.model.embed_tokens.weight, ours.lm_head.weight)
    # And back.
    interop.save_peft(ours, tmp_path / "back")
    again = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=True), str(tmp_path / "back")).eval()
    assert_same(again(IDS).logits, ours(IDS).logits, llama(tie_word_embeddings=True)(IDS).logits)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.attn = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        return self.attn(x, x, x, need_weights=False)[0]


def attention() -> nn.Module:
    torch.manual_seed(0)
    return Attention().eval()


def test_multihead_attention(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["attn"], init_lora_weights=False)
    model = peft.get_peft_model(attention(), config).eval()
    model.save_pretrained(tmp_path)
    ours = interop.load_peft(attention(), tmp_path)
    assert {key.rpartition(".B.")[0] for key in glora.state_dict(ours)} == {"attn.in_proj_weight", "attn.out_proj"}
    assert_same(ours(IDS), model(IDS), attention()(IDS))
    with pytest.raises(ValueError, match="'attn.out_proj' is read by MultiheadAttention and never called"):
        interop.save_peft(ours, tmp_path / "out")
    alone = glora.apply(attention(), ["in_proj_weight"], glora.GLoRAConfig.lora(rank=2, init="random"))
    interop.save_peft(alone, tmp_path / "alone")
    again = peft.PeftModel.from_pretrained(attention(), str(tmp_path / "alone")).eval()
    assert_same(again(IDS), alone(IDS), attention()(IDS))


README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_readmes_batch_through_five_files_of_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample as its own method has it in PEFT."""
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if '"dora", "ia3"' in block]
    monkeypatch.chdir(tmp_path)
    places = {"target_modules": ["q", "k"]}
    configs = {
        "lora": peft.LoraConfig(r=2, init_lora_weights=False, **places),
        "dora": peft.LoraConfig(r=2, init_lora_weights=False, use_dora=True, **places),
        "ia3": peft.IA3Config(feedforward_modules=["k"], init_ia3_weights=False, **places),
        "hira": peft.HiraConfig(r=2, init_weights=False, **places),
        "glora": peft.GloraConfig(r=2, init_weights=False, **places),
    }

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict(emb=nn.Embedding(9, 6), q=nn.Linear(6, 8), act=nn.Tanh(), k=nn.Linear(8, 4)))

    ours, ids, wanted = build(), torch.arange(30).view(6, 5) % 9, list[Tensor]()
    for row, (name, config) in zip(ids, configs.items(), strict=False):
        theirs = peft.get_peft_model(build(), config).eval()
        theirs.save_pretrained(f"adapters/{name}")
        wanted.append(theirs(row))
    held: dict[str, Any] = {"glora": glora, "model": ours, "batch": ids}
    exec(example, held)
    assert_same(held["y"], torch.stack([*wanted, build()(ids[5])]), build()(ids))


def test_an_embedding_that_peft_trained_apart_from_its_tie_is_named(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = peft.get_peft_model(llama(tie_word_embeddings=True), config).eval()
    with torch.no_grad():
        model.model.model.embed_tokens.modules_to_save["default"].weight.mul_(1.1)
    model.save_pretrained(tmp_path)
    tied = llama(tie_word_embeddings=True)
    with pytest.raises(glora.AdapterFileError, match=r"tied to 'lm_head\.weight' here, and PEFT trained a copy"):
        interop.load_peft(tied, tmp_path)
    tied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    assert_same(interop.load_peft(tied, tmp_path)(IDS).logits, model(IDS).logits, llama()(IDS).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_that_peft_saves_by_itself_are_heads(tied: bool, tmp_path: Path) -> None:
    base = llama(tie_word_embeddings=tied)
    base.resize_token_embeddings(23)
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    model.eval().save_pretrained(tmp_path, save_embedding_layers=True)
    fresh = llama(tie_word_embeddings=tied)
    with pytest.raises(glora.AdapterFileError, match=r"call model\.resize_token_embeddings\(23\) first"):
        interop.load_peft(fresh, tmp_path)
    fresh = llama(tie_word_embeddings=tied)
    fresh.resize_token_embeddings(23)
    with torch.no_grad():
        fresh.model.embed_tokens.weight[20:] = 0  # other new rows than those that were saved
    ours = interop.load_peft(fresh, tmp_path)
    assert_same(ours(IDS).logits, model(IDS).logits, base(IDS).logits)
    heads = {"model.embed_tokens.weight", "lm_head.weight"} & set(glora.state_dict(ours))
    assert len(heads) == (1 if tied else 2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"groups": 2}, "groups=2"),
        ({"padding": 1, "padding_mode": "circular"}, "padding_mode='circular'"),
    ],
)
def test_a_convolution_that_peft_does_not_repeat_is_refused(
    options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3, **options)})

    peft.get_peft_model(build(), peft.LoraConfig(r=2, target_modules=["conv"])).save_pretrained(tmp_path)
    model = build()
    before = snapshot(model)
    with pytest.raises(glora.AdapterFileError, match=named):
        interop.load_peft(model, tmp_path)
    assert snapshot(model) == before


def test_miss_that_multiplies_blocks_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"q": nn.Linear(4, 4)})
    config = peft.MissConfig(r=2, target_modules=["q"], init_weights="bat")
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    with pytest.raises(glora.AdapterFileError, match="blocks of W0 by matrices of their own"):
        interop.load_peft(model, tmp_path)


def test_what_needs_the_base_says_so_without_one(tmp_path: Path) -> None:
    from glora.interop.peft.read import read_peft

    peft.get_peft_model(every(), peft.LoraConfig(target_modules=["q"], use_dora=True)).save_pretrained(tmp_path)
    with pytest.raises(glora.AdapterFileError, match="give the base model"):
        read_peft(tmp_path)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    peft.get_peft_model(every(), peft.LoraConfig(target_modules=["q"])).save_pretrained(tmp_path)
    (tmp_path / TENSORS).unlink()
    torch.save({"base_model.model.q.lora_A.weight": Path("x")}, tmp_path / PICKLED)
    with pytest.raises(glora.AdapterFileError, match="tensors alone"):
        interop.load_peft(every(), tmp_path)


def test_a_lora_beside_other_embedding_rows_is_refused(tmp_path: Path) -> None:
    """PEFT saves the rows that the adapter was trained beside; on others it would be another function."""
    peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["embed_tokens"])).save_pretrained(tmp_path)
    interop.load_peft(llama(), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] += 1
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(glora.AdapterFileError, match="beside other rows"):
        interop.load_peft(llama(), tmp_path)
