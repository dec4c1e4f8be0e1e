"""Figures: the numbers that are drawn, and that everything requested is drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pydqn import preset, train
from pydqn.plotting.curves import PANELS, draw_runs, group_runs, plot_runs, rolling_mean, spread
from pydqn.plotting.values import Grid, Surface, draw_values, plot_values, values_of

PONG = [Path(__file__).parents[2] / "results" / "pong" / f"seed-{seed}" for seed in range(4)]
SIGNATURES = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


def test_rolling_mean_against_a_slow_one():
    values = np.random.default_rng(0).normal(size=57)
    for window in (1, 2, 10, 57, 100):
        slow = [np.mean(values[max(0, end - window) : end]) for end in range(1, 58)]
        np.testing.assert_allclose(rolling_mean(values, window), slow)


@pytest.mark.parametrize("seeds", [2, 4, 5, 9])
def test_the_spread_over_seeds(seeds):
    generator = np.random.default_rng(seeds)
    curves = []
    for _ in range(seeds):
        x = np.sort(generator.uniform(0, 10, 30))
        curves.append((x, generator.normal(size=30)))
    curve = spread(curves)
    assert curve.x[0] == max(x[0] for x, _ in curves)
    assert curve.x[-1] == min(x[-1] for x, _ in curves)
    for index in (0, 123, 399):
        values = [np.interp(curve.x[index], x, y) for x, y in curves]
        assert curve.mean[index] == pytest.approx(np.mean(values))
        low, high = min(values), max(values)
        if seeds >= 5:
            low, high = np.mean(values) - np.std(values, ddof=1), np.mean(values) + np.std(values, ddof=1)
        assert (curve.low[index], curve.high[index]) == pytest.approx((low, high))


def copy_of(run, folder, **changes):
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_runs_that_differ_in_their_seeds_are_one_group(tmp_path):
    other = copy_of(PONG[0], tmp_path / "slow-0", learning_rate=1e-5)
    groups = group_runs([*PONG, other])
    assert [group.label for group in groups] == ["pong (4 seeds)", "slow-0"]
    assert [len(group.progress) for group in groups] == [4, 1]
    again = copy_of(PONG[0], tmp_path / "slow-1", learning_rate=1e-5, seed=1)
    assert [group.label for group in group_runs([other, again])] == ["slow (2 seeds)"]
    assert [group.label for group in group_runs([PONG[2]])] == ["pong/seed-2"]
    assert [group.label for group in group_runs(PONG, each=True)] == [f"pong/seed-{seed}" for seed in range(4)]


def test_what_is_drawn():
    figure = draw_runs(group_runs(PONG), list(PANELS), 10)
    assert len(figure.axes) == 6
    for axes in figure.axes:
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert axes.has_data()
    assert any("(millions)" in axes.get_xlabel() for axes in figure.axes)
    assert any("(minutes)" in axes.get_xlabel() for axes in figure.axes)
    frames = figure.axes[0]
    assert len(frames.lines) == 5  # four seeds and their mean
    assert len(frames.collections) == 1  # the spread
    assert frames.lines[0].get_xdata()[-1] == pytest.approx(group_runs(PONG)[0].progress[0]["frames"][-1] / 1e6)
    assert [text.get_text() for text in figure.legends[0].texts] == ["pong (4 seeds): mean, lowest to highest"]
    few = draw_runs(group_runs(PONG[:1]), ["return-frames", "episodes-steps"], 10)
    assert [len(axes.lines) for axes in few.axes] == [1, 1]
    line = few.axes[1].lines[0]
    assert line.get_ydata()[-1] == len(group_runs(PONG[:1])[0].episodes[0]["episode"])


def test_a_panel_without_data_says_so(tmp_path):
    folder = copy_of(PONG[0], tmp_path / "run")
    (folder / "episodes.csv").unlink()
    figure = draw_runs(group_runs([folder]), ["return-frames", "length-episodes"], 10)
    assert [text.get_text() for text in figure.axes[1].texts] == ["no data"]
    assert not figure.axes[0].texts


def test_a_running_run_can_be_drawn(tmp_path):
    folder = copy_of(PONG[0], tmp_path / "run")
    whole = len(group_runs([folder])[0].progress[0]["frames"])
    for name in ("progress.csv", "episodes.csv"):
        with open(folder / name, "a") as file:
            file.write("12,34")  # the rest is being written
    group = group_runs([folder])[0]
    assert len(group.progress[0]["frames"]) == whole
    plot_runs([folder], tmp_path / "a.png")


@pytest.mark.parametrize("suffix", SIGNATURES)
def test_images_have_the_format_of_their_ending(tmp_path, suffix):
    image = tmp_path / f"image{suffix}"
    plot_runs(PONG[:2], image, panels=["return-minutes"])
    assert image.read_bytes().startswith(SIGNATURES[suffix])
    assert [file.name for file in tmp_path.iterdir()] == [image.name]


def test_wrong_input(tmp_path):
    for arguments, options, message in (
        ([[tmp_path], "a.png"], {}, "^run: .* is not the folder of a run"),
        ([PONG, "a.jpeg"], {}, "^output: expected a name that ends in .png"),
        ([PONG, "a.png"], {"panels": ["loss"]}, "^panels: expected some of return-frames, .*, got 'loss'"),
        ([PONG, "a.png"], {"smooth_episodes": 0}, "^smooth_episodes: "),
    ):
        with pytest.raises(ValueError, match=message):
            plot_runs(*arguments, **options)
    with pytest.raises(ValueError, match="^output: "):
        plot_values([], "a.txt")


def test_of_many_episodes_some_are_drawn(tmp_path):
    folder = copy_of(PONG[0], tmp_path / "run")
    rows = "".join(f"{number},{number * 20},0,{number % 40},20\n" for number in range(1, 100_001))
    (folder / "episodes.csv").write_text("episode,steps,env_index,return,length_steps\n" + rows)
    figure = draw_runs(group_runs([folder]), ["return-episodes"], 10)
    assert all(len(line.get_xdata()) <= 4_000 for line in figure.axes[0].lines)


# --- value functions ---


@pytest.fixture(scope="module")
def lake(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "lake"
    train(preset("frozenlake", seed=1), folder)
    return folder


def test_the_map_of_a_lake(lake, tmp_path):
    (grid,) = values_of(lake)
    assert grid.letters == ["SFFF", "FHFH", "FFFH", "HFFG"]
    holes = [(1, 1), (1, 3), (2, 3), (3, 0), (3, 3)]
    assert sorted(zip(*map(list, np.nonzero(np.isnan(grid.values))), strict=True)) == holes
    assert all((grid.arrows[hole] == 0).all() for hole in holes)
    assert np.nanargmax(grid.values) == 14  # beside the goal
    assert (np.abs(grid.arrows).sum(axis=2) == ~np.isnan(grid.values)).all()
    # In the cell below the start, next to a hole, the only safe action is left, against the edge.
    assert grid.arrows[1, 0].tolist() == [-1, 0]
    figure = draw_values([grid])
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sum(text in "SFHG" for text in texts if text) == 16
    assert f"{grid.values[3, 2]:.3g}" in texts
    plot_values([grid], tmp_path / "lake.png")
    assert (tmp_path / "lake.png").stat().st_size > 10_000


def test_the_surfaces_of_blackjack(tmp_path):
    config = preset(
        "frozenlake", env_id="Blackjack-v1", gamma=1.0, learning_rate=0.02, total_steps=20_000, evaluation_every_steps=0
    )
    train(config, tmp_path)
    surfaces = values_of(tmp_path)
    assert [surface.title for surface in surfaces] == ["no usable ace", "usable ace"]
    for surface in surfaces:
        assert surface.z.shape == (10, 10)
        assert surface.y.tolist() == list(range(12, 22))
        assert surface.z[9].mean() > surface.z[0].mean()  # 21 is worth more than 12
    figure = draw_values(surfaces)
    assert len(figure.axes) == 4  # two surfaces with their colour bars
    assert figure.axes[0].get_xlabel() == "dealer's card"


def test_the_cost_to_go_of_mountain_car(tmp_path):
    config = preset(
        "cartpole",
        env_id="MountainCar-v0",
        total_steps=300,
        success_steps=0,
        stop_successes=0,
        device="cpu",
        torch_threads=1,
    )
    train(config, tmp_path)
    (surface,) = values_of(tmp_path)
    assert isinstance(surface, Surface)
    assert (surface.x_label, surface.y_label) == ("position", "velocity")
    assert surface.z.shape == (len(surface.y), len(surface.x))
    assert surface.x[[0, -1]] == pytest.approx([-1.2, 0.6])
    # One point of it, from the network itself.
    from pydqn.envs.make import make_envs
    from pydqn.evaluation.build import trained_policy

    policy, _ = trained_policy(tmp_path, config, make_envs(config, 1, 0))
    point = np.array([[[surface.x[7], surface.y[30]]]], np.float32)
    assert surface.z[30, 7] == pytest.approx(-policy.values(point).max(), rel=1e-5)


def test_tasks_without_two_axes(tmp_path):
    train(preset("cartpole", total_steps=50, device="cpu", torch_threads=1), tmp_path)
    with pytest.raises(ValueError, match="CartPole-v1 are not on two axes"):
        values_of(tmp_path)


def test_cells_without_a_state_are_gray():
    grid = Grid("map", np.array([[1.0, np.nan]]), np.array([[[1, 0], [0, 0]]]), ["FH"])
    axes = draw_values([grid]).axes[0]
    image = axes.images[0]
    assert image.get_array().mask.tolist() == [[False, True]]
    assert len([text for text in axes.texts if text.get_text() == ""]) == 1  # one arrow
