from __future__ import annotations

import inspect
import typing

import pytest

import pydqn


def test_public_names():
    for name in pydqn.__all__:
        assert getattr(pydqn, name) is not None
        assert name in dir(pydqn)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = pydqn.nonsense


def test_the_command_line_has_the_choices_of_the_modules():
    """It repeats them, because it imports the modules only when they are needed."""
    from pydqn.cli import options
    from pydqn.evaluation import build
    from pydqn.plotting import curves

    assert tuple(curves.PANELS) == options._PANELS
    assert build.WEIGHTS == options._WEIGHTS


def test_modules_do_not_shadow_functions():
    import pydqn.evaluation.evaluate
    import pydqn.training.loop

    assert inspect.isfunction(pydqn.train)
    assert inspect.isfunction(pydqn.evaluate)
    assert inspect.ismodule(pydqn.preprocess)


def test_every_public_name_has_a_docstring_and_types():
    for name in pydqn.__all__:
        thing = getattr(pydqn, name)
        assert inspect.getdoc(thing), name
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                if inspect.isfunction(value) and not member.startswith("_"):
                    assert inspect.getdoc(value), f"{name}.{member}"
                    assert "return" in typing.get_type_hints(value), f"{name}.{member}"
