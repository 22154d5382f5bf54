"""The package as a whole: light to import, lazy names, imports in one direction."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import paddlemix

ROOT = Path(__file__).parents[1]

# A room may import from itself and from those before it.
ROOMS = (
    *("errors", "runtime", "lazy_paddlenlp", "models", "processors", "auto", "datasets", "evaluation", "trainer"),
    *("__init__", "tools", "examples"),  # the tools and examples may use the public names
)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_import_is_light():
    done = run(
        "import sys, paddlemix, paddlemix.auto, paddlemix.errors, paddlemix.runtime\n"
        "print(sorted({'paddle', 'paddlenlp', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    assert done.stdout == "[]\n", done.stderr


def test_public_names_are_imported_when_used():
    from paddlemix import LlavaChat, LlavaConfig, LlavaLlamaForCausalLM, LlavaProcessor

    names = [cls.__name__ for cls in (LlavaConfig, LlavaLlamaForCausalLM, LlavaProcessor, LlavaChat)]
    assert names == ["LlavaConfig", "LlavaLlamaForCausalLM", "LlavaProcessor", "LlavaChat"]
    assert set(names) <= set(dir(paddlemix))
    with pytest.raises(AttributeError, match="LlavaModle"):
        getattr(paddlemix, "LlavaModle")  # noqa: B009


def test_model_is_a_paddlenlp_model():
    from paddlenlp.transformers import PretrainedConfig, PretrainedModel

    assert issubclass(paddlemix.LlavaLlamaForCausalLM, PretrainedModel)
    assert issubclass(paddlemix.LlavaConfig, PretrainedConfig)


def imported_modules(path):
    """Modules that a file imports, anywhere in it, by their full names."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from paddlemix import models` names a room, `from paddlemix import LlavaConfig` the package
            yield from (f"{module}.{alias.name}" if module == "paddlemix" else module for alias in node.names)


def test_imports_go_one_way():
    wrong = []
    for path in sorted((ROOT / "paddlemix").rglob("*.py")):
        room = path.relative_to(ROOT / "paddlemix").parts[0].replace(".py", "")
        for module in imported_modules(path):
            parts = module.split(".")
            if parts[0] != "paddlemix":
                continue
            used = parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"
            if ROOMS.index(used) > ROOMS.index(room):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_no_file_is_large_but_the_default_models_weights():
    files = [path for room in ("paddlemix", "tests", "benchmarks") for path in (ROOT / room).rglob("*.*")]
    sizes = {path: path.stat().st_size for path in files if path.is_file()}
    weights = {path for path in sizes if "demo_weights" in path.parts}
    assert [path for path, size in sizes.items() if size > 5_000_000 and path not in weights] == []
    assert sum(sizes[path] for path in weights) < 12_000_000


def test_a_model_needs_a_part_of_paddlenlp_only_and_the_rest_follows_when_used():
    code = """
import sys
from paddlemix import LlavaLlamaForCausalLM
LlavaLlamaForCausalLM
heavy = ("sklearn", "datasets", "fastapi")
print(*[name for name in heavy if name in sys.modules], "|")
import paddlenlp
print(paddlenlp.__version__, paddlenlp.Taskflow.__name__, paddlenlp.transformers.__name__)
from paddlenlp.trainer import Trainer
from paddlenlp.transformers import PretrainedModel
assert issubclass(LlavaLlamaForCausalLM, PretrainedModel) and "sklearn" in sys.modules
print(hasattr(paddlenlp, "nonsense"))
"""
    done = run(code)
    assert done.stdout.split() == ["|", "3.0.0b4", "Taskflow", "paddlenlp.transformers", "False"], done.stderr


@pytest.mark.parametrize(
    "first", ["import paddlenlp", "from paddlenlp.trainer import Trainer", "from paddlemix.trainer import trainer"]
)
def test_whoever_imports_paddlenlp_first_gets_all_of_it(first):
    code = f"{first}; from paddlemix import LlavaLlamaForCausalLM as M; import paddlenlp.peft; print(M.__name__)"
    assert run(code).stdout == "LlavaLlamaForCausalLM\n"


def test_parts_of_paddlenlp_are_there_after_a_model():
    code = "from paddlemix import LlavaConfig; LlavaConfig; from paddlenlp.peft import LoRAModel; print(LoRAModel.__name__)"
    assert run(code).stdout == "LoRAModel\n"
