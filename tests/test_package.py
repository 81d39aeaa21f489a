"""What `import glora` brings: the public names, and nothing that an extra brings."""

from __future__ import annotations

import subprocess
import sys

import glora

PUBLIC = {
    *("AdapterFileError", "GLoRAConfig", "Plan", "Summary"),
    *(
        "activate",
        "adapters",
        "apply",
        "base_state_dict",
        "combine",
        "delete",
        "disabled",
        "load",
        "load_state_dict",
        "merge",
    ),
    *("merged", "named_parameters", "parameters", "plan", "remove", "reset_parameters", "route", "save"),
    *("state_dict", "summary", "functional", "integrations", "interop", "search"),
}


def test_the_public_names_are_there() -> None:
    assert set(glora.__all__) >= PUBLIC
    assert len(glora.__all__) == len(set(glora.__all__))
    assert all(hasattr(glora, name) for name in glora.__all__)


def test_the_choice_of_a_kernel_is_not_public() -> None:
    assert "ways" not in glora.__all__
    assert not hasattr(glora, "ways")


def run(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


def test_importing_glora_imports_no_extra() -> None:
    extras = ["safetensors", "peft", "lycoris", "transformers", "tqdm", "optuna", "rich", "hypothesis"]
    script = "import sys, torch; before = set(sys.modules); import glora; print(*(set(sys.modules) - before))"
    assert not set(extras) & set(run(script).split())


def test_interop_comes_with_glora_and_without_safetensors() -> None:
    script = "import sys, glora; print(sorted(glora.interop.__all__), 'safetensors' in sys.modules)"
    names = ["load_lycoris", "load_official", "load_peft", "save_lycoris", "save_peft"]
    assert run(script).strip() == f"{names} False"


def test_the_integrations_come_with_glora_and_without_their_frameworks() -> None:
    script = """
import sys, glora
names = ["integrations", "interop", "search"]
print(set(names) <= set(dir(glora)), set(names) <= set(glora.__all__))
print({"lightning", "trainer"} <= set(dir(glora.integrations)))
print(glora.integrations.trainer.AdapterCheckpoints.__module__, {"transformers", "lightning"} & set(sys.modules))
try:
    glora.integrations.keras
except AttributeError as error:
    print(error)
"""
    assert run(script).splitlines() == [
        "True True",
        "True",
        "glora.integrations.trainer set()",
        "module 'glora.integrations' has no attribute 'keras'",
    ]


def test_importing_glora_imports_no_compiler_and_little_beside_torch() -> None:
    script = "import sys, torch; before = set(sys.modules); import glora; print(*(set(sys.modules) - before))"
    new = set(run(script).split())
    assert not {name for name in new if name.startswith(("torch._dynamo", "torch._inductor", "sympy"))}
    packages = {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names)
    assert packages <= {"glora", "einops", "torch"}
