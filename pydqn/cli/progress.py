"""The progress bar of `pydqn train`."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from pydqn.runs.logs import Report


class ProgressBar:
    """One line: steps, time left, frames/s, updates/s, epsilon, mean return, loss."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._bar: Any = None  # made by the first `show`
        self._text = ""

    def show(self, report: Report) -> None:
        """Draw the line for a report."""
        from tqdm import tqdm

        if self._bar is None:
            self._bar = tqdm(
                total=self._total,
                initial=min(report.steps, self._total),  # the time left follows from what is done from here on
                unit="step",
                unit_scale=True,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}]{postfix}",
            )
        parts = [
            f"{report.frames_per_second:,.0f} frames/s",
            f"{report.updates_per_second:,.0f} updates/s",
            f"eps {report.epsilon:.2f}",
            f"return {report.mean_return:.1f}",
            f"loss {report.loss:.4f}",
        ]
        self._text = " ".join(parts).replace("nan", "-")
        self._bar.set_postfix_str(self._text, refresh=False)
        self._bar.n = min(report.steps, self._total)
        self._bar.refresh()

    def saving(self, share: float) -> None:
        """Show which share of the replay buffer has been saved; at 1, show the report again."""
        if self._bar is not None:
            self._bar.set_postfix_str(self._text if share >= 1 else f"saving the replay buffer: {share:.0%}")

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        from tqdm import tqdm

        tqdm.write(text)

    def note(self, text: str) -> None:
        """Print a line above the bar, where warnings go."""
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)

    def _warn(self, *warning: Any, **options: Any) -> None:
        """Show a warning above the bar instead of within it."""
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stderr):
            self._show_warning(*warning, **options)

    def __enter__(self) -> ProgressBar:
        self._show_warning, warnings.showwarning = warnings.showwarning, self._warn
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the line as it is."""
        warnings.showwarning = self._show_warning
        if self._bar is not None:
            self._bar.close()
