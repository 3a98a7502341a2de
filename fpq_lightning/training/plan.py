"""Where a calibration is; the module moves it on, the datamodule reads it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Plan:
    """The optimisation steps of every unit, and what is done of them.

    Attributes:
        steps: optimisation steps of each unit, in execution order; 0 where there is nothing to learn.
        unit: position of the unit in work.
        step: its optimisation steps done.
    """

    steps: list[int] = field(default_factory=list)
    unit: int = 0
    step: int = 0

    @property
    def finished(self) -> bool:
        """Whether every unit is quantized."""
        return bool(self.steps) and self.unit >= len(self.steps)

    @property
    def unit_steps(self) -> int:
        """Optimisation steps of the unit in work."""
        return 0 if self.finished or not self.steps else self.steps[self.unit]

    @property
    def unit_is_learned(self) -> bool:
        """Whether no step of the unit in work is left."""
        return self.step >= self.unit_steps

    def next_unit(self) -> None:
        """Moves on to the next unit."""
        self.unit, self.step = self.unit + 1, 0
