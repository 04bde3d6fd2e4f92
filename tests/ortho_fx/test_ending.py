"""The end of a process of a process group."""

import subprocess
import sys

# A thread of gloo that lets go of a tensor late is like this one: it wants the interpreter while that is torn down.
LATE = """
import atexit, sys, threading, time
import torch
from ortho_fx.processes import leave

def compute():
    tensor = torch.randn(100)
    while True:
        tensor + tensor

def write_late():
    time.sleep(0.2)
    print("a thread has ended")

atexit.register(print, "at exit")
threading.Thread(target=compute, daemon=True).start()
threading.Thread(target=write_late).start()
print("done")
END
"""


def test_a_process_leaves_while_threads_compute():
    script = LATE.replace("END", "leave(3)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.splitlines() == ["done", "a thread has ended", "at exit"]
