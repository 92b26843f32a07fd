"""The result and the toy model that the command line's tests use too."""

from tests.app.conftest import medley, result, toy

__all__ = ["medley", "result", "toy"]
