"""`Site`: one place where an activation is called, and what happens to it; and a table of sites."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ortho_fx.tables import table

# The key in a graph node's `meta` under which the passes store its `Site`.
NOTE = "ortho_fx"

# What torch.compile puts before the names of the module that it wraps.
COMPILED = "_orig_mod"
# What wrappers put into the names of a model's modules and parameters.
WRAPPERS = (COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Site:
    """One activation of a model.

    Attributes:
        name: the qualified name of its expansion in the rewritten model.
        kind: "module" (a child such as nn.GELU), "attribute" (a function kept on a module), "function", "method",
            "built in forward" (calls in the source of the owner's methods) or "node" (of a `torch.fx` graph).
        function: the activation function, by its name in `ortho_fx.passes.vocabulary.targets`.
        location: file and line of a call, or of each that shares the expansion; empty for modules and attributes.
        aliases: the other names of a shared module.
        expansion: the expansion that replaces it ("hermite 3"); None if it is not replaced.
        parameters: how many learnable numbers the expansion has.
        fit_rmse: the root mean square error of the fit that init="fit" starts from, under the distribution of the
            inputs (N(0, 1) if it was not measured); None for any other init.
        reason: why the activation is left; empty if it is or can be replaced.
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

    @property
    def calls(self) -> tuple[Site, ...]:
        """The site of each call; only the first has the parameters of an expansion that several share."""
        first, *others = self.location.split(", ")
        return replace(self, location=first), *(replace(self, location=one, parameters=0) for one in others)

    @property
    def lines(self) -> tuple[tuple[str, int], ...]:
        """The file and the line of each call in source."""
        places = (place.rpartition(":") for place in self.location.split(", "))
        return tuple((file, int(number)) for file, _, number in places if number.isdigit())


def join(prefix: str, key: str) -> str:
    """The qualified name of a child of the module named `prefix`; the prefix is empty for the model itself."""
    return f"{prefix}.{key}" if prefix else key


def plain_name(name: str) -> str:
    """A qualified name without the components of wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def format_sites(sites: Sequence[Site]) -> str:
    """The sites as a table in plain text, one per line."""
    header = ["name", "kind", "function", "expansion", "parameters"]
    fits = any(site.fit_rmse is not None for site in sites)
    if fits:
        header.append("fit rmse")
    rows = [
        (
            ", ".join((site.name, *site.aliases)) + (f" ({len(site.lines)} calls)" if len(site.lines) > 1 else ""),
            site.kind,
            site.function,
            f"left: {site.reason}" if site.reason else site.expansion or "",
            str(site.parameters) if site.parameters else "",
            *([f"{site.fit_rmse:.2g}" if site.fit_rmse is not None else ""] if fits else []),
        )
        for site in sites
    ]
    return table([header, *rows])
