"""InternVL's image processor with a setting for the thumbnail tile of images with several tiles."""

from typing import Any

import torch
from transformers import BatchFeature, GotOcr2ImageProcessor
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessorKwargs


class TileKwargs(GotOcr2ImageProcessorKwargs, total=False):  # type: ignore[misc, call-arg]
    """Transformers' settings, and ``use_thumbnail``: append the whole image as a thumbnail tile if it has several tiles."""

    use_thumbnail: bool


class TileImageProcessor(GotOcr2ImageProcessor):  # type: ignore[misc]
    """`GotOcr2ImageProcessor`, which always makes a thumbnail, with ``use_thumbnail`` (official InternVL's name for it).

    It is saved under the name of transformers' class with this additional setting; other software loads it with thumbnails.
    """

    valid_kwargs = TileKwargs
    use_thumbnail = True

    @classmethod
    def of(cls, image_processor: GotOcr2ImageProcessor) -> "TileImageProcessor":
        """Create a processor with the settings of another."""
        settings = {name: value for name, value in image_processor.to_dict().items() if name != "image_processor_type"}
        return cls(**settings)

    def _preprocess(self, images: Any, *args: Any, use_thumbnail: bool = True, **kwargs: Any) -> Any:
        made = super()._preprocess(images, *args, **kwargs)
        if use_thumbnail:
            return made
        counts = [int(count) for count in made["num_patches"]]
        kept = [count - (count > 1) for count in counts]  # a thumbnail is the last tile
        split = zip(torch.stack(list(made["pixel_values"])).split_with_sizes(counts), kept, strict=True)
        pixels = torch.cat([tiles[:count] for tiles, count in split])
        return BatchFeature({"pixel_values": pixels, "num_patches": kept}, tensor_type=kwargs.get("return_tensors"))

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """The number of tiles of an image, with its thumbnail."""
        tiles: int = super().get_number_of_image_patches(height, width, images_kwargs)
        use_thumbnail = (images_kwargs or {}).get("use_thumbnail", self.use_thumbnail)
        return tiles if use_thumbnail or tiles == 1 else tiles - 1

    def to_dict(self) -> dict[str, Any]:
        """The settings, under the name of transformers' class."""
        return {**super().to_dict(), "image_processor_type": GotOcr2ImageProcessor.__name__}
