"""`bench plot`: writes docs/benchmarks.md and its plots from the committed rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_modules.paths import given_path
from mixers.errors import ConfigError
from recipes.commands import bench_rows
from recipes.commands.arguments import Arguments
from recipes.commands.bench_arguments import OUT
from recipes.commands.bench_rows import Row
from recipes.commands.bench_train import TRAINING, Training
from recipes.commands.problems import WIDTHS

KINDS = {
    "op": "The ops",
    "layer": "Whole mixers, under autocast",
    "decode": "One token of decoding",
}
RECURRENCES = {*WIDTHS, "attention", "ssd", "siso"}
INTRO = """# Benchmarks

Written by `python -m recipes bench plot` from the rows in `benchmarks/`, which `python -m recipes bench op`, `layer` and `decode` add to. The
newest row of each implementation and shape is shown, so a plot may join rows of several commits: the tables name them. Those of one commit and
day that stand together were timed in one process on the same tensors, in turns, with cold caches; times are medians. Ours get no row at a shape
where their results are not those of the float64 reference (within 4 % of a tensor's largest entry in bfloat16, and within sqrt(tokens / 1,024)
times that where it is a sum over all later tokens that nearly cancels; within 8 % for a whole mixer). Others are held against no limit: `bench
op` shows their errors in the terminal, and their times are taken whatever these are. `gdn2` begins with normalised queries and keys; `gdn2+norm`
begins with raw ones and times each side's own norm with the op. The host runs ahead of the GPU, as inside of a model: a time is that of the GPU.
Only `decode` includes waiting for the host, in its eager rows. Whole trainings (`bench train`) are `fit`, one after the other on one machine:
tokens a second are those of all devices together.
"""


def run(argv: list[str]) -> int:
    """Writes the page and the plots beside the folder of rows."""
    given = _parser().parse_args(argv)
    out, page = given_path(given.out, "--out"), given_path(given.page, "--page")
    if not out.is_dir():
        raise ConfigError(f"--out: no folder {out}")
    if page.is_dir():
        raise ConfigError(f"--page: must be a file, and {page} is a folder")
    try:
        write(out, page)
    except OSError as error:
        raise ConfigError(f"--page: {error.strerror}: {error.filename}") from error
    print(f"wrote {page}")
    return 0


def write(rows_folder: Path, page: Path) -> Path:
    """The page, with a plot for each GPU and size of heads that has rows of several lengths."""
    text = [INTRO]
    tables, trained = {kind: bench_rows.read(rows_folder, kind) for kind in KINDS}, bench_rows.read(rows_folder, TRAINING, Training)
    if not any((*tables.values(), trained)):
        raise ConfigError(f"--out: {rows_folder} holds no rows of {', '.join((*KINDS, TRAINING))}; the page stays as it is")
    page.parent.mkdir(parents=True, exist_ok=True)
    for kind, title in KINDS.items():
        by_gpu: dict[str, list[Row]] = defaultdict(list)
        for row in newest(tables[kind]):
            by_gpu[row.gpu].append(row)
        for gpu, rows in by_gpu.items():
            text += [f"\n## {title}, {gpu}\n"]
            for plot in plots(rows, page.with_name(f"benchmarks_{bench_rows.slug(gpu)}.png")) if kind == "op" else []:
                text += [f"\n![Forward and backward over the length of a sequence]({plot.name})\n"]
            text += ["\n", table(rows)]
    trainings: dict[str, dict[tuple[Any, ...], Training]] = defaultdict(dict)
    for training in trained:
        trainings[training.gpu][training[:6]] = training  # the newest
    for gpu, of_gpu in trainings.items():
        text += [f"\n## Whole trainings, {gpu}\n\n", trainings_table(of_gpu.values())]
    page.write_text("".join(text), encoding="utf-8")
    return page


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row of every implementation, shape and GPU."""
    return list({(row.gpu, *row[:8]): row for row in rows}.values())


def markdown(names: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table with these columns."""
    lines = [" | ".join(map(str, cells)) for cells in (names, *rows)]
    return "\n".join([f"| {lines[0]} |", f"|{'---|' * (lines[0].count(' | ') + 1)}", *(f"| {line} |" for line in lines[1:])]) + "\n"


def versions_of(row: Row | Training) -> str:
    """What a row was measured with."""
    return f"torch {row.torch}, triton {row.triton}, {row.commit}, {row.date}"


def table(rows: list[Row]) -> str:
    """Rows as Markdown, sorted by what they time."""
    names = (
        "what",
        "impl",
        "batch x tokens",
        "heads",
        "K, V",
        "dtype",
        "forward ms",
        "forward + backward ms",
        "memory MiB",
        "first call s",
        "versions",
    )
    lines = []
    for row in sorted(rows, key=lambda r: (r.what, r.tokens, r.batch)):
        versions = versions_of(row)
        sizes = (f"{row.batch} x {row.tokens:,}", row.heads, f"{row.dk}, {row.dv}", row.dtype)
        cells = (row.what, row.impl, *sizes, row.fwd_ms, row.fwd_bwd_ms, row.extra_mib, row.first_call_s, versions)
        lines.append(cells)
    return markdown(names, lines)


def trainings_table(rows: Iterable[Training]) -> str:
    """Trainings as Markdown, in the order in which they were run first."""
    names = (
        "recipe",
        "strategy",
        "GPUs",
        "batch x tokens, micro-batches a step",
        "tokens/s",
        "ratio",
        "TFLOP/s a GPU",
        "MFU",
        "memory GiB",
        "versions",
    )
    lines = []
    for row in rows:
        versions = versions_of(row)
        shape = f"{row.batch} x {row.seq_len:,}, {row.accumulate}"
        mfu = f"{float(row.mfu):.1%}" if row.mfu else ""
        speed = (f"{float(row.tokens_per_second):,.0f}", row.ratio, row.tflops_per_second, mfu, row.peak_memory_gib)
        lines.append((row.recipe, row.strategy, row.devices, shape, *speed, versions))
    return markdown(names, lines)


def plots(rows: Iterable[Row], path: Path) -> list[Path]:
    """Plots of what depends on the length of a sequence, one for each number and size of heads, named after `path`."""
    sizes: dict[tuple[int, int, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row.what in RECURRENCES:
            sizes[row.heads, row.dk, row.dv].append(row)
    files = {path.with_stem(f"{path.stem}_{heads}x{bench_rows.size_of(dk, dv, 'x')}"): its for (heads, dk, dv), its in sorted(sizes.items())}
    return [file for file, its in files.items() if draw(its, file)]


def curves(rows: Iterable[Row]) -> tuple[int, dict[str, list[tuple[int, float]]]]:
    """Tokens in all, and by implementation (length, forward + backward ms): of the number of tokens that has most lengths."""
    by_tokens: dict[int, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.fwd_bwd_ms:
            by_tokens[row.batch * row.tokens][f"{row.what}, {row.impl}"][row.tokens] = float(row.fwd_bwd_ms)
    if not by_tokens:
        return 0, {}
    total = max(by_tokens, key=lambda n: (max(map(len, by_tokens[n].values())), n))
    return total, {name: sorted(points.items()) for name, points in by_tokens[total].items() if len(points) > 1}


def draw(rows: list[Row], path: Path) -> bool:
    """Time over the length of a sequence at a fixed number of tokens; False if no implementation has two lengths."""
    total, lines = curves(rows)
    if not lines:
        return False
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    colors = {what: f"C{n}" for n, what in enumerate(sorted({name.partition(",")[0] for name in lines}))}  # one for each op
    for name, points in sorted(lines.items(), key=lambda line: -line[1][-1][1]):
        style = "-" if ", ours" in name else "--"
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, linestyle=style, color=colors[name.partition(",")[0]], label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    lengths = sorted({tokens for points in lines.values() for tokens, _ in points})
    axes.set_xticks(lengths, [f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}" for tokens in lengths])
    times = [ms for points in lines.values() for _, ms in points]
    subs = (1, 1.5) if max(times) > 3 * min(times) else (1, 1.25, 1.5, 1.75)  # powers of two alone may be one tick, or none
    axes.yaxis.set_major_locator(LogLocator(base=2, subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    title = f"{rows[0].gpu}, {rows[0].heads} heads of {bench_rows.size_of(rows[0].dk, rows[0].dv)}"
    axes.set(xlabel=f"tokens in a sequence, {total:,} in all", ylabel="forward + backward, ms", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return True


def _parser() -> Arguments:
    parser = Arguments("python -m recipes bench plot", "Writes docs/benchmarks.md and its plots from the rows.")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the rows (%(default)s)")
    parser.add_argument("--page", type=Path, default=OUT.parent / "benchmarks.md", help="the page (%(default)s); plots lie beside it")
    return parser
