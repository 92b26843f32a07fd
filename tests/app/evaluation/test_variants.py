"""Variants of an evaluation: methods with options of their own, and with those of every method."""

import pytest

from app.evaluation import variants
from app.evaluation.cases import Case
from composition import Lora, Refused, Request


def test_options_of_every_method_are_fields_of_the_request():
    read = variants.read_methods("merge,merge:anchored=true,cmlora:cache=false:windows=both:anchored=false")
    assert read == {"merge": {}, "merge:anchored=true": {}, "cmlora:cache=false:windows=both:anchored=false": {"cache": False}}
    case = Case(request=Request("a fox", loras=[Lora("fox")]), group="a fox", seed=0, text="a fox")
    rows = [row.request for row in variants.Variants(read).rows(case)]
    assert [(row.method, row.anchored, row.windows) for row in rows] == [
        ("merge", False, ""), ("merge", False, ""), ("merge", True, ""), ("cmlora", False, "both")]
    assert variants.title("merge:anchored=true@equal") == "Merge anchored=true, equal evaluations"


@pytest.mark.parametrize("text", ["merge:anchored", "merge:anchored=", "merge:windows=late", "merge:anchord=true"])
def test_what_is_neither_is_refused(text):
    with pytest.raises(Refused, match=text.partition(":")[2].partition("=")[0]):
        variants.read_methods(text)
