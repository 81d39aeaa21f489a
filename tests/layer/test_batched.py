"""Where a module has the batch: whatever its order, each sample is its own adapter's, or the call is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import glora
from glora import GLoRAConfig
from tests.helpers.calls import RANDOM
from tests.helpers.kinds import KINDS

T: Any = pytest.importorskip("transformers")

NAMES = st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=4)
LORA = GLoRAConfig.lora(rank=2, init="random")


def with_two(model: Any, targets: Any = "all-linear", config: GLoRAConfig = RANDOM) -> Any:
    for name in "ab":
        glora.apply(model, targets, config, name=name)
    return model.eval()


def each_alone(model: nn.Module, names: list[str | None], call: Callable[[int], Any]) -> list[Any]:
    found: list[Any] = []
    for index, name in enumerate(names):
        glora.activate(model, {} if name is None else name)
        found.append(call(index))
    return found


@given(NAMES, st.integers(1, 4), st.booleans(), st.sampled_from(["", "key_padding", "attn", "each attn"]))
def test_attention_has_its_batch_where_it_says(names: list[str | None], size: int, first: bool, masked: str) -> None:
    """Also where there are as many tokens as samples, for masks and for attention weights."""
    attention = with_two(nn.MultiheadAttention(4, 2, batch_first=first).double())
    x = torch.randn(len(names), size, 4, dtype=torch.float64)
    masks: dict[str, Tensor] = {}
    if masked == "key_padding":
        masks["key_padding_mask"] = torch.rand(len(names), size) < 0.5
        masks["key_padding_mask"][:, 0] = False
    elif masked:
        per_sample = [2 * len(names)] if masked == "each attn" else []
        masks["attn_mask"] = torch.randn(*per_sample, size, size, dtype=torch.float64)

    def call(x: Tensor, masks: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x = x if first else x.transpose(0, 1)
        y, weights = attention(x, x, value=x, **masks)
        return (y if first else y.transpose(0, 1)), weights

    def of(index: int) -> dict[str, Tensor]:
        each = {"key_padding": 1, "each attn": 2}.get(masked, 0)
        return {key: mask[index * each : (index + 1) * each] if each else mask for key, mask in masks.items()}

    wanted = each_alone(attention, names, lambda i: call(x[i : i + 1], of(i)))
    with glora.route(attention, names):
        y, weights = call(x, masks)
    torch.testing.assert_close(y, torch.cat([y for y, _ in wanted]))
    torch.testing.assert_close(weights, torch.cat([weights for _, weights in wanted]))


UNBATCHED = [kind for kind in KINDS if kind.attention or ("Conv" in str(kind) and "1D" not in str(kind))]


@pytest.mark.parametrize("kind", UNBATCHED, ids=str)
@pytest.mark.parametrize("flattened", [False, True])
def test_a_call_without_a_batch_is_refused(kind: Any, flattened: bool) -> None:
    model, x = with_two(kind.build().double(), [kind.path], LORA), kind.input()[0]
    names = ["a", "b", "a", "b"][: len(x)]  # as many as the input is long
    message = "'0' was called with an input of shape"
    with glora.route(model, names, flattened=flattened), pytest.raises(ValueError, match=message):
        kind.call(model, x)


@given(st.integers(1, 4), st.integers(0, 1))
def test_a_vector_is_no_batch(size: int, dim: int) -> None:
    layer = with_two(nn.Linear(size, 3))
    with pytest.raises(ValueError, match="not that many samples"), glora.route(layer, ["a"] * size, dim=dim):
        layer(torch.randn(size))


@given(NAMES, st.integers(1, 3))
def test_samples_in_the_second_dimension_that_one_product_could_mix(names: list[str | None], tokens: int) -> None:
    """Of forms and sizes that share one product with W0 where the batch comes first."""
    layer = with_two(nn.Linear(4, 3).double(), config=LORA)
    x = torch.randn(tokens, len(names), 4, dtype=torch.float64)
    wanted = each_alone(layer, names, lambda i: layer(x[:, i : i + 1]))
    with glora.route(layer, names, dim=1):
        torch.testing.assert_close(layer(x), torch.cat(wanted, 1))


class Passing(nn.Module):
    """A layer that has the batch whole, and one that is given its rows in some other way."""

    def __init__(self, rows: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.whole, self.rows, self.layer = nn.Linear(4, 4), rows, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.rows(self.whole(x)))


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "expert by expert": lambda x: x.reshape(-1, 4).repeat(3, 1),
    "some tokens": lambda x: x.reshape(-1, 4)[: len(x)].repeat(2, 1),
    "the batch twice": lambda x: torch.cat([x, x]),
    "tokens first": lambda x: x.transpose(0, 1),
}


@pytest.mark.parametrize("order", ORDERS)
def test_flattened_refuses_rows_that_are_not_each_samples_tokens(order: str) -> None:
    model = with_two(Passing(ORDERS[order]))
    for _ in range(2):  # of each forward
        with glora.route(model, ["a", "b", None], flattened=True), pytest.raises(ValueError, match=r"'layer' is given"):
            model(torch.randn(3, 6, 4))


@given(NAMES, st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_flattened_takes_the_same_tokens_of_each_forward(names: list[str | None], lengths: list[int]) -> None:
    """As in generation: a prompt, and then a token at a time, inside of one block."""
    model = with_two(Passing(lambda x: x.reshape(-1, 4)).double())
    inputs = [torch.randn(len(names), tokens, 4, dtype=torch.float64) for tokens in lengths]
    wanted = [torch.cat(each_alone(model, names, lambda i, x=x: model(x[i : i + 1]))) for x in inputs]
    with glora.route(model, names, flattened=True):
        for x, y in zip(inputs, wanted, strict=True):
            torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("path", ["experts", "experts.0"])
def test_tokens_that_a_router_may_have_picked_are_refused(path: str, flattened: bool) -> None:
    kind = next(kind for kind in KINDS if str(kind) == "experts up")
    experts = kind.build().double() if path == "experts" else nn.Sequential(nn.Linear(4, 4).double())
    model = nn.ModuleDict({"experts": experts[0] if path == "experts" else experts})
    with_two(model, ["gate_up_proj" if path == "experts" else "0"], LORA)
    names = ["a", "b", None]
    with glora.route(model, names, flattened=flattened), pytest.raises(ValueError, match="that a router has picked"):
        experts(torch.randn(3, 4, dtype=torch.float64))


TEXT: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 16, "d_model": 16, "intermediate_size": 32, "d_inner": 32, "n_layer": 2,
    "n_head": 2, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size_mlp": 32,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "ffn_dim": 32, "word_embed_proj_dim": 16, "num_local_experts": 4,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1, "num_experts": 4,
    "attention_window": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "src_vocab_size": 120, "tgt_vocab_size": 120, "langs": ["en", "de"], "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES = {
    "XLNet": "right", "Longformer": "right", "LED": "right", "FSMT": "right", "OPT": "right", "Mixtral": "right",
    "Qwen2Moe": "right", "GptOss": "right", "Llama4Text": "refused", "SwitchTransformers": "refused",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The adapter reaches")  # XLNet holds its attention in tensors of its own
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [4, 8])
@torch.no_grad()
def test_families_whose_layers_have_rows_in_an_order_of_their_own(family: str, tokens: int) -> None:
    kind = getattr(T, f"{family}Config")
    known = vars(kind()).keys() | kind.attribute_map.keys()
    config = kind(**{key: value for key, value in TEXT.items() if key in known})
    torch.manual_seed(0)
    model: Any = T.AutoModel.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.2)
    with_two(model, config=LORA)
    names, ids = ["a", "b", None, "a"], torch.randint(3, 100, (4, tokens))

    def call(ids: Tensor) -> Tensor:
        decoder = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
        return model(input_ids=ids, **decoder)[0]

    wanted = torch.cat(each_alone(model, names, lambda i: call(ids[i : i + 1])))
    with glora.route(model, names, flattened=True):
        if FAMILIES[family] == "right":
            torch.testing.assert_close(call(ids), wanted, atol=1e-4, rtol=1e-4)
        else:
            with pytest.raises((ValueError, RuntimeError), match="glora.route"):
                call(ids)
