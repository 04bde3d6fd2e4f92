from ortho_fx.tables import latex, markdown, table, without_empty_columns


def test_columns_are_aligned_and_a_note_runs_over_them():
    rows = [["", "s", "n"], ["a", "1.0", "22"], ["bcd", "10.0", ""], ["x", "failed: it took too long"]]
    assert table(rows, "lr") == "        s   n\na     1.0  22\nbcd  10.0\nx    failed: it took too long"
    assert table([["name", "kind"], ["a", "module"]]) == "name  kind\na     module"


def test_columns_that_are_empty_below_the_header_are_left_out():
    rows = [["", "s", "empty", "n"], ["a", "1.0", "", "22"], ["x", "failed"]]
    assert without_empty_columns(rows) == [["", "s", "n"], ["a", "1.0", "22"], ["x", "failed"]]


def test_markdown_says_how_columns_are_aligned():
    assert markdown([["name", "n"], ["a", "1"]], "lr") == "| name | n |\n| --- | ---: |\n| a | 1 |"


def test_latex_escapes_and_has_minus_signs():
    text = latex([["", "loss"], ["fourier:5,lr=1e-05", "-0.1 ± 0.2"], ["a_b & 1 %", "+2 to -3"]], "lr")
    assert text == (
        "\\begin{tabular}{lr}\n\\hline\n & loss \\\\\n\\hline\nfourier:5,lr=1e-05 & $-$0.1 $\\pm$ 0.2 \\\\\n"
        "a\\_b \\& 1 \\% & $+$2 to $-$3 \\\\\n\\hline\n\\end{tabular}"
    )
