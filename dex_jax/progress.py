"""Messages about what a program is doing, from the code that does it to the listener that shows them.

`notify("measuring step costs")` says what goes on from now on. Only the last that is `listening` hears it: a program
with its Display, or a caller of the library with a function of its own.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Notify = Callable[[str], None]
"""The function that receives the name of a phase that begins."""

_START = time.monotonic()
_LISTENERS: list[Notify] = []


def notify(phase: str) -> None:
    """Say what goes on from now on, until the next call: "compiling run_ticks", "decoding"."""
    for tell in _LISTENERS[-1:]:
        tell(phase)


def say_wait(why: str) -> None:
    """Say on stderr why something takes long, where nobody listens."""
    if not _LISTENERS:
        print(why, file=sys.stderr)


@contextlib.contextmanager
def listening(tell: Notify) -> Iterator[None]:
    """Let `tell` hear of every phase in this block, in whatever thread that begins; nobody else does.

    Examples:
      >>> heard = []
      >>> with listening(heard.append):
      ...     notify("decoding")
      >>> heard
      ['decoding']
    """
    _LISTENERS.append(tell)
    try:
        yield
    finally:
        _LISTENERS.remove(tell)


class Standing(NamedTuple):
    """The progress of something that goes on."""

    what: str  # that goes on
    share: float  # 0 to 1
    seconds_left: float | None  # None while there is nothing to go by
    logged: bool  # whether it is worth a line of a log

    def describe(self) -> str:
        """Describe the progress in one line."""
        return self.what if self.seconds_left is None else f"{self.what}, {duration(self.seconds_left)} left"


class Display:
    """A display of phases, progress and lines of text: live on a terminal, else a line for each; stderr by default."""

    def __init__(self, console: Console | None = None):
        if console is None:
            from rich.console import Console

            console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.console = console
        self._bars: Progress | None = None
        self._phase: str | None = None

    def __call__(self, event: str | Standing) -> None:
        """Show a line that stays, or how far something has come."""
        if isinstance(event, str):
            self.console.print(event, markup=False)
        elif self.console.is_terminal:
            self._draw(event.describe(), event.share)
        elif event.logged:
            self.console.print(event.describe(), markup=False)

    def phase(self, name: str) -> None:
        """Show what goes on from now on, with the seconds since the program's start where lines are kept."""
        if name == self._phase:
            return
        self._phase = name
        if self.console.is_terminal:
            self._draw(name, None, anew=True)
        else:
            self.console.print(f"[{time.monotonic() - _START:5.1f} s] {name}", markup=False)

    def part(self, done: int, total: int) -> None:
        """Show how much of the phase is done, on a terminal."""
        if self.console.is_terminal and self._phase is not None:
            self._draw(self._phase, done / max(total, 1))

    def close(self) -> None:
        """Leave the bar as it stands, and nothing of a phase."""
        if self._bars is not None:
            self._bars.live.transient = self._phase is not None
            self._bars.stop()
        self._bars = self._phase = None

    def _draw(self, text: str, share: float | None, anew: bool = False) -> None:
        if self._bars is None:
            self._bars = _bars(self.console)
            self._bars.start()
        if anew or not self._bars.tasks:
            for task in self._bars.task_ids:
                self._bars.remove_task(task)
            self._bars.add_task(text, total=None)
        if share is not None:
            self._bars.update(self._bars.task_ids[0], description=text, completed=share, total=1.0)


@contextlib.contextmanager
def phases() -> Iterator[Display]:
    """Show on stderr what goes on within this block."""
    display = Display()
    with contextlib.closing(display), listening(display.phase):
        yield display


def _bars(console: Console) -> Progress:
    from rich import progress
    from rich.text import Text

    class BarOfAShare(progress.BarColumn):
        """A bar that is empty where nobody knows how far it is."""

        def render(self, task: progress.Task):
            return super().render(task) if task.total else Text()

    description, elapsed = progress.TextColumn("{task.description}", markup=False), progress.TimeElapsedColumn()
    columns = (progress.SpinnerColumn(), BarOfAShare(), progress.TaskProgressColumn(), description, elapsed)
    return progress.Progress(*columns, console=console, refresh_per_second=4, redirect_stdout=False)


def duration(seconds: float) -> str:
    """Format seconds for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
