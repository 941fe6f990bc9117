"""What tells the weights of one folder from those of another."""

import hashlib

from qvdjax.checkpoint.folder import CheckpointFolder

# Of each tensor: so many pieces of so many bytes.
_PIECES, _PIECE_BYTES = 8, 4096


def fingerprint(folder: CheckpointFolder) -> str:
    """SHA-256 of every tensor's name, type, shape and a few pieces of its bytes: another training gives another one.

    All of the weights would have to be read to notice a change of single values. How the folder is cut into files does
    not enter.
    """
    digest = hashlib.sha256()
    for name in sorted(folder.keys):
        info = folder.info(name)
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
        with folder.files[name].path.open("rb") as file:
            for start in range(info.start, info.stop, max(_PIECE_BYTES, -(-info.nbytes // _PIECES))):
                file.seek(start)
                digest.update(file.read(min(_PIECE_BYTES, info.stop - start)))
    return digest.hexdigest()
