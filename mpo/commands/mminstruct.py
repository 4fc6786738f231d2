"""Make visual instructions as in MMInstruct (arXiv 2407.15838): from a folder of images, in 24 domains and four types.

`make` does all of it; the others are its steps. Each works in a folder: after an interruption the same command goes on,
and asks nothing again that was answered.
"""

from typing import Any

from mpo.commands.flags import REQUIRED, Args, action, arg, flags, path
from mpo.commands.models import ASKED, INPUT, JOB, MAKE, asked_model, ran, run_make, run_step
from mpo.commands.outcome import Report


@action(MAKE, "mpo mminstruct make mminstruct.yaml --output made                       all of it: made/meta.json, for mpo sft")
def make(args: Args) -> Report:
    """Make instructions from a configuration: collect, caption, seed, generate, check and expand.

    --output becomes a folder with meta.json (mpo sft, InternVL), llava.json, sharegpt.json, trl.jsonl, questions.jsonl (mpo mmpr)
    and report.html. CONFIG is YAML:

      images: [{path: photos, domain: folder, licence: CC-BY-4.0}]
      languages: [en, zh]
      caption: {model: {model: "http://localhost:8000/v1", prices: [10, 30]}}
      generate: {model: {model: "http://localhost:8001/v1", prices: [0.5, 1.5]}, rounds: 2}
      blind: {n: 3}  # what is answered without the image, and what the caption contradicts (judge), is dropped; null: not
      expand: [{set: figureqa, path: train1, limit: 1000}]
      manual_price: 0.3
    """
    from mpo.pipelines.mminstruct.config import read_config
    from mpo.pipelines.mminstruct.make import make

    return run_make(args, make, read_config(args.config), _describe)


def _describe(report: dict[str, Any]) -> list[str]:
    first = f"{report['instructions']:,} instructions about {report['images']:,} images, {report['dropped']:,} dropped"
    shown = (
        *("types", "dialogues", "languages", "judgements", "letters", "drops", "per instruction"),
        *("spent", "unused", "image_root"),
    )
    return [first, *(f"  {name}: {report[name]}" for name in shown if report.get(name))]


@action(
    {
        "paths": arg("folder of images, or JSONL, JSON or Parquet file", "PATH", nargs="+", type=path),
        **flags(
            "--image-domain", "--classifier", "--domains", "--licence", "--origin", "--clip", "--retrieve", "--query", min_side=64
        ),
        **flags("--exact", "--limit", "--retry-dropped", output=REQUIRED),
    },
    "mpo mminstruct collect photos --output images --image-domain folder     photos/landmark/a.jpg is a landmark",
    "mpo mminstruct collect archive --output images --image-domain landmark --clip openai/clip-vit-base-patch32 --retrieve 200",
    "mpo mminstruct collect old --output images --image-domain prompt --classifier http://localhost:8000/v1 --licence CC-BY-4.0",
)
def collect(args: Args) -> Report:
    """Collect images of folders and data sets: without broken, small and duplicate ones, with domain, licence and origin.

    PATH is a folder, whose metadata.jsonl may say more of its images by file_name, or a JSONL, JSON or Parquet file with an
    image a line. Read are: domain, licence, origin, ocr (text in the image) and tags.
    """
    from mpo.pipelines.mminstruct.config import Collecting, Images, Model
    from mpo.pipelines.mminstruct.make import collect_as

    for name, flag in (("prompt", "classifier"), ("query", "clip")):
        if args.image_domain == name and not getattr(args, flag):
            raise ValueError(f"--image-domain {name} needs a model. Give --{flag} MODEL.")
    if args.clip and not args.retrieve:
        raise ValueError("--clip needs the number of images for each query. Give --retrieve N.")
    given = {"licence": args.licence, "origin": args.origin, "limit": args.limit, "retrieve": args.retrieve if args.clip else None}
    images = [Images(path=str(one), domain=args.image_domain, queries=args.query or [], **given) for one in args.paths]
    model = Model(model=args.classifier) if args.classifier else None
    own = Collecting(min_side=args.min_side, near=not args.exact, model=model, clip=args.clip)
    report = collect_as(own, images, args.domains or [], args.output, {"retry_dropped": args.retry_dropped})
    lines = [f"{report['images']:,} images: {report['kept']:,} kept, {report['dropped']:,} dropped"]
    lines += [f"  {count:,} dropped: {reason}" for reason, count in report["reasons"].items()]
    lines += [f"  {count:,} of {name}" for name, count in report["domains"].items()]
    return Report("\n".join([*lines, f"{args.output}/output.jsonl"]), report)


@action(
    {**ASKED, **INPUT, **JOB, **flags("--language", "--domains", attempts=2)},
    "mpo mminstruct caption http://localhost:8000/v1 images --output told --language en --language zh",
)
def caption(args: Args) -> Report:
    """Describe the images of `mpo mminstruct collect` with a vision-language model.

    Captions that are too short, repeat themselves, refuse, or are in another language are asked for again, then dropped.
    """
    from mpo.pipelines.job import SETTINGS
    from mpo.pipelines.mminstruct.caption import InLanguages, check_sees
    from mpo.pipelines.mminstruct.make import caption_steps
    from mpo.pipelines.mmpr.make import Records

    model, sampling = asked_model(args)
    records = InLanguages(Records(args.input), args.language or ["en"])
    if not (args.output / SETTINGS).exists():
        check_sees(model)
    return run_step(args, caption_steps(model, args.attempts, domains=args.domains or [], **sampling), records)


@action(
    {**INPUT, **JOB, **flags("--type", "--domains", rounds=1, seed=0)},
    "mpo mminstruct seed told --output seeded --rounds 2 --type judgement --type short --domains kitchen.yaml",
)
def seed(args: Args) -> Report:
    """Choose random seed questions for each image with a caption: of its domain, for each type and round."""
    from mpo.pipelines.mminstruct.domains import TYPES
    from mpo.pipelines.mminstruct.generate import Seed

    own = {"types": args.type or TYPES, "rounds": args.rounds, "domains": args.domains or []}
    return run_step(args, [Seed(seed=args.seed, **own)])


@action(
    {**ASKED, **INPUT, **JOB, **flags("--blind", "--judge", "--domains", form="auto", turns=1)},
    "mpo mminstruct generate http://localhost:8001/v1 seeded --output made   made/mminstruct/meta.json",
    "mpo mminstruct generate http://localhost:8001/v1 seeded --output made --blind http://localhost:8001/v1 --turns 4",
)
def generate(args: Args) -> Report:
    """Write instructions with a language model, from the captions alone, check them, and write them for training.

    OUTPUT/mminstruct has meta.json (mpo sft, InternVL), llava.json, sharegpt.json, trl.jsonl, and questions.jsonl for mpo mmpr.
    """
    from mpo.pipelines.mminstruct.check import Agree, Blind, Check
    from mpo.pipelines.mminstruct.config import Generating, Model
    from mpo.pipelines.mminstruct.generate import Generate
    from mpo.pipelines.mminstruct.make import writer
    from mpo.pipelines.mmpr.make import Records, open_model

    plain, sampling = asked_model(args)
    given = {name: getattr(args, name) for name in ("device", "model_name", "max_tiles")}
    own = Generating(model=Model(model=args.model, **given), form=args.form)
    model, form = writer(own, lambda one: plain if one.extra is None else open_model(one))
    steps = [Generate(model, form=form, domains=args.domains or [], **sampling), Check()]
    steps += [Blind(open_model(Model(model=args.blind)))] if args.blind else []
    steps += [Agree(open_model(Model(model=args.judge)))] if args.judge else []
    return written(args, steps, Records(args.input))


@action(
    {
        "set": arg("geoqa_plus, tabmwp, dvqa, figureqa, mminstruct or fields", "SET"),
        "path": arg("its file of questions, or the folder that has it", "PATH", type=path),
        **flags("--field", "--image-domain", "--domains", "--licence", "--image-root", "--limit", turns=1),
        **JOB,
    },
    "mpo mminstruct expand figureqa train1 --output figures --image-domain numerical_calculation --licence CDLA-Sharing-1.0",
    "mpo mminstruct expand fields cells.jsonl --output cells --field question=q --field answer=a --field image=file",
)
def expand(args: Args) -> Report:
    """Read a public set as instructions of the four types, check them, and write them for training.

    SET is geoqa_plus, tabmwp, dvqa, figureqa or mminstruct (qa_en.jsonl, caption_cn.jsonl, caption_en.jsonl) in its published
    layout, or fields, for any JSONL, JSON or Parquet file whose fields are named by --field.
    """
    from mpo.pipelines.mminstruct.check import Check
    from mpo.pipelines.mminstruct.domains import load_domains
    from mpo.pipelines.mminstruct.expand import Expansion

    wrong = [one for one in args.field or [] if "=" not in one]
    if wrong:
        raise ValueError(f"--field={wrong[0]} is not of the form OURS=THEIRS. Write it such as question=q.")
    own = {name: getattr(args, name) for name in ("image_root", "licence", "limit", "drop_bad")}
    own |= {"domain": args.image_domain, "fields": dict(one.split("=", 1) for one in args.field or [])}
    return written(args, [Check()], Expansion(args.set, args.path, domains=load_domains(args.domains or []), **own))


def written(args: Args, steps: list[Any], records: Any) -> Report:
    """Run steps over records, and write the instructions for training."""
    from mpo.pipelines.mminstruct.config import Config
    from mpo.pipelines.mminstruct.output import write
    from mpo.pipelines.report import summarize

    job, report = ran(args, steps, records)
    made = write(args.output / "mminstruct", Config(turns=args.turns), None, [(job, report)])
    return Report(f"{summarize(report)}\n{made['instructions']:,} instructions\n{args.output}/mminstruct/meta.json", made)
