"""When and why a run ends."""

from __future__ import annotations

from typing import NamedTuple

from pydqn.config import Config


class Progress(NamedTuple):
    """The numbers of a run that can end it."""

    steps: int
    episodes: int
    updates: int
    successes: int  # in a row
    mean_return: float  # minus infinity until there are `mean_episodes` returns
    evaluation_return: float  # of the latest evaluation; NaN before the first


def end_reason(config: Config, now: Progress) -> str | None:
    """Return why a run of `config` is over: the setting that ends it, and the value that reached it. Else None.

    Where a goal was reached before the first update, the reason says so: nothing has been learned.
    """
    goal = None
    if 0 < config.stop_successes <= now.successes:
        goal = f"stop_successes: {now.successes} successes in a row"
    elif now.mean_return >= config.stop_return:
        goal = f"stop_return: the mean return {now.mean_return:.2f} reached {config.stop_return:g}"
    elif now.evaluation_return >= config.stop_evaluation_return:
        goal = (
            f"stop_evaluation_return: an evaluation's mean return {now.evaluation_return:.2f} "
            f"reached {config.stop_evaluation_return:g}"
        )
    if goal is not None:
        return goal if now.updates else f"{goal}, before the first update"
    if 0 < config.total_episodes <= now.episodes:
        return f"total_episodes: {now.episodes:,} episodes were played"
    if now.steps >= config.total_steps:
        return f"total_steps: {now.steps:,} steps were taken"
    return None
