"""A rewritten module whose class is known by its text alone, as in a notebook, is loaded in another process."""

import linecache
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from ortho_fx import rewrite_

TEXT = """
import torch.nn.functional as F
from torch import nn

class Cell(nn.Module):
    def forward(self, x):
        return F.gelu(x)
"""


@pytest.mark.slow
def test_a_class_of_a_notebook_is_loaded_elsewhere(tmp_path):
    cloudpickle = pytest.importorskip("cloudpickle")
    name = "<cell 1>"
    linecache.cache[name] = (len(TEXT), None, TEXT.splitlines(keepends=True), name)
    namespace = {"__name__": "__main__"}
    exec(compile(TEXT, name, "exec"), namespace)
    model = nn.Sequential(namespace["Cell"]())
    rewrite_(model)
    path, x = tmp_path / "model", torch.randn(3)
    path.write_bytes(cloudpickle.dumps((model, x, model(x))))
    script = (
        "import pickle, sys, torch; model, x, y = pickle.load(open(sys.argv[1], 'rb')); assert torch.equal(model(x), y)"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=True)


def test_a_class_of_a_file_is_pickled_by_its_name():
    from tests.passes.source.test_source import Everything

    module = Everything()
    rewrite_(module)
    assert b"def forward" not in pickle.dumps(module)
