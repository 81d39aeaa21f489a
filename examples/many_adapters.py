"""Serve many adapters: one model in memory, and each request of a batch goes through its own adapter.
At the end you have four trained adapters and their speed in one batch: half a minute on two CPU cores, no download.

    pip install -e ".[examples,files]"
    python examples/many_adapters.py
"""

# %% [markdown]
# ## The task
#
# A server has one base model and many customers, each with their own adapter. A batch mixes requests of several
# customers. `glora.route` sends each sample through its own adapter: the product with the base weight is computed once
# for the whole batch, and only the small factors differ. The adapters may be of different kinds.

# %%
from __future__ import annotations

import copy
import threading
import time
from pathlib import Path

import torch
from shared import done, draw, options, train
from torch import Tensor, nn

import glora
from glora.text import table

# %% [markdown]
# ## A base, and a task for each customer
#
# Each customer's task is a random linear map of the inputs, which the base does not know. Their adapters are of four
# kinds: LoRA, vectors (SSF), all five paths, and HiRA.

# %%
KINDS = {
    "lora": glora.GLoRAConfig.lora(rank=4),
    "vectors": glora.GLoRAConfig.ssf(),
    "glora": glora.GLoRAConfig.glora(rank=2),
    "hira": glora.GLoRAConfig.hira(rank=4),
}


def base_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 8))


def adapters(base: nn.Module, folder: Path, steps: int) -> dict[str, list[float]]:
    """Train an adapter for each customer on a copy of the base, and save it; return the losses."""
    losses: dict[str, list[float]] = {}
    for name, config in KINDS.items():
        model, task = glora.apply(copy.deepcopy(base), config=config), torch.randn(32, 8) / 6

        def loss(model: nn.Module = model, task: Tensor = task) -> Tensor:
            x = torch.randn(128, 32)
            return (model(x) - x @ task).square().mean()

        losses[name] = train(glora.parameter_groups(model, 1e-2), loss, steps, 1e-2, name, folder)
        glora.save(model, folder / name)
    return losses


# %% [markdown]
# ## Serving
#
# All adapters are loaded into one model; `trainable=False` loads them without gradients. `glora.route` takes the name
# of each sample's adapter; `None` is the base.


# %%
def serve(model: nn.Module, requests: list[tuple[str | None, Tensor]]) -> Tensor:
    """The answers to a batch of requests: the adapter's name and the input of each."""
    with torch.no_grad(), glora.route(model, [name for name, _ in requests]):
        return model(torch.stack([x for _, x in requests]))


def one_after_the_other(model: nn.Module, requests: list[tuple[str | None, Tensor]]) -> Tensor:
    """The same with one call per request; `activate` switches the adapter, for all threads."""
    answers: list[Tensor] = []
    for name, x in requests:
        glora.activate(model, {} if name is None else name)
        with torch.no_grad():
            answers.append(model(x))
    return torch.stack(answers)


# %% [markdown]
# A route belongs to the thread that entered it, so a server may run each batch in its own thread, without a lock.


# %%
def in_threads(model: nn.Module, batches: list[list[tuple[str | None, Tensor]]]) -> list[Tensor]:
    """Serve each batch in its own thread."""
    answers: list[Tensor] = [torch.empty(0)] * len(batches)

    def work(index: int) -> None:
        answers[index] = serve(model, batches[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


# %% [markdown]
# ## All together
#
# At the end a customer sends a new version of an adapter. `replace=True` swaps it in place of the old one (hot swap);
# the others stay as they are.


# %%
def main() -> None:
    chosen = options(__doc__, "many_adapters", steps=300, requests=64)
    base = base_model()
    draw(adapters(base, chosen.out, chosen.steps), chosen.out / "learning_curve.png")

    model = base
    for name in KINDS:
        glora.load(model, chosen.out / name, name, trainable=False)
    print(glora.summary(model))

    names = [*KINDS, None]
    requests = [(names[i % len(names)], torch.randn(32)) for i in range(chosen.requests)]
    rows: list[list[str]] = []
    answers: list[Tensor] = []
    for way, call in (("one batch, routed", serve), ("one after the other", one_after_the_other)):
        call(model, requests)
        started = time.perf_counter()
        answers.append(call(model, requests))
        rows.append([way, f"{1000 * (time.perf_counter() - started):.1f}"])
    print(table(f"{len(requests)} requests, {len(KINDS)} adapters and the base", ["way", "milliseconds"], rows))
    print(f"largest difference between the two ways: {(answers[0] - answers[1]).abs().max():.1e}")

    threaded = in_threads(model, [requests, requests[::-1]])
    print(f"largest difference between two threads: {(threaded[0] - threaded[1].flip(0)).abs().max():.1e}")

    glora.load(model, chosen.out / "lora", "lora", trainable=False, replace=True)
    print(f"adapters: {', '.join(glora.adapters(model))}")
    done(chosen.out)


if __name__ == "__main__":
    main()
