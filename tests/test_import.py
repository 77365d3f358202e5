"""What `import autoint_fast` costs and touches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    """What a fresh Python in the repository's root prints."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_adds_at_most_a_tenth_of_a_second() -> None:
    """Beyond torch's own import; the best of several, because other processes only ever add."""
    code = "import time, torch; t = time.perf_counter(); import autoint_fast; print(time.perf_counter() - t)"
    times: list[float] = []
    while len(times) < 5 and min(times, default=1.0) > 0.1:
        times.append(float(python(code)))
    assert min(times) <= 0.1, f"{min(times) * 1000:.0f} ms at best, of {len(times)} imports"


def test_import_touches_neither_triton_nor_a_gpu() -> None:
    code = (
        "import sys, torch\n"
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "import autoint_fast\n"
        "new = {name.partition('.')[0] for name in sys.modules} - before\n"
        "print('triton' in new, torch.cuda.is_initialized(), 'torch._dynamo' in sys.modules)"
    )
    without = python(code.replace("import autoint_fast\n", "", 1))
    assert python(code) == without


def test_serving_on_a_cpu_imports_no_triton() -> None:
    code = (
        "import sys, torch, autoint_fast\n"
        "layer = autoint_fast.InteractingLayer(2, 8)\n"
        "layer(torch.zeros(2, 3, 8)).sum().backward(); layer.eval().freeze()(torch.zeros(2, 3, 8))\n"
        "print('triton' in sys.modules)"
    )
    assert python(code) == "False"


def test_public_names() -> None:
    import autoint_fast

    assert sorted(autoint_fast.__all__) == [
        "AutoInt",
        "FlattenedInteractingLayer",
        "InteractingLayer",
        "InteractingParameters",
        "Interaction",
        "PaperInteractingLayer",
        "ReferenceInteractingLayer",
        "Report",
        "__version__",
        "accelerate",
        "interacting_reference",
        "register_adapter",
        "restore",
        "why",
    ]
    assert all(getattr(autoint_fast, name) for name in autoint_fast.__all__)


def test_the_folder_of_engines_is_not_a_package_of_that_name() -> None:
    """Another project's package is called `kernels`; ours says where it really lives."""
    code = "import kernels"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode != 0 and "autoint_fast.kernels" in result.stderr
    assert python("import autoint_fast.kernels as k; print(k.__name__)") == "autoint_fast.kernels"
