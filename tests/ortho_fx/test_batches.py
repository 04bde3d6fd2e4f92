"""What of a DataLoader's items reaches a model, and what is said where a batch does not fit."""

import collections
import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ortho_fx import Annealing, OrthoFxError, calibrate_, polynomial_report, rewrite_
from ortho_fx.batches import batches_of, call

X, Y = torch.randn(12, 4), torch.arange(12)


class Takes(nn.Module):
    """A model whose forward is the given function."""

    def __init__(self, forward):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.forward = forward


class Wraps(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **named):
        return self.module(*inputs, **named)


@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


Named = collections.namedtuple("Named", "x y")


def loader(collate=None, **options):
    return DataLoader(TensorDataset(X, Y), batch_size=4, collate_fn=collate, **options)


def item(collate):
    return lambda rows: collate(torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]))


def first(forward, collate=None):
    return next(batches_of(Takes(forward), loader(collate and item(collate))))


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize(
    ("forward", "count"),
    [
        (lambda x: x, 1),
        (lambda x, targets=None: x, 1),
        (lambda x, y: x, 2),
        (lambda *x: x, 1),
        (lambda x=None, **named: x, 1),
        (lambda x, y, *, scale=1: x, 2),
    ],
)
@pytest.mark.parametrize("collate", [None, lambda x, y: (x, y), Named])
def test_a_tuple_gives_the_inputs_that_forward_requires(forward, count, collate):
    assert equal(first(forward, collate), (X[:4], Y[:4])[:count])


@pytest.mark.parametrize(
    ("forward", "taken"),
    [
        (lambda x, y: x, {"x", "y"}),
        (lambda x: x, {"x"}),
        (lambda *, x: x, {"x"}),
        (lambda x=None, labels=None: x, {"x", "labels"}),
        (lambda **columns: columns, {"x", "y"}),
        (lambda x, **rest: x, {"x", "y"}),
    ],
)
def test_a_dict_gives_the_keys_that_forward_takes(forward, taken):
    columns = first(forward, lambda x, y: {"x": x, "y": y, "labels": y})
    assert equal(columns, {key: X[:4] if key == "x" else Y[:4] for key in taken})


def test_inputs_by_name_beside_targets():
    assert equal(first(lambda x, mask=None: x, lambda x, y: ({"x": x, "mask": y}, y)), {"x": X[:4], "mask": Y[:4]})


def test_what_forward_takes_none_of_is_handed_over_whole():
    (columns,) = first(lambda batch: batch, lambda x, y: {"x": x, "y": y})
    assert equal(columns, {"x": X[:4], "y": Y[:4]})
    (pair,) = first(lambda batch: batch, Pair)
    assert isinstance(pair, Pair)
    assert torch.equal(pair.x, X[:4])
    (images,) = first(lambda images: images, lambda x, y: (list(x), y))
    assert equal(images, list(X[:4]))
    (packed,) = first(lambda packed: packed, lambda x, y: pack_sequence(list(x)))
    assert isinstance(packed, PackedSequence)


def test_fields_of_a_dataclass_are_taken_by_name():
    assert equal(first(lambda x: x, Pair), {"x": X[:4]})


def test_the_signature_is_that_of_the_wrapped_module():
    wrapped = Wraps(Wraps(Takes(lambda x, y: x)))
    assert equal(next(batches_of(wrapped, loader())), (X[:4], Y[:4]))
    compiled = torch.compile(Takes(lambda x, y: x), backend="eager")
    assert equal(next(batches_of(compiled, loader())), (X[:4], Y[:4]))


def test_tensors_go_to_the_device_of_the_model():
    class There(torch.Tensor):
        """A tensor that says where it was sent."""

        def to(self, device):
            return [device]

    def batch(x, y):
        return {"x": x.as_subclass(There), "other": [Pair(x.as_subclass(There), y)]}

    columns = first(lambda x, other: x, batch)
    assert columns["x"] == [torch.device("cpu")]
    assert columns["other"][0].x == [torch.device("cpu")]


def test_other_iterables_keep_their_meaning():
    pairs = [(X, Y), {"x": X, "labels": Y}, X]
    assert list(batches_of(Takes(lambda x: x), pairs)) == pairs
    (taken,) = batches_of(Takes(lambda x: x), itertools.islice(loader(), 1))
    assert equal(taken, (X[:4], Y[:4]))


def test_a_limit_takes_no_batch_more():
    taken = iter(range(9))
    assert list(batches_of(nn.Identity(), taken, 3)) == [0, 1, 2]
    assert next(taken) == 3
    for limit in (0, -1, 1.5, True):
        with pytest.raises(OrthoFxError, match="limit must be an integer above zero, or None; got"):
            batches_of(nn.Identity(), [], limit)


@pytest.mark.parametrize(
    ("forward", "collate", "message"),
    [
        (
            lambda x, y, z: x,
            None,
            r"forward of Takes requires x, y, z, and an item of .* holds 2: \[float32",
        ),
        (
            lambda image, mask: image,
            lambda x, y: {"x": x, "mask": y},
            "forward of Takes takes image, mask, and an item of the DataLoader holds x, mask: image is missing",
        ),
        (
            lambda image=None, mask=None: image,
            lambda x, y: {"x": x, "labels": y},
            "holds x, labels: an input is missing",
        ),
    ],
)
def test_items_without_an_input_are_named(forward, collate, message):
    with pytest.raises(OrthoFxError, match=message):
        first(forward, collate)


def test_a_call_that_fails_says_what_it_was_called_with():
    with pytest.raises(OrthoFxError, match=r"Linear was called with \(float32 \(12, 4\), int64 \(12,\)\) and raised T"):
        call(nn.Linear(4, 4), (X, Y))
    with pytest.raises(OrthoFxError, match=r"Linear was called with {x: float32 \(12, 4\)} and raised TypeError: .*"):
        call(nn.Linear(4, 4), {"x": X})
    with pytest.raises(OrthoFxError, match=r"Linear was called with \(Pair\) and raised TypeError"):
        call(nn.Linear(4, 4), next(batches_of(Takes(lambda batch: batch), loader(item(Pair)))))
    with pytest.raises(OrthoFxError, match=r"Linear was called with DataLoader and raised TypeError"):
        call(nn.Linear(4, 4), loader())
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        call(nn.Linear(3, 3), X)


def test_memory_that_is_full_stays_that_error():
    def forward(x, y):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        call(Takes(forward), (X, Y))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        (iter([]), "batches gave no batch: an iterator can be used once"),
        (DataLoader(Stream(), batch_size=4), "the DataLoader gave no batch"),
        (
            DataLoader(TensorDataset(X, Y), batch_size=64, drop_last=True),
            "the DataLoader gave no batch: its dataset holds 12 samples, and drop_last leaves out a batch below 64",
        ),
        ({"x": X}, r"got one batch, a dict: pass \[batch\]"),
        (7, "batches must be a DataLoader or an iterable of batches; got int"),
    ],
)
def test_no_batch_is_named(batches, message):
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU())
    with pytest.raises(OrthoFxError, match=message):
        Annealing(model, batches=batches, steps=1)
    rewrite_(model)
    for function in (calibrate_, polynomial_report):
        with pytest.raises(OrthoFxError, match=message):
            function(model, batches)


def test_every_function_takes_a_loader():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.GELU())

    model, other = make(), make()
    rewrite_(model, "hermite"), rewrite_(other, "hermite")
    measured = calibrate_(model, loader(), limit=2)
    assert measured == calibrate_(other, [X[:4], X[4:8]])
    assert measured.sites[0].samples == 8 * 8
    assert polynomial_report(model, loader(), limit=2).sites[0].samples == 8 * 8
    annealing = Annealing(make(), batches=loader(), limit=1, steps=1)
    assert len(annealing.report.replaced) == 1


def test_a_loader_that_copies_ahead_is_a_loader():
    class Ahead:
        def __init__(self, loader):
            self.loader = loader

        def __iter__(self):
            return iter(self.loader)

    assert equal(next(batches_of(Takes(lambda x: x), Ahead(loader()))), (X[:4],))


def test_columns_that_are_no_dict():
    columns = collections.UserDict({"input_ids": Y, "attention_mask": X})  # as tokenizers give them
    taken = next(batches_of(Takes(lambda input_ids, **rest: input_ids), loader(lambda rows: columns)))
    assert equal(taken, dict(columns))
