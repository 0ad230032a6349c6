"""Images of a prompt, given as the tokens that stand for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cptool.cli.options.prompt_files import read_token_ids
from cptool.errors import UserError

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint


def read_images(file: str, checkpoint: Checkpoint) -> list[int]:
    """Return the tokens of the images in a JSON file of token ids, each between the tokens that
    begin and end an image.

    Raises UserError for a model without images, and for ids that do not stand for parts of one.
    """
    from cptool.model.architectures.registry import find_family

    ends, tokenizer = find_family(checkpoint.config.family).image_ends, checkpoint.tokenizer()
    if ends is None:
        raise UserError(
            "--image-tokens: the model's vocabulary has no tokens of images; leave it out, or use "
            "a Chameleon"
        )
    begin, end = (None if tokenizer is None else tokenizer.control_token(text) for text in ends)
    if begin is None or end is None:
        raise UserError(
            f"--image-tokens: the model's tokenizer lacks {' or '.join(ends)}; give the whole "
            "prompt as --token-ids"
        )
    tokens: list[int] = []
    for name, image in read_token_ids(file, checkpoint.config.max_position_embeddings):
        if not image:
            raise UserError(f"{name}: an image without tokens; give the ids of one")
        for token in image:
            if not any(first <= token < stop for first, stop in checkpoint.config.image_ids):
                raise UserError(
                    f"{name}: {token} is not the id of a token that stands for a part of an image; "
                    f"give ids that vocabulary_map in config.json names so"
                )
        tokens += [begin, *image, end]
    return tokens


def with_images(images: list[int], tokens: list[int], begins: int | None) -> list[int]:
    """Return the tokens of a prompt with those of its images before its text, after the token
    `begins` if it begins with that.
    """
    place = int(bool(images) and tokens[:1] == [begins])
    return [*tokens[:place], *images, *tokens[place:]]
