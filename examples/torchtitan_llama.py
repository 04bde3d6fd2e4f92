"""torchtitan's trainer on its Llama with learnable activations: trained, saved and resumed. It needs a GPU.

    pip install torchtitan
    python examples/torchtitan_llama.py --processes 8 --tensor-parallel 2 --assets torchtitan/tests/assets/tokenizer
    python examples/torchtitan_llama.py --dry-run

It trains torchtitan's debug model three times by torchtitan's own trainer: with its SiLU, with expansions, and with
expansions again, from the checkpoint of half the steps. It fails if a loss is not finite, does not fall, or differs
after the resume, and prints one line of JSON with the hardware, the versions and the losses. The folder of assets, with
a tokenizer, and the text of the data set `c4_test` are in torchtitan's repository: run it from there, or name others.

`--dry-run` needs no GPU: it makes the configs, applies the override, and builds both models on the meta device.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

OVERRIDE = "ortho_fx.integrations.torchtitan.expansions"


RUNS = ("silu", "expansions", "resumed")


def make_config(options: argparse.Namespace, run: str) -> Any:
    """The debug model's config of torchtitan, with what the options say."""
    from torchtitan.config.override import parse_cli_imports
    from torchtitan.models.llama3.config_registry import llama3_debugmodel

    config = llama3_debugmodel()
    config.hf_assets_path = options.assets
    config.dataloader.dataset = options.dataset
    config.dump_folder = str(Path(options.folder) / ("silu" if run == "silu" else "expansions"))
    config.training.steps, config.training.seq_len = options.steps, options.length
    config.training.disable_cuda_graphs = not options.cuda_graphs
    config.parallelism.tensor_parallel_degree = options.tensor_parallel
    config.compile.enable = options.compile
    config.validator.enable = False
    config.checkpoint.enable = True
    config.checkpoint.interval = options.steps // 2
    config.debug.seed = 0
    if run != "silu":
        config.override.imports = parse_cli_imports([f"{OVERRIDE}={json.dumps({'expansion': options.expansion})}"])
    return config


def train(options: argparse.Namespace) -> None:
    """One of torchrun's processes: runs torchtitan's trainer, and writes the loss of each step that it took."""
    from torchtitan.trainer import Trainer

    trainer = Trainer(make_config(options, options.only))
    losses: dict[int, float] = {}
    log = trainer.metrics_processor.log

    def record(step: int, loss: float, *others: Any, **more: Any) -> None:
        losses[step] = float(loss)
        log(step, loss, *others, **more)

    trainer.metrics_processor.log = record
    trainer.train()
    trainer.close()
    if torch.distributed.get_rank() == 0:
        (Path(options.folder) / f"{options.only}.json").write_text(json.dumps(losses))
    torch.distributed.destroy_process_group()


def train_all(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """Three runs of torchrun, and what they must agree on."""
    found: dict[str, dict[int, float]] = {}
    for run in RUNS:
        if run == "resumed":  # what is there of a run that ended after half of its steps
            shutil.rmtree(Path(options.folder) / "expansions" / "checkpoint" / f"step-{options.steps}")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(options.processes), __file__, *arguments]
        subprocess.run([*command, "--folder", options.folder, "--only", run], check=True, stdout=sys.stderr)
        written = json.loads((Path(options.folder) / f"{run}.json").read_text())
        found[run] = {int(step): loss for step, loss in written.items()}
    check(found, options.steps)
    return {"processes": options.processes, "tensor_parallel": options.tensor_parallel, "losses": found}


def check(found: dict[str, dict[int, float]], steps: int) -> None:
    """Raises SystemExit if the losses of the three runs are not as they should be."""
    for run in ("silu", "expansions"):
        losses = found[run]
        if not all(map(math.isfinite, losses.values())) or losses[steps] >= losses[1]:
            raise SystemExit(f"{run}: losses must be finite and fall; they went from {losses[1]} to {losses[steps]}")
    whole, resumed = found["expansions"], found["resumed"]
    if list(resumed) != list(range(steps // 2 + 1, steps + 1)):
        raise SystemExit(f"the resumed run must start after step {steps // 2}; its steps are {list(resumed)}")
    difference = max(abs(resumed[step] / whole[step] - 1) for step in resumed)
    if not difference < 0.01:
        raise SystemExit(f"after the resume, the losses differ by {difference:.1e} of them")


def dry_run(options: argparse.Namespace) -> dict[str, Any]:
    """What a machine without a GPU can check: the configs, the override, and the models on the meta device."""
    from torchtitan.config.override import apply_overrides

    counts = {}
    for run in ("silu", "expansions"):
        config = make_config(options, run)
        model_config = config.model_spec.model
        model_config.update_from_config(config=config)
        if config.override.imports:
            apply_overrides(config.override, config)
        with torch.device("meta"):
            model = model_config.build()
        model.verify_module_protocol()
        counts[run] = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": counts}


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expansion", default="hermite3", help='a short form of ExpansionConfig, such as "fourier5"')
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--processes", type=int, default=1, help="one for each GPU")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="processes that share a layer")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cuda-graphs", action="store_true")
    parser.add_argument("--assets", default="./tests/assets/tokenizer", help="torchtitan's hf_assets_path")
    parser.add_argument("--dataset", default="c4_test", help="a data set of torchtitan")
    parser.add_argument("--folder", help="where checkpoints go; a temporary folder when omitted")
    parser.add_argument("--dry-run", action="store_true", help="check what needs no GPU")
    parser.add_argument("--only", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.steps < 4 or options.steps % 2:
        parser.error(f"--steps must be an even number from 4 on; got {options.steps}")
    if options.only:
        train(options)
        return
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torchtitan's trainer needs a GPU; --dry-run checks the rest")
    with tempfile.TemporaryDirectory() as temporary:
        options.folder = options.folder or temporary
        found = dry_run(options) if options.dry_run else train_all(options, arguments)
    report = {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "versions": {"torch": torch.__version__, "torchtitan": importlib.metadata.version("torchtitan")},
        **found,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
