"""Tests of what may be missing here say so in the words that a user reads."""

import pytest

from gpu_mixmatch._extras import need


def skip_without(module):
    """Import a module of a package of the table; without it skip the test, or the whole file."""
    try:
        return need(module, "it")
    except ImportError as error:
        pytest.skip(str(error), allow_module_level=True)
