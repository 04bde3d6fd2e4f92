"""Which activations of real models are replaced, and which are left and why: by looking, without running the models.

    OMP_NUM_THREADS=1 python benchmarks/sites.py [--output FILE]      # ten minutes; needs timm and transformers
    python benchmarks/sites.py --compare results/sites_before.json    # where fewer are replaced than in that file

The models are those of coverage.py. Each call counts, though calls of which one run makes one at most share an
expansion (`sharing="call"` keeps them apart). Writes results/sites.json: for each model the number of replaced sites by
kind, and of sites that are left by function and reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import warnings
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "sites.json"


def listed() -> dict[str, Any]:
    """The sites of every model that can be built."""
    import timm
    import torch
    import transformers
    from architectures import build, specs

    from ortho_fx import find_sites

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = {}
    for number, spec in enumerate(specs()):
        try:
            model, _ = build(spec)
        except Exception as error:
            rows[spec.name] = {"error": f"{type(error).__name__}: {error}"[:100]}
            continue
        sites = find_sites(model, sharing="call")
        rows[spec.name] = {
            "replaced": dict(Counter(site.kind for site in sites if not site.reason)),
            "left": dict(Counter(f"{site.function}: {site.reason}" for site in sites if site.reason)),
        }
        del model
        if number % 50 == 0:
            gc.collect()
            print(number, spec.name, flush=True)
    versions = {"torch": torch.__version__, "timm": timm.__version__, "transformers": transformers.__version__}
    return {"date": date.today().isoformat(), "hardware": f"a {platform.machine()} CPU", **versions, "rows": rows}


def compared(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Every model in which fewer sites are replaced, with the reasons that are new."""
    lines, totals = [], Counter[str]()
    for name, row in now["rows"].items():
        earlier = before["rows"].get(name, {})
        if "error" in row or "replaced" not in earlier:
            continue
        one, other = Counter(earlier["replaced"]), Counter(row["replaced"])
        totals.update(models=1, before=one.total(), now=other.total())
        if one - other:
            new = Counter(row["left"]) - Counter(earlier["left"])
            lines.append(f"{name}: {(one - other).total()} fewer; {dict(new)}")
    return "\n".join([*lines, f"{totals['models']} models, {totals['before']} sites before, {totals['now']} now"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--compare", type=Path, metavar="FILE", help="compare results/sites.json with an earlier file")
    arguments = parser.parse_args()
    if arguments.compare:
        print(compared(json.loads(arguments.compare.read_text()), json.loads(arguments.output.read_text())))
        return
    result = listed()
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
