"""The commands `rorqual scaling …`: their arguments, and what they print."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from train.scaling.errors import ScalingError

scaling = typer.Typer(no_args_is_help=True, help="Scaling laws: measure, fit, forecast.")

INTERRUPTED = 130  # exit code, as a shell gives it after Ctrl-C

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RunsFolder = Annotated[Path, typer.Argument(metavar="RUNS", help="A ladder's folder, or a table kept of it.")]
LadderFile = Annotated[Path, typer.Argument(metavar="LADDER", help="A ladder's YAML file.")]


@scaling.command()
def run(
    ladder: LadderFile,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Cells at once on this machine; default: one a GPU, or one a core.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes of each cell (torchrun).")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it amounts to, and stop.")] = False,
) -> None:
    """Run a ladder's cells, or those that are left. Several machines may run the same ladder in one folder."""
    import torch

    from train.scaling.ladder.execute import Execution
    from train.scaling.ladder.ladder import load_ladder
    from train.scaling.ladder.preflight import preflight

    loaded = load_ladder(ladder)
    preflight(ladder, loaded, processes)
    places = torch.cuda.device_count() if torch.cuda.is_available() else len(os.sched_getaffinity(0))
    execution = Execution(loaded, jobs or max(1, places // processes), processes, _say)
    if dry_run or not execution.is_finished:
        for line in execution.describe():
            _say(line)
    if dry_run:
        return
    try:
        execution.run()
    except KeyboardInterrupt:
        print("stopped; what is finished is kept: start the same command again to go on", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


@scaling.command()
def table(
    runs: RunsFolder,
    out: Annotated[
        Path | None, typer.Option(help="Write the table as text, with what the runs have in common, here.")
    ] = None,
) -> None:
    """Show a ladder's runs, or keep them as a small folder that can be fitted anywhere."""
    from train.scaling.ladder.table import keep, read_rows

    if out is not None:
        keep(runs, out)
        print(out)
        return
    for row in read_rows(runs):
        print("\t".join("" if value is None else str(value) for value in row.values()))


@scaling.command()
def fit(
    runs: Annotated[
        Path | None, typer.Argument(metavar="RUNS", help="A ladder's folder, or a table kept of it.")
    ] = None,
    points: Annotated[Path | None, typer.Option(help="Fit this CSV file of runs instead.")] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help="What its columns are: loss=…, params=…, active=…, flops=…, tokens=…, lr=…, batch=…*2048, seed=…"
        ),
    ] = None,
    loss_unit: Annotated[
        Literal["nats", "bits"], typer.Option(help="What the losses are in: nats per token, or bits per byte.")
    ] = "nats",
    drop_highest: Annotated[int, typer.Option(min=0, help="Leave so many of the highest losses out of L(N, D).")] = 0,
    drop_outliers: Annotated[
        bool,
        typer.Option("--drop-outliers", help="Leave runs out of L(N, D) that are over 5 robust sd off a first fit."),
    ] = False,
    draws: Annotated[int, typer.Option(min=0, help="Samples of each bootstrap.")] = 400,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstraps.")] = 0,
    name: Annotated[str | None, typer.Option(help="Of the law; default: the folder's or file's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the law here (law.json).")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with pictures here.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="Write the pictures as PNG into this folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Fit the laws that runs can tell, with intervals, and forecast the largest budget from the others."""
    from train.scaling.fits.fit import fit_runs
    from train.scaling.fits.points import read_points
    from train.scaling.ladder.common import read_common
    from train.scaling.ladder.table import read_runs
    from train.scaling.law import save_law
    from train.scaling.output import check_output

    for option, path in (("out", out), ("html", html)):
        if path is not None:
            check_output(path, option)
    if (runs is None) == (points is None):
        raise ScalingError("fit: give either RUNS, a ladder's folder, or --points FILE.csv with --columns")
    if points is not None:
        if columns is None:
            raise ScalingError(
                "columns: missing; say what the columns are, for example --columns params=N,tokens=D,loss=loss"
            )
        found, common, place = read_points(points, columns), None, points
    else:
        assert runs is not None
        found, common, place = read_runs(runs), read_common(runs), runs
    result = fit_runs(
        found,
        name=name or place.resolve().stem,
        source=f"{len(found)} runs of {place.name}",
        common=common,
        loss_unit="nats per token" if loss_unit == "nats" else "bits per byte",
        highest=drop_highest,
        without_outliers=drop_outliers,
        draws=draws,
        seed=seed,
    )
    if out is not None:
        save_law(result.law, out)
    if html is not None:
        from train.scaling.report.page import write_page

        write_page(result, html, f"Scaling laws: {result.law.name}")
    if pictures is not None:
        from train.scaling.report.page import write_pictures

        write_pictures(result, pictures)
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        _print_fit(result.to_dict())


@scaling.command()
def forecast(
    law: Annotated[
        str,
        typer.Argument(metavar="LAW", help="A law.json, or deepseek-llm, step-law, ling-moe, chinchilla, ladder-cpu."),
    ],
    flops: Annotated[
        float | None, typer.Option(help="C: training FLOPs without embedding, output head and MTP.")
    ] = None,
    gpu_hours: Annotated[
        float | None, typer.Option(help="Hours of all devices together, which pay for everything.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Of the hours: h100, h200, b200 … or a driver's name.")] = None,
    mfu: Annotated[float | None, typer.Option(help="Model FLOPs utilisation of the hours; default: 0.4.")] = None,
    params: Annotated[float | None, typer.Option(help="N: without embedding and head, all experts counted.")] = None,
    tokens: Annotated[float | None, typer.Option(help="D, with --params.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="A recipe whose models and text the run has; default: the law's family, or small."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write a recipe that trains it here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Size, tokens, learning rate, batch and loss of a budget, with intervals, and a recipe that can be trained as it is."""
    from train.config import load_recipe
    from train.scaling import forecast as forecasts
    from train.scaling.law import load_law
    from train.scaling.output import check_output, write_output
    from train.scaling.recipes import recipe_of, run_of

    if out is not None:
        check_output(out)
    if mfu is not None and gpu_hours is None:
        raise ScalingError(f"mfu = {mfu:g}: goes with gpu_hours and device; leave it out, or give both")
    if (gpu_hours is None) != (device is None):
        raise ScalingError("gpu_hours, device: go together; give for example --gpu-hours 1000 --device h200")
    paid = None
    if gpu_hours is not None and device is not None:
        paid = forecasts.gpu_hours(device, gpu_hours, forecasts.MFU if mfu is None else mfu)
    template = load_recipe(recipe) if recipe else None
    found = forecasts.forecast(
        load_law(law), flops=flops, device_flops=paid, params=params, tokens=tokens, template=template
    )
    trained = recipe_of(found, law=law)
    if out is not None:
        write_output(out, trained.to_yaml())
    values = found.to_dict() | {"run": run_of(trained), "recipe": None if out is None else str(out)}
    print(json.dumps(values)) if as_json else _print_forecast(values)


def _print_fit(result: dict[str, Any]) -> None:
    for warning in result["warnings"]:
        print(f"warning: {warning}")
    noise = f", seeds differ by {result['noise']:.2%}" if result["noise"] else ""
    print(f"{result['runs']} runs{noise}" + "".join(f"; {what} left out" for what in result["dropped"]))
    for method in result["fits"]:
        objective = f", objective {method['objective']:.8g}" if "objective" in method else ""
        print(f"\n{method['what']} by {method['method']}: {method['form']}{objective}")
        for key, estimate in method["coefficients"].items():
            interval = "" if estimate["low"] is None else f"   {estimate['low']:.5g} to {estimate['high']:.5g}"
            print(f"  {key:16} {estimate['value']:12.6g}{interval}")
    for held in result["held_out"]:
        print(f"\nheld out: C = {held['flops']:.3g}")
        for key in ("loss", "lr", "batch"):
            if held[key] is not None:
                interval = "" if held[key]["low"] is None else f" ({held[key]['low']:.4g} to {held[key]['high']:.4g})"
                print(f"  {key:5} forecast {held[key]['value']:.4g}{interval}, measured {held[f'measured_{key}']:.4g}")
        if held["regret"] is not None:
            print(f"  the forecast lr and batch cost {held['regret']:.2%} of the loss")
        if held["inside"] is False:
            print("  the forecast lr and batch lie outside of the grid: what they cost is not known")


def _print_forecast(values: dict[str, Any]) -> None:
    from train.scaling.apply import NAMES

    for warning in values["warnings"]:
        print(f"warning: {warning}")
    run, law = values["run"], values["law"]
    rate = "M" if values["compute"] == "M*D" else "6N"  # C/D

    def other(of: str) -> str:
        return f"by {values[of]}" if values[of] != law else ""

    print("the run, as in its recipe:")
    _print_rows(
        [
            (
                f"C = {values['compute']}",
                f"{values['flops']:.4g} FLOPs; {values['all_flops']:.4g} with output head and MTP",
            ),
            ("model", f"width {values['hidden_size']}, {values['num_hidden_layers']} layers"),
            ("N", f"{values['params']:,} parameters without embedding and head, {values['active']:,} active"),
            ("M", f"{values['flops_per_token']:,} FLOPs per token; {values['all_flops_per_token']:,} with all"),
            ("tokens", f"{run['tokens']:,} in {run['steps']:,} steps, {run['warmup_steps']:,} of warm-up"),
            ("batch", f"{run['batch_tokens']:,} tokens, {run['sequences']:,} × {run['sequence_length']:,}"),
            ("learning rate", f"{run['lr']:.4g}"),
        ]
    )
    print(f"by law {law}:")
    _print_rows(
        [
            (f"{rate} of the best allocation at C", _told(values["best_flops_per_token"], "FLOPs per token")),
            ("D of the best allocation at C", _told(values["best_tokens"], "tokens")),
            ("learning rate", _told(values["lr"], other("lr_law"))),
            ("batch", _told(values["batch_tokens"], f"tokens {other('batch_law')}")),
            ("loss", _told(values["loss"], values["loss_unit"])),
        ]
    )
    for name, distances in values["distances"].items():
        far = [f"{NAMES[quantity]} {decades:.1f}" for quantity, decades in distances.items()]
        print(f"decades (factors of 10) outside of what law {name} was measured on: {', '.join(far) or 'unknown'}")
    if values["recipe"]:
        print(f"written to {values['recipe']}")


def _print_rows(rows: list[tuple[str, str | None]]) -> None:
    for name, value in rows:
        if value is not None:
            print(f"  {name:30} {value}")


def _told(estimate: dict[str, float | None] | None, unit: str = "") -> str | None:
    """A law's number with its 95 % interval."""
    if estimate is None:
        return None
    interval = "" if estimate["low"] is None else f" ({estimate['low']:.4g} to {estimate['high']:.4g})"
    return f"{estimate['value']:.4g}{interval} {unit}".rstrip()


def _say(line: str) -> None:
    print(line, flush=True)
