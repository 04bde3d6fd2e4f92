"""What other processes find in PyTorch's caches."""

import shutil
from importlib.util import find_spec

import pytest
import torch

pytestmark = pytest.mark.slow


def changed_package(folder, addition):
    """A copy of the installed package with `addition` at the end of its lowering."""
    for name in ("ortho_fx", "ortho_fx.passes", "ortho_fx.models"):
        (source,) = find_spec(name).submodule_search_locations
        target = folder / name.replace(".", "/")
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    with (folder / "ortho_fx" / "operators" / "lowering.py").open("a") as file:
        file.write(addition)
    return folder


DOUBLED = """
from ortho_fx.bases.hermite import Hermite
_evaluate = Hermite.evaluate
Hermite.evaluate = lambda self, x, *parameters: _evaluate(self, x, *parameters) * 2.0
"""


def test_another_process_finds_the_code_unless_formulas_or_options_changed(ask, tmp_path):
    [(_, *first)] = ask(degrees=[3], package="")["results"]
    [(hits, *again), (others, value, _, eager)] = ask(degrees=[3, 4], package="")["results"]
    assert (hits, others) == (1, 0)
    assert again == first
    assert torch.allclose(torch.tensor(value), torch.tensor(eager))
    assert value != first[0]

    package = changed_package(tmp_path, DOUBLED)
    found = ask(degrees=[3], package=str(package))
    [(hits, value, *_)] = found["results"]
    assert found["file"] == str(package / "ortho_fx" / "__init__.py")
    assert hits == 0
    assert torch.allclose(torch.tensor(value), 2 * torch.tensor(first[0]))
