"""Points and curves: samples as dots, scaling with its ideal line, collectives with their fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .style import BLACK, GREY, durations, field, figure, look, named

Values = Sequence[float] | np.ndarray


@figure
def dots(
    axes: Axes,
    samples: Mapping[str, Values],
    predicted: Mapping[str, float] | float | None = None,
    title: str = "",
    what: str = "one step",
) -> str:
    """Every sample (seconds) of `what` as a dot, its median as a bar, the prediction dotted.

    `predicted`: seconds per name, or one number for all of them.
    """
    if isinstance(predicted, int | float):
        predicted = dict.fromkeys(samples, float(predicted))
    pools = {name: np.asarray(values, dtype=float).ravel() for name, values in samples.items()}
    scale, unit = durations([*(float(np.median(v)) for v in pools.values() if v.size), 0.0])
    spread, said = np.random.default_rng(0), []
    for place, (name, pool) in enumerate(pools.items()):
        style = look(name)
        where = place + spread.uniform(-0.22, 0.22, pool.size)
        axes.scatter(where, pool * scale, s=16, alpha=0.6, color=style.colour, marker=style.marker,
                     edgecolors=BLACK, linewidths=0.4)  # fmt: skip
        middle = float(np.median(pool)) * scale
        axes.plot([place - 0.32, place + 0.32], [middle] * 2, color=BLACK, linewidth=1.4)
        text = f"{name} {middle:.3g} {unit}"
        if predicted and predicted.get(name) is not None:
            line = predicted[name] * scale
            axes.plot([place - 0.42, place + 0.42], [line] * 2, color=BLACK, linestyle=":")
            text += f" (predicted {line:.3g} {unit}, {line / middle - 1:+.0%})"
        said.append(text)
    labels = [name.replace(", ", ",\n") if len(pools) > 4 else name for name in pools]
    turned: dict[str, Any] = {"rotation": 30, "ha": "right"} if len(pools) > 7 else {}
    axes.set_xticks(range(len(pools)), labels, **turned)
    axes.set_xlim(-0.6, len(pools) - 0.4)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"{what} [{unit}]")
    axes.set_xlabel("dots: samples; bar: median" + ("; dotted: predicted" if predicted else ""))
    axes.set_title(title)
    return f"Samples: {', '.join(said)}."


@figure
def scaling(axes: Axes, table: Any, ideal: str = "linear", title: str = "") -> str:
    """Speed-up over ranks with the ideal line; oversubscribed points are hollow and unconnected.

    Rows: name (or strategy), ranks, speedup; optional lo, hi, oversubscribed.
    `ideal`: "linear" (strong scaling: y = ranks) or "flat" (weak scaling: efficiency 1).
    """
    series: dict[str, list[Any]] = {}
    for name, row in named(table):
        series.setdefault(name, []).append(row)
    ranks = sorted({int(field(r, "ranks")) for rows in series.values() for r in rows})
    reach = np.array([1, max(ranks, default=1)], dtype=float)
    best = reach if ideal == "linear" else np.ones(2)
    axes.plot(reach, best, color=GREY, linestyle="--", label="ideal")
    said = []
    for name, rows in series.items():
        style = look(name)
        rows = sorted(rows, key=lambda row: field(row, "ranks"))
        sound = [row for row in rows if not field(row, "oversubscribed", default=False)]
        axes.plot([field(r, "ranks") for r in sound], [field(r, "speedup") for r in sound],
                  color=style.colour, marker=style.marker, label=name,
                  markeredgecolor=BLACK, markeredgewidth=0.4)  # fmt: skip
        for row in rows:
            x, y = field(row, "ranks"), field(row, "speedup")
            if row not in sound:
                axes.plot(x, y, color=style.colour, marker=style.marker, fillstyle="none",
                          markeredgecolor=BLACK, linestyle="none")  # fmt: skip
            low, high = field(row, "lo"), field(row, "hi")
            if low is not None and high is not None:
                axes.plot([x, x], [low, high], color=style.colour, linewidth=1, marker="_")
            said.append(f"{name} at {x} ranks {y:.2f}{'' if row in sound else ' oversubscribed'}")
    axes.set_xticks(ranks)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("ranks (hollow: more ranks than devices)")
    axes.set_ylabel("speed-up" if ideal == "linear" else "efficiency")
    axes.set_title(title)
    axes.legend()
    return f"{'Strong' if ideal == 'linear' else 'Weak'} scaling: {', '.join(said)}."


@figure
def curve(
    axes: Axes,
    x: Values | Mapping[str, Values],
    y: Values | Mapping[str, Values],
    model: Callable[[np.ndarray], Any] | Mapping[str, Any] | Values | None = None,
    *,
    xlabel: str = "message [bytes]",
    ylabel: str = "time [s]",
    log: bool = True,
    title: str = "",
) -> str:
    """Measured points and the fitted line through them; several series as mappings by name.

    `model`: y values at x, or a function of x; drawn dashed. Points are not joined: nothing was
    measured between them.
    """
    ys = dict(y) if isinstance(y, Mapping) else {"measured": y}
    xs = dict(x) if isinstance(x, Mapping) else dict.fromkeys(ys, x)
    models = dict(model) if isinstance(model, Mapping) else dict.fromkeys(ys, model)
    for name in ys:
        style, at = look(name), np.asarray(xs[name], dtype=float)
        axes.plot(at, np.asarray(ys[name], dtype=float), linestyle="none", marker=style.marker,
                  color=style.colour, markeredgecolor=BLACK, markeredgewidth=0.4,
                  label=name)  # fmt: skip
        fitted = models.get(name)
        if callable(fitted):
            at = np.geomspace(at.min(), at.max(), 100) if log else np.linspace(at.min(), at.max())
            fitted = fitted(at)
        if fitted is not None:
            axes.plot(at, np.asarray(fitted, dtype=float), linestyle="--", color=style.colour,
                      label="model" if len(ys) == 1 else None)  # fmt: skip
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
        if "bytes" in xlabel:
            axes.xaxis.set_major_formatter(FuncFormatter(_bytes_tick))
    else:
        axes.set_ylim(bottom=0)
        whole = all(float(v).is_integer() for at in xs.values() for v in at)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=whole))
    several = len(ys) > 1 and any(fitted is not None for fitted in models.values())
    axes.set_xlabel(f"{xlabel} (points: measured; dashed: model)" if several else xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.legend()
    return (
        f"{ylabel} over {xlabel} for {', '.join(ys)}{', with the fitted model' if model else ''}."
    )


def _bytes_tick(value: float, _: int) -> str:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g} B"
