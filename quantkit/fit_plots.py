"""A picture of the types that were chosen for a size: what other sizes would cost, and what every tensor was given."""

from __future__ import annotations

import re
from typing import Any

from quantkit.fit import Choice, by_size, frontier
from quantkit.plots import BLUE, GREY, blank, dress

LAYER = re.compile(r"\d+")  # of an item: `blk.3.ffn_up.weight`, `3 mlp_in`


def draw_choice(choice: Choice) -> Any:
    """A figure of two panels: predicted KL against size, and a row of layers for each kind of tensor."""
    title = f"{choice.found.nbytes / 1e6:.1f} MB of tensors, predicted KL {choice.found.divergence:.4f} nats a token"
    figure, ink = blank(title, height=2.4 + 0.28 * len(set(choice.kinds.values())))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    _sizes(left, choice, ink)
    _types(right, choice, ink)
    return figure


def _sizes(axes: Any, choice: Choice, ink: str) -> None:
    """The least predicted KL at every size, and where the choice lies; any other choice of types lies above."""
    dress(axes, "size of the tensors (MB of 1e6 bytes)", "predicted KL (nats a token)", ink)
    line = frontier(choice.table)
    axes.plot([nbytes / 1e6 for nbytes, _ in line], [kl for _, kl in line], color=GREY, linewidth=1)
    axes.plot([choice.found.nbytes / 1e6], [choice.found.divergence], "o", color=BLUE)
    axes.set_yscale("log")


def _types(axes: Any, choice: Choice, ink: str) -> None:
    """A square for every tensor, the darker the more bits its type has; what is in no layer stands first."""
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    dress(axes, "layer", "", ink)
    axes.grid(visible=False)
    rows = {kind: i for i, kind in enumerate(dict.fromkeys(choice.kinds.values()))}
    used = {option.type for option in choice.found.options.values()}
    order = [kind for kind in by_size(choice.table) if kind in used]
    shades = {kind: colormaps["viridis_r"]((i + 1) / (len(order) + 1)) for i, kind in enumerate(order)}
    for item, option in choice.found.options.items():
        layer = LAYER.search(item)
        axes.barh(rows[choice.kinds[item]], 1, left=int(layer[0]) if layer else 0, height=1, color=shades[option.type])
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.invert_yaxis()
    patches = [Patch(color=shade, label=kind) for kind, shade in shades.items()]
    axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False, labelcolor=ink)
