import json
import sys
import types

import pytest
import torch
from torch import nn

from ortho_fx import OrthoFxError
from ortho_fx.cli import sites
from ortho_fx.cli.models import build_model
from ortho_fx.cli.parser import Parser
from ortho_fx.models.gpt2 import GPT2


def run(capsys, *arguments):
    parser = Parser(prog="ortho-fx")
    sites.add(parser.add_subparsers())
    parsed = parser.parse_args(["sites", *arguments])
    assert parsed.run(parsed) == 0
    return capsys.readouterr().out


def error_of(text):
    with pytest.raises(OrthoFxError) as caught:
        build_model(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


FILE = """
import dataclasses
import beside
import torch
from torch import nn

@dataclasses.dataclass
class Config:
    width: int = 4

class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.act, self.inner = nn.Linear(4, 4), nn.ReLU(), beside.Scaled()

    def forward(self, x):
        return self.act(torch.sigmoid(self.proj(x)) * x) + self.inner(x)

def make():
    print("building")
    return Gate()

def with_numbers():
    return nn.Sequential(*(nn.Dropout(rate) for rate in torch.linspace(0, 0.5, 2).tolist()), nn.GELU())

def failing():
    raise ValueError("no such width\\nand more")

def leaving():
    raise SystemExit(3)

number = 3
"""
BESIDE = """
import torch
from torch import nn

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.tensor(1.702)

    def forward(self, x):
        return x * torch.sigmoid(self.scale * x)
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / "beside.py").write_text(BESIDE)
    (tmp_path / "models.py").write_text(FILE)
    return str(tmp_path / "models.py")


def test_presets_are_listed_without_their_weights(capsys):
    lines = run(capsys, "gpt2").splitlines()
    assert [line.rstrip() for line in lines] == lines
    assert lines[0].split() == ["name", "kind", "function", "owner"]
    assert lines[1].split() == ["blocks.0.mlp.act", "module", "gelu", "MLP"]
    assert lines[-1] == "GPT2: 4 activations, 4 would be replaced, 0 left"
    lines = run(capsys, "convnext:b").splitlines()
    assert lines[-1] == "ConvNeXt: 36 activations, 36 would be replaced, 0 left"
    model = build_model("gpt2:1.5b")
    assert isinstance(model, GPT2)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_what_is_left_has_its_reason(capsys, file):
    lines = run(capsys, f"{file}:make").splitlines()
    assert [line.split("  ")[0] for line in lines[1:-1]] == ["sigmoid_expansion_0", "act", "inner"]
    assert lines[1].endswith("Gate   left: it is a gate unless it is named as a target")
    # The formula of `inner` contains a plain tensor, so only the tensor's value shows that it is swish.
    assert lines[3].split() == ["inner", "module", "swish", "Gate"]
    assert lines[-1] == "Gate: 3 activations, 2 would be replaced, 1 left"
    lines = run(capsys, f"{file}:make", "--targets", "sigmoid", "relu").splitlines()
    assert lines[3].endswith("left: it is not among the targets")
    assert lines[-1] == "Gate: 3 activations, 2 would be replaced, 1 left"


def test_json_is_alone_on_stdout(capsys, file):
    listed = json.loads(run(capsys, f"{file}:make", "--json"))
    assert [(site["name"], site["function"], site["owner"]) for site in listed] == [
        ("sigmoid_expansion_0", "sigmoid", "Gate"),
        ("act", "relu", "Gate"),
        ("inner", "swish", "Gate"),
    ]
    assert listed[0]["reason"] == "it is a gate unless it is named as a target"
    assert listed[0]["location"] == "models.py:17"
    assert json.loads(run(capsys, f"{file}:with_numbers", "--json", "--targets", "relu"))[0]["function"] == "gelu"


def test_models_without_activations(capsys, file, monkeypatch):
    monkeypatch.setattr(sites, "build_model", lambda text: nn.Linear(2, 2))
    assert run(capsys, "anything") == "Linear: 0 activations, 0 would be replaced, 0 left\n"
    assert run(capsys, "anything", "--json") == "[]\n"


def test_factories_that_need_numbers_get_them(file):
    assert build_model(f"{file}:with_numbers")[1].p == 0.5
    model = build_model(f"{file}:Gate")
    assert model.inner.scale == pytest.approx(1.702)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("failing", "FILE:failing cannot be built: ValueError: no such width"),
        ("leaving", "FILE:leaving cannot be built: SystemExit: 3"),
        ("Config", "FILE:Config must be a torch.nn.Module; got Config"),
        ("missing", "FILE must have a function or class missing; it has nothing of that name"),
        ("number", "FILE must have a function or class number; it is of type int"),
    ],
)
def test_what_is_wrong_with_a_factory(file, name, message):
    assert error_of(f"{file}:{name}").replace(file, "FILE") == message


def test_what_is_wrong_with_a_file(tmp_path, file):
    (tmp_path / "broken.py").write_text("def make(:\n")
    assert error_of(f"{tmp_path}/broken.py:make").startswith(f"{tmp_path}/broken.py cannot be built: SyntaxError: ")
    assert error_of(f"{tmp_path}/none.py:make") == f"there is no file {tmp_path}/none.py"
    forms = "gpt2[:SIZE], convnext[:SIZE], timm:NAME, hf:TYPE, hf:FOLDER or FILE.py:FACTORY"
    for text in ("bert", "timm:", "hf:", file, f"{file}:", ":make", ""):
        assert error_of(text) == f"MODEL must be {forms}; got {text!r}"
    assert error_of("gpt2:125m") == "sizes of gpt2 are tiny, small, 11m, 124m, 350m, 774m, 1.5b; got 'gpt2:125m'"


def test_wrong_options_are_named_before_the_model_is_built(capsys, monkeypatch):
    with pytest.raises(OrthoFxError, match=r"^unknown target 'swoosh'; targets are relu, "):
        run(capsys, "nothing.py:make", "--targets", "swoosh")
    with pytest.raises(OrthoFxError, match=r"^sharing must be instance, call or site; got 'none'"):
        run(capsys, "gpt2", "--sharing", "none")


def test_libraries_that_are_not_installed(monkeypatch):
    for name, text in (("timm", "timm:resnet50"), ("transformers", "hf:llama")):
        monkeypatch.setitem(sys.modules, name, None)
        assert error_of(text) == f"{text} needs {name}: pip install {name}"


def test_models_of_timm(capsys, monkeypatch):
    timm = types.ModuleType("timm")
    timm.list_models = lambda: ["resnet18", "resnet50", "vit_tiny"]
    timm.is_model = lambda name: name in timm.list_models()
    timm.create_model = lambda name: nn.Sequential(nn.Linear(10**6, 10**6), nn.ReLU())
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert run(capsys, "timm:resnet50").endswith("Sequential: 1 activation, 1 would be replaced, 0 left\n")
    assert error_of("timm:resnet19") == "timm has no model 'resnet19'; similar are resnet18, resnet50"


@pytest.fixture
def transformers(monkeypatch):
    def no_network(folder, *, local_files_only, trust_remote_code):
        assert local_files_only
        assert not trust_remote_code
        return types.SimpleNamespace(activation=nn.SiLU)

    def for_model(name):
        if name == "odd":
            raise TypeError("width must be a number\nand more")
        return types.SimpleNamespace(activation=nn.GELU)

    def from_config(config):
        return nn.Sequential(nn.Linear(10**6, 10**6), config.activation())

    library = types.ModuleType("transformers")
    library.CONFIG_MAPPING = dict.fromkeys(("llama", "llama4", "odd"))
    library.AutoConfig = types.SimpleNamespace(for_model=for_model, from_pretrained=no_network)
    library.AutoModel = types.SimpleNamespace(from_config=from_config)
    library.logging = types.SimpleNamespace(set_verbosity_error=lambda: None)
    monkeypatch.setitem(sys.modules, "transformers", library)


@pytest.mark.usefixtures("transformers")
def test_models_of_transformers(tmp_path):
    assert isinstance(build_model("hf:llama")[1], nn.GELU)
    assert error_of(f"hf:{tmp_path}") == f"{tmp_path} has no config.json"
    (tmp_path / "config.json").write_text("{}")
    model = build_model(f"hf:{tmp_path}")
    assert isinstance(model[1], nn.SiLU)
    assert model[0].weight.device == torch.device("meta")
    assert error_of("hf:lama") == "'lama' is no model type of transformers, and no folder; similar are llama, llama4"
    assert error_of("hf:odd") == "hf:odd cannot be built: TypeError: width must be a number"
