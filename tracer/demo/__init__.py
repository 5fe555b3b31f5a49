"""Where the shipped demo model lies, and whether its weights are the committed ones.

Knows two paths and how to hash a file. Refuses to know what is in the model: it imports neither
torch nor transformers, so that asking for the path costs nothing.
"""

import hashlib
from pathlib import Path

WEIGHTS = "model.safetensors"
CHECKSUM = "model.safetensors.sha256"


def path() -> Path:
    """The folder of the shipped model, in Hugging Face format."""
    return Path(__file__).resolve().parent / "model"


def sha256(file: Path | None = None) -> str:
    """The SHA-256 of a file, by default of the shipped weights, in hexadecimal."""
    with (file or path() / WEIGHTS).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_checksum(folder: Path) -> str:
    """Write the checksum of a folder's weights beside them, in `sha256sum -c` format; return it."""
    digest = sha256(folder / WEIGHTS)
    (folder / CHECKSUM).write_text(f"{digest}  {WEIGHTS}\n", encoding="utf-8")
    return digest


def verify(folder: Path | None = None) -> bool:
    """Whether a folder's weights (by default the shipped ones) match the checksum beside them."""
    folder = folder or path()
    recorded = (folder / CHECKSUM).read_text(encoding="utf-8").split()[0]
    return recorded == sha256(folder / WEIGHTS)
