"""Curves of a run that are drawn while it trains."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback
from typing_extensions import override

from mpo.figure import new_figure, png_of

PANELS: Mapping[str, Sequence[str]] = {
    "loss": ("loss", "eval_loss"),
    "terms of the loss": ("loss/sigmoid", "loss/bco_pair", "loss/sft"),
    "rewards": ("rewards/chosen", "rewards/rejected", "reward_shift"),
    "pairs ranked rightly": ("rewards/accuracies", "eval_rewards/accuracies"),
}


class LiveCurves(TrainerCallback):  # type: ignore[misc]
    """Draw what a trainer logs, in a notebook as one figure that is updated in place.

    Drawing takes about a tenth of a run's time at most: where a run logs faster, not after each log, but after evaluations and at
    the end in any case.

    Args:
        panels: names of metrics, by the title of their panel. What is not logged is left out, and so is a panel without metrics.
        width: of a panel, in inches.

    Raises:
        ValueError: if matplotlib is not installed, and for a panel whose metrics are not a list.

    Example:
        >>> from mpo.training.curves import LiveCurves
        >>> curves = LiveCurves({"loss": ["loss"]})
        >>> trainer = MPOTrainer(..., callbacks=[curves])  # doctest: +SKIP
        >>> curves.figure().savefig("curves.png")  # outside of a notebook
    """

    def __init__(self, panels: Mapping[str, Sequence[str]] = PANELS, *, width: float = 3.0) -> None:
        new_figure(1, 1)  # fails now if it cannot draw
        for title, names in panels.items():
            if isinstance(names, str):
                raise ValueError(f"Expected a list of metrics for the panel {title!r}; got {names!r}. Write [{names!r}].")
        self.panels, self.width = panels, width
        self._state: Any = None  # of the trainer that logged last
        self._handle: Any = None
        self._next = 0.0  # time from which on it may draw

    def figure(self) -> Any:
        """The curves so far, a matplotlib figure."""
        log = self._state.log_history if self._state else []
        logged = {name for line in log for name in line}
        shown = {title: [name for name in names if name in logged] for title, names in self.panels.items()}
        shown = {title: names for title, names in shown.items() if names} or {"nothing logged yet": []}
        figure = new_figure(self.width * len(shown), 2.6)
        for axes, (title, names) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
            for name in names:
                steps, values = zip(*((line["step"], line[name]) for line in log if name in line), strict=True)
                axes.plot(steps, values, ".-", ms=4, lw=1.2, label=name)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("step", fontsize=8)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
            if len(names) > 1:
                axes.legend(fontsize=7, frameon=False)
        if self._state:
            most = f" of {self._state.max_steps}" if self._state.max_steps else ""  # 0 where only evaluated
            figure.suptitle(f"step {self._state.global_step}{most}", fontsize=9)
        return figure

    @override
    def on_log(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Draw what the trainer has logged, a resumed one also before; another run has a figure of its own."""
        if state is not self._state:  # trainers make one in each `train`
            self._state, self._handle, self._next = state, None, 0.0
        if state.is_world_process_zero and time.monotonic() >= self._next:
            self._show()

    @override
    def on_evaluate(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Draw all that was logged."""
        if state is self._state and state.is_world_process_zero:
            self._show()

    @override
    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Draw all that was logged."""
        self.on_evaluate(args, state, control)

    def _show(self) -> None:
        began = time.monotonic()
        try:
            from IPython import get_ipython
            from IPython.display import Image, display
        except ImportError:
            return
        if getattr(get_ipython(), "kernel", None) is None:  # type: ignore[no-untyped-call]  # a terminal shows no images
            return
        image = Image(png_of(self.figure()))  # type: ignore[no-untyped-call]
        if self._handle is None:
            self._handle = display(image, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(image)
        now = time.monotonic()
        self._next = now + 9 * (now - began)
