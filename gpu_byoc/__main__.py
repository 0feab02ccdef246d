"""``python -m gpu_byoc``."""

from gpu_byoc.cli import main

raise SystemExit(main())
