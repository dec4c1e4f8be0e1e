from __future__ import annotations

from itertools import product

import pytest
from ale_py import roms

from pydqn.evaluation.protocols import PROTOCOLS
from pydqn.evaluation.scores import PUBLISHED, SOURCE, human_normalized

# Per game: DQN in percent of the human, the last column of Nature's table; then random, human and DQN from the second
# publication of the same scores, with more digits: van Hasselt et al. 2016, arXiv 1509.06461, table 3.
TABLE = """
alien 42.7 227.8 6875.4 3069.33
amidar 43.9 5.8 1675.8 739.5
assault 246.2 222.4 1496.4 3358.63
asterix 70.0 210.0 8503.3 6011.67
asteroids 7.3 719.1 13156.7 1629.33
atlantis 449.9 12850.0 29028.1 85950.0
bank_heist 57.7 14.2 734.4 429.67
battle_zone 67.6 2360.0 37800.0 26300.0
beam_rider 119.8 363.9 5774.7 6845.93
bowling 14.7 23.1 154.8 42.4
boxing 1707.9 0.1 4.3 71.83
breakout 1327.2 1.7 31.8 401.2
centipede 63.0 2090.9 11963.2 8309.4
chopper_command 64.8 811.0 9881.8 6686.67
crazy_climber 419.5 10780.5 35410.5 114103.33
demon_attack 294.2 152.1 3401.3 9711.17
double_dunk 17.1 -18.6 -15.5 -18.07
enduro 97.5 0.0 309.6 301.77
fishing_derby 93.5 -91.7 5.5 -0.8
freeway 102.4 0.0 29.6 30.3
frostbite 6.2 65.2 4334.7 328.33
gopher 400.4 257.6 2321.0 8520.0
gravitar 5.3 173.0 2672.0 306.67
hero 76.5 1027.0 25762.5 19950.33
ice_hockey 79.3 -11.2 0.9 -1.6
jamesbond 145.0 29.0 406.7 576.67
kangaroo 224.2 52.0 3035.0 6740.0
krull 277.0 1598.0 2394.6 3804.67
kung_fu_master 102.4 258.5 22736.2 23270.0
montezuma_revenge 0.0 0.0 4366.7 0.0
ms_pacman 13.0 307.3 15693.4 2311.0
name_this_game 278.3 2292.3 4076.2 7256.67
pong 132.0 -20.7 9.3 18.9
private_eye 2.5 24.9 69571.3 1787.57
qbert 78.5 163.9 13455.0 10595.83
riverraid 57.3 1338.5 13513.3 8315.67
road_runner 232.9 11.5 7845.0 18256.67
robotank 509.0 2.2 11.9 51.57
seaquest 25.9 68.4 20181.8 5286.0
space_invaders 121.5 148.0 1652.3 1975.5
star_gunner 598.1 664.0 10250.0 57996.67
tennis 143.2 -23.8 -8.9 -2.47
time_pilot 100.9 3568.0 5925.0 5946.67
tutankham 112.2 11.4 167.6 186.7
up_n_down 92.7 533.4 9082.0 8456.33
venture 32.0 0.0 1187.5 380.0
video_pinball 2539.4 16256.9 17297.6 42684.07
wizard_of_wor 67.5 563.5 4756.5 3393.33
zaxxon 54.1 32.5 9173.3 4976.67
"""
PERCENT = {line.split()[0]: float(line.split()[1]) for line in TABLE.split("\n") if line}
FINER = {line.split()[0]: tuple(map(float, line.split()[2:])) for line in TABLE.split("\n") if line}
# Here the second publication (85950, 451.85%) contradicts Nature's score and percentage, which agree with each other.
CONTRADICTED = ("atlantis", "dqn")


def rounding(score):
    """Return half a unit of the last digit that Nature prints."""
    return 0.5 if abs(score) >= 1000 else 0.05


def test_the_games_are_the_49_and_ale_has_them():
    assert len(PUBLISHED) == 49
    assert set(PUBLISHED) == set(PERCENT)
    assert set(PUBLISHED) <= set(roms.get_all_rom_ids())
    assert "2015" in SOURCE


@pytest.mark.parametrize("rom", PUBLISHED)
def test_scores_yield_the_printed_percentage(rom):
    """The column was computed from scores before rounding, so it lies in the range that rounding allows."""
    ends = [(score - rounding(score), score + rounding(score)) for score in PUBLISHED[rom]]
    percents = [100 * (dqn - random) / (human - random) for random, human, dqn in product(*ends)]
    assert min(percents) - 0.05 <= PERCENT[rom] <= max(percents) + 0.05
    assert min(percents) <= human_normalized(rom, PUBLISHED[rom].dqn) <= max(percents)


@pytest.mark.parametrize("rom", PUBLISHED)
def test_scores_are_those_of_the_second_publication(rom):
    for player, score, finer in zip(PUBLISHED[rom]._fields, PUBLISHED[rom], FINER[rom], strict=True):
        agrees = score - rounding(score) <= finer < score + rounding(score)  # halves were rounded up
        assert agrees == ((rom, player) != CONTRADICTED), (player, score, finer)


@pytest.mark.parametrize("rom", PUBLISHED)
def test_random_play_is_0_and_the_human_100(rom):
    assert human_normalized(rom, PUBLISHED[rom].random) == 0
    assert human_normalized(rom, PUBLISHED[rom].human) == 100


def test_human_normalized_by_hand():
    assert human_normalized("pong", 18.9) == pytest.approx(132)  # 39.6 of 30 points
    assert human_normalized("freeway", -2.96) == pytest.approx(-10)


@pytest.mark.parametrize("rom", ["berzerk", "Pong", "ALE/Pong-v5", ""])
def test_other_games_have_no_percentage(rom):
    assert human_normalized(rom, 1.0) is None


def test_protocols_are_as_published():
    second = 60  # frames
    assert list(PROTOCOLS) == ["own", "nature", "machado2018"]
    assert PROTOCOLS["own"].settings == {}
    assert PROTOCOLS["nature"].settings == {
        "evaluation_epsilon": 0.05,
        "noop_max_frames": 30,
        "sticky_actions": 0.0,
        "max_episode_frames": 5 * 60 * second,
    }
    assert PROTOCOLS["machado2018"].settings == {
        "evaluation_epsilon": 0.01,
        "noop_max_frames": 0,
        "sticky_actions": 0.25,
        "terminal_on_life_loss": False,
        "max_episode_frames": 30 * 60 * second,
    }
