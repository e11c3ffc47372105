"""Prove that a deployed checkpoint is intact, and put super weights back into one that is not.

``create`` hashes every chunk of every tensor and writes down the super weights' exact bits;
``Manifest.save`` writes that as a small file, sealed if there is a key. ``verify`` reads a
checkpoint at the speed of the disk and says which tensor is damaged where, and whether a super
weight was hit; ``repair`` puts super weights back into a copy. docs/guard.md describes the format
and what it protects from.
"""

from .create import create
from .digests import CHUNK, HASH, digest_chunks
from .findings import DAMAGED, INTACT, MOVED, Finding, Hit, Verification
from .keys import read_key
from .manifest import File, Manifest, SuperWeight, Tensor
from .repair import Repair, repair
from .verify import verify

__all__ = [
    "CHUNK",
    "DAMAGED",
    "HASH",
    "INTACT",
    "MOVED",
    "File",
    "Finding",
    "Hit",
    "Manifest",
    "Repair",
    "SuperWeight",
    "Tensor",
    "Verification",
    "create",
    "digest_chunks",
    "read_key",
    "repair",
    "verify",
]
