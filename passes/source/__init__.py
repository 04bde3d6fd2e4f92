"""Replaces activations that are calls in a module's code, by editing the code for one module instance.

This is the last of the three front ends: it handles what modules and graphs cannot. This file is its interface.
"""

from ortho_fx.passes.source.analysis import Source
from ortho_fx.passes.source.children import tested_classes
from ortho_fx.passes.source.classes import _restore as _restore  # pickles name it here
from ortho_fx.passes.source.classes import (
    asked_in_place,
    class_problem,
    find_calls,
    guard_of_child,
    guards_parameter,
    reads_changed_input,
    rewrite_class,
    set_class,
    source_of,
)
from ortho_fx.passes.source.reader import Call

__all__ = [
    "Call",
    "Source",
    "asked_in_place",
    "class_problem",
    "find_calls",
    "guard_of_child",
    "guards_parameter",
    "reads_changed_input",
    "rewrite_class",
    "set_class",
    "source_of",
    "tested_classes",
]
