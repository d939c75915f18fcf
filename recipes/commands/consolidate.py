"""`consolidate`: one checkpoint file from the folder of a sharded one."""

from __future__ import annotations

from lit_modules.checkpoint import read_header
from lit_modules.intact import check_intact, write_file
from lit_modules.paths import given_path
from lit_modules.sharded import read_index, read_sharded
from mixers.errors import ConfigError
from recipes.commands.arguments import Arguments


def run(argv: list[str]) -> int:
    """Reads the folder into memory and writes one file, which is there only when it is whole."""
    parser = Arguments("python -m recipes consolidate", "Makes one checkpoint file from a sharded one, which stays as it is.")
    parser.add_argument("folder", help="a sharded checkpoint: a folder that fsdp2_sharded_checkpoint has saved")
    parser.add_argument("--out", help="the file; default: beside the folder, last.ckpt becomes last.whole.ckpt")
    given = parser.parse_args(argv)
    folder = given_path(given.folder, "folder")
    out = given_path(given.out, "out") if given.out else folder.with_name(f"{folder.stem}.whole.ckpt")
    if out.exists():
        raise ConfigError(f"out: {out} exists; remove it, or give another --out")
    if not out.parent.is_dir():
        raise ConfigError(f"out: {out} cannot be written: its folder does not exist")
    read_index(folder, f"folder: {folder}")
    check_intact(folder, f"folder: {folder}")  # the file will have fresh checksums of whatever is read
    checkpoint = read_sharded(folder, f"folder: {folder}")
    read_header(checkpoint, f"folder: {folder}")
    try:
        write_file(checkpoint, out)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise ConfigError(f"out: {out} cannot be written: {reason or error}; nothing of it is left") from error
    print(f"checkpoint: {out} (step {checkpoint.get('global_step', 0):,}, {out.stat().st_size / 2**20:,.1f} MiB)")
    return 0
