"""A network of the digits on encrypted images, in OpenFHE and TenSEAL; and what a ResNet-20 would take.

    python examples/encrypted_inference.py digits [--library openfhe tenseal] [--images 50]
    python examples/encrypted_inference.py resnet20

`digits` trains 64-32-10 with ReLU on scikit-learn's digits, makes it polynomial by `Annealing`, and takes the smallest
degree that loses at most half a point on the images for selection. `polynomial_report` gives the ranges, and
`to_openfhe` and `to_tenseal` the parameters. Then the network runs on encrypted images, which had no part in training
and selection. The weights are not encrypted: they belong to the server.

OpenFHE packs one image into every row of 64 slots, interleaved: slot i B + b holds value i of image b. So a rotation by
k B is cyclic in the values of all images at once, and one ciphertext holds 128 of them at ring dimension 2^14. Products
with matrices are by diagonals (Halevi and Shoup, "Algorithms in HElib", CRYPTO 2014), with baby steps and giant steps.
TenSEAL has one image in a ciphertext, and its own product, `CKKSVector.mm`.

`resnet20` reports on a ResNet-20 for images of 3 x 32 x 32, with random weights: depth, levels and bootstrappings.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ortho_fx import Annealing, ExpansionConfig, OrthoFxError, freeze_, param_groups, polynomial_report, rewrite_
from ortho_fx.plots import STOCK, colour_of, load_pyplot
from ortho_fx.polynomial import OpenFHEParameters, PolynomialReport, TenSEALParameters
from ortho_fx.polynomial.encryption import EncryptedSite
from ortho_fx.polynomial.evaluation import evaluation
from ortho_fx.tables import table

TRAIN, SELECT, HIDDEN, BATCH = 1000, 397, 32, 64
DEGREES, LOSS_ALLOWED = (2, 3, 4), 0.005
# The usable levels between two bootstrappings, for the estimate of ResNet-20.
USABLE = 10
# ReLU(x) = x (1 + sign(x)) / 2, with the sign as a composition of three polynomials of these degrees: what Orion
# (Ebel et al., arXiv 2311.03470) takes unless told otherwise.
SIGN = (15, 15, 27)


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 64) of mean 0 and deviation 1, and their classes, in a fixed random order."""
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return ((images - images.mean()) / images.std())[order].float(), labels[order]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, annealing: Annealing | None = None) -> None:
    optimizer = torch.optim.AdamW(param_groups(model, lr=2e-3, weight_decay=1e-2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        if annealing is not None:
            loss = loss + 0.1 * annealing.penalty()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if annealing is not None:
            annealing.step()
    if annealing is not None:
        annealing.finish()


class OpenFHENetwork:
    """A chain of `nn.Linear` and polynomials, on images that share one ciphertext.

    `room` is the number of images in a ciphertext, and `levels` the levels that the last call took.
    """

    def __init__(self, model: nn.Sequential, parameters: OpenFHEParameters) -> None:
        self.context = parameters.context()
        self.keys = self.context.KeyGen()
        self.context.EvalMultKeyGen(self.keys.secretKey)
        largest = max(max(layer.weight.shape) for layer in model if isinstance(layer, nn.Linear))
        self.width = 1 << (largest - 1).bit_length()
        self.room = parameters.slots // self.width
        self.step = 1 << (self.width.bit_length() // 2)
        turns = [*range(1, self.step), *range(self.step, self.width, self.step)]
        self.context.EvalRotateKeyGen(self.keys.secretKey, [turn * self.room for turn in turns])
        sites = {site.name: site for site in parameters.sites}
        self.layers: list[Callable[[Any], Any]] = []
        for name, layer in model.named_children():
            self.layers.append(self._linear(layer) if isinstance(layer, nn.Linear) else self._activation(sites[name]))
        self.levels = 0

    def encrypt(self, images: Tensor) -> Any:
        values = np.zeros((self.width, self.room))
        values[: images.shape[1], : len(images)] = images.double().numpy().T
        return self.context.Encrypt(self.keys.publicKey, self._packed(values))

    def __call__(self, encrypted: Any) -> Any:
        x = encrypted
        for layer in self.layers:
            x = layer(x)
        self.levels = x.GetLevel() - encrypted.GetLevel()
        return x

    def decrypt(self, encrypted: Any, shape: tuple[int, int]) -> np.ndarray:
        images, outputs = shape
        values = np.array(self.context.Decrypt(encrypted, self.keys.secretKey).GetRealPackedValue())
        return values[: self.width * self.room].reshape(self.width, self.room)[:outputs, :images].T

    def _packed(self, values: np.ndarray) -> Any:
        return self.context.MakeCKKSPackedPlaintext(values.ravel().tolist())

    def _linear(self, layer: nn.Linear) -> Callable[[Any], Any]:
        """y = sum_j turn(sum_i d_(j s + i) turn(x, i), j s), where turn(v, k) has value r + k of v in row r.

        The diagonal k has W[r, r + k] in row r. Those of a giant step j s are turned back beforehand.
        """
        weight = np.zeros((self.width, self.width))
        weight[: layer.out_features, : layer.in_features] = layer.weight.detach().double().numpy()
        rows = np.arange(self.width)
        diagonals: dict[int, dict[int, Any]] = {}
        for k in range(self.width):
            diagonal = weight[rows, (rows + k) % self.width]
            if diagonal.any():
                giant, baby = k - k % self.step, k % self.step
                turned = np.roll(diagonal, giant)
                packed = self._packed(np.repeat(turned[:, None], self.room, axis=1))
                diagonals.setdefault(giant, {})[baby] = packed
        bias = np.zeros(self.width)
        bias[: layer.out_features] = layer.bias.detach().double().numpy()
        packed_bias = self._packed(np.repeat(bias[:, None], self.room, axis=1))
        babies = {baby for row in diagonals.values() for baby in row}

        def apply(x: Any) -> Any:
            turned = {baby: self.context.EvalRotate(x, baby * self.room) if baby else x for baby in babies}
            parts = []
            for giant, row in diagonals.items():
                products = [self.context.EvalMult(turned[baby], diagonal) for baby, diagonal in row.items()]
                part = self.context.EvalAddMany(products)
                parts.append(self.context.EvalRotate(part, giant * self.room) if giant else part)
            return self.context.EvalAdd(self.context.EvalAddMany(parts), packed_bias)

        return apply

    def _activation(self, site: EncryptedSite) -> Callable[[Any], Any]:
        (coefficients,) = site.coefficients
        if site.method == "EvalPoly":
            return lambda x: self.context.EvalPoly(x, list(coefficients))
        return lambda x: self.context.EvalChebyshevSeries(x, list(coefficients), site.low, site.high)


class TenSEALNetwork:
    """The same for one image in a ciphertext.

    `CKKSVector.mm` reads the slots after the end of its vector as a repetition of it, for what a rotation moves over
    the end. A bias that is added does not reach them: the next product would be wrong. So every layer's outputs stand
    after as many zeros as the next layer has columns, and no rotation moves one of them over the end.
    """

    room = 1

    def __init__(self, model: nn.Sequential, parameters: TenSEALParameters) -> None:
        self.context = parameters.context(threads=torch.get_num_threads())
        sites = {site.name: site for site in parameters.sites}
        self.layers: list[Callable[[Any], Any]] = []
        columns = 0
        for name, layer in reversed(list(model.named_children())):
            if isinstance(layer, nn.Linear):
                before = 0 if layer is model[0] else columns + layer.out_features
                columns = self._add(layer, before, columns)
            else:
                (coefficients,) = sites[name].coefficients
                self.layers.insert(0, lambda x, own=list(coefficients): x.polyval(own))
        self.levels = 0

    def _add(self, layer: nn.Linear, before: int, after: int) -> int:
        """Puts a layer before the others: its inputs stand after `before` zeros, its outputs after `after`."""
        weight = F.pad(layer.weight.detach().double().T, (after, 0, before, 0)).tolist()
        bias = F.pad(layer.bias.detach().double(), (after, 0)).tolist()
        self.layers.insert(0, lambda x: x.mm(weight) + bias)
        return after + layer.out_features

    def encrypt(self, images: Tensor) -> Any:
        import tenseal

        return tenseal.ckks_vector(self.context, images[0].double().tolist())

    def __call__(self, encrypted: Any) -> Any:
        x = encrypted
        for layer in self.layers:
            x = layer(x)
        before, after = (own.ciphertext()[0].coeff_modulus_size() for own in (encrypted, x))
        self.levels = before - after
        return x

    def decrypt(self, encrypted: Any, shape: tuple[int, int]) -> np.ndarray:
        return np.array(encrypted.decrypt())[None, : shape[1]]


NETWORKS: dict[str, tuple[type[Any], str]] = {
    "openfhe": (OpenFHENetwork, "to_openfhe"),
    "tenseal": (TenSEALNetwork, "to_tenseal"),
}


def evaluate(
    library: str, model: nn.Sequential, report: PolynomialReport, images: Tensor, labels: Tensor
) -> dict[str, Any]:
    """Runs the model on encrypted images, and compares with the same model in float64.

    Seconds are those of the CPU, which other processes on the machine affect little.
    """
    kind, method = NETWORKS[library]
    parameters = getattr(report, method)()
    parameters.check(model, [images])
    start = time.process_time()
    network = kind(model, parameters)
    setup = time.process_time() - start
    exact = copy.deepcopy(model).double()(images.double()).detach().numpy()
    logits, seconds, coding = [], [], 0.0
    for batch in images.split(network.room):
        start = time.process_time()
        encrypted = network.encrypt(batch)
        begun = time.process_time()
        result = network(encrypted)
        ended = time.process_time()
        logits.append(network.decrypt(result, (len(batch), exact.shape[1])))
        seconds.append(ended - begun)
        coding += begun - start + time.process_time() - ended
    found = np.concatenate(logits)
    error = float(np.abs(found - exact).max())
    if not error < 0.01 * np.abs(exact).max():
        raise OrthoFxError(
            f"{library}'s logits differ from those in the clear by {error:.3g}: they are not the network's"
        )
    return {
        "version": importlib.metadata.version(library),
        "parameters": parameters.to_dict(),
        "accuracy": accuracy(torch.from_numpy(found), labels),
        "images_in_a_ciphertext": min(network.room, len(images)),
        "room_in_a_ciphertext": network.room,
        "setup_seconds": setup,
        "seconds_a_ciphertext": sum(seconds) / len(seconds),
        "seconds_an_image": sum(seconds) / len(images),
        "encrypt_and_decrypt_seconds_an_image": coding / len(images),
        "levels_predicted": parameters.levels,
        "levels_used": network.levels,
        "largest_error": error,
        "same_classes": int((found.argmax(1) == exact.argmax(1)).sum()),
    }


def make_polynomial(
    trained: nn.Sequential, images: Tensor, labels: Tensor, steps: int
) -> tuple[nn.Sequential, int, dict[int, float]]:
    """The network of the smallest degree that loses little, its degree, and the accuracy of each on the selection."""
    chosen, share, scores = None, slice(TRAIN, TRAIN + SELECT), {}
    enough = accuracy(trained(images[share]), labels[share]) - LOSS_ALLOWED
    models = {}
    for degree in DEGREES:
        models[degree] = model = copy.deepcopy(trained)
        annealing = Annealing(model, degree=degree, batches=[images[:TRAIN]], steps=max(1, steps // 3))
        train(model, images[:TRAIN], labels[:TRAIN], steps, annealing)
        scores[degree] = accuracy(model(images[share]), labels[share])
        if chosen is None and scores[degree] >= enough:
            chosen = degree
    chosen = chosen or max(scores, key=scores.__getitem__)
    return models[chosen], chosen, scores


def draw(
    model: nn.Sequential, report: PolynomialReport, inputs: Tensor, scores: dict[int, float], relu: float, path: Path
) -> None:
    """The polynomial in its range beside ReLU with the inputs' histogram, and the accuracy of every degree."""
    pyplot = load_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.5, 3.3), layout="constrained")
    (site,) = report.sites
    x = torch.linspace(site.low, site.high, 200)
    with torch.no_grad():
        values = model[0](inputs).flatten()
        left.plot(x, torch.relu(x), color=STOCK, lw=3, alpha=0.35, label="ReLU")
        left.plot(x, model[1](x), color=colour_of("hermite"), label=f"polynomial of degree {site.cost.degree}")
    share = left.twinx()
    share.hist(values.numpy(), bins=60, color="0.85", density=True)
    share.set_ylabel("density of the inputs")
    left.set_zorder(share.get_zorder() + 1)
    left.patch.set_visible(False)
    left.set_xlabel("input of the activation, over its range")
    left.set_ylabel("output")
    left.legend(frameon=False, fontsize=9)
    right.axhline(100 * relu, color=STOCK, lw=3, alpha=0.35, label="ReLU")
    right.plot(
        list(scores), [100 * score for score in scores.values()], "o-", color=colour_of("hermite"), label="polynomial"
    )
    right.set_xticks(list(scores))
    right.set_xlabel("degree")
    right.set_ylabel(f"accuracy in % ({SELECT} images)")
    right.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def run_digits(libraries: list[str], count: int, steps: int, out: Path) -> tuple[dict[str, Any], str]:
    images, labels = digits()
    torch.manual_seed(0)
    trained = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    train(trained, images[:TRAIN], labels[:TRAIN], steps)
    model, degree, scores = make_polynomial(trained, images, labels, steps)
    report = polynomial_report(model, [images[: TRAIN + SELECT]])
    relu = accuracy(trained(images[TRAIN : TRAIN + SELECT]), labels[TRAIN : TRAIN + SELECT])
    draw(model, report, images[:TRAIN], scores, relu, out / "pictures" / "encrypted_inference.png")
    encrypted_images, encrypted_labels = images[-count:], labels[-count:]
    rows = {library: evaluate(library, model, report, encrypted_images, encrypted_labels) for library in libraries}
    freeze_(model)
    held = slice(TRAIN + SELECT, None)
    clear = {}
    for name, network in (("plain (ReLU)", trained), ("polynomial (float)", model)):
        start = time.process_time()
        logits = network(encrypted_images)
        seconds = (time.process_time() - start) / count
        clear[name] = {
            "accuracy": accuracy(logits, encrypted_labels),
            "accuracy_of_all_held_out": accuracy(network(images[held]), labels[held]),
            "seconds_an_image": seconds,
        }
    result = {
        "date": date.today().isoformat(),
        "hardware": f"{torch.get_num_threads()} thread(s) of a {platform.machine()} CPU that other processes share",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "images": count,
        "degree": degree,
        "accuracy_in_selection": {"relu": relu, **{str(one): score for one, score in scores.items()}},
        "range": [report.sites[0].low, report.sites[0].high],
        "levels": report.levels,
        "clear": clear,
        "encrypted": rows,
    }
    return result, digits_text(result, report)


def digits_text(result: dict[str, Any], report: PolynomialReport) -> str:
    rows: list[tuple[str, ...]] = [
        ("network", "accuracy", "CPU s/image", "CPU s/call", "images", "levels", "used", "largest error")
    ]
    for name, row in result["clear"].items():
        rows.append((name, f"{100 * row['accuracy']:.1f} %", f"{row['seconds_an_image']:.1g}", *[""] * 5))
    for library, row in result["encrypted"].items():
        times = f"{row['seconds_an_image']:.3g}", f"{row['seconds_a_ciphertext']:.3g}"
        counts = (row["images_in_a_ciphertext"], row["levels_predicted"], row["levels_used"])
        printed = (f"{100 * row['accuracy']:.1f} %", *times, *map(str, counts), f"{row['largest_error']:.1e}")
        rows.append((f"encrypted, {library}", *printed))
    lines = [
        f"degree {result['degree']}: "
        + ", ".join(
            f"{name if name == 'relu' else f'degree {name}'} {100 * score:.1f} %"
            for name, score in result["accuracy_in_selection"].items()
        )
        + " on the images for selection",
        *(str(getattr(report, NETWORKS[library][1])()) for library in result["encrypted"]),
        f"{result['images']} encrypted images, {result['hardware']}",
        table(rows, "lr"),
    ]
    return "\n".join(lines)


class Block(nn.Module):
    """Two convolutions with a residual, whose batch normalisations are folded; option A's shortcut has no weights."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(inputs, outputs, 3, stride, 1),
            nn.Conv2d(outputs, outputs, 3, 1, 1),
        )
        self.act, self.last = nn.ReLU(), nn.ReLU()
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.act(self.first(x))) + self.shortcut(x))


def resnet20() -> nn.Sequential:
    """He et al., arXiv 1512.03385, section 4.2: three stages of three blocks with 16, 32 and 64 channels."""
    blocks = [Block(16, 16, 1) for _ in range(3)]
    for inputs, outputs in ((16, 32), (32, 64)):
        blocks += [Block(inputs, outputs, 2), Block(outputs, outputs, 1), Block(outputs, outputs, 1)]
    start = [nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*start, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def run_resnet20() -> tuple[dict[str, Any], str]:
    rows: dict[str, dict[str, Any]] = {}
    for degree in (2, 3):
        torch.manual_seed(0)
        images, model = torch.randn(4, 3, 32, 32), resnet20()
        rewrite_(model, ExpansionConfig("hermite", degree, "fit"), example_inputs=images)
        report = polynomial_report(model, [images])
        rows[f"degree {degree}"] = {
            "activations": len(report.sites),
            "ciphertext_multiplications": report.ciphertext_multiplications,
            "depth": report.depth,
            "levels": report.levels,
            "openfhe_levels": report.openfhe_levels,
            "ring_dimension": {bits: ring(report, bits) for bits in (40, 50)},
        }
    # The layers take the rest of the levels.
    count, parts = len(report.sites), [evaluation(degree) for degree in SIGN]
    levels = report.levels - count * report.sites[0].cost.levels
    composed = f"x sign(x), {', '.join(map(str, SIGN))}"
    rows[composed] = {
        "activations": count,
        "ciphertext_multiplications": count * (sum(part.ciphertext_multiplications for part in parts) + 1),
        "depth": count * (sum(part.depth for part in parts) + 1),
        "levels": levels + count * (sum(part.levels for part in parts) + 1),
    }
    header = ("activation", "ct mul", "depth", "levels", "bootstrappings", "in OpenFHE", "ring, 40 bits", "50 bits")
    lines: list[tuple[str, ...]] = [header]
    for name, row in rows.items():
        row["bootstrappings"] = math.ceil(row["levels"] / USABLE) - 1
        cells = [str(row[cell]) for cell in ("ciphertext_multiplications", "depth", "levels", "bootstrappings")]
        if name != composed:
            rings = (str(one) if isinstance(one, int) else "refused" for one in row["ring_dimension"].values())
            cells += [str(row["openfhe_levels"]), *rings]
        lines.append((name, *cells, *[""] * (len(header) - len(cells) - 1)))
    title = f"ResNet-20: {count} activations; at least so many bootstrappings, with {USABLE} usable levels after each"
    return {"usable_levels": USABLE, "rows": rows}, f"{title}\n{table(lines, 'lr')}"


def ring(report: PolynomialReport, scale_bits: int) -> int | str:
    """OpenFHE's ring dimension without bootstrapping, or why there is none."""
    try:
        return report.to_openfhe(scale_bits=scale_bits).ring_dimension
    except OrthoFxError as error:
        return str(error)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=("digits", "resnet20"))
    parser.add_argument("--library", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="default: both")
    parser.add_argument("--images", type=int, default=50, help="how many images are encrypted, up to 400")
    parser.add_argument("--steps", type=int, default=600, help="training steps, with ReLU and again for each degree")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/encrypted_inference"), help="folder of results/ and pictures/"
    )
    parsed = parser.parse_args(arguments)
    if parsed.network == "digits":
        result, text = run_digits(parsed.library, parsed.images, parsed.steps, parsed.out)
    else:
        result, text = run_resnet20()
    print(text)
    folder = parsed.out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "encrypted_inference.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**results, parsed.network: result}, indent=1) + "\n")
    (folder / f"encrypted_inference_{parsed.network}.txt").write_text(text + "\n")
    print(path)


if __name__ == "__main__":
    main()
