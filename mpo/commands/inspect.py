"""Inspect parts of a model."""

import json

from mpo.commands.flags import REQUIRED, Args, Words, action, arg, flags, path, refuse_targets
from mpo.commands.outcome import Report


@action(
    {
        "model": arg("model: a folder, or a model id on the Hub", "MODEL"),
        "image": arg("image file", "IMAGE", type=path),
        **flags("--point", "--tile", "--max-tiles", "--base", "--device", output=REQUIRED, dtype=Words("auto")),
        **flags(points=Words("3, without --point")),
    },
    "mpo inspect fuser runs/first photo.jpg --output looks                      from a grid of 3 x 3 points",
    "mpo inspect fuser runs/first photo.jpg --output looks --point 0.2 0.8      from one point, near the lower left corner",
    "mpo inspect fuser runs/first photo.jpg --output looks --tile 0 --points 5",
)
def fuser(args: Args) -> Report:
    """Show where the MMFuser of a model looks in an image (arXiv 2410.11829).

    MODEL is a folder or a model id on the Hub, as in `mpo generate`. DIR gets fuser.png: for each layer that is sampled, the
    sampling locations of some points over the image, as large as their weights; the mean attention by layer; and the norm of what
    the fuser adds to the feature of each patch. And fuser.json, with the numbers.
    """
    if args.point and args.points:
        raise ValueError(f"--point and --points={args.points} both say where to look from. Leave one of the two out.")
    refuse_targets({"--output": args.output})
    from mpo.data.images import open_image
    from mpo.encoding.chat import is_processor
    from mpo.generation.open import open_local
    from mpo.io import atomic_folder, write_text
    from mpo.models.looking import draw, look, tile_of

    image = open_image(args.image)
    opened = open_local(args.model, base=args.base, dtype=args.dtype or "auto", device=args.device, max_tiles=args.max_tiles)
    if not is_processor(opened.processor):
        raise ValueError(f"{args.model} is a text model and has no fuser. Give a model with an MMFuser.")
    pixels, visible = tile_of(image, opened.processor, args.tile)
    looks = look(opened.model, pixels, args.point or args.points or 3)
    figure, numbers = draw(looks, visible), looks.numbers()
    with atomic_folder(args.output) as partial:
        figure.savefig(partial / "fuser.png", dpi=120)
        write_text(partial / "fuser.json", json.dumps(numbers, indent=1) + "\n")
    shares = ", ".join(f"{layer}: {share:.1%}" for layer, share in numbers["attention"].items())
    lines = [
        f"attention by hidden state: {shares}",
        f"added to a patch's feature: norm {numbers['mean_added']:.3g} on average, to a feature of {numbers['mean_query']:.3g}",
    ]
    if not looks.added.any():
        lines.append("The fuser adds nothing: it is new and was not trained.")
    return Report(
        "\n".join([*lines, f"{args.output / 'fuser.png'} and fuser.json are written."]), {"folder": args.output, **numbers}
    )
