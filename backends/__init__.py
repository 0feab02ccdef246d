"""The backends that ship with gpu_byoc: found by entry point (``gpu_byoc.backends``), never imported by name."""

if __name__ != "gpu_byoc_backends":  # a bare checkout would import a second copy of each class
    raise ImportError(f"import gpu_byoc_backends, not {__name__}: install the project (pip install -e .)")
