"""`generate`: continues a text with a checkpoint, printing it as it comes."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

from lit_modules.checkpoint import load_lm
from lit_modules.data.tokenizer import Tokenizer, load_tokenizer
from lit_modules.decoder_lm import Sampling
from lit_modules.intact import check_intact
from mixers.base import at_least
from mixers.errors import ConfigError
from recipes.commands.arguments import Arguments
from recipes.commands.checkpoints import run_config
from recipes.commands.config_files import dig, read_config
from recipes.commands.newest import find_checkpoint


def run(argv: list[str]) -> int:
    """Prints the prompt and its continuation, up to the end of the document or `max_new_tokens`."""
    given = _parser().parse_args(argv)
    at_least(1, max_new_tokens=given.max_new_tokens)
    _in_range("temperature", given.temperature, 0 <= given.temperature < math.inf, "a number >= 0")
    _in_range("top_p", given.top_p, 0 < given.top_p <= 1, "in (0, 1]")
    _in_range("seed", given.seed, 0 <= given.seed < 2**64, "in 0 .. 2**64 - 1")
    path = find_checkpoint(given.ckpt_path, *Path("runs").glob("*"))
    lm = load_lm(path, _device(given.device))
    check_intact(path, f"ckpt_path: {path}")
    tokenizer = _tokenizer(path, given.tokenizer)
    if tokenizer.vocab_size > lm.settings["vocab_size"]:
        sizes = f"{tokenizer.vocab_size} tokens, the model {lm.settings['vocab_size']}"
        raise ConfigError(f"tokenizer: it has {sizes}; give the one of the training as --tokenizer")
    device = lm.embedding.weight.device
    prompt = torch.tensor([tokenizer.bos_id, *tokenizer.encode(given.prompt).tolist()], device=device)
    tokens = lm.generate(
        prompt,
        given.max_new_tokens,
        sampling=Sampling(given.temperature, given.top_p),
        stop=tokenizer.bos_id,
        generator=torch.Generator(device).manual_seed(given.seed),
    )
    decode = tokenizer.stream()
    _show(given.prompt)
    for token in tokens:
        _show(decode(token))
    _show(decode.flush() + "\n")
    return 0


def _in_range(name: str, value: float, holds: bool, legal: str) -> None:
    if not holds:
        raise ConfigError(f"{name}: must be {legal}, got {value}")


def _show(text: str) -> None:
    """Prints at once; to a terminal without control characters, which a model may well emit."""
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding), end="", flush=True)


def _parser() -> Arguments:
    parser = Arguments("python -m recipes generate", "Continues a text with a checkpoint.")
    parser.add_argument("--ckpt_path", required=True, help="a checkpoint, or `last`: the newest in runs/")
    parser.add_argument("--prompt", default="", help="the text to go on from; empty: a new document")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="tokens at most (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top_p", type=float, default=0.95, help="draw from the smallest set of this probability (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (%(default)s)")
    parser.add_argument("--tokenizer", help="`bytes` or a local file; default: that of the checkpoint's run")
    parser.add_argument("--device", help="cpu, cuda, ...; default: a GPU if there is one")
    return parser


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # an AssertionError where torch was built without CUDA
        raise ConfigError(f"device: {name} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise ConfigError("device: meta holds no values")
    return device


def _tokenizer(checkpoint: Path, given: str | None) -> Tokenizer:
    """The given tokenizer, or that of the run which wrote the checkpoint."""
    if given is None:
        config = run_config(checkpoint)
        given = dig(read_config(config), "data.tokenizer") if config is not None else None
    if given is None:
        raise ConfigError(f"tokenizer: must be set: there is no config.yaml beside {checkpoint} that says which one it was trained with")
    return load_tokenizer(given)
