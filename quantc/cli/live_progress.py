"""Progress drawn live in a terminal: a line per stage, and below them the current linear."""

from __future__ import annotations

from types import TracebackType

import psutil
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from ..errors import printable
from ..units import clock, number, size


class LiveProgress:
    """A quantc.progress.Progress on a terminal, alive between `with` and its end.

    `step` tells of a finished step: the time left is the mean of those for each that is to come.
    """

    def __init__(self, console: Console, refresh_per_second: float = 8):
        self._bars = Bars(
            SpinnerColumn(finished_text="[green]✓[/]", style="cyan"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24, complete_style="cyan", finished_style="green", pulse_style="cyan"),
            _StepColumn(),
            _TimeColumn(),
            _MemoryColumn(),
            console=console,
            auto_refresh=False,
        )
        self._live = Live(self, console=console, refresh_per_second=refresh_per_second)
        self._task: TaskID | None = None
        self._count = 0
        self._detail = ""

    def __enter__(self) -> LiveProgress:
        self.stage("opening the model", 0)
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._detail = ""
        if kind is None:
            self.done()
        elif self._task is not None:
            self._bars.stop_task(self._task)
        self._live.stop()
        self._live.console.print()

    def __rich__(self) -> RenderableType:
        lines: list[RenderableType] = [self._bars.get_renderable()]
        if self._detail:
            lines.append(Text(f"  {self._detail}", style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(*lines)

    def stage(self, name: str, total: int) -> None:
        self.done()
        self._count = 0
        self._task = self._bars.add_task(printable(name), total=total or None, counted=total > 0)

    def step(self, name: str) -> None:
        self._count += 1
        self._detail = printable(name)
        if self._task is not None:
            self._bars.update(self._task, completed=self._count)

    def linear(self, name: str, error: float) -> None:
        self._detail = f"{printable(name)}   error {number(error)}"

    def note(self, text: str) -> None:
        self._live.console.print(printable(text), style="dim", markup=False)

    def done(self) -> None:
        """Close the current stage, if any; the time it took stays on the screen."""
        if self._task is None:
            return
        total = self._bars.tasks[self._task].total or max(1, self._count)
        self._bars.update(self._task, total=total, completed=total)
        self._task, self._detail = None, ""


class _StepColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        if task.total is None or not task.fields["counted"]:
            return Text("")
        return Text(f"{task.completed:.0f}/{task.total:.0f}", style="" if task.finished else "bold")


class _TimeColumn(ProgressColumn):
    """Time taken and, from the mean of the finished steps, time left."""

    def render(self, task: Task) -> Text:
        elapsed = task.finished_time if task.finished else task.elapsed
        text = f"{clock(elapsed or 0)} elapsed"
        if task.total and task.completed and not task.finished:
            text += f"  {clock((elapsed or 0) * (task.total - task.completed) / task.completed)} left"
        return Text(text)


class _MemoryColumn(ProgressColumn):
    """Resident memory of the process, on the running stage only."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        memory = psutil.Process().memory_info().rss
        return Text("" if task.finished else f"{size(memory)} memory", style="dim")
