"""The README's Python runs, in order, as one reader would run it."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 3
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert "1 replaced, 0 left, 4 new parameters" in capsys.readouterr().out
    assert [tuple(p.shape) for p in namespace["model"][1].parameters()] == [(1,), (5,), (5,), (5,)]


def test_commands_are_known(capsys):
    from ortho_fx.cli import make_parser

    commands = re.findall(r"^ortho-fx (.*)$", README, flags=re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        assert make_parser().parse_args(command.split()).run
