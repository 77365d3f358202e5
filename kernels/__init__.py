"""The engines behind `autoint_fast`; installed as `autoint_fast.kernels`."""

if __name__ != "autoint_fast.kernels":
    raise ImportError(
        f"this folder is the package autoint_fast.kernels, but it was imported as {__name__!r}: "
        "use `import autoint_fast.kernels`"
    )
