"""Collect images of folders and data sets: without broken, small and duplicate ones, with domain, licence and origin.

PATH is a folder, whose metadata.jsonl may say more of its images by file_name, or a JSONL, JSON or Parquet file with an
image a line. Read are: domain, licence, origin, ocr (text in the image) and tags.
"""

from mpo.commands.flags import REQUIRED, Args, arg, flags, path
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo mminstruct collect photos --output images --image-domain folder --licence CC-BY-4.0     photos/landmark/a.jpg is a landmark
mpo mminstruct collect archive --output images --image-domain landmark --clip openai/clip-vit-base-patch32 --retrieve 200
mpo mminstruct collect archive --output images --image-domain prompt --classifier http://localhost:8000/v1
"""
ARGUMENTS = {
    "paths": arg("folder of images, or JSONL, JSON or Parquet file", "PATH", nargs="+", type=path),
    **flags("--image-domain", "--classifier", "--domains", "--licence", "--origin", "--clip", "--retrieve", "--query", min_side=64),
    **flags("--exact", "--limit", "--retry-dropped", output=REQUIRED),
}


def run(args: Args) -> Report:
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
