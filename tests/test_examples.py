"""The examples. Those that need only the `train` extra run with small sizes; of the others, our own functions run."""

import dataclasses
import importlib.util
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ortho_fx import ExpansionConfig, HermiteActivation, OrthoFxError, TropicalActivation, polynomial_report

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    """Imports an example as a module. It must be in sys.modules, since dataclasses look up their module there."""
    specification = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pinn():
    return load("pinn")


@pytest.fixture(scope="module")
def figures():
    return load("paper_figures")


EQUATIONS = ["poisson", "helmholtz", "burgers"]


@pytest.mark.parametrize("name", EQUATIONS)
def test_exact_solution_solves_the_equation(pinn, name):
    """The residual is the example's own; Cole and Hopf's integral is differentiated like a network."""
    problem = pinn.PROBLEMS[name]()
    points = problem.points[
        problem.points[:, -1] > 0.05
    ]  # at t = 0 the integral's derivative divides by the square root of t
    assert problem.residual(problem.exact, points).abs().max() < 1e-6


def test_burgers_starts_and_ends_where_it_should(pinn):
    x = torch.linspace(-1, 1, 21, dtype=torch.float64)
    starts = pinn.exact_burgers(torch.stack([x, torch.zeros_like(x)], 1))
    torch.testing.assert_close(starts, -torch.sin(math.pi * x))


@pytest.mark.parametrize("name", EQUATIONS)
def test_solutions_meet_their_boundary_conditions(pinn, name):
    problem = pinn.PROBLEMS[name]()
    network = pinn.make_network(ExpansionConfig("hermite", 5), problem.scaled(problem.points))
    edge = (problem.test[:, 0] == problem.test[:, 0].min()) | (problem.test[:, 0] == problem.test[:, 0].max())
    if problem.test.shape[1] == 2:
        edge |= problem.test[:, 1] == 0
    found = problem.solution(network, problem.test[edge])
    torch.testing.assert_close(found, problem.exact(problem.test[edge]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["poisson", "burgers"])
@pytest.mark.parametrize("label", ["hermite 5", "fourier 5", "chebyshev 5", "gelu_series 3"])
def test_all_forms_have_the_same_loss_and_gradients(pinn, label, name):
    problem = pinn.PROBLEMS[name]()
    torch.manual_seed(0)
    network = pinn.make_network(pinn.ACTIVATIONS[label], problem.scaled(problem.points))
    points = problem.points[::40]
    expected, *others = (
        pinn.with_gradients(pinn.make_loss(problem, form), network, points) for form in pinn.FORMS.values()
    )
    for found in others:
        torch.testing.assert_close(found, expected)


def test_loss_compiles_whole(pinn):
    problem = pinn.PROBLEMS["poisson"]()
    network = pinn.make_network(ExpansionConfig("hermite", 3), problem.scaled(problem.points))
    loss = pinn.make_loss(problem, pinn.by_grad)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(network, problem.points)
    torch.testing.assert_close(compiled, loss(network, problem.points))
    torch.compiler.reset()


def test_a_siren_starts_with_sines_of_the_size_that_its_paper_says(pinn):
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 2001, dtype=torch.float64)[:, None]
    network = pinn.make_network(pinn.Siren(30.0), x)
    inputs = []
    network[3].register_forward_hook(lambda _, arguments, __: inputs.append(arguments[0]))
    with torch.no_grad():
        network[2].bias.zero_()
        network(x)
    # Theorem 1.8 there: before each later sine the distribution is N(0, 1).
    assert inputs[0].std() == pytest.approx(1.0, rel=0.25)


def test_tropical_networks_have_no_second_derivative(pinn):
    network = nn.Sequential(nn.Linear(1, 8), TropicalActivation(), nn.Linear(8, 1))
    slope = pinn.gradient(lambda points: network(points)[:, 0])
    x = torch.linspace(0, 1, 50)[:, None]
    assert slope(x).abs().max() > 0
    assert pinn.gradient(lambda points: slope(points)[:, 0])(x).abs().max() == 0


def test_pinn_learns_and_writes(pinn, tmp_path):
    shared = ["poisson", "--seeds", "1", "--out", str(tmp_path), "--only", "tanh", "hermite 5"]
    pinn.main([*shared, "--steps", "1"])
    first = json.loads((tmp_path / "results" / "pinn.json").read_text())["poisson"]["activations"]
    pinn.main([*shared, "--steps", "30"])
    rows = json.loads((tmp_path / "results" / "pinn.json").read_text())["poisson"]["activations"]
    assert list(rows) == ["tanh", "hermite 5"]
    for name, row in rows.items():
        assert row["median"] < 0.75 * first[name]["median"]
    assert (tmp_path / "pictures" / "pinn_poisson.png").read_bytes().startswith(b"\x89PNG")


def test_fits_draws_every_function(figures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "FUNCTIONS", {"ReLU": torch.relu})
    figures.main(["fits", "--out", str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path / 'fits_relu.png'}\n"
    assert 5_000 < (tmp_path / "fits_relu.png").stat().st_size < 200_000


def test_boundaries_are_learned(figures, tmp_path, monkeypatch, capsys):
    moons = figures.make_moons(200, noise=0.1, random_state=0)
    monkeypatch.setattr(figures, "datasets", lambda count: {"moons": moons})
    networks = {name: figures.NETWORKS[name] for name in ("ReLU", "Hermite 3")}
    monkeypatch.setattr(figures, "NETWORKS", networks)
    figures.main(["boundaries", "--steps", "100", "--out", str(tmp_path)])
    *lines, path = capsys.readouterr().out.splitlines()
    accuracies = {line[9:29].strip(): float(line[29:].strip(" %")) for line in lines}
    assert accuracies.keys() == networks.keys()
    assert accuracies["ReLU"] > 80
    assert accuracies["Hermite 3"] > 94
    assert path == str(tmp_path / "boundaries.png")
    assert 10_000 < (tmp_path / "boundaries.png").stat().st_size < 200_000


def test_activations_needs_a_run(figures, tmp_path):
    with pytest.raises(OrthoFxError, match=str(tmp_path)):
        figures.main(["activations", str(tmp_path)])


def test_spirals_are_two_arms_apart(figures):
    points, labels = figures.spirals(200)
    assert points.shape == (200, 2)
    assert labels.sum() == 100


def test_transformers_text_is_cut_into_pieces():
    example = load("transformers_trainer")
    data = example.Bytes(bytes(range(256)) * 2 + b"rest")
    assert len(data) == 512 // example.LENGTH
    assert data[1]["labels"].tolist() == list(range(example.LENGTH, 2 * example.LENGTH))


def test_timm_model_is_calibrated_in_training_mode():
    """A new batch normalisation has no statistics yet: in eval mode it would not normalise its inputs."""
    example = load("timm_training")
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)).eval()
    example.make_learnable(model, 50 * torch.randn(64, 8), ExpansionConfig("hermite"))
    assert "2.coefficients" in model.no_weight_decay()
    torch.testing.assert_close(model[2].coefficients, HermiteActivation(3).coefficients, rtol=0.05, atol=0.05)


def test_timm_digits_are_normalised():
    images, classes, held, held_classes = load("timm_training").digits()
    assert images.shape[1:] == held.shape[1:] == (1, 32, 32)
    assert (len(images), len(held)) == (len(classes), len(held_classes)) == (1347, 450)
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05


@pytest.fixture(scope="module")
def encrypted():
    return load("encrypted_inference")


class Clear:
    """OpenFHE's context in the clear: a ciphertext is an array, with the level that it would have."""

    levels = 0

    def KeyGen(self):
        return types.SimpleNamespace(publicKey=None, secretKey=None)

    def EvalMultKeyGen(self, key):
        pass

    def EvalRotateKeyGen(self, key, turns):
        self.turns = turns

    def MakeCKKSPackedPlaintext(self, values):
        return np.array(values)

    def Encrypt(self, key, values):
        return Ciphertext(values, 0)

    def Decrypt(self, ciphertext, key):
        return types.SimpleNamespace(GetRealPackedValue=ciphertext.values.tolist)

    def EvalRotate(self, x, turn):
        assert turn in self.turns
        return Ciphertext(np.roll(x.values, -turn), x.level)

    def EvalMult(self, x, plaintext):
        return Ciphertext(x.values * plaintext, x.level + 1)

    def EvalAdd(self, x, y):
        return Ciphertext(x.values + y, x.level)

    def EvalAddMany(self, parts):
        return Ciphertext(sum(part.values for part in parts), max(part.level for part in parts))

    def EvalPoly(self, x, coefficients):
        return Ciphertext(np.polynomial.Polynomial(coefficients)(x.values), x.level + 2)


@dataclasses.dataclass
class Ciphertext:
    values: np.ndarray
    level: int

    def GetLevel(self):
        return self.level


def clear_parameters(model, images):
    parameters = polynomial_report(model, [images]).to_openfhe()
    small = types.SimpleNamespace(sites=parameters.sites, slots=64, context=Clear)
    return parameters, small


def test_diagonals_of_interleaved_images_are_matrix_products(encrypted):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 9), HermiteActivation(2), nn.Linear(9, 3)).double()
    images = torch.randn(4, 13, dtype=torch.float64)
    parameters, small = clear_parameters(model, images)
    network = encrypted.OpenFHENetwork(model, small)
    assert (network.width, network.room) == (16, 4)
    found = network.decrypt(network(network.encrypt(images[:3])), (3, 3))
    np.testing.assert_allclose(found, model(images[:3]).detach().numpy(), atol=1e-12)
    assert network.levels == parameters.levels == 4
    assert len(network.context.turns) <= 2 * math.isqrt(network.width)


@pytest.fixture
def in_the_clear(encrypted, monkeypatch):
    class Network(encrypted.OpenFHENetwork):
        wrong = 0.0

        def __init__(self, model, parameters):
            small = types.SimpleNamespace(sites=parameters.sites, slots=1024, context=Clear)
            super().__init__(model, small)

        def decrypt(self, ciphertext, shape):
            return super().decrypt(ciphertext, shape) + self.wrong

    monkeypatch.setitem(encrypted.NETWORKS, "openfhe", (Network, "to_openfhe"))
    monkeypatch.setattr(encrypted.importlib.metadata, "version", lambda library: "0")
    return Network


def test_encrypted_digits_are_classified_and_written(encrypted, in_the_clear, tmp_path, capsys):
    encrypted.main(["digits", "--library", "openfhe", "--images", "20", "--steps", "60", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "results" / "encrypted_inference.json").read_text())["digits"]
    text = (tmp_path / "results" / "encrypted_inference_digits.txt").read_text()
    assert printed.startswith(text)
    row = result["encrypted"]["openfhe"]
    assert row["same_classes"] == 20
    assert row["accuracy"] == result["clear"]["polynomial (float)"]["accuracy"] > 0.5
    assert (row["images_in_a_ciphertext"], row["largest_error"] < 1e-4) == (16, True)
    assert (tmp_path / "pictures" / "encrypted_inference.png").read_bytes().startswith(b"\x89PNG")
    in_the_clear.wrong = 5.0
    with pytest.raises(OrthoFxError, match=r"openfhe's logits differ from those in the clear by 5\b"):
        encrypted.main(["digits", "--library", "openfhe", "--images", "4", "--steps", "9", "--out", str(tmp_path)])


def test_the_page_shows_what_the_example_printed(encrypted, tmp_path, capsys):
    page = (EXAMPLES.parent / "docs" / "guides" / "encrypted.md").read_text()
    for name in ("digits", "resnet20"):
        assert f"```\n{(EXAMPLES / 'results' / f'encrypted_inference_{name}.txt').read_text()}```\n" in page
    encrypted.main(["resnet20", "--out", str(tmp_path)])
    text = (EXAMPLES / "results" / "encrypted_inference_resnet20.txt").read_text()
    assert capsys.readouterr().out.startswith(text)


@pytest.mark.parametrize(("name", "command"), [("pinn", "poisson --steps 1 --seeds 1"), ("paper_figures", "fits")])
def test_examples_write_to_a_folder_of_their_own(name, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load(name).main(command.split())
    written = [path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()]
    assert set(written) == {("runs", name)}
