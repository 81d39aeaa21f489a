"""The names in kohya's, LyCORIS's and diffusers' files: one model and several, spellings, and what fits none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import glora
from glora import interop
from glora.model import flags

PREFIXES = ["lora_unet", "lora_te", "lora_te1", "lora_te2", "lycoris", "unet", "text_encoder", "x"]


def nested(paths: dict[str, nn.Module]) -> nn.Module:
    """A model with these modules at these paths."""
    root = nn.Module()
    for path, module in paths.items():
        *outer, name = path.split(".")
        at = root
        for part in outer:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.add_module(name, module)
    return root


def lora(
    name: str, seed: int = 0, rank: int = 2, alpha: float | None = 1.0, out: int = 3, inputs: int = 4
) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    tensors = {f"{name}.lora_up.weight": torch.randn(out, rank), f"{name}.lora_down.weight": torch.randn(rank, inputs)}
    return tensors | ({} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)})


def update(tensors: dict[str, Tensor], name: str, scale: float) -> Tensor:
    return scale * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]


def states(*models: nn.Module) -> list[tuple[dict[str, Tensor], list[bool]]]:
    return [
        (
            {key: tensor.clone() for key, tensor in model.state_dict().items()},
            [p.requires_grad for p in model.parameters()],
        )
        for model in models
    ]


def assert_unchanged(before: Any, *models: nn.Module) -> None:
    for (tensors, asked), model in zip(before, models, strict=True):
        now = model.state_dict()
        assert now.keys() == tensors.keys()
        assert all(torch.equal(now[key], tensor) for key, tensor in tensors.items())
        assert [p.requires_grad for p in model.parameters()] == asked


PATHS = st.lists(
    st.lists(st.sampled_from(["a", "b", "a_b", "0", "to_q", "attn1"]), min_size=1, max_size=3).map(".".join),
    min_size=1,
    max_size=4,
    unique_by=lambda path: path.replace(".", "_"),
).filter(lambda paths: not any(one != other and f"{one}.".startswith(f"{other}.") for one in paths for other in paths))


@given(st.lists(st.sampled_from(PREFIXES), min_size=1, max_size=3, unique=True), st.data())
def test_each_prefix_goes_to_its_model(tmp_path_factory: Any, prefixes: list[str], data: st.DataObject) -> None:
    file = tmp_path_factory.mktemp("names") / "a.safetensors"
    models, tensors, expected = {}, {}, {}
    for number, prefix in enumerate(prefixes):
        paths = data.draw(PATHS)
        models[prefix] = nested({path: nn.Linear(4, 3) for path in paths})
        for seed, path in enumerate(paths):
            name = f"{prefix}_{path}".replace(".", "_")
            own = lora(name, 10 * number + seed)
            tensors |= own
            expected[prefix, path] = models[prefix].get_submodule(path).weight.detach() + update(own, name, 0.5)
    save_file(tensors, file)
    assert interop.load_lycoris(models, file) is models
    for (prefix, path), weight in expected.items():
        torch.testing.assert_close(models[prefix].get_submodule(path).weight.detach(), weight)
    interop.save_lycoris(models, file.with_name("again.safetensors"))
    again = interop.load_lycoris(
        {p: glora.remove(m) for p, m in models.items()}, file.with_name("again.safetensors"), strict=True
    )
    for (prefix, path), weight in expected.items():
        torch.testing.assert_close(again[prefix].get_submodule(path).weight.detach(), weight)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (lora("lora_te_encoder_fc9"), "no layer for lora_te_encoder_fc9 .the nearest is 'lora_te_encoder_fc[12]'"),
        (lora("lora_other_encoder_fc1"), "lora_other_encoder_fc1, of another model"),
        (lora("lora_te_encoder_fc2", out=5), r"wrong shape: an update of \(5, 4\) where the weight is \(3, 4\)"),
        (lora("lora_te_encoder_norm"), r"lora_te_encoder_norm.*wrong kind"),
        ({"lora_te_encoder_fc2.oft_blocks": torch.ones(1, 2, 2)}, "no place for a rotation of W0"),
        ({"lora_te_encoder_fc2.lambda_layer": torch.ones(1, 2)}, "depends on the step"),
        ({"lora_te_encoder_fc2.hada_w1_a": torch.ones(3, 2)}, "without 'hada_w1_b'"),
        ({"lora_te_encoder_fc2.lora_q.weight": torch.ones(3, 2)}, "no known method"),
        (
            lora("lora_te_encoder_fc2") | {"lora_te_encoder_fc2.other": torch.ones(1)},
            "with other, which its method has not",
        ),
        ({k: v.int() for k, v in lora("lora_te_encoder_fc2").items()}, "floating"),
    ],
)
def test_a_wrong_name_shape_and_kind_are_told_apart_and_nothing_has_changed(
    extra: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    unet = nested({"mid.to_q": nn.Linear(4, 3)})
    text = nested({"encoder.fc1": nn.Linear(4, 3), "encoder.fc2": nn.Linear(4, 3), "encoder.norm": nn.LayerNorm(4)})
    save_file(lora("lora_unet_mid_to_q") | lora("lora_te_encoder_fc1") | extra, tmp_path / "a.safetensors")
    before = states(unet, text)
    with pytest.raises(glora.AdapterFileError, match=message):
        interop.load_lycoris({"lora_unet": unet, "lora_te": text}, tmp_path / "a.safetensors")
    assert_unchanged(before, unet, text)


def test_all_models_or_none(tmp_path: Path) -> None:
    unet, text = nested({"q": nn.Linear(4, 3)}), nested({"q": nn.Linear(4, 3)})
    glora.apply(text, config=glora.GLoRAConfig.lora(), name="taken")
    save_file(lora("u_q") | lora("t_q"), tmp_path / "a.safetensors")
    before = states(unet, text)
    with pytest.raises(ValueError, match="attached already"):
        interop.load_lycoris({"u": unet, "t": text}, tmp_path / "a.safetensors", "taken")
    assert_unchanged(before, unet, text)


def test_all_models_or_none_when_memory_ends_at_the_last(tmp_path: Path) -> None:
    unet, text = nested({"q": nn.Linear(4, 3)}), nested({"q": nn.Linear(4, 3)})
    save_file(lora("u_q") | lora("t_q"), tmp_path / "a.safetensors")
    before, freeze, calls = states(unet, text), flags.freeze, list[int]()

    def fail_at_the_second(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        freeze(*arguments, **options)

    with mock.patch.object(flags, "freeze", fail_at_the_second), pytest.raises(MemoryError):
        interop.load_lycoris({"u": unet, "t": text}, tmp_path / "a.safetensors")
    assert len(calls) == 2
    assert_unchanged(before, unet, text)


def test_a_file_of_several_models_is_not_for_one(tmp_path: Path) -> None:
    unet, text = nested({"q": nn.Linear(4, 3)}), nested({"fc": nn.Linear(4, 3)})
    save_file(lora("lora_unet_q") | lora("lora_te_fc"), tmp_path / "a.safetensors")
    with pytest.raises(
        glora.AdapterFileError, match=r"load_lycoris\(\{'lora_unet': \.\.\., 'lora_te': \.\.\.\}, file\)"
    ):
        interop.load_lycoris(unet, tmp_path / "a.safetensors")
    save_file(lora("lora_unet_q"), tmp_path / "b.safetensors")
    with pytest.raises(glora.AdapterFileError, match="has none of 'lora_te', and has lora_unet"):
        interop.load_lycoris({"lora_unet": unet, "lora_te": text}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="a Linear in common"):
        interop.load_lycoris({"lora_unet": unet, "lora_te": nn.ModuleList(unet.children())}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="mapping from prefix to model"):
        interop.load_lycoris({}, tmp_path / "a.safetensors")


def test_a_name_of_two_layers_is_refused(tmp_path: Path) -> None:
    model = nested({"a.b": nn.Linear(4, 3), "a_b": nn.Linear(4, 3)})
    save_file(lora("lora_unet_a_b"), tmp_path / "a.safetensors")
    with pytest.raises(glora.AdapterFileError, match="for several: 'a.b', 'a_b'"):
        interop.load_lycoris(model, tmp_path / "a.safetensors")
    models = {"lora": nested({"unet.a_b": nn.Linear(4, 3)}), "lora_unet": nested({"a.b": nn.Linear(4, 3)})}
    with pytest.raises(glora.AdapterFileError, match="for several: 'unet.a_b', 'a.b'"):
        interop.load_lycoris(models, tmp_path / "a.safetensors")


@pytest.mark.parametrize("inside", ["", "text_model."])
@pytest.mark.parametrize("said", ["", "text_model."])
def test_text_encoders_have_text_model_in_front_or_not(inside: str, said: str, tmp_path: Path) -> None:
    path = "encoder.layers.0.self_attn.q_proj"
    name = f"lora_te_{said}{path}".replace(".", "_")
    text, tensors = nested({inside + path: nn.Linear(4, 3)}), lora(name)
    expected = text.get_submodule(inside + path).weight.detach() + update(tensors, name, 0.5)
    save_file(tensors, tmp_path / "a.safetensors")
    interop.load_lycoris(text, tmp_path / "a.safetensors")
    torch.testing.assert_close(text.get_submodule(inside + path).weight, expected)


SPELLINGS = {
    "peft": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "older": ("{}.lora.down.weight", "{}.lora.up.weight"),
    "kohya with dots": ("{}.lora_down.weight", "{}.lora_up.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_diffusers_spellings(spelling: str, tmp_path: Path) -> None:
    tensors, paths = lora("x", alpha=None), ("down_blocks.0.attn1.to_q", "down_blocks.0.attn1.to_out.0")
    down, up = SPELLINGS[spelling]
    both = {
        f: {down.format(f"{f}.{p}"): tensors["x.lora_down.weight"] for p in paths}
        | {up.format(f"{f}.{p}"): tensors["x.lora_up.weight"] for p in paths}
        for f in ("unet", "text_encoder")
    }
    save_file({k: v.clone() for k, v in {**both["unet"], **both["text_encoder"]}.items()}, tmp_path / "a.safetensors")
    models = {prefix: nested({p: nn.Linear(4, 3) for p in paths}) for prefix in both}
    expected = {
        (f, p): m.get_submodule(p).weight.detach() + update(tensors, "x", 1) for f, m in models.items() for p in paths
    }
    interop.load_lycoris(models, tmp_path / "a.safetensors")
    for (prefix, path), weight in expected.items():
        torch.testing.assert_close(models[prefix].get_submodule(path).weight, weight)


def test_diffusers_oldest_spelling(tmp_path: Path) -> None:
    tensors, file = lora("x", alpha=None), tmp_path / "a.safetensors"
    model = nested({"mid.attn1.to_q": nn.Linear(4, 3), "mid.attn1.to_out.0": nn.Linear(4, 3)})
    expected = {
        name: module.weight.detach() + update(tensors, "x", 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    made = {
        f"unet.mid.attn1.processor.{at}_lora.{way}.weight": tensors[f"x.lora_{way}.weight"].clone()
        for at in ("to_q", "to_out")
        for way in ("up", "down")
    }
    save_file(made, file)
    interop.load_lycoris(model, file)
    for path, weight in expected.items():
        torch.testing.assert_close(model.get_submodule(path).weight, weight)


@pytest.mark.parametrize("rslora", [False, True])
def test_diffusers_alphas_stand_in_the_metadata(rslora: bool, tmp_path: Path) -> None:
    tensors = {
        f"unet.{p}.lora_{w}.weight": t
        for p in ("a.q", "a.k")
        for w, t in (("A", torch.ones(4, 4)), ("B", torch.ones(3, 4)))
    }
    said = {"unet.r": 4, "unet.lora_alpha": 8, "unet.alpha_pattern": {"k": 2}, "unet.use_rslora": rslora}
    save_file(
        {k: v.clone() for k, v in tensors.items()},
        tmp_path / "a.safetensors",
        {"lora_adapter_metadata": json.dumps(said)},
    )
    model = nested({"a.q": nn.Linear(4, 3), "a.k": nn.Linear(4, 3)})
    base = {path: model.get_submodule(path).weight.detach().clone() for path in ("a.q", "a.k")}
    interop.load_lycoris(model, tmp_path / "a.safetensors")
    for path, alpha in (("a.q", 8), ("a.k", 2)):
        moved = torch.full((3, 4), 4.0) * alpha / (2 if rslora else 4)
        torch.testing.assert_close(model.get_submodule(path).weight, base[path] + moved)
    for bad in ("[]", "{", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 1}}'):
        save_file(
            {k: v.clone() for k, v in tensors.items()}, tmp_path / "b.safetensors", {"lora_adapter_metadata": bad}
        )
        with pytest.raises(glora.AdapterFileError):
            interop.load_lycoris(glora.remove(model), tmp_path / "b.safetensors")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("blocks", [1, 2])
def test_sdxls_names_are_those_that_diffusers_reads(blocks: int, tmp_path: Path) -> None:
    """diffusers' own conversion is the reference; it knows which of its modules each of kohya's names means."""
    diffusers = pytest.importorskip("diffusers")
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=blocks,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
    )
    each = blocks + 1
    names = [
        *(
            f"lora_unet_input_blocks_{n}_0_{rest}"
            for n in (1, each + 1)
            for rest in ("in_layers_2", "emb_layers_1", "out_layers_3")
        ),
        f"lora_unet_input_blocks_{each}_0_op",
        f"lora_unet_input_blocks_{each + 1}_0_skip_connection",
        *(f"lora_unet_input_blocks_{each + 1}_1_{rest}" for rest in ("proj_in", "transformer_blocks_0_attn1_to_q")),
        *(f"lora_unet_middle_block_{rest}" for rest in ("0_in_layers_2", "1_proj_out", "2_out_layers_3")),
        *(f"lora_unet_output_blocks_{n}_0_in_layers_2" for n in range(2 * each)),
        *(f"lora_unet_output_blocks_{n}_1_transformer_blocks_0_ff_net_2" for n in range(each)),
        f"lora_unet_output_blocks_{blocks}_2_conv",
    ]
    tensors: dict[str, Tensor] = {}
    path_of: dict[str, str] = {}
    for name in names:
        (theirs,) = conversion._maybe_map_sgm_blocks_to_diffusers({f"{name}.alpha": 1}, unet.config)
        path = conversion._convert_unet_lora_key(theirs.removesuffix(".alpha")).removeprefix("unet.")
        path_of[name] = path.replace(".processor.to.", ".to_")
        out, inputs, *kernel = unet.get_submodule(path_of[name]).weight.shape
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, 1, *[1] * len(kernel))
        tensors[f"{name}.lora_down.weight"] = torch.randn(1, inputs, *kernel)
    save_file(tensors, tmp_path / "a.safetensors")
    own = glora.state_dict(interop.load_lycoris(unet, tmp_path / "a.safetensors"))
    assert len(own) == len(tensors)
    for name, path in path_of.items():
        assert torch.equal(own[f"{path}.B.left"], tensors[f"{name}.lora_up.weight"].flatten(1)), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv2d(4, 4, 3)])
def test_diffusers_dora_is_pefts(layer: nn.Module, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        nested({"a.to_q": layer}), peft.LoraConfig(r=2, target_modules=["to_q"], use_dora=True, lora_alpha=2)
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora" in name:
                parameter.add_(0.3 * torch.rand_like(parameter))
    x = torch.randn(2, 4) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 5, 5)
    base, expected = layer(x).detach(), theirs.base_model.model.a.to_q(x).detach()
    tensors = peft.get_peft_model_state_dict(theirs)
    save_file(
        {k.replace("base_model.model", "unet"): t.contiguous() for k, t in tensors.items()}, tmp_path / "a.safetensors"
    )
    interop.load_lycoris(nested({"a.to_q": layer}), tmp_path / "a.safetensors")
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(base, expected, atol=1e-3)
