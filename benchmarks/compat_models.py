"""The checks of rewritten models: the compiler's hook, exports, and two processes."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from compat_case import DOUBLE, SINGLE, Case, Wrong, inputs, off
from torch import Tensor, nn

from ortho_fx import ExpansionConfig, rewrite_
from ortho_fx.activations.expansion import ExpansionActivation
from ortho_fx.bases import BASES
from ortho_fx.processes import leave


class Network(nn.Module):
    """One activation is a module, the other a call in the source."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.act(self.up(x))))


def network() -> Network:
    torch.manual_seed(0)
    return Network().double()


def rewritten(config: ExpansionConfig) -> Network:
    model = network()
    rewrite_(model, config, example_inputs=inputs(8, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def hook() -> Iterator[Case]:
    def steps(model: Network, call: Callable[[Tensor], Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Outputs of three steps and the parameters after them.

        The optimizer is made after the first call, since the hook replaces activations in that call.
        """
        results, optimizer = [], None
        for step, size in enumerate(sizes):
            y = call(inputs(size, 4, seed=step))
            optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.1)
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
            results.append(y.detach())
        return [*results, *(parameter.detach() for parameter in model.parameters())]

    def trains(basis: str, dynamic: bool) -> float:
        torch.compiler.reset()
        sizes = (8, 12, 5) if dynamic else (8, 8, 8)
        ours, reference = network(), network()
        rewrite_(reference, ExpansionConfig(basis))
        call = torch.compile(ours, backend="ortho_fx", options={"basis": basis}, dynamic=dynamic)
        results = steps(ours, call, sizes)
        if sum(isinstance(module, ExpansionActivation) for module in ours.modules()) != 2:
            raise Wrong("not all activations are replaced")
        return off(results, steps(reference, reference, sizes), DOUBLE)

    for basis in BASES:
        yield f"{basis}, one batch size", partial(trains, basis, False)
    for basis in ("hermite", "fourier"):
        yield f"{basis}, several batch sizes", partial(trains, basis, True)


def export() -> Iterator[Case]:
    def exports(basis: str, granularity: str, strict: bool) -> float:
        torch.compiler.reset()
        model, x = rewritten(ExpansionConfig(basis, granularity=granularity)), inputs(5, 4, seed=2)
        shapes = ({0: torch.export.Dim("batch")},)
        exported = torch.export.export(model, (inputs(3, 4),), dynamic_shapes=shapes, strict=strict)
        decomposed = exported.run_decompositions()
        for program, has_ours in ((exported, True), (decomposed, False)):
            if any("ortho_fx" in str(node.target) for node in program.graph.nodes) is not has_ours:
                raise Wrong(f"operators of ortho_fx are {'missing' if has_ours else 'left after the decompositions'}")
        return max(off(program.module()(x), model(x), DOUBLE) for program in (exported, decomposed))

    for basis in BASES:
        for granularity in ("layer", "channel"):
            for strict in (True, False):
                case = f"{basis} a {granularity}, {'strict' if strict else 'not strict'}"
                yield case, partial(exports, basis, granularity, strict)


def ddp() -> Iterator[Case]:
    def step(configs: Sequence[ExpansionConfig]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(one_of_two, (folder, configs), nprocs=2)
            seen = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]
        for text in {text for each in seen for text in each["warnings"]}:
            warnings.warn(text, stacklevel=2)
        return max(each["off"] for each in seen)

    configs = ExpansionConfig("hermite"), ExpansionConfig("fourier", granularity="channel")
    yield "hermite a layer, fourier a channel", partial(step, configs)


def one_of_two(rank: int, folder: str, configs: Sequence[ExpansionConfig]) -> None:
    """A step on half a batch by a compiled model in float32, compared with an eager step on all of it in float64."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    limit = timedelta(seconds=300)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
    exact, x = nn.Sequential(*(rewritten(config) for config in configs)), inputs(6, 4)
    model = copy.deepcopy(exact).float()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = torch.compile(nn.parallel.DistributedDataParallel(model))
        for network, call, batch in ((exact, exact, x), (model, wrapped, x.float().chunk(2)[rank])):
            optimizer = torch.optim.SGD(network.parameters(), 0.1)
            call(batch).square().mean().backward()
            optimizer.step()
    states = ([[p.detach(), p.grad] for p in network.parameters()] for network in (model, exact))
    texts = [str(warning.message) for warning in caught if "ortho_fx" in str(warning.message)]
    result = {"off": off(*states, SINGLE), "warnings": texts}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    # A process that ends closes its connections, which gloo's threads in the other process may still use.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    leave(0)
