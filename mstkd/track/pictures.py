"""Pictures of a run's figures, for MLflow's page, which shows one per step."""

import numpy as np
from numpy.typing import NDArray


def validation_bars(figures: dict[str, float], step: int, stage: str) -> NDArray[np.uint8]:
    """(H, W, 4) RGBA: a bar per figure of a validation, as they come; fractions on an axis from 0 to 1, so that steps compare."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, values = list(figures), list(figures.values())
    figure = Figure(figsize=(7, 1.2 + 0.26 * len(names)), layout="constrained", dpi=90)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    bars = axes.barh(names, values, color=["#43799b" if name == "score" else "#9db8c9" for name in names])
    axes.bar_label(bars, [f"{value:.3f}" for value in values], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_title(f"{stage}: validation at step {step}", fontsize=10, loc="left")
    if all(0 <= value <= 1 for value in values):
        axes.set_xlim(0, 1.1)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()
