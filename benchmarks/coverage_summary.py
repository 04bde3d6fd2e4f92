"""The text of the coverage benchmark: a line for each model, and the summary of all (coverage.py --summary)."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

VERSIONS = ("torch", "timm", "transformers")
# Findings for which the summary names the models, and the fields of a row that show each finding.
NAMED = {
    "gates changed": ["gates_changed"],
    "expansions without a gradient, or without a finite one": ["no_gradient", "gradient_not_finite"],
    "expansions that are called without effect on the outputs": ["off_the_loss"],
    "expansions that are never called": ["uncalled"],
    "out of range with Hermite expansions of degree 3, then trained with those clamped at 3": ["diverged"],
    "second rewrite changed something": ["second_rewrite"],
    "rewrite_ finds nothing to replace": ["rewrite_error"],
    "fails in train before the rewrite": ["train_error"],
}


def line(row: dict[str, Any]) -> str:
    """The line of one model, printed as soon as it is measured."""
    if "error" in row:
        return f"{row['name']}: NOT BUILT {row['error']}"
    parts = [f"{row['name']}: {row['calls'] + row['formulas']} calls, {sum(row.get('replaced', {}).values())} replaced"]
    if row.get("default_finite", True) is not True:
        parts.append(f"AT THE DEFAULT {row['default_finite']}")
    if "relative_error" in row:
        parts.append(f"relative error {row['relative_error']:.1e}")
    for key in ("rewrite_error", "train_error", "unexplained", "gates_changed", "no_gradient", "gradient_not_finite"):
        if row.get(key):
            shown = ", ".join(row[key]) if not isinstance(row[key], str) else row[key]
            parts.append(f"{key.upper()} {shown[:300]}")
    for key in ("remaining", "off_the_loss", "uncalled", "second_rewrite", "problems"):
        if row.get(key):
            parts.append(f"{key} {str(row[key])[:300]}")
    return ", ".join(parts) + f" ({row['seconds']} s)"


def architectures(rows: list[dict[str, Any]]) -> int:
    return len({row["name"].split("/")[0] for row in rows})


def total(rows: list[dict[str, Any]], key: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(row.get(key, {}))
    return counts


def summary(result: dict[str, Any]) -> str:
    """The text of results/coverage.txt."""
    head = f"{result['date']}, {result['hardware']}, " + ", ".join(f"{k} {result[k]}" for k in VERSIONS)
    parts = [head]
    for library in ("timm", "transformers"):
        rows = [row for row in result["rows"] if row["library"] == library]
        if rows:
            parts.append(library_summary(library, rows, result.get("default", "")))
    return "\n\n".join(parts)


def library_summary(library: str, rows: list[dict[str, Any]], default: str) -> str:
    built = [row for row in rows if "error" not in row]
    active = [row for row in built if row["calls"] + row["formulas"]]
    covered = [row for row in active if "unexplained" not in row]
    left, replaced, remaining = (total(built, key) for key in ("left", "replaced", "remaining"))
    kinds = ", ".join(f"{count} {kind}" for kind, count in replaced.most_common())
    lines = [
        f"{library}: {len(rows)} models of {architectures(rows)} architectures tried, {len(built)} of "
        f"{architectures(built)} built, {len(active)} with activations, {len(covered)} of these wholly replaced or "
        "explained",
        f"  {sum(replaced.values())} sites replaced ({kinds}), {sum(left.values())} left",
        f"  unexplained calls: {sum(total(built, 'unexplained').values())}",
    ]
    lines += [f"    {row['name']}: {', '.join(row['unexplained'])}" for row in built if "unexplained" in row]
    lines += default_lines(built, default)
    for title, keys in NAMED.items():
        found = {row["name"]: sum(_count(row.get(key)) for key in keys) for row in built}
        names = [f"{name} ({count})" if count > 1 else name for name, count in found.items() if count]
        lines.append(f"  {title}: {sum(found.values())} in {len(names)} models; {shortened(names)}".removesuffix("; "))
    problems = [f"    {row['name']}: {problem}" for row in built for problem in row.get("problems", ())]
    lines += [f"  other problems: {len(problems)}", *problems]
    errors = sorted((row["relative_error"], row["name"]) for row in built if "relative_error" in row)
    if len(errors) > 1:
        values = [error for error, _ in errors]
        quantiles = statistics.quantiles(values, n=20, method="inclusive")
        lines.append(
            f"  relative error of {len(errors)} fitted models: median {statistics.median(values):.1e}, "
            f"90 % {quantiles[17]:.1e}, 95 % {quantiles[18]:.1e}, largest {values[-1]:.1e} ({errors[-1][1]})"
        )
    seconds, slowest = max((row.get("rewrite_seconds", 0.0), row["name"]) for row in built)
    lines.append(f"  slowest rewrite: {seconds:.1f} s ({slowest})")
    lines += [f"  left sites: {count:5} {reason}" for reason, count in left.most_common()]
    lines += [f"  lines that still run: {count:5} {reason}" for reason, count in remaining.most_common()]
    failed = [f"{row['name']} ({row['error'][:100]})" for row in rows if "error" in row]
    return "\n".join([*lines, f"  not built: {len(failed)}", *(f"    {name}" for name in failed)])


def default_lines(built: list[dict[str, Any]], default: str) -> list[str]:
    """How many of the models with replaced sites train with the default expansion, and what the others say."""
    rows = [row for row in built if row.get("replaced")]
    tried = [row for row in rows if "default_finite" in row]
    bad = [row for row in tried if row["default_finite"] is not True]
    lines = [f"  finite outputs and gradients at the default ({default}): {len(tried) - len(bad)} of {len(tried)}"]
    if len(tried) < len(rows):
        lines[0] += f"; not measured yet: {len(rows) - len(tried)}"
    return lines + [f"    {row['name']}: {row['default_finite']}" for row in bad]


def _count(found: Any) -> int:
    return len(found) if isinstance(found, list | dict) else int(bool(found))


def shortened(names: list[str], most: int = 60) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
