"""What the report says in words of the order in which methods took the LoRAs."""

from dataclasses import replace
from pathlib import Path

import pytest

from app.evaluation import wording
from app.evaluation.cases import Case
from app.evaluation.generate import Picture
from app.evaluation.variants import Row
from composition import Lora, Request


def picture(variant="cmlora", asked="", settled="", method="cmlora", loras=("fox", "ink")):
    request = Request("x", loras=[Lora(name) for name in loras], method=method, options={"order": asked} if asked else {})
    done = replace(request, options={"order": settled} if settled else {})
    return Picture(Row(Case("g", 0, "x", request=request), variant, request), Path("x.png"), "id", done)


@pytest.mark.parametrize(("asked", "settled", "says"), [
    ("", "fox,ink", "by the measured change of frequency"), ("change", "fox,ink", "by the measured change of frequency"),
    ("level", "ink,fox", "by the measured level of frequency"), ("", "category", "by category, as not all are profiled on this model"),
    ("category", "category", "by category"), ("ink", "ink", "as the option says"),
])
def test_by_what_the_loras_were_ordered(asked, settled, says):
    assert wording.orders([picture(asked=asked, settled=settled)] * 2) == [f"CMLoRA: LoRAs ordered {says}."]


def test_where_sets_differ_it_says_in_how_many():
    (line,) = wording.orders([picture(settled="fox,ink"), picture(settled="fox,ink"), picture(settled="category")])
    assert line == ("CMLoRA: LoRAs ordered by the measured change of frequency in 2 of 3 pictures; by category, as not all are profiled on this "
                    "model in 1 of 3 pictures.")


def test_nothing_is_said_where_nothing_is_ordered():
    assert wording.orders([picture("merge", method="merge"), picture(loras=("fox",)), picture("cmlora@equal", "fox", "fox")]) == []
