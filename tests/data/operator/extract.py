"""Makes the schemas beside this file again, from a package that is not among the project's own.

    python -m venv /tmp/v && /tmp/v/bin/pip install cloudcoil-models-prometheus-operator==0.80.1.0
    /tmp/v/bin/python tests/data/operator/extract.py

The package's models are generated from the resource definitions of the Prometheus Operator. A cluster drops a field
that a definition does not have; here that is an error, so that a typo is seen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def strict(part: Any) -> Any:
    """Without the prose, and with no field allowed that is not named."""
    if isinstance(part, list):
        return [strict(each) for each in part]
    if not isinstance(part, dict):
        return part
    kept = {name: strict(each) for name, each in part.items() if not prose(name, each)}
    if "properties" in part:
        kept["properties"] = {name: strict(each) for name, each in part["properties"].items()}
        kept["additionalProperties"] = False
    return kept


def prose(name: str, value: Any) -> bool:
    return name == "default" or (name in ("title", "description") and isinstance(value, str))


def main() -> None:
    from cloudcoil.models.prometheus_operator import v1

    for kind in (v1.PodMonitor, v1.PrometheusRule):
        schema = strict(kind.model_json_schema(by_alias=True))
        file = Path(__file__).with_name(f"{kind.__name__}.json")
        file.write_text(json.dumps(schema, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
