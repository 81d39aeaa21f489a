"""Families of models: how much an adapter with default targets reaches, merges exactly, and costs a step.

`python -m benchmarks.families` prints a row for each. The models are small and random, from transformers' configs and
plain torch; the step is compared with full fine-tuning of the same model, interleaved, medians.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import glora
from benchmarks.timing import interleaved
from glora import GLoRAConfig

Inputs = dict[str, Tensor]
WIDTH = 256  # of the models that are timed, at 8 x 64 tokens


def _of(kind: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = getattr(transformers, config)(**options)
            return getattr(transformers, kind).from_config(made, attn_implementation="eager")

    return build


def families(width: int = 32) -> dict[str, tuple[Callable[[], nn.Module], str]]:
    """Family to how its model of this width is built, and what it takes."""
    text: dict[str, Any] = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    bert: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    bert["intermediate_size"] = 2 * width
    llama: dict[str, Any] = {**bert, **text, "num_key_value_heads": 2, "head_dim": width // 4}
    gpt2: dict[str, Any] = {**text, "n_embd": width, "n_layer": 2, "n_head": 4}
    opt: dict[str, Any] = {**bert, "ffn_dim": 2 * width, "word_embed_proj_dim": width, "pad_token_id": 0}
    t5: dict[str, Any] = {**text, "d_model": width, "d_kv": width // 4, "d_ff": 2 * width, "num_layers": 2}
    moe: dict[str, Any] = {**llama, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": width}
    experts: dict[str, Any] = {**llama, "num_local_experts": 4}
    swin: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": width // 2, "depths": [1, 1]}

    def encoder() -> nn.Module:
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    model, causal, classifier = "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"
    return {
        "BERT": (_of(model, "BertConfig", **bert), "ids"),
        "BERT, classifier": (_of(classifier, "BertConfig", **bert), "ids"),
        "DeBERTa-v2": (_of(model, "DebertaV2Config", **bert, relative_attention=True), "ids"),
        "Llama": (_of(causal, "LlamaConfig", **llama), "ids"),
        "OPT": (_of(causal, "OPTConfig", **opt), "ids"),
        "Falcon": (_of(causal, "FalconConfig", **bert | text), "ids"),
        "GPT-2": (_of(causal, "GPT2Config", **gpt2), "ids"),
        "GPT-2, classifier": (_of(classifier, "GPT2Config", **gpt2), "ids"),
        "T5": (_of("AutoModelForSeq2SeqLM", "T5Config", **t5), "ids twice"),
        "Mixtral": (_of(causal, "MixtralConfig", **experts), "ids"),
        "Qwen2-MoE": (_of(causal, "Qwen2MoeConfig", **moe, shared_expert_intermediate_size=width), "ids"),
        "Qwen3-MoE": (_of(causal, "Qwen3MoeConfig", **moe), "ids"),
        "GPT-OSS": (_of(causal, "GptOssConfig", **experts), "ids"),
        "Llama 4": (_of(causal, "Llama4TextConfig", **experts, intermediate_size_mlp=2 * width), "ids"),
        "ViT": (_of(model, "ViTConfig", **bert | {"image_size": 32, "patch_size": 8}), "pixels"),
        "Swin": (_of(model, "SwinConfig", **swin, num_heads=[2, 4], window_size=4), "pixels"),
        "nn.TransformerEncoder": (encoder, "hidden"),
    }


def inputs_of(kind: str, width: int = 32, batch: int = 2, tokens: int = 16) -> Inputs:
    """A batch for a family."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (batch, tokens), generator=generator)
    if kind == "pixels":
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    if kind == "hidden":
        return {"src": torch.randn(batch, tokens, width, generator=generator)}
    return {"input_ids": ids, "decoder_input_ids": ids} if kind == "ids twice" else {"input_ids": ids}


def output(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's first output."""
    found = model(**inputs)
    return found if isinstance(found, Tensor) else found[0]


def attach(model: nn.Module, **options: Any) -> nn.Module:
    """With default targets and forms; the warnings on biases and heads are known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return glora.apply(model, config=GLoRAConfig.glora(init="random", rank=2), **options)


def _linear_share(model: nn.Module) -> float:
    """The share that nn.Linear alone would reach, as before other kinds were known."""
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        return 0.0
    outputs = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            planned = glora.plan(model, lambda _, m: isinstance(m, nn.Linear) and m is not outputs)
        except ValueError:  # there is none but the output embeddings
            return 0.0
    assert planned.coverage is not None
    return planned.coverage.share


def _step(model: nn.Module, inputs: Inputs) -> None:
    output(model, inputs).float().square().mean().backward()
    model.zero_grad()


def main() -> None:
    """Print the table."""
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    print("| family | reached by nn.Linear alone | reached | merge difference | removed | step / full fine-tuning |")
    print("|---|---|---|---|---|---|")
    for family, (build, kind) in families(WIDTH).items():
        torch.manual_seed(0)
        model, inputs = build().eval(), inputs_of(kind, WIDTH, 8, 64)
        full = build().train()
        before = _linear_share(model)
        with torch.no_grad():
            base = output(model, inputs)
        share = glora.summary(attach(model)).coverage.share
        with torch.no_grad():
            adapted = output(model, inputs)
            with glora.merged(model):
                difference = (output(model, inputs) - adapted).abs().max() / adapted.abs().max()
        times = interleaved({"ours": partial(_step, model, inputs), "full": partial(_step, full, inputs)}, seconds=3.0)
        _, ratio, _ = times["ours"].ratio(times["full"])
        with torch.no_grad():
            same = torch.equal(output(glora.remove(model), inputs), base)
        removed = "to the bit" if same else "NO"
        print(f"| {family} | {before:.0%} | {share:.0%} | {difference:.0e} | {removed} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
