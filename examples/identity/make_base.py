"""Make the base model of this example: a tokenizer from its own text and a small random Yuan 2.0.

    python make_base.py --data conversations.json --out DIRECTORY

The directory has the published layout (config.json, model.safetensors, tokenizer.model), so nothing after
this step knows that the model is small. The same data, sizes and seed give the same files; a complete
directory made from them is left alone. Runs in the trainer image, which has `yuan2_core` and `yuan2_model`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from yuan2_core.formats import load_conversations
from yuan2_core.tokenizer import Yuan2Tokenizer, train_tokenizer
from yuan2_model import Yuan2Config, random_model, save_model

VOCABULARY = 2000
"""Token ids; the text is small, and short sequences train fast."""
EMBEDDING_MULTIPLE = 64
"""Embedding rows are padded to a multiple of this, as the published model pads 134,958 ids to 135,040."""
HIDDEN_SIZE = 256
LAYERS = 3
HEADS = 4
POSITIONS = 1024
STAMP = "base.json"
"""Written last: what the directory was made from."""


def main(argv: Sequence[str]) -> int:
    """Make the model, or find that it is there already; prints one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--data", type=Path, required=True, help="conversations that the tokenizer learns from"
    )
    parser.add_argument("--out", type=Path, required=True, help="model directory to make")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default 0)")
    arguments = parser.parse_args(argv)
    recipe = make_recipe(arguments.data, arguments.seed)
    if read_stamp(arguments.out) == recipe:
        print(f"{arguments.out}: the base model is there already")
        return 0
    parameters, vocabulary = make(arguments.data, arguments.out, recipe)
    print(
        f"a random Yuan 2.0 of {parameters / 1e6:.1f} M parameters, {vocabulary} tokens, in {arguments.out}"
    )
    return 0


def make_recipe(data: Path, seed: int) -> dict[str, object]:
    """Everything that decides the files."""
    return {
        "data": hashlib.sha256(data.read_bytes()).hexdigest(),
        "seed": seed,
        "vocabulary": VOCABULARY,
        "hiddenSize": HIDDEN_SIZE,
        "layers": LAYERS,
        "heads": HEADS,
        "positions": POSITIONS,
    }


def read_stamp(directory: Path) -> object:
    """The recipe of a complete directory, or None."""
    try:
        return json.loads((directory / STAMP).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def make(data: Path, out: Path, recipe: dict[str, object]) -> tuple[int, int]:
    """Write the model beside `out`, then move it there. Returns its parameters and its token ids."""
    seed = recipe["seed"]
    assert isinstance(seed, int)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    texts = [
        message.content for conversation in load_conversations(data) for message in conversation.messages
    ]
    tokenizer = train_tokenizer(texts, VOCABULARY, partial)
    model = random_model(make_config(tokenizer), seed=seed)
    save_model(model, model.config, partial)
    (partial / STAMP).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return sum(parameter.numel() for parameter in model.parameters()), tokenizer.vocab_size


def make_config(tokenizer: Yuan2Tokenizer) -> Yuan2Config:
    """Yuan 2.0 in small: the shape of the published models, F = 4H included."""
    return Yuan2Config(
        vocab_size=-(-tokenizer.vocab_size // EMBEDDING_MULTIPLE) * EMBEDDING_MULTIPLE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=4 * HIDDEN_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=POSITIONS,
        eod_token=tokenizer.eod_id,
        sep_token=tokenizer.sep_id,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
