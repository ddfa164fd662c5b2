"""``python -m bench.report results.json``: what ``pytest bench --benchmark-json=results.json`` found, to be read.

Writes, into ``--out`` (docs/bench), ``report.md``, a table for each suite, with all conditions and whoever is faster;
and two plots: ``share.svg``, fastmb's and the best peer's share of the machine's peak by the size of the work, and
``times.svg``, the time of every peer relative to fastmb's. Whoever runs it gets their own machine's.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

Result = dict[str, Any]

COLOURS = {
    "fastmb": "#d62728",
    "numpy": "#1f77b4",
    "torch": "#ff7f0e",
    "jax": "#2ca02c",
    "sklearn": "#9467bd",
    "built-in": "#7f7f7f",
}


def results(data: Result) -> dict[str, list[Result]]:
    """What `turns.in_turn` noted, by suite; whoever else wrote into the file is left out."""
    found = defaultdict(list)
    for benchmark in data["benchmarks"]:
        info = benchmark["extra_info"]
        if "contenders" in info or "wheel_bytes" in info:
            found[benchmark["group"] or benchmark["name"]].append(info)
    return dict(found)


def time_text(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def best_peer(info: Result) -> tuple[str, float] | None:
    """Who is the fastest of the peers, and how many times fastmb's time it takes."""
    baseline = info.get("baseline", {}).get("name")
    others = {n: result["seconds"] for n, result in info["contenders"].items() if n not in ("fastmb", baseline)}
    if not others:
        return None
    best = min(others, key=lambda name: others[name])
    return best, others[best] / info["contenders"]["fastmb"]["seconds"]


def table(group: str, infos: list[Result]) -> str:
    """A suite as Markdown."""
    names = list(dict.fromkeys(name for info in infos for name in info["contenders"]))
    peers, baselines = any(map(best_peer, infos)), any("baseline" in info for info in infos)
    heads = ["case", "shape", "dtype", "threads", *names, "fastmb: rate", "of the peak", "largest error"]
    heads += ["over the baseline (asked)"] * baselines + ["times the best"] * peers
    lines = [f"## {group}", "", f"| {' | '.join(heads)} |", "|---|---|---|" + "---:|" * (len(heads) - 3)]
    for info in infos:
        ours = info["contenders"]["fastmb"]
        cells = [info["case"], info["shape"], info["dtype"], str(info["threads"])]
        for name in names:
            result = info["contenders"].get(name)
            cells.append(_time_cell(result, bold=name == "fastmb") if result else "-")
        cells.append(f"{ours['rate']:.3g} {info['unit']}" if ours["rate"] else "-")
        cells.append(f"{ours['share']:.0%}" if ours["share"] else "-")
        shown = [
            f"{name} {result['error']:.1e}"
            for name, result in info["contenders"].items()
            if result["error"] is not None
        ]
        cells.append(", ".join(shown) or "-")
        if baselines:
            cells.append(_baseline_cell(info))
        if peers:
            best = best_peer(info)
            cells.append(f"{best[1]:.2f} ({best[0]})" if best else "-")
        lines.append(f"| {' | '.join(cells)} |")
    slower = [info["case"] for info in infos if (best := best_peer(info)) and best[1] < 1]
    lines.append("")
    if peers:
        lines += [f"A peer is faster in: {', '.join(slower)}." if slower else "No peer is faster.", ""]
    return "\n".join(lines)


def _time_cell(result: Result, bold: bool) -> str:
    text = f"**{time_text(result['seconds'])}**" if bold else time_text(result["seconds"])
    return f"{text} ({time_text(result['fastest'])} to {time_text(result['slowest'])})" if bold else text


def _baseline_cell(info: Result) -> str:
    if "baseline" not in info:
        return "-"
    baseline, times = info["baseline"], {name: result["seconds"] for name, result in info["contenders"].items()}
    plain = times[baseline["name"]]
    over = f"{baseline['name']} {baseline['ratio'] - 1:+.1%}"
    if baseline["asked"]:
        return f"{over} ({baseline['asked'] - 1:+.0%})"
    others = [f"{name} {time_text(max(s - plain, 0))}" for name, s in times.items() if name != baseline["name"]]
    return f"{over}: {', '.join(others)}" if len(others) > 1 else over


def sizes(info: Result) -> str:
    """Wheel and installed sizes."""
    installed = (f"{name} {size / 1e6:,.3g} MB" for name, size in info["installed_bytes"].items())
    return f"## size\n\nfastmb's wheel: {info['wheel_bytes'] / 1e6:.2f} MB. Installed: {', '.join(installed)}.\n"


def conditions(infos: list[Result]) -> str:
    """The machine, the versions, who was missing, and what was set that handicaps a peer."""
    versions: dict[str, str] = {}
    environment: dict[str, str] = {}
    for info in infos:
        versions |= info["versions"]
        environment |= info["environment"]
    lines = [
        f"{infos[0]['processor']}; fastmb's instruction set: {infos[0]['isa'] or '-'}. "
        + ", ".join(f"{package} {version}" for package, version in versions.items())
        + "."
    ]
    peaks = defaultdict(list)
    for info in infos:
        if info.get("peak"):
            peaks[info["unit"], info["dtype"], info["threads"]].append(info["peak"])
    kinds = {"GFLOP/s": "Fused multiply-add peak", "GB/s": "Copy bandwidth"}
    lines += [
        f"{kinds[unit]}, {dtype}, threads: {threads}: {min(found):.0f} to {max(found):.0f} {unit}."
        for (unit, dtype, threads), found in peaks.items()
    ]
    lines += sorted({f"Missing: {why}." for info in infos for why in info.get("left_out", ())})
    lines += [f"NOTE: {name}={value} was set and may handicap a peer." for name, value in environment.items()]
    lines.append(
        "Medians of rounds in which all work in turn; in brackets fastmb's fastest and slowest round. `times the best` "
        "is the best peer's time divided by fastmb's: below 1 the peer is faster. A baseline is no peer but the same "
        "work without what is timed: the column says how much longer fastmb takes, and what was asked for at the most."
    )
    return "\n\n".join(lines) + "\n"


def report(found: dict[str, list[Result]], plots: list[str]) -> str:
    """All of it as Markdown."""
    infos = [info for group in found.values() for info in group]
    parts = ["# Benchmarks", conditions(infos), *(f"![{name}]({name}.svg)\n" for name in plots)]
    for group, members in found.items():
        parts += [sizes(info) for info in members if "wheel_bytes" in info]
        timed = [info for info in members if "contenders" in info]
        parts += [table(group, timed)] if timed else []
    return "\n".join(parts)


# ---- plots ---------------------------------------------------------------------------------------------------------


def plot_share(found: dict[str, list[Result]], path: Path) -> bool:
    """Share of the peak by size of the work: fastmb filled, the best peer hollow. False if nothing has a share."""
    groups = {g: [i for i in infos if i.get("peak") and i.get("work")] for g, infos in found.items()}
    groups = {g: infos for g, infos in groups.items() if infos}
    if not groups:
        return False
    figure, axes = _figure(len(groups), 2.6)
    for axis, (group, infos) in zip(axes, groups.items(), strict=True):
        for info in infos:
            shares = {name: result["share"] for name, result in info["contenders"].items() if result["share"]}
            best = best_peer(info)
            for name, share in shares.items():
                if name in ("fastmb", best and best[0]):
                    face = _colour(name) if name == "fastmb" else "none"
                    axis.plot(info["work"], share, "o", color=_colour(name), markerfacecolor=face, markersize=5)
        axis.set(xscale="log", title=group, xlabel="FLOP" if infos[0]["unit"] == "GFLOP/s" else "bytes")
        axis.set_ylabel("share of the peak")
        axis.set_ylim(0, max(1, axis.get_ylim()[1]))  # what stays in a cache is faster than a copy of memory
    _save(
        figure, path, dict.fromkeys(name for infos in groups.values() for info in infos for name in info["contenders"])
    )
    return True


def plot_times(found: dict[str, list[Result]], path: Path) -> bool:
    """Every peer's time relative to fastmb's, a line for each case. False if there is nobody to compare with."""
    groups = {g: [i for i in infos if best_peer(i)] for g, infos in found.items() if "contenders" in infos[0]}
    groups = {g: infos for g, infos in groups.items() if infos}
    if not groups:
        return False
    figure, axes = _figure(len(groups), 0.6 + 0.2 * max(len(infos) for infos in groups.values()))
    for axis, (group, infos) in zip(axes, groups.items(), strict=True):
        for y, info in enumerate(infos):
            ours = info["contenders"]["fastmb"]["seconds"]
            for name, result in info["contenders"].items():
                if name != "fastmb":
                    axis.plot(result["seconds"] / ours, y, "o", color=_colour(name), markersize=5)
        axis.axvline(1, color=_colour("fastmb"), linewidth=1)
        axis.set(xscale="log", title=group, xlabel="times fastmb's time", ylim=(len(infos) - 0.5, -0.5))
        axis.set_yticks(range(len(infos)), [_label(info, infos) for info in infos], fontsize=7)
        axis.grid(axis="x", linewidth=0.3)
    _save(
        figure, path, dict.fromkeys(name for infos in groups.values() for info in infos for name in info["contenders"])
    )
    return True


def _label(info: Result, infos: list[Result]) -> str:
    several = len({other["threads"] for other in infos}) > 1
    return f"{info['case']}, {info['threads']} thr." if several else info["case"]


def _colour(name: str) -> str:
    return COLOURS.get(name, "#17becf")


def _figure(panels: int, height: float) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fastmb", "font.size": 8, "axes.titlesize": 9})
    from matplotlib import pyplot

    columns = min(panels, 3)
    rows = math.ceil(panels / columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.4 * columns, height * rows + 0.6), squeeze=False)
    for axis in axes.flat[panels:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:panels])


def _save(figure: Any, path: Path, names: Any) -> None:
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", linestyle="", color=_colour(name), label=name) for name in names]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False)
    figure.tight_layout(rect=(0, 0.5 / figure.get_figheight(), 1, 1))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Read, write, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Results as a table and plots.")
    parser.add_argument("results", type=Path, nargs="+", help="of pytest bench --benchmark-json=results.json")
    parser.add_argument(
        "--out", type=Path, default=Path("docs/bench"), help="folder to write to (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    found: dict[str, list[Result]] = {}
    for path in args.results:
        for group, infos in results(json.loads(path.read_text())).items():
            found.setdefault(group, []).extend(infos)
    if not found:
        sys.exit(f"{', '.join(map(str, args.results))}: no result that this program can read")
    args.out.mkdir(parents=True, exist_ok=True)
    plots = [
        name for name, plot in (("share", plot_share), ("times", plot_times)) if plot(found, args.out / f"{name}.svg")
    ]
    text = report(found, plots)
    (args.out / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
