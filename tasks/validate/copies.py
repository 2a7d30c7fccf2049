"""Images that should be there only once: the same content, nearly the same picture, the same physical part.

Of several, the one stays that is judged: test before validation before train, and within a split the first. All others
are told which one that is.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtri

STAYS = {"test": 0, "validation": 1, "train": 2}
"""Split -> its place in the order in which images stay."""

BITS = 256
"""Bits of a perceptual hash."""

_CHANCE = 0.05
"""Expected number of chance pairs in a category that is tolerated."""
_SAMPLED_PAIRS = 1 << 17
_ALL_PAIRS_UP_TO = 512
_BLOCK = 256
_LARGEST_PART = 64
_NONE = np.iinfo(np.int32).max


def same_content(table: pd.DataFrame) -> pd.DataFrame:
    """Keys of other images with the same content, a row an image, in one of three columns (absent for most images).

    `seen_in`: in a split that stays. `other_label`: in test, but good where this is anomalous or vice versa.
    `copy_of`: the first in the same split. Takes id, key, split, label, readable; unreadable files have no copies.
    """
    copies = pd.DataFrame(index=table.index, columns=["other_label", "copy_of", "seen_in"], dtype="string")
    group = table.loc[table["readable"] & table["id"].duplicated(keep=False), ["id", "key", "split", "label"]]
    group = _in_order_of_staying(group, ["id"])
    first = group.groupby("id")[["key", "split"]].transform("first")
    elsewhere = group["split"] != first["split"]
    copies.loc[group.index[elsewhere], "seen_in"] = first["key"][elsewhere]
    group = group[~elsewhere]
    for label, other in (("good", "anomalous"), ("anomalous", "good")):
        first_other = group[group["label"] == other].groupby("id")["key"].first()
        contradicting = group.loc[group["label"] == label, "id"].map(first_other).dropna()
        copies.loc[contradicting.index, "other_label"] = contradicting.astype("string") + f" ({other})"
    rest = group[copies.loc[group.index, "other_label"].isna()]
    again = rest.index[rest.duplicated("id")]
    copies.loc[again, "copy_of"] = rest.groupby("id")["key"].transform("first")[again]
    return copies


def same_part(table: pd.DataFrame) -> pd.DataFrame:
    """Keys and splits of images that show the same physical part in a split that stays, a row an image: columns
    `part_seen_in`, `part_seen_split`."""
    seen = pd.DataFrame(index=table.index, columns=["part_seen_in", "part_seen_split"], dtype="string")
    group = _in_order_of_staying(
        table.loc[table["readable"] & table["part"].notna(), ["part", "key", "split"]], ["part"]
    )
    first = group.groupby("part")[["key", "split"]].transform("first")
    elsewhere = group.index[group["split"] != first["split"]]
    seen.loc[elsewhere] = first.loc[elsewhere, ["key", "split"]].to_numpy()
    return seen


def _in_order_of_staying(group: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    ranked = group.assign(stays=group["split"].map(STAYS).astype("int64"))
    return ranked.sort_values([*by, "stays"], kind="stable")


def nearly_same(table: pd.DataFrame, bits: int) -> pd.DataFrame:
    """Images that stay and show nearly the same picture, a row an image, by Hamming distance of the perceptual hashes.

    Columns `near_copy_of`, `near_copy_bits` (the closest earlier one in the same split that shows another part) and
    `near_seen_in`, `near_seen_split`, `near_seen_bits` (the closest one in a split that stays). Pairs count up to
    `distance_limit`. Exact: each image is compared with each, in blocks, so that memory is small also where all
    images look alike; 100,000 images take some 15 s of one core.
    """
    columns = {"near_copy_of": "string", "near_copy_bits": "Int64"}
    columns |= {"near_seen_in": "string", "near_seen_split": "string", "near_seen_bits": "Int64"}
    pairs = pd.DataFrame({name: pd.Series(index=table.index, dtype=dtype) for name, dtype in columns.items()})
    hashes = unpack(table["perceptual_hash"])
    limit = distance_limit(hashes, bits)
    if limit < 0:
        return pairs
    parts, names, splits = _part_numbers(table["part"]), table["key"].to_numpy(), table["split"].to_numpy()
    earlier = np.empty(0, dtype=np.int64)  # rows of the splits that stay
    with _Search() as search:
        for split in STAYS:
            rows = np.flatnonzero(splits == split)
            bits_apart, other = _closest_earlier(search, hashes[rows], parts[rows])
            near = bits_apart <= limit
            here, there = table.index[rows[near]], rows[other[near]]
            pairs.loc[here, "near_copy_of"], pairs.loc[here, "near_copy_bits"] = names[there], bits_apart[near]
            bits_apart, other = _closest(search, hashes[earlier], hashes[rows])
            near = bits_apart <= limit
            here, there = table.index[rows[near]], earlier[other[near]]
            pairs.loc[here, "near_seen_in"], pairs.loc[here, "near_seen_bits"] = names[there], bits_apart[near]
            pairs.loc[here, "near_seen_split"] = splits[there]
            earlier = np.concatenate([earlier, rows])
    return pairs


def distance_limit(hashes: np.ndarray, bits: int) -> int:
    """Distance up to which a pair of these images is no chance: at most `bits`, below 0 where none can be told.

    Images of one product under one camera all look alike, and among many some pair is always close. As in iris
    recognition (Daugman 2003, "The importance of being random"), the distances between the category's own images say
    how close: the limit lies where fewer than 0.05 such pairs are expected in the category, from the median and the
    median absolute deviation of the distances (of a fixed draw of pairs in a large category). hashes: uint8 (n, 32).
    """
    n = len(hashes)
    if n < 2:
        return -1
    if n <= _ALL_PAIRS_UP_TO:
        one, other = np.triu_indices(n, 1)
    else:
        one, step = np.random.default_rng(0).integers([0, 1], [n, n], (_SAMPLED_PAIRS, 2)).T
        other = (one + step) % n  # never itself
    apart = _distance(hashes[one], hashes[other]).astype(np.float64)
    middle = np.median(apart)
    spread = max(1.0, 1.4826 * float(np.median(np.abs(apart - middle))))
    certain = -float(ndtri(_CHANCE / (n * (n - 1) / 2)))
    return min(bits, int(np.floor(middle - certain * spread)))


def unpack(hashes: pd.Series) -> np.ndarray:
    """Hexadecimal digits -> uint8 (n, 32)."""
    return np.frombuffer(bytes.fromhex("".join(hashes)), dtype=np.uint8).reshape(len(hashes), BITS // 8)


def _distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Differing bits of uint8 (..., 32), broadcast as a pair."""
    return np.bitwise_count(one.view(np.uint64) ^ other.view(np.uint64)).sum(axis=-1, dtype=np.int32)


def _part_numbers(parts: pd.Series) -> np.ndarray:
    """A number for each image's part; images whose part is not known have a number each."""
    numbers, names = pd.factorize(parts)
    unknown = numbers < 0
    numbers[unknown] = len(names) + np.arange(unknown.sum())
    return numbers


class _Search:
    """Nearest neighbours among binary codes, by threads of our own.

    Those of OpenMP wait for each other busily at each block, which on a machine that does other work too takes many
    times as long as one thread.
    """

    def __init__(self) -> None:
        import faiss  # here because a kept verdict needs none

        self.faiss, self.threads = faiss, faiss.omp_get_max_threads()
        self.pool = ThreadPoolExecutor(self.threads, initializer=faiss.omp_set_num_threads, initargs=(1,))

    def __enter__(self) -> _Search:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()

    def index(self) -> Any:
        """To add codes to."""
        return self.faiss.IndexBinaryFlat(BITS)

    def __call__(self, index: Any, asked: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Distances and rows of the k closest in the index, both (n, k)."""
        blocks = np.array_split(asked, max(self.threads, -(-len(asked) // _BLOCK)))
        results = list(self.pool.map(lambda block: index.search(block, k), [block for block in blocks if len(block)]))
        return np.concatenate([apart for apart, _ in results]), np.concatenate([rows for _, rows in results])


def _closest(search: _Search, known: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each asked hash to the closest known one, and its row."""
    if not len(known) or not len(asked):
        return np.full(len(asked), _NONE), np.zeros(len(asked), dtype=np.int64)
    index = search.index()
    index.add(known)
    apart, rows = search(index, asked, 1)
    return apart[:, 0], rows[:, 0]


def _closest_earlier(search: _Search, hashes: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each hash to the closest one before it that shows another part, and its row.

    Of a part with more than 64 images some pairs with other parts may be missed.
    """
    n = len(hashes)
    apart, other = np.full(n, _NONE), np.zeros(n, dtype=np.int64)
    of_a_part = int(np.unique(parts, return_counts=True)[1].max(initial=1))
    index = search.index()
    for start in range(0, n, _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, n))
        # Within the block every pair, (b, b); only those before count.
        within = _distance(hashes[rows, None], hashes[None, rows])
        within[(rows[None] >= rows[:, None]) | (parts[None, rows] == parts[rows, None])] = _NONE
        apart[rows], other[rows] = _least(within, np.broadcast_to(rows, within.shape))
        if start:
            before, nearest = search(index, hashes[rows], min(of_a_part, _LARGEST_PART, start))
            before[parts[nearest] == parts[rows, None]] = _NONE
            before, nearest = _least(before, nearest)
            nearer = before <= apart[rows]
            apart[rows[nearer]], other[rows[nearer]] = before[nearer], nearest[nearer]
        index.add(hashes[rows])
    return apart, other


def _least(apart: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest of each line (b, k), and its row."""
    at = np.arange(len(apart)), apart.argmin(axis=1)
    return apart[at], rows[at]
