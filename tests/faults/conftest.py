"""The command line and the toy model of the tests of app."""

from tests.app.conftest import medley, toy

__all__ = ["medley", "toy"]
