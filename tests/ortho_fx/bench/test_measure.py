import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from ortho_fx import ExpansionConfig, OrthoFxError
from ortho_fx.bases import BASES
from ortho_fx.bench.candidates import Candidate, Rational, exchanged, trained_model
from ortho_fx.bench.config import ROW, BenchConfig
from ortho_fx.bench.measure import bench, choose_expansions, compile_seconds, memory
from ortho_fx.models import gpt2
from ortho_fx.models.stock import SquaredReLU
from ortho_fx.operators.generated_code import count_kernels, generated_code

pytestmark = pytest.mark.slow

HERMITE = ExpansionConfig("hermite", 3)
TINY = {"elements": 8 * ROW, "rounds": 2, "expansions": (HERMITE,)}


@pytest.fixture(scope="module")
def report():
    return bench(BenchConfig(**TINY))


def test_a_report_has_every_candidate_and_prints_a_line_of_each(report):
    names = [m.name for m in report.measurements]
    assert names[:4] == ["gelu", "copy", "hermite 3", "rational 5/4"]
    assert [m.kind for m in report.measurements[:4]] == ["reference", "floor", "expansion", "peer"]
    title, header, *lines = str(report).splitlines()
    assert title.startswith("activation, 8 x 3072, float32, torch.compile, ")
    for column in ("forward ms", "backward ms", "total / gelu", "of the floor", "peak MiB", "kernels"):
        assert column in header
    assert "compile" not in header
    assert [line.split("  ")[0] for line in lines] == names


def test_a_report_as_json(report):
    values = json.loads(json.dumps(report.to_dict()))
    assert {"date", "hardware", "threads", "buffers", "versions", "config", "rows"} <= values.keys()
    assert values["config"]["expansions"] == ["hermite 3"]
    reference, floor, ours = values["rows"][:3]
    assert reference["ratios"] == {"forward": 1.0, "backward": 1.0, "total": 1.0}
    assert reference["ratio_of_medians"] == 1.0
    assert floor["floor_share"] == 1.0
    assert ours["seconds"].keys() == {"forward", "backward", "total"}
    assert ours["seconds"]["total"] > 0
    assert ours["rounds"] == 2


def test_memory_of_gelu_is_its_output_and_the_gradient(report):
    tensor = 8 * ROW * 4
    for name in ("gelu", "copy"):
        assert report[name].peak_bytes == 2 * tensor
        assert report[name].saved_bytes == 0  # only the input is saved, and it existed before
    assert report["hermite 3"].peak_bytes >= 2 * tensor


def test_memory_counts_what_is_held_and_what_is_only_passed_through():
    def forward(_):
        scratch = torch.empty(1000, dtype=torch.uint8)
        held.append(torch.empty(300, dtype=torch.uint8))
        del scratch
        return torch.empty(50, dtype=torch.uint8)

    def backward(y):
        held.clear()
        return torch.empty(7, dtype=torch.uint8)

    held: list[torch.Tensor] = []
    assert memory(Candidate("x", "peer", {"forward": forward, "backward": backward}, "cpu", False)) == (1300, 300)


def test_kernels_are_counted_by_their_graph(report):
    assert report["gelu"].kernels == {"forward": 1, "backward": 1}
    assert report["copy"].kernels == {"forward": 1, "backward": 1}
    torch.compiler.reset()
    x = torch.ones(64, requires_grad=True)
    with generated_code() as codes:
        torch.compile(lambda x: torch.softmax(torch.sin(x), 0).square())(x).sum().backward()
    again = count_kernels(codes)
    torch.compiler.reset()
    with generated_code() as cached:
        torch.compile(lambda x: torch.softmax(torch.sin(x), 0).square())(x).sum().backward()
    assert count_kernels(cached) == again
    assert min(again.values()) >= 1


def test_triton_kernels_are_counted_by_their_launches():
    code = """
triton_poi_fused_0 = async_compile.triton('triton_poi_fused_0', '''
def triton_poi_fused_0(in_ptr0, out_ptr0): pass
''')
def call(self, args):
    triton_poi_fused_0.run(primals_1, buf0, stream=stream0)
    triton_poi_fused_0.run(primals_2, buf1, stream=stream0)
    extern_kernels.mm(buf0, buf1, out=buf2)
"""
    assert count_kernels([code, code.replace("primals_1", "tangents_1")]) == {"forward": 2, "backward": 2}


def test_an_mlp_block_in_bfloat16_without_compilation():
    report = bench(BenchConfig("mlp", **TINY, dtype="bfloat16", eager=True, threads=1))
    assert [m.name for m in report.measurements[:3]] == ["gelu", "no activation", "hermite 3"]
    assert report.environment["threads"] == 1
    assert report["gelu"].kernels is None
    assert str(report).startswith("mlp, 8 x 3072, bfloat16, eager, ")


@pytest.mark.parametrize("what", ["gpt2", "convnext"])
def test_training_steps_without_compilation(what):
    a_channel = ExpansionConfig("tropical", 3, granularity="channel")
    config = BenchConfig(what, (HERMITE, a_channel), batch_size=1, rounds=1, eager=True)
    report = bench(config)
    expansions, stock = ["hermite 3", "tropical 3 a channel"], ["gelu, tanh", "silu", "squared relu"]
    assert [m.name for m in report.measurements] == ["gelu", *expansions, *stock]
    assert report["gelu"].seconds.keys() == {"step", "total"}
    assert report["hermite 3"].peak_bytes > 0
    header = str(report).splitlines()[1]
    assert header.split() == "step ms step / gelu fastest / gelu peak MiB".split()


@pytest.mark.parametrize("what", ["gpt2", "convnext"])
def test_an_activation_takes_the_place_of_all_others(what):
    model, inputs, _ = trained_model(BenchConfig(what, batch_size=1))
    with torch.no_grad():
        exact = exchanged(model, nn.GELU())(inputs)
        # ConvNeXt's own is the exact form, GPT-2's the tanh form.
        torch.testing.assert_close(exact, model(inputs), atol=1e-2, rtol=1e-2)
        assert (exchanged(model, SquaredReLU())(inputs) - exact).abs().max() > 1e-3


def test_a_model_without_an_activation_has_none_to_exchange():
    with pytest.raises(OrthoFxError, match="Linear has no activation"):
        exchanged(nn.Linear(2, 2), nn.GELU())


def test_a_compiled_training_step_has_kernels_both_ways(monkeypatch):
    monkeypatch.setitem(gpt2.PRESETS, "small", gpt2.GPT2Config(256, 16, 1, 2, 16))
    report = bench(BenchConfig("gpt2", (HERMITE,), size="small", batch_size=1, rounds=1))
    assert min(report["hermite 3"].kernels.values()) > 4


def test_the_number_of_threads_is_left_as_it_was():
    before = torch.get_num_threads()
    bench(BenchConfig(**TINY, eager=True, peers=False, threads=1))
    assert torch.get_num_threads() == before


def test_a_peer_that_fails_is_a_note(monkeypatch):
    def broken(self, x):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(Rational, "forward", broken)
    report = bench(BenchConfig(**TINY, eager=True))
    assert report["rational 5/4"].error == "RuntimeError: no kernel"
    assert re.search("rational 5/4 +failed: RuntimeError: no kernel", str(report))


def test_an_expansion_that_fails_raises(monkeypatch):
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: x.no_such_method())
    with pytest.raises(AttributeError):
        bench(BenchConfig(**TINY, eager=True))


def test_compilation_takes_time():
    assert compile_seconds(HERMITE, BenchConfig(**TINY), blocks=1) > 0


def test_fresh_allocations_fault_and_reused_buffers_do_not():
    code = (
        "from ortho_fx.bench import *\n"
        "from ortho_fx import OrthoFxError\n"
        "settings = dict(elements=3000 * 3072, rounds=3, eager=True, peers=False, expansions=DEFAULT_EXPANSIONS[:1])\n"
        "fresh = BenchConfig(**settings, fresh=True)\n"
        "print(bench(fresh)['copy'].page_faults, bench(BenchConfig(**settings))['copy'].page_faults)\n"
        "try: BenchConfig(**settings, fresh=True)\n"
        "except OrthoFxError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    faults, refusal = done.stdout.splitlines()
    fresh, reused = map(float, faults.split())
    # Pages of the output and of the gradient; a page has at most 2 MiB. Below 32 MiB malloc reuses buffers by itself.
    assert fresh >= 2 * 3000 * 3072 * 4 / 2**21
    assert reused < fresh / 10
    assert refusal == "fresh allocations need a new process: this one already reuses its buffers"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"what": "vit"}, "what must be one of activation, mlp, gpt2, convnext; got 'vit'"),
        ({"dtype": "float8"}, "dtype must be one of float32, bfloat16, float16; got 'float8'"),
        ({"mode": "fast"}, "mode must be one of default, reduce-overhead, max-autotune; got 'fast'"),
        ({"mode": "reduce-overhead"}, "mode 'reduce-overhead' is for compiled mlp, gpt2 and convnext on cuda"),
        ({"size": "124m"}, "size of activation must be one of tiny; got '124m'"),
        (
            {"what": "gpt2", "size": "t"},
            "size of gpt2 must be one of tiny, small, 11m, 124m, 350m, 774m, 1.5b; got 't'",
        ),
        ({"elements": 100}, "elements must be 3072 or more; got 100"),
        ({"rounds": 0}, "rounds must be 1 or more; got 0"),
        ({"threads": 0}, "threads must be 1 or more; got 0"),
        ({"device": "tpu"}, "device must be cpu or cuda; got 'tpu'"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available on this machine"),
        ({"expansions": ()}, "there is no expansion to measure"),
        ({"eager": True, "compile_time": True}, "compile_time does not go with eager"),
    ],
)
def test_wrong_settings_say_what_is_allowed(settings, message):
    with pytest.raises(OrthoFxError) as raised:
        BenchConfig(**settings)
    assert str(raised.value) == message


def test_expansions_are_chosen_by_basis_and_degree():
    def chosen(*arguments):
        return [str(expansion) for expansion in choose_expansions(*arguments)]

    first = ["hermite 3", "hermite 8", "hermite 16", "tropical 5", "tropical_rational 6", "fourier 5"]
    assert chosen()[:6] == first
    assert {text.split()[0] for text in chosen()} == {*BASES}
    assert chosen(["fourier", "hermite"]) == ["hermite 3", "hermite 8", "hermite 16", "fourier 5"]
    assert chosen(["fourier"], [2, 4, 2], "channel") == ["fourier 2 a channel", "fourier 4 a channel"]
    assert chosen(None, [2]) == [f"{basis} 2" for basis in BASES]
    with pytest.raises(OrthoFxError, match="basis must be one of"):
        chosen(["sine"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_report_on_a_gpu():
    report = bench(BenchConfig(**TINY, device="cuda", dtype="bfloat16"))
    assert report.environment["hardware"] == torch.cuda.get_device_name()
    assert report["gelu"].kernels == {"forward": 1, "backward": 1}
    assert 0 < report["copy"].seconds["total"] < 1
