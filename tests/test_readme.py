"""What the README says is so."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import re
import statistics
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from pydqn import Config, preset
from pydqn.cli import options
from pydqn.config import RENAMED
from pydqn.envs.tasks import resolved
from pydqn.presets import PRESETS
from pydqn.runs.layout import load_run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SYSTEMS = (ROOT / "docs" / "systems.md").read_text()
TRAINING = (ROOT / "docs" / "training.md").read_text()
PARSER = options.make_parser(defaultdict(lambda: print))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_replay_example_works_as_printed():
    program = re.search(r"<!-- replay example -->\n```python\n(.*?)```", README, re.DOTALL).group(1)
    assert len(program.splitlines()) <= 16
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert re.match(r"19\d\d \(32, 4, 84, 84\) 0.97", out), out


def test_the_transitions_example_works_as_printed():
    page = (ROOT / "docs" / "embedding.md").read_text()
    program = re.search(r"<!-- transitions example -->\n```python\n(.*?)```", page, re.DOTALL).group(1)
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert re.match(r"19\d\d \(32, 4\) 0.97", out), out


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "algorithms").glob("*.md")), ids=lambda page: page.name)
def test_algorithms_name_fields_defaults_and_commands_that_exist(page):
    text, fields = page.read_text(), {field.name: field for field in dataclasses.fields(Config)}
    for command in re.findall(r"^    pydqn train (.*)$", text, re.MULTILINE):
        arguments = PARSER.parse_args(["train", *command.split()])
        preset(arguments.preset, **options.given_settings(arguments))
    settings = re.search(r"^## Settings\n(.*?)(^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert (settings is None) == (page.name == "README.md")
    for names, default in re.findall(r"^\| (`.*?`) \| (.*?) \|", settings.group(1) if settings else "", re.MULTILINE):
        names = re.findall(r"`(\w+)`", names)
        assert set(names) <= set(fields)
        if re.fullmatch(r"`?[\w.-]+`?(, [\d.-]+)*", default):
            found = [f"{fields[name].default:g}" if "`" not in default else str(fields[name].default) for name in names]
            assert ", ".join(found) == default.strip("`"), names


def test_the_presets_are_those_that_exist():
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \|", README, re.MULTILINE)) == set(PRESETS)


def test_every_preset_has_a_result_or_says_that_it_has_none():
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` \| .*? \| (.*) \|$", README, re.MULTILINE))
    assert set(rows) == set(PRESETS)
    for name, result in rows.items():
        runs = sorted((ROOT / "results" / name).glob("seed-*"))
        if runs:
            assert re.search(rf"\b{len(runs)} of {len(runs)} seeds", result), result
            for run in runs:
                about = json.loads((run / "environment.json").read_text())
                assert about["processor"], run
        elif name == "dqn":
            for task in ("CartPole", "Acrobot", "LunarLander", "MountainCar"):
                assert "{} {:.0f} and {:.0f}".format(task, *means_of(task)) in result
        else:
            assert result.startswith("not run to its end here"), result


CLASSIC = ROOT / "results" / "classic-control"


def classic(task, library):
    """Return the results of all seeds of a task."""
    (folder,) = CLASSIC.glob(f"{task}-v*")
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{library}-*.json"))]


def means_of(task):
    return [statistics.mean(one["mean"] for one in classic(task, library)) for library in ("pydqn", "sb3")]


def program_of(name, monkeypatch):
    """Import one of the programs in bench/."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


def test_the_table_of_value_learning(monkeypatch):
    """Three seeds each, the settings of the program that makes them, and the numbers that the files hold."""
    program, folder = program_of("value_learning", monkeypatch), ROOT / "results" / "value-learning"
    text = (folder / "README.md").read_text()
    learned = (ROOT / "docs" / "algorithms" / "README.md").read_text().partition("What they learn:")[2]
    learned = " ".join(learned.split())
    for task, settings in program.TASKS.items():
        table = re.search(rf"^## {task}$(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
        rows = re.findall(r"^\| `(\w+)` \| (.*?) \|$", table.group(1), re.MULTILINE)
        seeds = set(program.SEEDS[task])
        found = {
            value: {int(path.stem.split("-")[1]): path for path in (folder / task).glob(f"{value}-*.json")}
            for value in program.VALUES[task]
        }
        assert [value for value, _ in rows] == [value for value in found if set(found[value]) == seeds]
        for value, cell in rows:
            runs = [json.loads(path.read_text()) for _, path in sorted(found[value].items())]
            means = [statistics.mean(run["returns"]) for run in runs]
            expected = f"{statistics.mean(means):.1f} ({', '.join(f'{mean:.1f}' for mean in means)})"
            ends = [run["curve"][-1][1] for run in runs]  # the training return says how fast they learned
            expected += f" | {statistics.mean(ends):.1f}"
            assert f" {statistics.mean(means):.1f}" in learned, value
            assert cell == expected
            for run in runs:
                assert len(run["returns"]) == 100
                assert run["settings"] == {**settings, "value": value, **program.VALUES[task][value]}
                assert run["environment"]["processor"]
                if task == "CartPole-v1":  # as both pages say
                    assert max(value for _, value in run["evaluations"]) == 500


def test_the_table_of_classic_control(monkeypatch):
    """Five seeds each, the settings of the program that makes them, and the numbers that the files hold."""
    program = program_of("classic_control", monkeypatch)
    page = (ROOT / "docs" / "your-task.md").read_text()
    commands = dict(re.findall(r"^\| (\w+) \| `pydqn train dqn (.*?)` \|$", page, re.MULTILINE))
    text = (CLASSIC / "README.md").read_text()
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    assert [task for task, *_ in rows] == ["CartPole", "Acrobot", "LunarLander", "MountainCar"]
    for task, steps, *cells in rows:
        arguments = PARSER.parse_args(["train", "dqn", *commands[task].split()])
        env_id = classic(task, "pydqn")[0]["task"]
        number = program.STEPS[env_id]
        settings = {"total_steps": number, "learning_rate_decay_steps": number, **program.PYDQN[env_id]}
        expected = resolved(preset("dqn", env_id=env_id, **settings))
        assert resolved(preset("dqn", **options.given_settings(arguments))) == expected
        for library, cell in zip(("pydqn", "sb3"), cells, strict=True):
            runs = classic(task, library)
            assert len({run["seed"] for run in runs}) == 5
            means = [statistics.mean(run["returns"]) for run in runs]
            assert cell == f"{statistics.mean(means):.1f} ({statistics.stdev(means):.1f}), {min(means):.1f}"
            for run in runs:
                assert len(run["returns"]) == 100
                assert run["mean"] == pytest.approx(statistics.mean(run["returns"]))
                assert f"{run['steps']:,}" == steps == f"{program.STEPS[run['task']]:,}"
                plain = {"preset": "dqn", "total_steps": run["steps"], "learning_rate_decay_steps": run["steps"]}
                ours, theirs = {**plain, **program.PYDQN[run["task"]]}, program.ZOO[run["task"]]
                assert run["settings"] == (ours if library == "pydqn" else theirs)


def test_ci_runs_the_test_command():
    command = re.search(r"<!-- test command -->\n```\n(.*?)\n```", README).group(1)
    assert command.startswith("pip install")
    assert "grep -A 3 '<!-- test command -->' README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_commands_can_be_typed():
    commands = re.findall(r"^pydqn train ([^#\n]*)", (README + TRAINING).replace("\\\n", " ") + SYSTEMS, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        arguments = PARSER.parse_args(["train", *command.split()])
        if arguments.resume:
            continue
        config = preset(arguments.preset, **options.given_settings(arguments))
        # A run that is to end at a mean return must not end before it has learned.
        assert "Pong" in config.env_id or config.stop_return > 100


def test_every_system_has_its_page():
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \| `pydqn train", SYSTEMS, re.MULTILINE)) == set(PRESETS)
    for option in re.findall(r"`--([a-z-]+)", README + SYSTEMS + TRAINING):
        field = option.removeprefix("no-").replace("-", "_")
        known = field in Config.__dataclass_fields__ or option in CLI_OPTIONS
        assert known, option


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", page.read_text()):
        if "://" not in target:
            found = (page.parent / target).resolve() if target else page
            assert found.exists(), target
            if anchor:
                titles = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, anchor


CLI_OPTIONS = {
    "resume",
    "record",
    "q-values",
    "protocol",
    "values",
    "fps",
    "logdir",
    "no-show",
    "extra-index-url",
    "import",
}
# Settings that are younger than some of the results, which had what is their default now.
LATER = {"evaluation_max_episode_steps", "env_kwargs", "image_channels", "input_scaling", "init_weights"}
LATER |= {"env_workers", "restart_envs", "updates_in_a_row", "priority_error", "value", "num_atoms", "value_min"}
LATER |= {"value_max", "hl_gauss_sigma", "num_quantiles", "num_taus", "num_target_taus", "num_action_taus"}
LATER |= {"num_cosines", "first_cosine", "quantile_kappa", "munchausen", "munchausen_alpha", "munchausen_temperature"}
LATER |= {"munchausen_least", "munchausen_policy", "noisy_sigma", "target_update_rate", "epsilon_off_steps"}
LATER |= {"epsilon_ladder", "boltzmann_temperature", "evaluation_noise", "priority_beta_end"}
LATER |= {"impala_width", "impala_spectral", "impala_pooled", "layer_norm", "shared_bias", "weight_decay"}
LATER |= {"priority_uniform_share", "update"}
RUNS = sorted((ROOT / "results").glob("*/seed-*"))
# Where a run computes, and how it is spread over the processor, is not its setting.
MACHINE = {"torch_threads": 0, "emulator_threads": 0, "device": "auto"}


def rows(run, name):
    with open(run / name) as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.parent.name}-{run.name}")
def test_results_are_runs_of_their_preset(run):
    expected = resolved(preset(run.parent.name, seed=int(run.name.removeprefix("seed-"))))
    written = json.loads((run / "config.json").read_text())
    names = {RENAMED.get(name, name) for name in written}
    later = {name: value for name, value in expected.to_dict().items() if name not in names}
    # The episodes of these tasks have limits of their own; their environments take no arguments.
    assert set(later) <= LATER
    assert load_run(run, **MACHINE, **later) == expected
    config, last = load_run(run), rows(run, "progress.csv")[-1]
    returns = [float(row["return"]) for row in rows(run, "episodes.csv")]
    assert len(returns) == int(last["episodes"])
    recent = returns[-config.mean_episodes :]
    assert abs(sum(recent) / len(recent) - float(last["mean_return"])) < 1e-3


def test_there_are_results():
    counts = Counter(run.parent.name for run in RUNS)
    assert counts == {"pong": 11, "frozenlake": 10, "cartpole": 10}


@pytest.mark.parametrize(
    ("game", "names"), [("breakout", ("hour", "published-38-minutes")), ("minatar", ("breakout",))]
)
def test_runs_are_those_of_their_commands(game, names):
    folder = ROOT / "results" / game
    page = (folder / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^pydqn train (.*)$", page, re.MULTILINE)
    for command, name in zip(commands, names, strict=True):
        arguments = PARSER.parse_args(["train", *command.split()])
        assert load_run(folder / name) == resolved(preset(arguments.preset, **options.given_settings(arguments)))
        last = rows(folder / name, "progress.csv")[-1]
        assert f"{int(last['steps']):,}" in page
        assert f"{int(last['updates']):,}" in page
    scores = [json.loads(line) for line in (folder / names[0] / "scores.jsonl").read_text().splitlines()]
    assert [score["protocol"] for score in scores] == (["own", "nature"] if game == "breakout" else ["own"])
    assert all(f"{score['mean_return']:.2f}" in page for score in scores)


def test_results_are_what_their_pages_say():
    """Every row of a table of results is in the files: steps, episodes, and that the goal was reached."""
    for name in ("frozenlake", "cartpole"):
        page = (ROOT / "results" / name / "README.md").read_text()
        table = [
            line.strip("| ").replace(",", "").split(" | ") for line in page.splitlines() if re.match(r"\| \d", line)
        ]
        assert len(table) == 10
        for cells in table:
            run = ROOT / "results" / name / f"seed-{cells[0]}"
            last, games = rows(run, "progress.csv")[-1], rows(run, "episodes.csv")
            if name == "frozenlake":
                assert cells[1:3] == [last["steps"], last["episodes"]]
                assert float(cells[3]) == float(last["evaluation_return"]) > 0.80
            else:
                lengths = [int(game["length_steps"]) for game in games]
                first = next(number for number, length in enumerate(lengths, 1) if length >= 190)
                assert cells[1:5] == [str(len(games)), str(first), last["steps"], last["updates"]]
                assert min(lengths[-5:]) >= 190
                assert len(games) <= 500
