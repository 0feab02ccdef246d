"""Benchmarks: what this machine does, against the floor of the same machine. Installed as ``gpu_byoc_benchmarks``.

``gpu-byoc bench`` and, from a checkout, ``python -m benchmarks``. See README.md.
"""

import sys

_OTHER = {"benchmarks": "gpu_byoc_benchmarks", "gpu_byoc_benchmarks": "benchmarks"}[__name__]
if _OTHER in sys.modules:  # one process, one copy of each class
    raise ImportError(f"import {_OTHER}, not {__name__}: it is already there under the first name")
