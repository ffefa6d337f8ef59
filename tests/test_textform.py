"""The text form of passes and rules: writing and reading it round-trips."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import pytest
from graphrewrite.passes.rules._labels import overlay
from hypothesis import given, settings
from hypothesis import strategies as st

import graphrewrite as gr
from graphrewrite import registry, textform
from graphrewrite.pipeline import build_pass, parse_pipeline
from graphrewrite.rule import build_rule


def squash(x):
    return x


@dataclass(frozen=True)
class Everything(gr.Pass):
    """An option of every kind."""

    count: int = 3
    rate: float = 0.5
    deep: bool = False
    word: str = "auto"
    sizes: tuple[int, ...] = ()
    names: tuple[str, ...] = ("a",)
    limit: int | None = None
    table: tuple[tuple[int, str], ...] = ()
    made: list[int] = field(default_factory=list)

    name = "everything"

    def run(self, graph):
        return gr.PassResult(graph, False)


@pytest.fixture(autouse=True, scope="module")
def _registered():
    registry.register("pass", "everything", Everything)
    yield
    del registry._registered["pass"]["everything"]


TRICKY = ["true", "null", "NaN", "Infinity", "-Infinity", "a:b", "x y", "{}", "}", "a,b"]
options = st.fixed_dictionaries(
    {},
    optional={
        "count": st.integers(),
        "rate": st.floats(allow_nan=False),
        "deep": st.booleans(),
        "word": st.one_of(st.text(), st.sampled_from(TRICKY)),
        "sizes": st.lists(st.integers(), max_size=3).map(tuple),
        "names": st.lists(st.text(), max_size=3).map(tuple),
        "limit": st.one_of(st.none(), st.integers()),
    },
)


@given(options)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_round_trip(given_options: dict[str, Any]):
    one = Everything(**given_options)
    again = build_pass(str(one))
    assert again == one
    assert [type(getattr(again, f.name)) for f in fields(one)] == [type(getattr(one, f.name)) for f in fields(one)]
    assert str(again) == str(one)


@given(st.lists(options, min_size=1, max_size=3))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_round_trip_of_a_pipeline(several):
    passes = [Everything(**one) for one in several]
    assert parse_pipeline(str(gr.PassManager(passes))) == passes


def test_nested_tuples_round_trip():
    one = Everything(table=((1, "a"), (2, "b")))
    assert build_pass(str(one)) == one


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dfa", "dfa"),
        ("dfa{}", "dfa"),
        (" dfa { shared = true , scale = 0.5 } ", "dfa{shared=true,scale=0.5}"),
        ("dfa{shared=false}", "dfa"),  # the default is not written
        ('dfa{distribution="normal"}', "dfa{distribution=normal}"),
        ("ff{readout=goodness,peer=0}", "ff{peer=0,readout=goodness}"),
        ("ff{embed=graphrewrite.passes.rules._labels:overlay}", "ff{embed=graphrewrite.passes.rules._labels:overlay}"),
    ],
)
def test_reading_and_writing(text, expected):
    rule = build_rule(text)
    assert str(rule) == expected
    assert build_rule(str(rule)) == rule


def test_callables_go_by_their_path():
    assert build_rule("ff{embed=graphrewrite.passes.rules._labels:overlay}").embed is overlay
    with_function = type(build_rule("ff"))(embed=squash)
    assert str(with_function) == f"ff{{embed={__name__}:squash}}"
    assert build_rule(str(with_function)).embed is squash


def test_a_lambda_has_no_text_form_and_says_so():
    text = str(type(build_rule("ff"))(embed=lambda x, code: x))
    assert "no text form" in text
    assert "ff.embed" in text
    with pytest.raises(gr.RuleError):
        build_rule(text)


@pytest.mark.parametrize("path", ["nowhere.at_all:f", "graphrewrite.passes.rules.ff:nothing", "torch:"])
def test_callables_that_are_not_there(path):
    with pytest.raises(gr.RuleError, match="embed|" + path.partition(":")[0]):
        build_rule(f"ff{{embed={path}}}")


def test_objects_classes_and_texts_are_all_accepted():
    assert build_pass(Everything) == build_pass("everything") == build_pass(Everything()) == Everything()


def test_values_are_json_or_words():
    name, values = textform.split_text('p{a=1,b=-2.5e3,c=[1,"x"],d={"k": [1, 2]},e=word.with:more*,f="q,}",g=null}')
    assert name == "p"
    assert values == {
        "a": 1,
        "b": -2500.0,
        "c": [1, "x"],
        "d": {"k": [1, 2]},
        "e": "word.with:more*",
        "f": "q,}",
        "g": None,
    }
