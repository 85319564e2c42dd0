"""Results of benchmarks for people."""

from typing import Any

from rich import box
from rich.table import Table

from affcache.progress import duration_text
from cli.console import out
from cli.show import fact_table


def machine_text(machine: dict[str, Any]) -> str:
    """Return what a benchmark ran on in one line."""
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def extract(result: Any) -> None:
    """Print the pipeline's rate and the bare encoder's."""
    compiled = ", compiled" if result.compiled else ""
    out(
        fact_table(
            {
                "pipeline": f"{result.rate:,.2f} crops/s, from files to committed rows",
                "bare encoder": f"{result.bare:,.2f} crops/s",
                "ratio": f"{result.ratio:.3f}, median of {len(result.rates)} rounds of {result.crops:,} crops",
                "time": ", ".join(f"{stage} {share:.0%}" for stage, share in result.shares.items()),
                "bottleneck": result.bottleneck,
                "encoder": f"{result.model} in {result.precision}, {result.batch_size} crops a call{compiled}",
                "workers": result.workers,
                "machine": machine_text(result.machine),
            }
        )
    )


def predict(result: Any) -> None:
    """Print the rate from a video to a table, and those of its two halves alone."""
    out(
        fact_table(
            {
                "predict": f"{result.rate:,.2f} frames/s, from the video to the table",
                "detecting alone": f"{result.detecting:,.2f} frames/s: decoded, faces found, tracked and cut out",
                "encoding alone": f"{result.encoding:,.2f} frames/s: the bare encoder",
                "ratio": f"{result.ratio:.3f} of the slower one, {result.shared:.3f} of one after the other; medians "
                f"of {len(result.rates)} rounds of {result.frames:,} frames, {result.faces:,} faces",
                "encoder": f"{result.model} in {result.precision}, {result.batch_size} crops a call",
                "workers": result.workers,
                "machine": machine_text(result.machine),
            }
        )
    )


def fit(result: Any) -> None:
    """Print a step's time, its products' and the reference loop's."""
    facts: dict[str, Any] = {
        "step": f"{result.rate:.2f} ms, CVaR and SAM, {result.batch_size} frames, products in {result.precision}",
        "bare products": f"{result.bare:.2f} ms, the {result.products} that a step needs, in the same format",
        "ratio": f"{result.ratio:.2f}, median of {len(result.rates)} rounds",
    }
    if result.published is not None:
        facts["reference loop"] = f"{result.published:.1f} ms a step, {result.speedup:.1f} times as long"
    facts["evaluation"] = f"{result.evaluation:.1f} s for a million frames"
    facts["paper-size fit"] = f"{duration_text(result.paper_fit)}: 585,317 frames, 32 epochs, each evaluated"
    facts["machine"] = machine_text(result.machine)
    out(fact_table(facts))


def ablate(result: Any) -> None:
    """Print a row for each number of heads."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("heads", "a step", "an epoch", "of one head's", "each, of one's"):
        table.add_column(heading, justify="right")
    for row in result.groups:
        table.add_row(
            str(row.heads),
            f"{row.step:,.1f} ms",
            duration_text(row.epoch),
            f"{row.ratio:.2f}",
            f"{row.ratio / row.heads:.2f}",
        )
    out(table, "an epoch: 585,317 frames, evaluated on 280,532, as Aff-Wild2 has for expr")
    out(f"machine: {machine_text(result.machine)}")


def store(result: Any) -> None:
    """Print a row for each layout."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("layout", "4,096 random rows", "in order", "writing"):
        table.add_column(heading, justify="left" if heading == "layout" else "right")
    for name in dict.fromkeys([*result.random, *result.write]):
        table.add_row(
            name,
            f"{result.random[name]:.1f} ms" if name in result.random else "",
            f"{result.sequential[name]:.2f} GB/s" if name in result.sequential else "",
            f"{result.write[name]:.2f} GB/s" if name in result.write else "",
        )
    out(table, f"random reads: {result.ratio:.2f} of a plain numpy.memmap's rate")


def gpu(result: Any) -> None:
    """Print a row for each part, and below what each says in words."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("part", "measured", "against", "ratio", "took"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for name, part in result.parts.items():
        numbers = gpu_numbers(part.result) if part.state == "measured" else (part.state, "", "")
        table.add_row(name, *numbers, f"{part.seconds:.0f} s")
    out(table, fact_table({name: part.note or part.reason[:200] for name, part in result.parts.items()}))
    out(f"machine: {machine_text(result.machine)}")
    if result.toy:
        out("toy sizes: this says what runs, and measures nothing")
    out(f"{result.seconds:.0f} s in all; written: {result.out}")


def gpu_numbers(found: dict[str, Any]) -> tuple[str, str, str]:
    """Return a part's rate, what it is held against, and their ratio; the tests have none."""
    if "rate" not in found:
        return "", "", ""
    return f"{figures(found['rate'])} {found['unit']}", figures(found["bare"]), f"{found['ratio']:.3f}"


def figures(value: float) -> str:
    """Write a number with three figures or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
