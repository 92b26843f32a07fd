"""The command line: medley demo, generate, compare, batch, annotate, evaluate, export, merge, convert, profile, train, ui, pull, loras,
inspect, index, lookup, methods, doctor.

torch and diffusers are imported inside commands only, so that `medley --help` answers at once. Errors are one line on
stderr and exit code 2; Ctrl-C ends with 130 and leaves nothing half-written.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from typer.exceptions import Abort, Exit, TyperException

from app import concepts, engines, options, remarks, settings, workbench
from app.cli import (
    annotate,
    batch,
    convert,
    evaluate,
    export,
    flags,
    index,
    inspect,
    merge,
    recalled,
    session,
    suggest,
    tables,
    trainings,
)
from app.cli.arguments import (
    PICTURES,
    AllowDownload,
    AllowPaths,
    Anchored,
    Controls,
    Denoiser,
    Device,
    Dtype,
    Embeddings,
    Enlarged,
    Fit,
    Folders,
    From,
    Guidance,
    Json,
    Loras,
    Mask,
    Masks,
    Model,
    NamedOnly,
    Negative,
    Offload,
    Option,
    Out,
    Partial,
    Prompt,
    Quantize,
    Sampler,
    Seed,
    Size,
    Soft,
    StartFrom,
    Steps,
    Strength,
    Triggers,
    TrueGuidance,
    Vae,
    Windows,
)
from app.errors import sentence
from app.terminal import Terminal, closed, err, forgiving, gone, out, printable
from composition import Cancelled, Lora, Request, __version__, record
from composition.backbones.loading import catalog
from composition.refusal import MAX_QUOTED, shortened

app = typer.Typer(help="Medley composes several LoRAs into one picture.", no_args_is_help=True, add_completion=False)
app.add_typer(trainings.sub, name="train")

DEMO = Request(prompt="a raccoon and a fox on the moon, neon lights",
               loras=[Lora("raccoon", weight=0.8), Lora("moon", weight=0.7), Lora("neon", weight=0.5)], seed=2)


def _place(
    device: str | None, dtype: str | None, offload: str, folders: list[Path] | None, quantize: str | None = None,
    denoiser: str | None = None, vae: str | None = None,
) -> engines.EngineOptions:
    return engines.EngineOptions(device, dtype, offload, engines.folders(folders or []), quantize, denoiser, vae)


@app.command()
def demo(out_dir: Out = PICTURES, device: Device = None, dtype: Dtype = None) -> None:
    """Compose three bundled LoRAs in three ways, beside the picture of the prompt alone. Needs no network."""
    record.ready(out_dir)
    _compare(DEMO, {"merge": {}, "switch": {}, "composite": {}}, out_dir, "demo", engines.EngineOptions(device, dtype), drawn=False)


@app.command()
def generate(
    context: typer.Context, prompt: Prompt = None, lora: Loras = None,
    method: Annotated[str | None, typer.Option(help="How the LoRAs are composed (merge); see `medley methods`.")] = None,
    option: Option = None, control: Controls = None, start_from: StartFrom = None, strength: Strength = None, mask: Mask = None,
    soft: Soft = None, fit: Fit = None, hires: Enlarged = None, model: Model = None, sampler: Sampler = None, negative: Negative = None,
    seed: Seed = None, steps: Steps = None, guidance: Guidance = None, true_guidance: TrueGuidance = None, size: Size = None,
    anchored: Anchored = None, windows: Windows = None, named_only: NamedOnly = None,
    count: Annotated[int | None, typer.Option(help="How many pictures, with seeds seed, seed+1, ... (1).")] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Add the LoRAs that the prompt calls for, with their trigger words (see `medley suggest`).")] = False,
    out_dir: Out = PICTURES, triggers: Triggers = False, allow_partial: Partial = None, picture: From = None,
    allow_paths: AllowPaths = False, allow_download: AllowDownload = False,
    keep_paths: Annotated[bool, typer.Option("--keep-paths", help="Write the paths of files into the picture, not only their names.")] = False,
    device: Device = None, dtype: Dtype = None, offload: Offload = "auto", quantize: Quantize = None, denoiser: Denoiser = None,
    vae: Vae = None, embedding: Embeddings = None, lora_dir: Folders = None, masks: Masks = False,
    save_request: Annotated[Path | None, typer.Option("--save-request", metavar="FILE.json", help="Write the request, with all that was settled, as a file for "
                                                      "--from.")] = None,
    json: Json = False,
) -> None:
    """Make pictures from a prompt and LoRAs."""
    record.ready(out_dir)
    place, original = _place(device, dtype, offload, lora_dir, quantize, denoiser), recalled.start(picture, model, allow_paths, allow_download, vae)
    request, drawn = flags.request(context.params, original.request if original else None)
    say = err if json else out
    request = suggest.added(request, place.folders, method, say) if auto else request
    with engines.open_engine(request.model, replace(place, vae=request.vae or None)) as engine:
        request = recalled.located(request, original, engine, strict=not allow_paths and not lora)
        request, settled = engine.settle(request)
        for line in remarks.remarks(settled):
            say.print(Text(printable(line), style="dim"))
        request = _triggered(request, engine, say) if triggers else request
        if save_request is not None:
            say.print(Text(printable(f"request: {record.save_request(request, save_request, keep_paths=keep_paths)}"), style="dim"))
        results, drawn_places = [], []
        with workbench.bench(engine, request.length * request.count, err) as at:
            for path, result in session.pictures(at, request, out_dir, keep_paths=keep_paths):
                results.append((path, result))
                if masks:
                    drawn_places.append(session.places(path, result))
                if original and len(results) == 1:
                    receipts = dict(zip(request.names, result.receipts, strict=True))
                    for line in record.differences(original, receipts, record.versions(), result.condition_receipts, result.notes):
                        err.print(Text(printable(line), style="yellow"))
    if json:
        out.document(tables.generated(request, results, drawn))
        return
    tables.result(out, replace(results[0][1], request=request), drawn)
    for line in remarks.timeline(results[0][1].notes):
        out.print(Text(line))
    for path, result in results:
        out.print(Text(f"{path}  seed {result.request.seed}, {sum(result.seconds.values()):.1f} s"))
        if line := concepts.lost(concepts.verdicts(result.request, result.receipts, result.images[0])):
            out.print(Text(printable(f"{path.name}: {line}"), style="yellow"))
    for sheet in filter(None, drawn_places):
        out.print(Text(f"{sheet}  {'how far each LoRA is let through, by layer and step' if sheet.stem.endswith('-gates') else 'where each LoRA acts'}"))
    if masks and (names := remarks.everywhere(results[0][1].notes)):
        out.print(Text(f"on everywhere: {', '.join(names)}"))
    if masks and not any(drawn_places) and not results[0][1].notes.get("no regions"):
        out.print(Text(f"no masks: method {request.method} computes none; clora, clora-fast, regions and autolora do", style="yellow"))


@app.command()
def compare(
    context: typer.Context, prompt: Prompt = None, lora: Loras = None,
    methods: Annotated[str | None, typer.Option(help="Which, as merge,composite (all).")] = None,
    option: Option = None, control: Controls = None, start_from: StartFrom = None, strength: Strength = None, mask: Mask = None,
    soft: Soft = None, fit: Fit = None, hires: Enlarged = None, model: Model = None, sampler: Sampler = None, negative: Negative = None,
    seed: Seed = None, steps: Steps = None, guidance: Guidance = None, true_guidance: TrueGuidance = None, size: Size = None,
    anchored: Anchored = None, windows: Windows = None, named_only: NamedOnly = None,
    out_dir: Out = PICTURES, triggers: Triggers = False,
    allow_partial: Partial = None, picture: From = None, allow_paths: AllowPaths = False, allow_download: AllowDownload = False,
    device: Device = None, dtype: Dtype = None, offload: Offload = "auto", quantize: Quantize = None, denoiser: Denoiser = None,
    vae: Vae = None, embedding: Embeddings = None, lora_dir: Folders = None,
) -> None:
    """The same seed and LoRAs by every method, and without any LoRA, side by side."""
    record.ready(out_dir)
    place, original = _place(device, dtype, offload, lora_dir, quantize, denoiser), recalled.start(picture, model, allow_paths, allow_download, vae)
    from composition import methods as known

    names = [name.strip() for name in methods.split(",")] if methods else sorted(known.all(), key=lambda name: name != "merge")
    ways = options.options_of_each(option or [], [known.find(name).name for name in names])
    request, drawn = flags.request(context.params | {"option": None}, original.request if original else None)
    if request.method in ways:
        ways[request.method] = {**request.options, **ways[request.method]}
    _compare(request, ways, out_dir, "compare", place, drawn=drawn, triggers=triggers, original=original, strict=not allow_paths and not lora)


def _compare(
    request: Request, ways: dict[str, dict[str, Any]], folder: Path, prefix: str, place: engines.EngineOptions, *, drawn: bool,
    triggers: bool = False, original: record.Record | None = None, strict: bool = False,
) -> None:
    with engines.open_engine(request.model, replace(place, vae=request.vae or None)) as engine:
        request = recalled.located(request, original, engine, strict=strict)
        settled_request, settled = engine.settle(replace(request, options={}))
        request = replace(settled_request, options=request.options)  # each way has its own, and its order is settled with it
        for line in remarks.remarks({name: note for name, note in settled.items() if name != "order"}):
            out.print(Text(printable(line), style="dim"))
        request = _triggered(request, engine, out) if triggers else request
        with workbench.bench(engine, request.length * (1 + len(ways)), err) as at:
            tiles, sheet = session.compare(at, request, ways, folder, prefix)
    out.print(Text(f"{request.prompt}  seed {request.seed}"))
    tables.result(out, next(tile.result for tile in tiles[1:] if tile.result), drawn)
    tables.tiles(out, tiles, sheet)


def _triggered(request: Request, engine: Any, say: Terminal) -> Request:
    request, added = flags.with_triggers(request, engine.inspect)
    if added:
        say.print(Text(f"prompt with trigger words: {request.prompt}"))
    return request


app.command(epilog=batch.EPILOG)(batch.batch)
app.command(epilog=annotate.EPILOG)(annotate.annotate)
app.command(epilog=evaluate.EPILOG)(evaluate.evaluate)
app.command(epilog=export.EPILOG)(export.export)
app.command(epilog=merge.EPILOG)(merge.merge)
app.command(epilog=convert.EPILOG)(convert.convert)
app.command()(suggest.suggest)
app.command()(suggest.search)


@app.command()
def profile(
    lora: Annotated[list[str], typer.Argument(metavar="LORA...", help="LoRAs by name or path.")],
    prompt: Annotated[str, typer.Option(help="What to draw (each LoRA's first trigger word); such a profile is shown, not kept.")] = "",
    steps: Annotated[int | None, typer.Option(min=4, max=1000, help="Denoising steps (50; of a behaviour 8).")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, max=64, help="Pictures with and without each LoRA (4; of a behaviour 2 of each of its prompts).")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure again, even where a profile is kept.")] = False,
    behaviour: Annotated[bool, typer.Option("--behaviour", help="Measure what the LoRA does to pictures of any prompt instead, as the judge sees it: "
                                            "LoRAs are searched by it.")] = False,
    judge: Annotated[str, typer.Option(help="The judge of a behaviour: pocket, MODEL:WEIGHTS of open-clip, or a folder.")] = "pocket",
    model: Model = None, out_dir: Out = PICTURES, device: Device = None, dtype: Dtype = None, offload: Offload = "auto",
    lora_dir: Folders = None, json: Json = False,
) -> None:
    """Measure how a LoRA moves high and low frequencies while it draws: the order that cmlora and switch-a use. Or its behaviour."""
    if not behaviour:
        record.ready(out_dir)
    engines.prepare(model or "pocket")
    from app.cli import profile as profiling
    from app.drawing.profile_plot import plot

    with engines.open_engine(model or "pocket", _place(device, dtype, offload, lora_dir)) as engine:
        for source in lora:
            engine.find(source)
        if behaviour:
            behaviours = profiling.searched(engine, lora, prompt=prompt, steps=steps, seeds=seeds, again=again, judge=judge, console=err)
            out.document(tables.as_json({"behaviours": [asdict(item) for item, _ in behaviours]})) if json else tables.behaviours(out, behaviours)
            return
        steps, seeds = steps or 50, seeds or 4
        with workbench.bench(engine, 2 * steps * seeds * len(lora), err) as at:
            profiles = profiling.measure(at, lora, prompt=prompt, steps=steps, seeds=seeds, again=again)
    measured = [item for item, _ in profiles]
    names, low = profiling.described(measured)
    path = record.publish(plot(measured), out_dir, f"profile-{record.free(out_dir, 'profile-'):04d}")
    if json:
        out.document(tables.as_json({"order": names, "low": low, "plot": str(path), "profiles": [asdict(item) for item in measured]}))
        return
    tables.profiles(out, profiles, names, low)
    out.print(Text(f"plot: {path}"))


@app.command()
def ui(
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The port (the first free one from 7860).")] = None,
    model: Model = None, device: Device = None, dtype: Dtype = None, offload: Offload = "auto", lora_dir: Folders = None,
    vae: Vae = None, out_dir: Out = PICTURES, browse: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    longest: Annotated[float, typer.Option(min=0.1, max=10_000, metavar="MINUTES", help="Minutes that a picture may take: what would take longer, "
                                           "by this machine's speed, is refused.")] = 30.0,
) -> None:
    """The page: make pictures in a browser, on this machine alone."""
    record.ready(out_dir)
    engines.prepare(model or "pocket")
    from app.ui import serve

    number, place = serve.port(port), _place(device, dtype, offload, lora_dir, vae=vae)
    with engines.open_engine(model or "pocket", place) as engine:
        serve.serve(engine, out_dir, number, lambda address: out.print(Text(f"{address}  (Ctrl-C stops)")), browse=browse,
                    longest=60 * longest)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A hub id as org/name, or a short name: " + ", ".join(catalog.KNOWN) + ".")],
) -> None:
    """Fetch a model from the Hugging Face hub; shows its licence, and asks for your token where that must be accepted."""
    from app.cli import pull as pulling

    pulling.pull(name, out, pulling.asker())


@app.command()
def loras(
    model: Model = None, lora_dir: Folders = None,
    hashes: Annotated[bool, typer.Option("--hashes", help="With --json: read every file whole, for its hashes.")] = False, json: Json = False,
) -> None:
    """The LoRAs that can be named, and what reads pictures that control: bundled with the model, in your folder, in --lora-dir."""
    engines.prepare(model or "pocket")
    from composition.condition_sources import named as named_controls
    from composition.loras import library

    folders = engines.folders(lora_dir or [])
    controls = named_controls(model or "pocket", folders)
    read_pictures = {each.path for each in controls}
    listed = [each for each in library.listing(model or "pocket", folders, hashes=hashes) if each.path not in read_pictures]
    if json:
        out.document(tables.loras_json(listed, controls))
    else:
        tables.loras(out, listed, settings.lora_folder())
        tables.controls(out, controls)


app.command(epilog=inspect.EPILOG)(inspect.inspect)
app.command()(index.index)
app.command()(index.lookup)


@app.command()
def methods() -> None:
    """The ways of composing LoRAs, with their cost, paper and options."""
    engines.prepare("pocket")
    from composition import methods as known

    tables.methods(out, known.all())


@app.command()
def doctor(device: Device = None, dtype: Dtype = None) -> None:
    """Versions, device, memory, bundled models: what will run here. Exit code 1 when something that ships does not."""
    from app.cli.doctor import examine

    report = examine(engines.EngineOptions(device, dtype))
    rows = Table.grid(padding=(0, 2))
    for name, finding in report.lines:
        rows.add_row(Text(name, style="dim"), Text(finding))
    out.print(rows)
    out.print("everything will run" if report.healthy else "something does not run; see above")
    if not report.healthy:
        raise Exit(1)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(f"medley {__version__}")
        raise Exit(0)


def run(command: Callable[[], Any], words: Sequence[str] = ()) -> int:
    """Call it; turn what it raises into one line on stderr and an exit code. MEDLEY_DEBUG=1 shows the traceback.

    words: those of the command line, of which an error repeats the ends alone where they are long.
    """
    try:
        code = command()
        return code if isinstance(code, int) else 0
    except Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, Abort, Cancelled):
        return _fail("cancelled", 130)
    except BrokenPipeError:
        closed(sys.stdout)
        return 0
    except SystemExit as error:  # so rich's own console, which writes the help, ends when nobody reads on
        return 0 if gone(sys.stdout) else error.code if isinstance(error.code, int) else 2
    except Exception as error:
        if os.environ.get("MEDLEY_DEBUG"):
            raise
        complaint = flags.hinted(error.format_message(), _command(error)) if isinstance(error, TyperException) else sentence(error)
        for word in filter(lambda word: len(word) > MAX_QUOTED, words):
            complaint = complaint.replace(word, shortened(f'"{word}"')[1:-1])
        return _fail(shortened(complaint), 2) if complaint.strip() else 2  # no command was named: the help was printed


def _command(error: TyperException) -> str:
    """The command whose words were wrong, "" where none was reached."""
    return getattr(getattr(error, "ctx", None), "info_name", None) or ""


def _fail(sentence: str, code: int) -> int:
    err.print(Text("medley: " + printable(" ".join(sentence.split()))))
    return code


def main() -> None:
    """The console script."""
    forgiving()
    sys.exit(run(lambda: typer.main.get_command(app).main(prog_name="medley", standalone_mode=False), sys.argv[1:]))


if __name__ == "__main__":
    main()
