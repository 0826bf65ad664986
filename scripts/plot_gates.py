#!/usr/bin/env python3
"""Draws the gate curves of a run from its TensorBoard events.

    python scripts/plot_gates.py lightning_logs/smollm2/version_0 --out gates.png

One panel a layer, one curve a component. Without ``--layers`` the six layers whose gates ended farthest from
uniform are shown.
"""

import argparse
from pathlib import Path


def read_gates(run: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Returns step and value of every gate, by layer and component."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    gates: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for tag in events.Tags()["scalars"]:
        kind, _, rest = tag.partition("/")
        if kind == "gate":
            layer, _, component = rest.rpartition("/")
            gates.setdefault(layer, {})[component] = [(e.step, e.value) for e in events.Scalars(tag)]
    return gates


def spread(curves: dict[str, list[tuple[int, float]]]) -> float:
    """How far apart a layer's gates ended."""
    last = [curve[-1][1] for curve in curves.values()]
    return max(last) - min(last)


def main() -> None:
    """Draws the picture."""
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="log folder of a run")
    parser.add_argument("--out", type=Path, default=Path("gates.png"), help="picture to write")
    parser.add_argument("--layers", nargs="*", default=[], help="layers to show, such as layer03.q_proj")
    args = parser.parse_args()
    gates = read_gates(args.run)
    if not gates:
        parser.error(f"{args.run} holds no gate curves")
    chosen = args.layers or sorted(gates, key=lambda layer: -spread(gates[layer]))[:6]
    unknown = [layer for layer in chosen if layer not in gates]
    if unknown:
        parser.error(f"no such layer: {', '.join(unknown)}; there are {', '.join(gates)}")
    rows = (len(chosen) + 2) // 3
    figure = Figure(figsize=(11, 2.9 * rows + 0.5), dpi=100)
    axes = figure.subplots(rows, min(3, len(chosen)), sharex=True, squeeze=False).flatten()
    for axis, layer in zip(axes, chosen, strict=False):
        for component, curve in gates[layer].items():
            axis.plot(*zip(*curve, strict=True), label=component.replace("alpha_", "α "), linewidth=1.3)
        axis.axhline(1 / len(gates[layer]), color="grey", linewidth=0.6, linestyle=":")
        axis.set_title(layer, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("optimizer step", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=10, fontsize=7)
    figure.set_layout_engine("constrained")
    figure.savefig(args.out)
    print(f"{args.out}: {', '.join(chosen)}")


if __name__ == "__main__":
    main()
