"""`Site`: one place where an activation is called, what becomes of it, and how the places read as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ortho_fx.tables import table

# Under this key the `meta` of a graph's node holds the `Site` that the passes found there.
NOTE = "ortho_fx"


@dataclass(frozen=True)
class Site:
    """One activation of a model.

    Attributes:
        name: the qualified name of its expansion in the rewritten model.
        kind: "module" (a child such as nn.GELU), "attribute" (a function kept on a module), "function", "method",
            "built in forward" (calls in the source of the owner's methods) or "node" (of a `torch.fx` graph).
        function: the activation function, by its name in `ortho_fx.passes.vocabulary.targets`.
        location: file and line of a call; empty for modules and attributes.
        aliases: the other names of a shared module.
        expansion: what it was replaced by ("hermite 3"); None where it was not.
        parameters: how many learnable numbers that has.
        fit_rmse: where init="fit" starts from the replaced function, the root mean square error of that fit under the
            inputs' distribution (N(0, 1) where it was not measured); else None.
        reason: why it is left as it is; empty where it is replaced.
    """

    name: str
    kind: str
    function: str
    location: str = ""
    aliases: tuple[str, ...] = ()
    expansion: str | None = None
    parameters: int = 0
    fit_rmse: float | None = None
    reason: str = ""


def join(prefix: str, key: str) -> str:
    """The qualified name of a child of the module with the name `prefix`, which is empty for the model itself."""
    return f"{prefix}.{key}" if prefix else key


def format_sites(sites: Sequence[Site]) -> str:
    """The sites as a table in plain text, one a line."""
    header = ["name", "kind", "function", "expansion", "parameters"]
    fits = any(site.fit_rmse is not None for site in sites)
    if fits:
        header.append("fit rmse")
    rows = [
        (
            ", ".join((site.name, *site.aliases)),
            site.kind,
            site.function,
            f"left: {site.reason}" if site.reason else site.expansion or "",
            str(site.parameters) if site.parameters else "",
            *([f"{site.fit_rmse:.2g}" if site.fit_rmse is not None else ""] if fits else []),
        )
        for site in sites
    ]
    return table([header, *rows])
