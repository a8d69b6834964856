"""What the lessons print stays narrow, and tables of texts are readable, the same in every run."""

import pandas as pd
import pytest

from notebooks import examples
from notebooks.examples import LINE_WIDTH, print_wrapped, show_table


@pytest.fixture
def displayed(monkeypatch):
    bundles = []
    monkeypatch.setattr(examples, "display", lambda bundle, raw: bundles.append(bundle))
    return bundles


@pytest.mark.parametrize(
    ("start", "indent"), [("", 3), ("- ", 2), ("   - ", 5), ("12. ", 4), ("   fix: ", 3)]
)
def test_a_long_line_goes_on_below_its_own_text(capsys, start, indent):
    line = start + " ".join(["half-known"] * 30)
    print_wrapped(line)
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith(start)
    assert rest
    assert max(map(len, [first, *rest])) <= LINE_WIDTH
    assert all(len(one) - len(one.lstrip()) == indent for one in rest)
    assert " ".join([first.strip(), *map(str.strip, rest)]) == line.strip()


def test_short_and_empty_lines_stay_as_they_are(capsys):
    print_wrapped("one", "", "  two")
    print_wrapped()
    assert capsys.readouterr().out == "one\n\n  two\n"


def test_a_table_wraps_texts_and_rounds_numbers(displayed):
    table = pd.DataFrame({"text": ["long " * 40, "short"], "number": [1.2345, None]})
    show_table(table, digits=1)
    [bundle] = displayed
    assert "long " * 40 in bundle["text/html"]
    assert ">1.2<" in bundle["text/html"]
    assert ">-<" in bundle["text/html"]
    style = bundle["text/html"].partition("</style>")[0]
    assert ".col0 {\n  text-align: left;\n  white-space: pre-wrap" in style
    assert ".col1" not in style
    assert "1.2" in bundle["text/plain"]


def test_a_table_shows_markup_as_text_and_takes_repeated_labels(displayed):
    table = pd.DataFrame({"<b>": ["<i>", "x"]}, index=["<u>", "<u>"])
    show_table(table)
    [bundle] = displayed
    body = bundle["text/html"].partition("</style>")[2]
    assert not [tag for tag in ("<b>", "<i>", "<u>") if tag in body]
    assert body.count("&lt;u&gt;") == 2


def test_a_table_is_the_same_in_every_run(displayed):
    for number in (1, 1, 2):
        show_table(pd.DataFrame({"text": [f"number {number}"]}))
    first, again, other = (bundle["text/html"] for bundle in displayed)
    assert first == again
    assert first.splitlines()[1] != other.splitlines()[1], "the styles of two tables would mix"
