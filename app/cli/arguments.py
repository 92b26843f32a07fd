"""Arguments and flags that several commands share, with their help. None: not set, so that what --from has is kept."""

from pathlib import Path
from typing import Annotated

import typer

Prompt = Annotated[str | None, typer.Argument(help="What to draw. Trigger words are not added unless --triggers is given.")]
Loras = Annotated[list[str] | None, typer.Option(
    "--lora", metavar="NAME[:WEIGHT]", help="A LoRA by name or path, with its weight (1). Repeat for more. JSON with the "
    "fields of a Lora works too.")]
Controls = Annotated[list[str] | None, typer.Option(
    "--control", metavar="NAME=PICTURE[:STRENGTH]", help="A picture that controls: a condition LoRA or ControlNet by name or path, the picture, "
    "and how much heed is paid to it (1). Repeat for more. JSON with the fields of a Condition works too.")]
StartFrom = Annotated[str | None, typer.Option("--picture", metavar="PICTURE", help="A picture to start from, in place of noise.")]
Strength = Annotated[float | None, typer.Option(help="How much of --picture is made anew: over 0, up to 1 (0.6).")]
Mask = Annotated[str | None, typer.Option("--mask", metavar="PICTURE", help="White where --picture is painted anew; the rest of it is kept to the bit.")]
Soft = Annotated[int | None, typer.Option(metavar="PIXELS", help="Over so many pixels inside the white the new comes in (4).")]
Fit = Annotated[str | None, typer.Option(metavar="crop|contain|stretch", help="How a --picture of another shape than --size is brought to it (crop).")]
Enlarged = Annotated[str | None, typer.Option("--hires", metavar="FACTOR[:STRENGTH]", help="A second pass: the picture enlarged and denoised again with "
                                              "this strength (0.5). JSON with the fields of a Hires works too.")]
Option = Annotated[list[str] | None, typer.Option(
    "--option", metavar="KEY=VALUE", help="An option of the method. Repeat for more.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="A bundled name, a diffusers folder, a .safetensors "
                                           "checkpoint, or a hub id (pocket).")]
Sampler = Annotated[str | None, typer.Option(help="Sampler by name (the model's own).")]
Negative = Annotated[str | None, typer.Option(help="What to avoid.")]
Seed = Annotated[int | None, typer.Option(help="The seed (drawn, and printed).")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps (the model's own).")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale (the model's own); 1 or less is off.")]
TrueGuidance = Annotated[float | None, typer.Option(help="For guidance-distilled models such as FLUX.1-dev: over 1, "
                                                    "guidance against the negative prompt as well.")]
Anchored = Annotated[bool | None, typer.Option("--anchored/--no-anchored", help="Guide away from what the base draws of the negative prompt without "
                                               "any LoRA, by whichever method (off).")]
Windows = Annotated[str | None, typer.Option(metavar="both|style|none", help="style: LoRAs of style are on in the last 70 % of the steps; both: and those of "
                                             "content in the first 70 %; not where a LoRA has a start or an end (none).")]
NamedOnly = Annotated[bool | None, typer.Option("--named-only/--no-named-only", help="Leave out every LoRA none of whose trigger words is in the prompt (off).")]
Size = Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels (the model's own).")]
Out = Annotated[Path, typer.Option("--out", "--output", "-o", help="Folder for the pictures.")]
Triggers = Annotated[bool, typer.Option("--triggers", help="Add a trigger word of every LoRA that has none in the prompt.")]
Partial = Annotated[bool | None, typer.Option("--allow-partial", help="Use LoRAs of which not every tensor fits.")]
Embeddings = Annotated[list[str] | None, typer.Option("--embedding", metavar="FILE[:WORD]", help="A textual inversion, and the word of the prompts that stands "
                                                       "for it (the file's own). Repeat for more. embedding:NAME in a prompt needs no flag.")]
Vae = Annotated[str | None, typer.Option(metavar="FOLDER|FILE|HUB ID", help="Another VAE (autoencoder) of the model's family in place of its own.")]
From = Annotated[Path | None, typer.Option("--from", metavar="PICTURE.png|REQUEST.json", help="Start from the request in this picture or file.")]
AllowDownload = Annotated[bool, typer.Option("--allow-download", help="Let the record of --from fetch a model from the hub.")]
AllowPaths = Annotated[bool, typer.Option("--allow-paths", help="Let the record of --from open files of this machine by path.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps (the best there is).")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16 (what suits the device).")]
Offload = Annotated[str, typer.Option("--offload", "--cpu-offload", help="auto, none, model, sequential or group.")]
Quantize = Annotated[str | None, typer.Option("--quantize", "--quantise", metavar="KIND", help="Large models in little memory: nf4 or "
                                              "8bit (bitsandbytes, CUDA), int8 or fp8 (torchao).")]
Denoiser = Annotated[str | None, typer.Option(metavar="FILE", help="A .gguf or .safetensors file of FLUX's or SD3's transformer alone, in "
                                              "place of the model's own.")]
Folders = Annotated[list[Path] | None, typer.Option("--lora-dir", help="A folder in which LoRAs are found by name.")]
Masks = Annotated[bool, typer.Option("--masks", help="Also save where each concept is (clora, clora-fast, regions), or the gates of autolora as a heat map.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PICTURES = Path("pictures")
