"""How fast the interacting layer is here: `python -m benchmarks`, from the repository's root."""
