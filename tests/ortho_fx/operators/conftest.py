"""Fixtures of the tests of operators: a compiler that starts afresh, and processes that have PyTorch already."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SERVER = Path(__file__).parents[2] / "future_server.py"


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The folder of PyTorch's caches for the processes of `ask`."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def ask(cache):
    """Runs a case in a process of its own, which has PyTorch and its compiler already."""
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # Inductor asks the system for the processor's features instead of building a test program.
        "TORCHINDUCTOR_VEC_ISA_OK": "1",
        "OMP_NUM_THREADS": "1",
    }
    # Its text, not its path: with a path, imports would look in tests/ first, which has a folder ortho_fx.
    command = [sys.executable, "-c", SERVER.read_text()]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def answer(**case):
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
            found = json.loads(process.stdout.readline())
            assert "failed" not in found, found["failed"]
            return found

        yield answer
        process.stdin.close()
