"""Published scores of Atari games, and human-normalized scores."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """One game's mean scores per episode, as printed."""

    random: float  # a random action every sixth frame
    human: float  # a professional tester of games
    dqn: float


SOURCE = "Mnih et al. 2015, extended data table 2"
# Later papers measure 57 games against another human (Alien: 7127.7). The two scales must not be mixed.
PUBLISHED: dict[str, Published] = {
    "alien": Published(227.8, 6875, 3069),
    "amidar": Published(5.8, 1676, 739.5),
    "assault": Published(222.4, 1496, 3359),
    "asterix": Published(210, 8503, 6012),
    "asteroids": Published(719.1, 13157, 1629),
    "atlantis": Published(12850, 29028, 85641),
    "bank_heist": Published(14.2, 734.4, 429.7),
    "battle_zone": Published(2360, 37800, 26300),
    "beam_rider": Published(363.9, 5775, 6846),
    "bowling": Published(23.1, 154.8, 42.4),
    "boxing": Published(0.1, 4.3, 71.8),
    "breakout": Published(1.7, 31.8, 401.2),
    "centipede": Published(2091, 11963, 8309),
    "chopper_command": Published(811, 9882, 6687),
    "crazy_climber": Published(10781, 35411, 114103),
    "demon_attack": Published(152.1, 3401, 9711),
    "double_dunk": Published(-18.6, -15.5, -18.1),
    "enduro": Published(0, 309.6, 301.8),
    "fishing_derby": Published(-91.7, 5.5, -0.8),
    "freeway": Published(0, 29.6, 30.3),
    "frostbite": Published(65.2, 4335, 328.3),
    "gopher": Published(257.6, 2321, 8520),
    "gravitar": Published(173, 2672, 306.7),
    "hero": Published(1027, 25763, 19950),
    "ice_hockey": Published(-11.2, 0.9, -1.6),
    "jamesbond": Published(29, 406.7, 576.7),
    "kangaroo": Published(52, 3035, 6740),
    "krull": Published(1598, 2395, 3805),
    "kung_fu_master": Published(258.5, 22736, 23270),
    "montezuma_revenge": Published(0, 4367, 0),
    "ms_pacman": Published(307.3, 15693, 2311),
    "name_this_game": Published(2292, 4076, 7257),
    "pong": Published(-20.7, 9.3, 18.9),
    "private_eye": Published(24.9, 69571, 1788),
    "qbert": Published(163.9, 13455, 10596),
    "riverraid": Published(1339, 13513, 8316),
    "road_runner": Published(11.5, 7845, 18257),
    "robotank": Published(2.2, 11.9, 51.6),
    "seaquest": Published(68.4, 20182, 5286),
    "space_invaders": Published(148, 1652, 1976),
    "star_gunner": Published(664, 10250, 57997),
    "tennis": Published(-23.8, -8.9, -2.5),
    "time_pilot": Published(3568, 5925, 5947),
    "tutankham": Published(11.4, 167.6, 186.7),
    "up_n_down": Published(533.4, 9082, 8456),
    "venture": Published(0, 1188, 380),
    "video_pinball": Published(16257, 17298, 42684),
    "wizard_of_wor": Published(563.5, 4757, 3393),
    "zaxxon": Published(32.5, 9173, 4977),
}


def human_normalized(rom: str, score: float) -> float | None:
    """Return where `score` lies between random play (0) and the human tester (100), in percent.

    Args:
        rom: the game, by the name of its ROM in ale_py ("space_invaders").
        score: a mean score per episode, unclipped.

    Returns:
        The percentage, or None where the game is not among the 49 of `SOURCE`.
    """
    published = PUBLISHED.get(rom)
    if published is None:
        return None
    return (score - published.random) / (published.human - published.random) * 100
