from __future__ import annotations

import inspect
import typing

import pytest

import pydqn


def test_public_names():
    assert pydqn.__all__ == [
        "Batch",
        "Config",
        "DeviceReplay",
        "FrameReplay",
        "Learner",
        "Result",
        "TransitionReplay",
        "evaluate",
        "preprocess",
        "preset",
        "resume",
        "train",
    ]
    for name in pydqn.__all__:
        assert getattr(pydqn, name) is not None
        assert name in dir(pydqn)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = pydqn.nonsense


def test_the_command_line_names_what_there_is():
    """It repeats the names of rooms that it imports only when they are needed."""
    from pydqn.cli import options
    from pydqn.evaluation import evaluate as evaluation
    from pydqn.plotting import curves as plots

    assert tuple(plots.PANELS) == options._PANELS
    assert evaluation.WEIGHTS == options._WEIGHTS


def test_functions_are_not_shadowed_by_rooms():
    import pydqn.evaluation.evaluate
    import pydqn.training.loop

    assert inspect.isfunction(pydqn.train)
    assert inspect.isfunction(pydqn.evaluate)
    assert inspect.ismodule(pydqn.preprocess)


def test_contract_of_the_replay():
    names = inspect.signature(pydqn.FrameReplay).parameters
    assert list(names) == [
        "capacity",
        "frame_shape",
        "stack",
        "n_step",
        "gamma",
        "num_envs",
        "dtype",
        "padding",
        "seed",
        "prioritized",
        "alpha",
        "beta",
        "max_transitions",
    ]
    assert names["frame_shape"].default == (84, 84)
    assert names["stack"].kind is inspect.Parameter.KEYWORD_ONLY
    assert list(inspect.signature(pydqn.FrameReplay.append).parameters)[1:] == [
        "frame",
        "action",
        "reward",
        "terminated",
        "truncated",
        "first",
    ]
    assert pydqn.Batch._fields == ("obs", "action", "reward", "discount", "next_obs", "index", "weight")
    assert pydqn.Result._fields == ("returns", "steps", "frames", "updates", "seconds", "logdir", "reason")


def test_every_public_name_has_a_docstring_and_types():
    for name in pydqn.__all__:
        thing = getattr(pydqn, name)
        assert inspect.getdoc(thing), name
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                if inspect.isfunction(value) and not member.startswith("_"):
                    assert inspect.getdoc(value), f"{name}.{member}"
                    assert "return" in typing.get_type_hints(value), f"{name}.{member}"
