"""Runs a notebook and writes its outputs into it: python docs/notebooks/run.py docs/notebooks/rewrite_to_picture.ipynb

The cells run in this process, one after the other, in one namespace. Their outputs are what they print, and the
pictures that they leave open. So no Jupyter is needed, and the notebook names no path of the machine.
"""

import base64
import contextlib
import io
import json
import linecache
import sys
from pathlib import Path


def run(notebook):
    """Runs the code cells of a notebook, a map of its format 4, and returns it with their outputs."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    namespace = {"__name__": "__main__"}
    pyplot.close("all")
    cells, count = [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            text, name = "".join(cell["source"]), f"cell{count}.py"
            # So that the source of classes in a cell can be read, as in Jupyter.
            linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(text, name, "exec"), namespace)
            outputs = []
            if printed.getvalue():
                lines = printed.getvalue().splitlines(keepends=True)
                outputs.append({"output_type": "stream", "name": "stdout", "text": lines})
            for number in pyplot.get_fignums():
                outputs.append({"output_type": "display_data", "metadata": {}, "data": _drawn(pyplot.figure(number))})
            pyplot.close("all")
            cell = {**cell, "execution_count": count, "outputs": outputs}
        cells.append(cell)
    return {**notebook, "cells": cells}


def _drawn(figure):
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=80, metadata={"Software": None})
    size = "<Figure size {:.0f}x{:.0f}>".format(*(figure.get_size_inches() * 80))
    return {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": [size]}


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        done = run(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
