"""A name for the exact data a run was trained on: images and annotations, not where they lie."""

from __future__ import annotations

import hashlib
import json


def data_fingerprint(split):
    """Return 16 hex digits of the SHA-256 of a split's images and annotations.

    Parameters
    ----------
    split : helpers.records.Split

    Returns
    -------
    str
        The same wherever the split's folder lies and in either layout. It changes with any byte of
        an image, any box, mask, category or known content, and with the name of a file. The cost
        is that of reading the files once.

    Raises
    ------
    OSError
        If an image cannot be read.
    """
    digest = hashlib.sha256()
    for record in split.records:
        objects = [
            [
                item.category,
                item.box_xyxy,
                item.is_crowd,
                None if item.rle is None else dict(item.rle),
            ]
            for item in record.objects
        ]
        size = [record.width, record.height]
        described = [record.image_id, size, sorted(record.contents), objects]
        digest.update(json.dumps(described, sort_keys=True).encode("utf-8"))
        with record.path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
