"""The kernels for an H100, run by `tests.interpreter`: right, and without a fault in memory."""

import dataclasses
import re

import pytest
import torch

from tests.h100 import triton_code
from tests.interpreter import run
from tests.ortho_fx.operators.expansions import noise
from tests.ortho_fx.operators.kernel_cases import (
    Case,
    Problem,
    code_of,
    compare,
    cover,
    every_case,
    exact,
    outcome_of,
    problem_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_compiler")]

# Each of these takes less than two seconds.
QUICK = (
    Case("hermite", "channel", "bfloat16", "odd", "gate"),
    Case("tropical", "layer", "float32", "symbolic", "residual"),
)


def assert_right(case):
    problem = problem_of(case)
    outcome = outcome_of(problem, code_of(case, problem))
    assert outcome.is_right(case), outcome


@pytest.mark.parametrize("case", cover(), ids=str)
def test_kernels_are_right_and_touch_only_what_is_theirs(case):
    assert_right(case)


@pytest.mark.smoke
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_two_kernels_quickly(case):
    assert_right(case)


@pytest.mark.parametrize("blocks", [{"XBLOCK": 1, "R0_BLOCK": 8}, {"XBLOCK": 64, "R0_BLOCK": 512}], ids=str)
def test_block_sizes_do_not_matter(blocks):
    case = Case("hermite", "group:3", "float32", "image last", "gate")
    problem = problem_of(case)
    (y,), gradients = run(
        code_of(case, problem), problem.tensors, [problem.tangent], {**blocks, "YBLOCK": 4}, complete=True
    )
    needed = [g for g, t in zip(gradients, problem.tensors, strict=True) if t.requires_grad]
    assert compare(problem, y, needed).is_right(case)


def test_each_two_values_of_settings_meet():
    cases = cover()
    assert len(cases) < 40 < len(list(every_case()))
    for first in range(5):
        for second in range(first):
            pairs = {(case[first], case[second]) for case in every_case()}
            assert {(case[first], case[second]) for case in cases} == pairs


# Faults put into generated code: each is found.

HERMITE = Case("hermite", "layer", "float32", "symbolic", "alone")
CHANNELS = Case("hermite", "channel", "bfloat16", "odd", "gate")


@pytest.fixture(scope="module")
def generated():
    """The problem and the code of a case, generated once."""
    known = {}

    def get(case):
        if case not in known:
            problem = problem_of(case)
            known[case] = problem, code_of(case, problem)
        return known[case]

    return get


def edited(graph, edit_source, edit_kernel):
    kernels = tuple(dataclasses.replace(k, definition=edit_kernel(k.definition)) for k in graph.kernels)
    return dataclasses.replace(graph, source=edit_source(graph.source), kernels=kernels)


def broken(code, pattern, replacement, where):
    """The code with a pattern replaced once in a graph's first kernel that has it ("kernel"), or in its wrapper."""
    done = []

    def edit(text):
        if done:
            return text
        text, count = re.subn(pattern, replacement, text, count=1, flags=re.MULTILINE)
        done.extend([None] * count)
        return text

    graph, part = where.split()
    graphs = {"forward": code.forward, "backward": code.backward}
    changed = edited(graphs[graph], *((str, edit) if part == "kernel" else (edit, str)))
    assert done, f"nothing to replace by {replacement}"
    return dataclasses.replace(code, **{graph: changed})


@pytest.mark.parametrize(
    ("case", "where", "pattern", "replacement", "message"),
    [
        # A mask dropped, from a load and from a store.
        (HERMITE, "forward kernel", r"(tl\.load\(in_ptr0 \+ \(x0\)), xmask", r"\1, None", "in_ptr. has 621 elements"),
        (HERMITE, "forward kernel", r"(tl\.store\(out_ptr0 \+ \(x0\), \w+), xmask", r"\1, None", "out_ptr0 has 621 e"),
        # An index shifted, to before the start and by one row.
        (HERMITE, "forward kernel", r"tl\.store\(out_ptr0 \+ \(x0\)", "tl.store(out_ptr0 + (x0 - 1)", r"\[-1\] are me"),
        (HERMITE, "backward kernel", r"tl\.load\(in_ptr0 \+ \(", "tl.load(in_ptr0 + (27 + ", "in_ptr0 has 621 element"),
        # Half of a block stored.
        (
            HERMITE,
            "forward kernel",
            r"(tl\.store\(out_ptr0 \+ \(x0\), \w+), xmask",
            r"\1, xmask & (xindex % 8 < 4)",
            "nothing wrote 309 of the 621 elements of result 0",
        ),
        # A promise about an address: the buffer starts one element later.
        (
            CHANNELS,
            "backward wrapper",
            r"^( +)(\w+)(\.run\()(\w+),",
            r"\1\2\3reinterpret_tensor(\4, (997, ), (1, ), 1),",
            "in_ptr0 is said to be a multiple of 16",
        ),
        # A promise about a size.
        (
            HERMITE,
            "forward kernel",
            r"('configs': \[\{)",
            r"\1(3,): [['tt.divisibility', 16]], ",
            "xnumel is said to be a multiple of 16",
        ),
        # A promise about an index.
        (
            HERMITE,
            "forward kernel",
            r"x0 = xindex$",
            "x0 = tl.multiple_of(xindex, 16)",
            "said to be multiples of 16",
        ),
        (
            HERMITE,
            "forward kernel",
            r"x0 = xindex$",
            "x0 = tl.max_contiguous(xindex * 2, 4)",
            "said to be 4 neighbours",
        ),
        # A size that the kernel has as a number.
        (CHANNELS, "forward kernel", r"xnumel = 999$", "xnumel = 990", "xnumel is 999, and the kernel has 990"),
        # A kernel that is not launched, so that the next one reads memory that nothing wrote.
        (
            CHANNELS,
            "backward wrapper",
            r"^ +triton_(red|per)\w+\.run\(.*$",
            "",
            "nothing wrote",
        ),
        # A buffer that a kernel has in the place of another, and that nothing wrote.
        (
            HERMITE,
            "forward wrapper",
            r"^( +)(triton\w+\.run\()(\w+),(.*)$",
            r"\1other = empty_strided_cuda(\3.size(), \3.stride(), \3.dtype)" "\n" r"\1\2other,\4",
            "which nothing wrote",
        ),
        # Two lanes of a program write one element, and two programs do.
        (
            HERMITE,
            "forward kernel",
            r"tl\.store\(out_ptr0 \+ \(x0\)",
            "tl.store(out_ptr0 + (x0 // 2)",
            "stores two values",
        ),
        (
            HERMITE,
            "forward kernel",
            r"tl\.store\(out_ptr0 \+ \(x0\)",
            "tl.store(out_ptr0 + (x0 % 8)",
            "in any order",
        ),
        # A buffer of another dtype.
        (
            CHANNELS,
            "forward wrapper",
            r"torch\.bfloat16\)$",
            "torch.float16)",
            "is torch.float16, and the signature says",
        ),
        # A value of another dtype.
        (
            HERMITE,
            "forward kernel",
            r"tl\.store\(out_ptr0 \+ \(x0\), (\w+)",
            r"tl.store(out_ptr0 + (x0), \1.to(tl.float16)",
            "stores torch.float16 to out_ptr0, which is torch.float32",
        ),
        (
            HERMITE,
            "forward kernel",
            r"tl\.store\(out_ptr0 \+ \(x0\), (\w+)",
            r"tl.store(out_ptr0 + (x0), \1.to(tl.int32)",
            "stores torch.int32 to out_ptr0",
        ),
    ],
)
def test_a_fault_is_found(generated, case, where, pattern, replacement, message):
    problem, code = generated(case)
    with pytest.raises(AssertionError, match=message):
        run(broken(code, pattern, replacement, where), problem.tensors, [problem.tangent], complete=True)


def test_a_program_that_reads_what_another_writes_is_found():
    """In place a kernel may work on the element that it reads, but on no other."""
    x = noise(64, 64)
    code = triton_code(torch.sin, x)
    in_place = broken(code, r"\.run\((\w+), \w+,", r".run(\1, \1,", "forward wrapper")
    in_place = broken(in_place, r"return \(\w+, \)", "return ()", "forward wrapper")
    run(in_place, [x.clone()], [])
    shifted = broken(in_place, r"tl\.load\(in_ptr0 \+ \(x0\)", "tl.load(in_ptr0 + (x0 ^ 8)", "forward kernel")
    with pytest.raises(AssertionError, match="write what others read, in any order"):
        run(shifted, [x.clone()], [])


def test_atomic_additions_of_several_programs_are_no_fault():
    x = noise(64, 64)
    code = triton_code(torch.sin, x)
    code = broken(code, r"tl\.store\((out_ptr0) \+ \(x0\)", r"tl.atomic_add(\1 + (x0 // 64)", "forward kernel")
    launch = r"^( +)(\w+ = empty_strided_cuda\(.*)$"
    code = broken(code, launch, r"\g<0>\n\1buf0.zero_()", "forward wrapper")
    (y,), _ = run(code, [x], [x])
    torch.testing.assert_close(y.flatten()[:64], x.sin().sum(1))


def test_a_changed_value_is_found(generated):
    problem, code = generated(HERMITE)
    changed = broken(code, r"(tmp\d+) = (tmp\d+) \+ (tmp\d+)$", r"\1 = \2 + \3 * 1.0001", "backward kernel")
    (y,), gradients = run(changed, problem.tensors, [problem.tangent])
    needed = [g for g, t in zip(gradients, problem.tensors, strict=True) if t.requires_grad]
    assert not compare(problem, y, needed).is_right(HERMITE)


def test_a_memory_that_is_used_again_is_not_read():
    """Only a kernel that works in place may read what the buffer before has left."""
    case = Case("hermite", "layer", "float32", "odd", "alone")
    problem: Problem = problem_of(case)
    code = code_of(case, problem)
    name = re.search(r"^ +(\w+) = empty_strided_cuda", code.forward.source, re.MULTILINE)[1]
    launch = re.search(r"^( +)(triton\w+)\.run\((\w+), (.*)$", code.forward.source, re.MULTILINE)
    again = f"{launch[0]}\n{launch[1]}again = {name}; del {name}  # reuse\n{launch[1]}{name} = again\n"
    again += f"{launch[1]}{launch[2]}.run({name}, {launch[4]}"
    source = code.forward.source.replace(launch[0], again)
    changed = dataclasses.replace(code, forward=dataclasses.replace(code.forward, source=source))
    with pytest.raises(AssertionError, match="which nothing wrote"):
        run(changed, problem.tensors, [problem.tangent])


def test_exact_results_are_those_of_float64():
    problem = problem_of(HERMITE)
    y, gradients = exact(problem)
    assert y.dtype == torch.float64
    assert len(gradients) == 2
