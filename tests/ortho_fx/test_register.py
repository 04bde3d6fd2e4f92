"""Bases of users: the checks of their registration, and the numeric defaults for methods that they leave out."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ortho_fx
from ortho_fx import ExpansionConfig, OrthoFxError, cli
from ortho_fx.activations import expansion as activations
from ortho_fx.activations.expansion import make_activation
from ortho_fx.bases import BASES, HERMITE
from ortho_fx.bases.basis import Basis, Parameter, multiply_add
from ortho_fx.bases.formula import after, masked
from ortho_fx.bases.hermite import Hermite
from ortho_fx.bench.measure import choose_expansions
from ortho_fx.models.gpt2 import GPT2, GPT2Config
from ortho_fx.models.recipe import TrainConfig
from ortho_fx.models.weights.bundle import load_model, save_weights
from ortho_fx.numerics.moments import clamped
from ortho_fx.operators import expand, support
from ortho_fx.rewriting.sources import config_of_tensors
from tests.kinds import bases_from_outside

pytestmark = pytest.mark.slow


class Powers(Basis):
    """y(x) = sum of a_k x^k: linear in its parameters, and closed under a change of variable."""

    wrong = 1.0

    def evaluate(self, x, *parameters):
        (a,) = parameters
        y = a[len(a) - 1] * 1.0
        for k in range(len(a) - 2, -1, -1):
            y = multiply_add(y, x, a[k])
        return y

    def derivatives(self, grad, x, *parameters):
        (a,) = parameters
        powers = [1.0, x]
        for _ in range(2, len(a)):
            powers.append(powers[-1] * x)

        def grad_x():
            slope = 0.0
            for k in range(1, len(a)):
                slope = multiply_add(k * a[k], powers[k - 1], slope)
            return grad * slope * self.wrong

        return grad_x, [lambda k=k: grad * powers[k] for k in range(len(a))]


class Sines(Basis):
    """y(x) = c + sum of a_k sin(x - s_k): not linear in its shifts; if these are tied, one shift serves all terms."""

    def evaluate(self, x, *parameters):
        constant, weights, shifts = parameters
        y = constant[0]
        for k in range(len(weights)):
            y = multiply_add(weights[k], (x - shifts[min(k, len(shifts) - 1)] * self.multiple(k, shifts)).sin(), y)
        return y

    @staticmethod
    def multiple(k, shifts):
        return 1.0 if len(shifts) > 1 else k + 1.0

    def derivatives(self, grad, x, *parameters):
        _, weights, shifts = parameters
        n, tied = len(weights), len(shifts) < len(weights)
        angle = [x - shifts[min(k, len(shifts) - 1)] * self.multiple(k, shifts) for k in range(n)]

        def grad_x():
            slope = 0.0
            for k in range(n):
                slope = multiply_add(weights[k], angle[k].cos(), slope)
            return grad * slope

        def shift(k):
            return grad * weights[k] * angle[k].cos() * -self.multiple(k, shifts)

        def all_shifts():
            total = shift(0)
            for k in range(1, n):
                total = total + shift(k)
            return total

        last = [all_shifts] if tied else [lambda k=k: shift(k) for k in range(n)]
        return grad_x, [lambda: grad, *(lambda k=k: grad * angle[k].sin() for k in range(n)), *last]


class Hats(Basis):
    """y(x) = sum of a_k relu(x - t_k): its kinks t_k are not learnable, and it has no constant.

    `prepare` doubles the heights for the formulas, and `collect_prepared` needs the factor of two again.
    """

    def prepare(self, dtype, *parameters):
        heights, places = parameters
        return 2.0 * heights.to(dtype), places, torch.tensor(2.0)

    def evaluate(self, x, *parameters):
        heights, places = parameters
        y = heights[0] * (x - places[0]).relu()
        for k in range(1, len(heights)):
            y = multiply_add(heights[k], (x - places[k]).relu(), y)
        return y

    def derivatives(self, grad, x, *parameters):
        heights, places = parameters

        def grad_x():
            slope = masked(after(x, places[0]), heights[0])
            for k in range(1, len(heights)):
                slope = slope + masked(after(x, places[k]), heights[k])
            return grad * slope

        return grad_x, [lambda k=k: grad * (x - places[k]).relu() for k in range(len(heights))]

    def collect_prepared(self, sums, parameters, prepared):
        return (prepared[2] * sums,)


HATS = (Parameter("heights", offset=1), Parameter("places", learnable=False, offset=1))
COEFFICIENTS = (Parameter("coefficients", offset=1),)
SHIFTED = (Parameter("constant", scalar=True), Parameter("weights"), Parameter("shifts", tieable=True))


@pytest.fixture(autouse=True)
def forgotten():
    with bases_from_outside():
        yield


_names = iter(range(1000))


def register(cls=Powers, parameters=COEFFICIENTS, degrees=range(1, 9), default=3):
    """Registers a basis under a name that no other test uses; returns its class of modules."""
    number = next(_names)
    return ortho_fx.register_basis(cls(f"outside{number}", f"Outside{number}", parameters, degrees, default))


def test_linear_basis_has_every_default():
    cls = register()
    basis = cls.basis
    for degree in (1, 2, 3, 8):
        gains = ortho_fx.gains(cls(degree, dtype=torch.float64))
        assert (gains.forward, gains.backward) == pytest.approx((1, 1), abs=1e-9)
        assert abs(gains.slope) < 0.9 or degree == 1
        ours = ortho_fx.fit(F.gelu, ExpansionConfig("hermite", degree))
        its = ortho_fx.fit(F.gelu, ExpansionConfig(basis.name, degree))
        assert its.rmse == pytest.approx(ours.rmse, rel=1e-6)
    values = {"coefficients": np.array([0.3, -0.2, 0.5, 0.1])}
    known = basis.moments(values, (-1.0, 2.0))
    exact = clamped(
        lambda x: (np.polyval(values["coefficients"][::-1], x), np.polyval([0.3, 1.0, -0.2], x)), (-1, 2), 3
    )
    for field in ("mean", "square", "derivative_square", "mean_growth", "square_growth"):
        assert getattr(known, field) == pytest.approx(getattr(exact, field), abs=1e-9)


@pytest.mark.parametrize("clamp", [None, 1.5])
def test_gains_of_one_with_a_clamp_in_channels_and_after_calibration(clamp):
    config = ExpansionConfig(register().basis.name, 4, granularity="channel", clamp=clamp)
    model = nn.Sequential(nn.GELU())
    ortho_fx.rewrite_(model, config, example_inputs=torch.randn(8, 5))
    before = ortho_fx.gains(model[0])
    assert (before.forward, before.backward) == pytest.approx((1, 1), abs=1e-5)
    x = 3 * torch.randn(20_000, 5, generator=torch.Generator().manual_seed(0)) + 1
    (site,) = ortho_fx.calibrate_(model, [x]).sites
    after = ortho_fx.gains(model[0], site.mean, site.std)
    assert after.backward == pytest.approx(1, abs=1e-4)
    assert after.forward == pytest.approx(before.forward, abs=1e-4)


def test_rescaling_a_closed_basis_is_exact():
    basis = register().basis
    values = {"coefficients": np.array([0.3, -0.2, 0.5, 0.1])}
    moved = basis.rescale(values, 0.7, 2.0)
    z = np.linspace(-3, 3, 50)
    y = np.polyval(moved["coefficients"][::-1], 0.7 + 2.0 * z)
    np.testing.assert_allclose(y, 2.0 * np.polyval(values["coefficients"][::-1], z), atol=1e-9)


@pytest.mark.parametrize("tied", [False, True])
def test_basis_that_is_not_linear(tied):
    cls = register(Sines, SHIFTED, range(2, 5), 2)
    config = ExpansionConfig(cls.basis.name, 2, tied=tied)
    activation = make_activation(config, dtype=torch.float64)
    assert len(activation.shifts) == 1 + (not tied)
    gains = ortho_fx.gains(activation)
    assert (gains.forward, gains.backward) == pytest.approx((1, 1), abs=1e-9)
    # The function belongs to the basis, so the fit finds it.
    result = ortho_fx.fit(lambda x: 0.3 + 0.8 * (x - 0.4).sin(), config)
    assert result.rmse < 1e-6
    # The basis does not contain its functions on another scale; the closest function still keeps the gains.
    model = nn.Sequential(activation)
    ortho_fx.calibrate_(model, [torch.randn(5000, dtype=torch.float64) * 0.9 + 0.1])
    (site,) = ortho_fx.calibrate_(model, [torch.randn(5000, dtype=torch.float64) * 0.9 + 0.1]).sites
    gains = ortho_fx.gains(activation, site.mean, site.std)
    assert (gains.forward, gains.backward) == pytest.approx((1, 1), abs=1e-9)


def test_basis_with_kinks_has_gains_of_one():
    cls = register(Hats, HATS, range(2, 5), 2)
    gains = ortho_fx.gains(cls(3, dtype=torch.float64))
    assert (gains.forward, gains.backward) == pytest.approx((1, 1), abs=1e-9)
    x = torch.randn(100, requires_grad=True)
    activation = cls(3)
    frozen = nn.Sequential(copy.deepcopy(activation))
    ortho_fx.freeze_(frozen)
    torch.testing.assert_close(frozen(x), activation(x))


def test_it_compiles_as_eager_and_is_lowered(monkeypatch):
    cls = register()
    activation = cls(5, granularity="channel", channels=7)
    x = torch.randn(9, 7, requires_grad=True)
    eager = torch.autograd.grad(activation(x).square().sum(), (x, activation.coefficients))
    torch.compiler.reset()
    compiled = torch.autograd.grad(torch.compile(activation)(x).square().sum(), (x, activation.coefficients))
    torch.testing.assert_close(compiled, eager)
    assert support.reason(cls.basis) is None
    assert cls.basis.name in support.LOWERED
    assert cls.basis.name in torch.compiler.config.cache_key_tag
    # A basis that is registered after the lowering was loaded is lowered too.
    late = register(Hats, HATS, range(2, 5), 2)
    assert late.basis.name in support.LOWERED
    assert support._verdict(late.basis, "cpu", check=False) is None
    activation = late(3)
    expected = torch.autograd.grad(activation(x).square().sum(), (x, activation.heights))
    compiled = torch.autograd.grad(torch.compile(activation)(x).square().sum(), (x, activation.heights))
    torch.testing.assert_close(compiled, expected)
    with torch.no_grad():
        frozen = nn.Sequential(copy.deepcopy(activation))
        ortho_fx.freeze_(frozen)
        torch.testing.assert_close(torch.compile(frozen)(x), activation(x))


class WithSlope(Powers):
    def slope(self, *parameters):
        (a,) = parameters
        orders = torch.arange(len(a), dtype=a.dtype).reshape(-1, *(1 for _ in a.shape[1:]))
        return (torch.cat([(orders * a)[1:], 0 * a[:1]]),)


class Inherited(Hermite):
    """Its formula has one more summand, and its slope is still that of Hermite expansions."""

    def evaluate(self, x, *parameters):
        return super().evaluate(x, *parameters) + x * x

    def derivatives(self, grad, x, *parameters):
        grad_x, terms = super().derivatives(grad, x, *parameters)
        return lambda: grad_x() + grad * x * 2.0, terms


class WithoutSlope(Inherited):
    slope = Basis.slope


@pytest.mark.parametrize("cls", [WithSlope, WithoutSlope])
def test_forward_mode_with_and_without_a_slope(cls):
    basis = register(cls, COEFFICIENTS, range(1, 9), 3).basis
    x, a = torch.linspace(-1, 1, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda x: expand(basis, x, a))(x)
    torch.testing.assert_close(torch.func.jacfwd(lambda x: expand(basis, x, a))(x), jacobian)


def test_derivatives_of_higher_order_and_vmap():
    basis = register().basis
    x = torch.linspace(-1, 1, 6, dtype=torch.float64, requires_grad=True)
    a = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, a: expand(basis, x, a), (x, a))
    many = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(
        torch.vmap(lambda a: expand(basis, x, a))(many), torch.stack([expand(basis, x, a) for a in many])
    )


def test_pickle_copy_and_state_dict():
    cls = register()
    activation = cls(4)
    for again in (pickle.loads(pickle.dumps(activation)), copy.deepcopy(activation)):
        assert type(again) is cls
        assert torch.equal(again.coefficients, activation.coefficients)
        assert again.config == activation.config
    assert getattr(activations, cls.__name__) is cls
    assert cls.__doc__.startswith("y(x) = sum of a_k x^k")
    other = cls(4, init="stable")
    other.load_state_dict(activation.state_dict())
    text = pickle.dumps(activation)
    assert cls.basis.name.encode() in text
    del BASES[cls.basis.name]
    try:
        with pytest.raises(OrthoFxError, match=f"basis must be one of hermite, .*; got '{cls.basis.name}'"):
            pickle.loads(text)
    finally:
        BASES[cls.basis.name] = cls.basis


def test_weights_of_a_model_are_saved_and_loaded(tmp_path):
    model = GPT2(GPT2Config(vocabulary=64, context=8, layers=1, heads=1, width=16))
    cls = register()
    ortho_fx.rewrite_(model, ExpansionConfig(cls.basis.name, 4))
    save_weights(model, tmp_path / "model.safetensors", {})
    loaded = load_model(tmp_path / "model.safetensors").eval()
    tokens = torch.randint(0, 64, (2, 8))
    torch.testing.assert_close(loaded(tokens), model.eval()(tokens))
    basis = BASES.pop(cls.basis.name)
    try:
        with pytest.raises(OrthoFxError, match="basis must be one of hermite"):
            load_model(tmp_path / "model.safetensors")
    finally:
        BASES[basis.name] = basis


def test_parameters_that_fit_two_bases_are_no_one_s():
    parameters = {"coefficients": torch.zeros(4)}
    assert config_of_tensors(parameters) == ExpansionConfig("hermite", 3)
    cls = register()
    with pytest.raises(OrthoFxError, match=rf"\(coefficients 4\) fit several bases: hermite, {cls.basis.name}"):
        config_of_tensors(parameters)


def test_command_line_follows(capsys, tmp_path):
    name = register().basis.name
    assert cli.main(["fit", "gelu", "--basis", name, "--degree", "4"]) == 0
    assert f"{name} 4 fit of gelu" in capsys.readouterr().out
    for command in ("fit", "bench", "train"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert name in re.sub(r"\s", "", capsys.readouterr().out)
    assert cli.main(["fit", "gelu", "--basis", name, "--degree", "9"]) == 2
    assert f"degree of {name} must be an integer from 1 to 8; got 9" in capsys.readouterr().err
    assert cli.main(["fit", "gelu", "--basis", name, "--tied"]) == 2
    assert f"tied is for the frequencies of fourier; {name} has none" in capsys.readouterr().err
    assert cli.main(["fit", "gelu", "--basis", "nosuch"]) == 2
    assert f", {name}; got 'nosuch'" in capsys.readouterr().err
    assert [expansion.basis for expansion in choose_expansions([name])] == [name]
    assert ExpansionConfig(name) in choose_expansions()
    assert TrainConfig(basis=name, data=str(tmp_path)).degree == 3
    with pytest.raises(OrthoFxError, match=f"init of {name} must be one of stable, calibrated, fit"):
        ExpansionConfig(name, init="paper")


PLUGIN = """
import ortho_fx
from ortho_fx.bases.hermite import Hermite
from ortho_fx.bases.basis import Parameter
ortho_fx.register_basis(Hermite("plugged", "Plugged", (Parameter("coefficients", offset=1),), range(1, 9), 3))
"""


def test_installed_packages_register_for_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "plugged_basis.py").write_text(PLUGIN)
    info = tmp_path / "plugged-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ortho_fx.bases]\nplugged = plugged_basis\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["fit", "relu", "--basis", "plugged"]) == 0
    assert "plugged 3 fit of relu" in capsys.readouterr().out
    (info / "entry_points.txt").write_text("[ortho_fx.bases]\nplugged = no_such_module\n")
    assert cli.main(["fit", "relu"]) == 2
    assert "entry point plugged = no_such_module of ortho_fx.bases: No module named" in capsys.readouterr().err


class Wrong(Powers):
    wrong = 1.001


class Raises(Powers):
    def evaluate(self, x, *parameters):
        raise RuntimeError("no such luck")


class RaisesInSlope(Powers):
    def slope(self, *parameters):
        raise RuntimeError("no such luck")


class Few(Powers):
    def derivatives(self, grad, x, *parameters):
        grad_x, terms = super().derivatives(grad, x, *parameters)
        return grad_x, terms[1:]


class Doubled(Powers):
    def collect(self, sums, *parameters):
        return (2.0 * sums,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cls": Wrong}, r"basis 'bad', degree 1: the gradient of x is off by 0\.00\d+ from autograd's of the formula"),
        ({"cls": Doubled}, "degree 1: the gradient of coefficients is off by"),
        ({"cls": Raises}, "basis 'bad', degree 1: its formula raises: RuntimeError: no such luck"),
        ({"cls": RaisesInSlope}, "basis 'bad', degree 1: its slope raises: RuntimeError: no such luck"),
        ({"cls": Inherited}, r"its slope, or a gradient of it, is off by .* slope = Basis\.slope in the class leaves"),
        ({"cls": Few}, "its derivatives have 1 terms for 2 learnable numbers"),
        ({"name": "hermite"}, "basis 'hermite' is registered already; known are hermite, fourier"),
        ({"name": "two words"}, "the name of a basis must be an identifier in lower case, not none or gelu; got 'two"),
        ({"name": "none"}, "not none or gelu; got 'none'"),
        ({"name": "Upper"}, "identifier in lower case"),
        ({"name": "hermite_backward"}, "would have an operator of a name that is taken"),
        ({"title": "two words"}, "the title of basis 'bad' must be an identifier that gives its class a free name"),
        ({"title": "Expansion"}, "the title of basis 'bad' must be an identifier that gives its class a free name"),
        ({"degrees": range(0)}, "the degrees of basis 'bad' must be a range with step 1"),
        ({"default_degree": 99}, "holds its default degree"),
        ({"parameters": (Parameter("x"),)}, "cannot have a parameter 'x': the name is taken or no identifier"),
        ({"parameters": (Parameter("training"),)}, "cannot have a parameter 'training'"),
        ({"parameters": (Parameter("a"), Parameter("a"))}, "cannot have a parameter 'a'"),
        ({"parameters": (Parameter("a", offset=-1),)}, "a of basis 'bad' has no number at degree 1"),
        ({"parameters": (Parameter("a", learnable=False),)}, "has no parameter that learns"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_basis_is_said_and_nothing_is_registered(settings, message):
    values = dict(name="bad", title="Bad", parameters=COEFFICIENTS, degrees=range(1, 9), default_degree=3)
    settings = dict(settings)
    cls = settings.pop("cls", Powers)
    with pytest.raises(OrthoFxError, match=message):
        ortho_fx.register_basis(cls(**{**values, **settings}))
    assert "bad" not in BASES
    assert not hasattr(torch.ops.ortho_fx, "bad")


def test_a_title_may_be_that_of_another_basis():
    with bases_from_outside():
        cls = ortho_fx.register_basis(Powers("my_hermite", "Hermite", COEFFICIENTS, range(1, 9), 3))
        assert cls.__name__ == "MyHermiteActivation"
        assert activations.MyHermiteActivation is cls
        assert type(pickle.loads(pickle.dumps(cls(3)))) is cls
    assert not hasattr(activations, "MyHermiteActivation")
    assert activations.HermiteActivation.basis is HERMITE


def test_what_a_kernel_cannot_compute_is_said():
    class Dividing(Powers):
        def evaluate(self, x, *parameters):
            return super().evaluate(x, *parameters) + 0.0 * x.tanh()

    with pytest.raises(OrthoFxError, match=r"its formula cannot be compiled, since .*AttributeError.*tanh"):
        ortho_fx.register_basis(Dividing("bad", "Bad", COEFFICIENTS, range(1, 9), 3))
    with pytest.raises(OrthoFxError, match=r"register_basis takes an ortho_fx\.bases\.Basis; got str"):
        ortho_fx.register_basis("hermite")


def test_second_registration_is_one_clear_error():
    cls = register()
    with pytest.raises(OrthoFxError, match=f"basis '{cls.basis.name}' is registered already"):
        ortho_fx.register_basis(cls.basis)


def test_start_that_does_not_exist_is_said():
    class Level(Powers):
        """y(x) = a (1 + x / 100): its gains cannot both be 1."""

        def evaluate(self, x, *parameters):
            (a,) = parameters
            return a[0] * (x * 1e-2 + 1.0)

        def derivatives(self, grad, x, *parameters):
            (a,) = parameters
            return (lambda: grad * a[0] * 1e-2), [lambda: grad * (x * 1e-2 + 1.0)]

    cls = register(Level, (Parameter("level", scalar=True),))
    with pytest.raises(
        OrthoFxError, match=r"expansion of degree 3 with gains of 1 was found: its basis needs a `start`"
    ):
        cls(3)
    assert ortho_fx.fit(torch.cos, ExpansionConfig(cls.basis.name, 1)).rmse < 1


def test_our_own_formula_under_another_name_is_the_same():
    number = next(_names)
    twin = type(HERMITE)(f"outside{number}", f"Outside{number}", HERMITE.parameters, HERMITE.degrees, 3)
    cls = ortho_fx.register_basis(twin)
    theirs, ours = cls(5), ortho_fx.HermiteActivation(5)
    x = torch.randn(100)
    assert torch.equal(theirs(x), ours(x))
    assert ortho_fx.gains(theirs) == ortho_fx.gains(ours)
