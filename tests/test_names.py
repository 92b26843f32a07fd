"""A variable is named for the thing it holds: no name in the packages is made of a word that says only that something was found or made."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("composition", "app", "retrieval", "assets")
VAGUE = {"found", "made", "told", "given", "said", "asked"}  # as any word of a name
ALONE = {"one"}  # as the whole name: "one_hot" is a term of the field


def bound(source: str) -> Iterator[tuple[int, str]]:
    """(line, name) of every name that a source binds: variables, parameters, attributes, functions, classes, imports.

    A name imported as it is was bound where it comes from: in our packages it is seen there, and another library's is its own.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield node.lineno, name
            case ast.MatchMapping(rest=str(name)):
                yield node.lineno, name
            case ast.alias(asname=str(name)):
                yield node.lineno, name
            case ast.Global(names=names) | ast.Nonlocal(names=names):
                yield from ((node.lineno, name) for name in names)


def words(name: str) -> list[str]:
    """The words of snake_case, CamelCase and CONSTANT names, in lower case."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")


def vague(source: str) -> list[tuple[int, str]]:
    return sorted((line, name) for line, name in bound(source)
                  if VAGUE & set(words(name)) or name.lower().strip("_") in ALONE)


@pytest.mark.parametrize("package", PACKAGES)
def test_names_say_what_they_hold(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    assert [f"{file.relative_to(ROOT)}:{line} {name}" for file in files for line, name in vague(file.read_text("utf-8"))] == []


SAMPLES = {
    "assignment": "found = 1", "typed": "found: int", "augmented": "found += 1", "unpacking": "a, (b, *found) = c", "walrus": "f(found := 1)",
    "loop": "for i, found in x: pass", "comprehension": "[a for found in x]", "generator": "sum(a for a, found in x)",
    "with": "with a as (b, found): pass", "except": "try: pass\nexcept E as found: pass", "parameter": "def f(found): pass",
    "keyword": "async def f(*, found=1): pass", "rest": "def f(*found): pass", "keywords": "def f(**found): pass", "lambda": "lambda found: 1",
    "attribute": "self.found = 1", "field": "class A:\n    found: int", "function": "def found(): pass", "method": "class A:\n    def _found(self): pass",
    "class": "class Found: pass", "import": "import a as found", "deleted": "del found",
    "case": "match x:\n    case [1, *found]: pass", "capture": "match x:\n    case A() as found: pass", "mapping": "match x:\n    case {**found}: pass",
    "global": "def f():\n    global found",
}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("word", ["found", "_made", "told_by", "ALL_GIVEN", "NotSaid", "asked", "one"])
def test_the_walk_sees_every_way_to_bind(sample, word):
    assert [name for _, name in vague(SAMPLES[sample].replace("_found", "found").replace("Found", "found").replace("found", word))] == [word]


def test_the_walk_leaves_other_names_and_uses_alone():
    assert vague("from hub import EntryNotFoundError\none_hot = found(made.told, given=said)\nfounded = {'found': one}\n# asked") == []
