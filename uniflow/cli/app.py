"""The commands and their options; what they do stands in the modules beside this one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

Pictures = Annotated[list[Path], typer.Argument(help="Picture files, and folders of them.", show_default=False)]
Checkpoint = Annotated[Path, typer.Option(help="Checkpoint folder, or OWNER/NAME on the Hub.", show_default=False)]
Weights = Annotated[
    str | None,
    typer.Option(help="Which model of a checkpoint that holds several, as in ema.", show_default=False),
]
OutFolder = Annotated[Path, typer.Option("--out", help="Folder to write to.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
KeepSize = Annotated[
    bool, typer.Option("--keep-size", help="Keep each picture's size (to the nearest multiple of the patch).")
]
_MOST_STEPS = 100_000  # their times are counted out before the first
Steps = Annotated[
    int | None, typer.Option(min=1, max=_MOST_STEPS, help="Sampling steps; the checkpoint's own if not given.")
]
Schedule = Annotated[str, typer.Option(help="linear, or pow_ or shifted_ and a number, as in pow_0.25.")]
Solver = Annotated[str, typer.Option(help="euler, heun or midpoint; the last two work twice in a step.")]
Temperature = Annotated[float, typer.Option(min=0, help="What the noise is multiplied by.")]
Cfg = Annotated[float, typer.Option(help="Guidance scale; 1 is none.")]
CfgInterval = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Lowest and highest sigma at which to guide.", show_default=False),
]


def _check_seed(seed: int) -> int:  # said in an error alone: a range of 19 digits would take the help's columns
    if not 0 <= seed < 1 << 63:
        raise typer.BadParameter(f"expected a number from 0 to {2**63 - 1}, got {seed}")
    return seed


Seed = Annotated[int, typer.Option(callback=_check_seed, help="Of the noise.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")]
Precision = Annotated[
    str | None, typer.Option(help="fp8 for products of 8-bit floats, on request.", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto (the GPU where there is one), cpu, cuda or cuda:N.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(help="Memory for the model's work beside weights and pictures, as in 2GB.", show_default=False),
]
Workers = Annotated[int, typer.Option(min=1, help="Threads that read pictures, and as many that write them.")]
Strict = Annotated[
    bool, typer.Option("--strict", help="Stop at a file of a folder that cannot be read, which is else skipped.")
]
MaxPixels = Annotated[int, typer.Option(min=1, help="Pixels (width times height) that a picture to read may have.")]
Json = Annotated[bool, typer.Option("--json", help="Print results as an object of JSON a line.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures at a time.")]
_MAX_PIXELS = 178_956_970  # Pillow's own limit: half a gigabyte
Config = Annotated[Path, typer.Argument(help="YAML file, as those in examples/.", show_default=False)]
RunFolder = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for checkpoints and logs, instead of the file's.", show_default=False),
]
Resume = Annotated[
    str | None,
    typer.Option(help="auto (the newest checkpoint in --out, if any) or a checkpoint folder.", show_default=False),
]


def _say_version(wanted: bool) -> None:
    if wanted:
        from uniflow.cli.printing import say
        from uniflow_kernels import __version__

        say(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """UniFlow: a visual tokenizer that both understands and generates."""


@app.command()
def demo(
    out: OutFolder = Path("out/demo"),
    seconds: Annotated[float, typer.Option(min=1, help="Time to train for.")] = 170,
    seed: Annotated[int, typer.Option(callback=_check_seed, help="Of the weights, the crops and the noise.")] = 0,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Train a tiny UniFlow on real pictures and reconstruct held-out ones."""
    from uniflow.cli.demo import demo

    demo(out, seconds, seed, device, force)


@app.command()
def train(
    config: Config, out: RunFolder = None, resume: Resume = None, device: Device = "auto", force: Force = False
) -> None:
    """Train a UniFlow, or a generator of its latents, as a configuration says; under torchrun with all processes."""
    from uniflow.cli.train import train

    train(config, out, resume, device, force)


@app.command()
def gather(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of a run with parallel: fsdp.", show_default=False)],
    out: OutFolder,
    ema: Annotated[bool, typer.Option("--ema", help="The moving average of the weights instead.")] = False,
    force: Force = False,
) -> None:
    """Write the model of a sharded checkpoint in the official format."""
    from uniflow.cli.train import gather

    gather(checkpoint, out, ema, force)


@app.command()
def reconstruct(
    pictures: Pictures,
    checkpoint: Checkpoint,
    out: OutFolder,
    weights: Weights = None,
    steps: Steps = None,
    schedule: Schedule = "linear",
    solver: Solver = "euler",
    cfg: Cfg = 1.0,
    cfg_interval: CfgInterval = None,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    keep_size: KeepSize = False,
    batch_size: BatchSize = 8,
    max_memory: MaxMemory = None,
    workers: Workers = 2,
    strict: Strict = False,
    max_pixels: MaxPixels = _MAX_PIXELS,
    dtype: Dtype = "auto",
    precision: Precision = None,
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Encode and decode pictures; print how close the results are."""
    from uniflow.cli.files import Given
    from uniflow.cli.inputs import Named, parse_memory
    from uniflow.cli.tokenize import Sampling, reconstruct

    memory = parse_memory(max_memory)
    sampling = Sampling(steps, schedule, solver, cfg, cfg_interval, temperature, seed, memory, precision)
    given, named = Given(pictures, strict, max_pixels), Named(checkpoint, weights)
    reconstruct(given, named, out, sampling, keep_size, batch_size, workers, dtype, device, force, as_json)


@app.command()
def encode(
    pictures: Pictures,
    checkpoint: Checkpoint,
    out: Annotated[
        Path,
        typer.Option("--out", help="latents.safetensors for a few, or a folder for a data set.", show_default=False),
    ],
    weights: Weights = None,
    keep_size: KeepSize = False,
    size: Annotated[
        int | None, typer.Option(min=1, help="Side of a set's pictures; the checkpoint's own if not given.")
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Encode each picture of a set mirrored, too.")] = False,
    per_shard: Annotated[int, typer.Option(min=1, max=1 << 20, help="Pictures in a file of a set.")] = 1024,
    store: Annotated[str, typer.Option(help="A set's dtype: auto (the model's), float32 or bfloat16.")] = "auto",
    batch_size: BatchSize = 8,
    max_memory: MaxMemory = None,
    workers: Workers = 2,
    strict: Strict = False,
    max_pixels: MaxPixels = _MAX_PIXELS,
    dtype: Dtype = "auto",
    precision: Precision = None,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Encode pictures into latents: a few into one file, a data set into a folder.

    A data set is class folders or WebDataset tar files ("train-{0000..0099}.tar"), and its latents may be an
    autoencoder's of diffusers. Under torchrun all processes share the work, and the same command goes on where it was
    stopped.
    """
    from uniflow.cli.encode_set import HowToEncode, encode_set
    from uniflow.cli.files import Given
    from uniflow.cli.inputs import Named, parse_memory
    from uniflow.cli.tokenize import LATENTS, encode

    memory, named = parse_memory(max_memory), Named(checkpoint, weights)
    how = HowToEncode(size, flip, per_shard, store, batch_size, memory, workers, strict, max_pixels)
    if out.suffix == LATENTS:
        how.check_of_one_file()
        given = Given(pictures, strict, max_pixels)
        encode(given, named, out, keep_size, batch_size, memory, workers, dtype, precision, device, force)
    else:
        encode_set(pictures, named, out, how, keep_size, dtype, precision, device, force)


@app.command()
def decode(
    latents: Annotated[Path, typer.Argument(help="File that `uniflow encode` wrote.", show_default=False)],
    checkpoint: Checkpoint,
    out: OutFolder,
    weights: Weights = None,
    steps: Steps = None,
    schedule: Schedule = "linear",
    solver: Solver = "euler",
    cfg: Cfg = 1.0,
    cfg_interval: CfgInterval = None,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    batch_size: BatchSize = 8,
    max_memory: MaxMemory = None,
    workers: Workers = 2,
    dtype: Dtype = "auto",
    precision: Precision = None,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Decode a file of latents into pictures."""
    from uniflow.cli.inputs import Named, parse_memory
    from uniflow.cli.tokenize import Sampling, decode

    memory = parse_memory(max_memory)
    sampling = Sampling(steps, schedule, solver, cfg, cfg_interval, temperature, seed, memory, precision)
    decode(latents, Named(checkpoint, weights), out, sampling, batch_size, workers, dtype, device, force)


@app.command()
def generate(
    checkpoint: Annotated[
        Path, typer.Option(help="Checkpoint folder of a generator, or OWNER/NAME.", show_default=False)
    ],
    tokenizer: Annotated[
        Path, typer.Option(help="Folder of the tokenizer whose latents it draws, or OWNER/NAME.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Folder for pictures, or x.png for a sheet of classes.", show_default=False)
    ],
    weights: Weights = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, max=10_000_000, help="Pictures, 50000 if not given; on a sheet of each class, 8."),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Numbers or names with commas between them; all if not given.", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=_MOST_STEPS, help="Of the generator.")] = 50,
    schedule: Annotated[
        str, typer.Option(help="auto (as it was trained), linear, or pow_ or shifted_ and a number.")
    ] = "auto",
    solver: Solver = "euler",
    cfg: Cfg = 1.0,
    cfg_interval: CfgInterval = None,
    temperature: Temperature = 1.0,
    decoder_steps: Annotated[
        int | None,
        typer.Option(min=1, max=_MOST_STEPS, help="Of the tokenizer's decoder; its own number if not given."),
    ] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    workers: Workers = 2,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Draw pictures from a generator of latents: a folder of them for FID, or a sheet.

    Picture i has class i of those there are, again and again, and seeds of its own. Under torchrun all processes share
    the work, and the same command goes on where it was stopped.
    """
    from uniflow.cli.generate import HowToGenerate, generate
    from uniflow.cli.inputs import Named

    how = HowToGenerate(
        steps, schedule, solver, cfg, cfg_interval, temperature, decoder_steps, seed, batch_size, workers
    )
    generate(Named(checkpoint, weights), Named(tokenizer), out, count, classes, how, dtype, device, force)


@app.command()
def evaluate(
    context: typer.Context,
    folder: Annotated[Path | None, typer.Argument(help="Folder of pictures, at any depth.", show_default=False)] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Checkpoint folder, or OWNER/NAME on the Hub, to reconstruct with.", show_default=False),
    ] = None,
    generated: Annotated[
        Path | None, typer.Option(help="Folder of generated pictures, to score instead.", show_default=False)
    ] = None,
    weights: Weights = None,
    steps: Steps = None,
    schedule: Schedule = "linear",
    solver: Solver = "euler",
    cfg: Cfg = 1.0,
    cfg_interval: CfgInterval = None,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Side of the squares to crop and reconstruct; else the checkpoint's own, or pictures as they are.",
        ),
    ] = None,
    score_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the squares to score, to which both are resized.")
    ] = None,
    keep_size: KeepSize = False,
    features: Annotated[
        Path | None, typer.Option(help="Network of the features for FID: a program.", show_default=False)
    ] = None,
    lpips: Annotated[Path | None, typer.Option(help="Network for LPIPS: a program.", show_default=False)] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="Statistics of the originals' features, as .npz with mu and sigma; of --generated also their folder.",
            show_default=False,
        ),
    ] = None,
    keep_reference: Annotated[
        Path | None, typer.Option(help="File to keep these statistics in.", show_default=False)
    ] = None,
    manifold: Annotated[
        int, typer.Option(min=0, help="Pictures of each set whose features are kept for precision and recall.")
    ] = 50_000,
    out: Annotated[
        Path | None, typer.Option(help="JSON file for the results and settings.", show_default=False)
    ] = None,
    batch_size: BatchSize = 8,
    max_memory: MaxMemory = None,
    workers: Workers = 2,
    strict: Strict = False,
    max_pixels: MaxPixels = _MAX_PIXELS,
    dtype: Dtype = "auto",
    precision: Precision = None,
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Score reconstructions, or generated pictures; under torchrun too.

    FOLDER --checkpoint: PSNR, SSIM and, with networks, LPIPS and rFID of its pictures' reconstructions. --generated
    --reference: FID, Inception Score, precision and recall. FOLDER --keep-reference: its statistics alone.
    """
    from uniflow.cli.evaluate import Scoring, evaluate
    from uniflow.cli.evaluate_generated import Judging, evaluate_generated, keep_statistics
    from uniflow.cli.files import Given
    from uniflow.cli.inputs import InputError, Named, parse_memory
    from uniflow.cli.tokenize import Sampling

    if checkpoint is not None and folder is not None and generated is None:
        _refuse_others(context, "--checkpoint", "manifold")
        memory = parse_memory(max_memory)
        sampling = Sampling(steps, schedule, solver, cfg, cfg_interval, temperature, seed, memory, precision)
        scoring = Scoring(size, score_size, keep_size, features, lpips, reference, keep_reference, out)
        given, named = Given([folder], strict, max_pixels), Named(checkpoint, weights)
        evaluate(given, named, sampling, scoring, batch_size, workers, dtype, device, force, as_json)
        return
    judging = Judging(features, reference, keep_reference, size, score_size, manifold, out, batch_size, workers)
    if generated is not None:
        _refuse_others(context, "--generated", "folder", *_OF_RECONSTRUCTIONS)
        evaluate_generated(Given([generated], strict, max_pixels), judging, device, force, as_json)
    elif folder is not None and keep_reference is not None:
        _refuse_others(context, "--keep-reference without --checkpoint", "reference", "out", *_OF_RECONSTRUCTIONS)
        keep_statistics(Given([folder], strict, max_pixels), judging, device, force, as_json)
    else:
        raise InputError("evaluate: expected FOLDER --checkpoint, --generated --reference, or FOLDER --keep-reference")


_OF_RECONSTRUCTIONS = (
    *("checkpoint", "weights", "steps", "schedule", "solver", "cfg", "cfg_interval", "temperature", "seed"),
    *("keep_size", "lpips", "max_memory", "dtype", "precision"),
)


def _refuse_others(context: typer.Context, what: str, *names: str) -> None:
    """Refuse options that would be of no use, and that somebody has given."""
    from uniflow.cli.inputs import InputError

    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            shown = "FOLDER" if name == "folder" else f"--{name.replace('_', '-')}"
            raise InputError(f"{shown}: of no use with {what}")


@app.command()
def probe(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures, in a folder for each class.", show_default=False)],
    checkpoint: Checkpoint,
    encoder: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the pretrained encoder, or OWNER/NAME; that which the checkpoint's run says if not given.",
            show_default=False,
        ),
    ] = None,
    weights: Weights = None,
    validation: Annotated[
        Path | None,
        typer.Option(help="Folder of the pictures to judge by, in folders of the same classes.", show_default=False),
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="Without --validation: share of each class that is held out to judge by.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(callback=_check_seed, help="Of the choice of these.")] = 0,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers from 1, as in 6,12; those at the quarters if not given.", show_default=False),
    ] = None,
    pooling: Annotated[str, typer.Option(help="mean of the patches' tokens, or class, the class token.")] = "mean",
    size: Annotated[
        int | None, typer.Option(min=1, help="Side of the pictures; the checkpoint's own if not given.")
    ] = None,
    neighbours: Annotated[int, typer.Option(min=1, help="Nearest pictures that have a voice.")] = 20,
    c: Annotated[float, typer.Option(help="C of the logistic regression: a larger one fits closer.")] = 1.0,
    out: OutFolder = Path("out/probe"),
    keep: Annotated[
        Path | None,
        typer.Option(help="Folder to keep features in; one below --out if not given.", show_default=False),
    ] = None,
    batch_size: BatchSize = 8,
    workers: Workers = 2,
    strict: Strict = False,
    max_pixels: MaxPixels = _MAX_PIXELS,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Print what the encoder's layers know of pictures' classes, beside the encoder that they were pretrained as."""
    from uniflow.cli.inputs import Named
    from uniflow.cli.probe import Probing, parse_layers, probe

    chosen = parse_layers(layers)
    probing = Probing(validation, held_out, seed, chosen, pooling, size, neighbours, c, out, keep)
    named = Named(checkpoint, weights)
    probe(folder, named, encoder, probing, batch_size, workers, strict, max_pixels, dtype, device, force, as_json)


@app.command()
def show(
    picture: Annotated[Path, typer.Argument(help="Picture file.", show_default=False)],
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option("--out", help="File to write, as in sheet.png.", show_default=False)],
    weights: Weights = None,
    teacher: Annotated[
        Path | None,
        typer.Option(help="Folder of an encoder, or OWNER/NAME, to see its features beside.", show_default=False),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the square that is shown; the checkpoint's own if not given."),
    ] = None,
    cfg: Cfg = 2.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Draw a sheet: reconstructions, errors, guidance, latents and features of a picture."""
    from uniflow.cli.inputs import Named
    from uniflow.cli.show import show

    show(picture, Named(checkpoint, weights), out, teacher, size, cfg, seed, dtype, device, force)


@app.command()
def export(
    checkpoint: Checkpoint,
    out: OutFolder,
    weights: Weights = None,
    to: Annotated[
        str,
        typer.Option(
            "--to", "--format", help="onnx, or pt2 for torch.export; transformers or internvit for the encoder alone."
        ),
    ] = "onnx",
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Sampling steps of the decoder; 1 if not given.")
    ] = None,
    original: Annotated[
        Path | None,
        typer.Option(
            help="Folder that the encoder came from, or OWNER/NAME, for its last norm and pooler.", show_default=False
        ),
    ] = None,
    dtype: Dtype = "auto",
    force: Force = False,
) -> None:
    """Write encoder and decoder, or the encoder alone, as files that run without this package."""
    from uniflow.cli.export import export
    from uniflow.cli.inputs import Named

    export(Named(checkpoint, weights), out, to, steps, original, dtype, force)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed here, what each op would run on, and why not something faster."""
    from uniflow.cli.doctor import doctor

    doctor(as_json)


unifluid = typer.Typer(
    help="UniFluid: one model that draws pictures from captions and answers questions about pictures.",
    no_args_is_help=True,
)
app.add_typer(unifluid, name="unifluid")

UniFluidCheckpoint = Annotated[
    Path, typer.Option("--checkpoint", help="Checkpoint folder of a UniFluid, or OWNER/NAME.", show_default=False)
]


@unifluid.command("train")
def unifluid_train(
    config: Config, out: RunFolder = None, resume: Resume = None, device: Device = "auto", force: Force = False
) -> None:
    """Train a UniFluid as a configuration says; under torchrun with all its processes."""
    from uniflow.cli.unifluid import train

    train(config, out, resume, device, force)


@unifluid.command("merge")
def unifluid_merge(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of a run with model.lora.", show_default=False)],
    out: OutFolder,
    force: Force = False,
) -> None:
    """Write a model that was trained with adapters as a plain one, the adapters in its weights."""
    from uniflow.cli.unifluid import merge

    merge(checkpoint, out, force)


@unifluid.command("generate")
def unifluid_generate(
    captions: Annotated[
        list[str], typer.Argument(help="What to draw, one text a picture; or a file *.jsonl of it.", show_default=False)
    ],
    checkpoint: UniFluidCheckpoint,
    tokenizer: Annotated[
        Path, typer.Option(help="Folder of the image tokenizer that it was trained with.", show_default=False)
    ],
    out: OutFolder,
    source: Annotated[
        list[Path] | None,
        typer.Option(help="A picture to draw from beside the captions; once for each of several.", show_default=False),
    ] = None,
    vision: Annotated[
        Path | None,
        typer.Option(help="Folder of the vision encoder, for a model that sees sources by it.", show_default=False),
    ] = None,
    weights: Weights = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="HxW in pixels, of a model that draws several sizes; by default its first.", show_default=False
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Pictures for each caption.")] = 4,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps for all tokens of a picture; one a token if not given.")
    ] = None,
    head_steps: Annotated[int, typer.Option(min=1, max=_MOST_STEPS, help="Steps of the head for each token.")] = 20,
    cfg: Cfg = 3.0,
    cfg_source: Annotated[float, typer.Option(help="Guidance scale of the sources; 1 is none.")] = 1.0,
    cfg_schedule: Annotated[
        str,
        typer.Option(help="Both scales from step to step: constant, or growing with what is drawn, linear or cosine."),
    ] = "constant",
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Draw pictures from captions, and from other pictures if given: a PNG each, and a sheet of all.

    A file's lines are objects of JSON with a caption, and with source if it is drawn from others. Under torchrun all
    processes share the pictures.
    """
    from uniflow.cli.inputs import InputError, Named
    from uniflow.cli.unifluid_drawing import Drawing, generate, generate_file

    guidance = {"cfg": cfg, "cfg_source": cfg_source, "cfg_schedule": cfg_schedule}
    how = {"steps": steps, "head_steps": head_steps, "temperature": temperature, **guidance}
    named = Named(checkpoint, weights)
    drawing = Drawing(named, tokenizer, vision, size, how, count, seed, batch_size, dtype, device)
    if len(captions) == 1 and captions[0].endswith(".jsonl"):
        if source:
            raise InputError("--source: expected none with a file, whose lines have their own")
        generate_file(Path(captions[0]), drawing, out, force)
    else:
        generate(captions, source or [], drawing, out, force)


_Vision = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the vision encoder (or tokenizer) that it was trained with, if it has none of its own.",
        show_default=False,
    ),
]
System = Annotated[
    str | None, typer.Option(help="A system prompt, for a tokenizer with a chat template.", show_default=False)
]
Longest = Annotated[int, typer.Option(min=1, help="Text tokens an answer may have.")]
TextTemperature = Annotated[float, typer.Option(min=0, help="Of the text that is drawn; 0 takes the likeliest token.")]
TopP = Annotated[
    float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens that have this probability together.")
]
Beams = Annotated[int, typer.Option(min=1, max=1000, help="Answers that are followed side by side.")]
TextSeed = Annotated[int, typer.Option(callback=_check_seed, help="Of the text that is drawn.")]


@unifluid.command("ask")
def unifluid_ask(
    pictures: Annotated[
        list[Path],
        typer.Argument(help="Picture files, and folders of them; or a file *.jsonl of questions.", show_default=False),
    ],
    checkpoint: UniFluidCheckpoint,
    vision: _Vision = None,
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="The same for all pictures.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File *.jsonl for the responses to one.", show_default=False)
    ] = None,
    system: System = None,
    weights: Weights = None,
    longest: Longest = 64,
    temperature: TextTemperature = 0.0,
    top_p: TopP = 1.0,
    beams: Beams = 1,
    seed: TextSeed = 0,
    batch_size: BatchSize = 16,
    strict: Strict = False,
    max_pixels: MaxPixels = _MAX_PIXELS,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Answer a question about pictures, a line each: the file, a tab and the answer; or those of a file, into another.

    A line of the file is an object of JSON with image and question, or choices too. Under torchrun all processes share
    its questions.
    """
    from uniflow.cli.files import Given
    from uniflow.cli.inputs import InputError, Named
    from uniflow.cli.unifluid import ask
    from uniflow.cli.unifluid_questions import Asking, ask_file, how_to_write

    named, how = Named(checkpoint, weights), how_to_write(temperature, top_p, beams)
    asking = Asking(named, vision, system, how, longest, seed, batch_size, strict, max_pixels, dtype, device)
    if pictures[0].suffix == ".jsonl" and len(pictures) == 1:
        if question is not None or out is None:
            raise InputError(f"{pictures[0]}: expected --out FILE.jsonl, and no --question: the file has its own")
        ask_file(pictures[0], asking, out, force)
    elif question is None or out is not None:
        raise InputError("PICTURES: expected --question, and no --out: answers are printed")
    else:
        ask(Given(pictures, strict, max_pixels), question, asking)


@unifluid.command("evaluate")
def unifluid_evaluate(
    questions: Annotated[
        Path, typer.Argument(help="File *.jsonl of questions and answers, or that `ask` wrote.", show_default=False)
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint folder of a UniFluid, or OWNER/NAME, to ask; else the file has responses.",
            show_default=False,
        ),
    ] = None,
    vision: _Vision = None,
    out: Annotated[Path | None, typer.Option("--out", help="JSON file for the results.", show_default=False)] = None,
    system: System = None,
    weights: Weights = None,
    longest: Longest = 64,
    temperature: TextTemperature = 0.0,
    top_p: TopP = 1.0,
    beams: Beams = 1,
    seed: TextSeed = 0,
    batch_size: BatchSize = 16,
    strict: Strict = False,
    max_pixels: MaxPixels = _MAX_PIXELS,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Score answers: exact match and VQA accuracy, and of several choices how often the likeliest is right."""
    from uniflow.cli.inputs import InputError, Named
    from uniflow.cli.unifluid_questions import Asking, evaluate_file, how_to_write

    if checkpoint is None and vision is not None:
        raise InputError("--vision: expected --checkpoint too, to ask, or neither, to score the file's responses")
    asking = None
    if checkpoint is not None:
        named, how = Named(checkpoint, weights), how_to_write(temperature, top_p, beams)
        asking = Asking(named, vision, system, how, longest, seed, batch_size, strict, max_pixels, dtype, device)
    evaluate_file(questions, asking, out, force, as_json)
