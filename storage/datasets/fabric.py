"""Fabric: the patterned fabrics of the University of Hong Kong (Ngan, Pang, Yung 2011; Tsang, Ngan, Pang 2016).

    <root>/box-patterned-fabric_with_groundtruth/Reference/Bbox_p10.bmp ...     good
                                                 <defect type>/Bbox_nn_d3.bmp   BrokenEnd, Hole, NettingMultiple, ...
                                                 <defect type>_GT/*             their masks
           dot-..., star-...                                                    likewise
    <root>/box/normal/*.bmp, defective/*.bmp, defective/mask/*.bmp              a copy that circulates

Images of 256 x 256 pixels in three patterns. The published archives could not be opened for this reader, and public
code names their folders in more than one way; so the folders are understood by what their names say, in any capitals
and with `-`, `_` or blanks:

    the pattern     begins with box, dot or star
    good images     reference, normal, good, defect-free
    masks           <folder>_GT, gt, mask, masks or ground_truth beside or in the folder of the images
    defects         any other folder, which is the defect type; in one of all of them (all_defect, All_star, defective)
                    the type follows from the code in the file's name, as in Bbox_nn_d3.bmp
    a mask's name   its image's, or equal to it without the marks gt, mask and d (Bbox_nn_gt3 belongs to Bbox_nn_d3)

There is no official split and none is established: these papers learn from a few good images and judge the rest. Here
a seeded share of the good ones is judged (`test_share`, by content, so that equal files stand on one side), and all
defective ones; two patterns never mix, each is a category.

Sources: the survey, section IV-A (three patterns, 25 good and 25 defective images each, five types of defects, 256 x
256); folders, names of files and codes from MATLAB and Python code in public repositories (Zhang 2012 for the codes;
two repositories for *-patterned*fabric_with_groundtruth, one each for Reference, all_defect and <type>_GT; one for
box/normal and defective/mask). Public code tests six types of five images of dot (with Knots), where the survey counts
25. Terms: the readme of the fabric images as public code quotes it (nico-zck/ZJU-Leaper-Dataset,
related_work/EloRating/readme.txt). Not confirmed: the names of the masks and the
numbers by type.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from storage.errors import DatasetError
from storage.listing import Dataset, Listing, SetAside, choose, images_in, subfolders
from storage.readers import add_category, check_draw, drawn, find_root, known_paths, plain, stem, strays
from storage.samples import Sample, content_hash

TREE = """\
<root>/box-patterned-fabric_with_groundtruth/Reference/*.bmp          (or box/normal/*.bmp)
<root>/box-patterned-fabric_with_groundtruth/<defect type>/*.bmp      (or all_defect/*.bmp, box/defective/*.bmp)
<root>/box-patterned-fabric_with_groundtruth/<defect type>_GT/*       (or box/defective/mask/*.bmp)
<root>/dot-..., <root>/star-..."""

PATTERNS = ("box", "dot", "star")

CODES = {
    "b": "BrokenEnd",
    "bn": "BrokenEnd",
    "h": "Hole",
    "he": "Hole",
    "k": "Knots",
    "l": "LoosePick",
    "m": "MissPick",
    "n": "NettingMultiple",
    "nn": "NettingMultiple",
    "op": "OilWarp",
    "ot": "OilWeft",
    "t": "ThinBar",
    "tk": "ThickBar",
    "tn": "ThinBar",
    "tt": "ThickBar",
}
"""Mark in a file's name -> type of defect."""

_GOOD = re.compile(r"reference|normal|good|defect_?free")
_MASKS = re.compile(r"(?:(.+)_)?(?:gt|masks?|ground_?truth)")
_MIXED = re.compile(r"all(_.*)?|bad|defect(s|ive)?")
_MARKS = ("d", "gt", "mask")

DATASET = Dataset(
    title="Patterned fabrics of the University of Hong Kong: dot, star, box",
    licence="academic use only, for yourself; not to be passed on without approval; name the HKU laboratory",
    home="https://ytngan.wordpress.com/codes",
    citation="Tsang, Ngan, Pang, Fabric inspection based on the Elo rating method, Pattern Recognition 51, 2016",
    categories=PATTERNS,
    images=150,
    tree=TREE,
    obtain="For academic use: follow the links on its home page and unpack each pattern into one folder.",
    split="none published: a seeded share of the good images (`test_share`, `seed`) and all defective ones are judged",
    counts={name: {"test/anomalous": 25} for name in PATTERNS},
)


def list_samples(
    dataset: str, root: Path, categories: Sequence[str] | None, *, test_share: float = 0.4, seed: int = 0
) -> Listing:
    """The images of the three patterns; `test_share` of the good ones are judged. Raises DatasetError otherwise."""
    check_draw("test_share", test_share, seed, zero=True)
    what = "folder whose name begins with box, dot or star and which holds one of good images (Reference, normal)"
    root = find_root(root, lambda folder: bool(_patterns(folder)), what, TREE)
    known = _patterns(root)
    listing = Listing(root)
    for name in choose(categories, known):
        samples, aside = _list_pattern(dataset, name, root, known[name])
        nothing = f"{known[name]} has no good image to learn from; put them into {known[name]}/Reference"
        add_category(listing, name, _divided(root, samples, test_share, seed), aside, nothing)
    return listing


def _patterns(root: Path) -> dict[str, str]:
    """Pattern -> its folder. Raises DatasetError when two folders mean one pattern."""
    folders: dict[str, str] = {}
    for name in subfolders(root):
        match = re.match(r"(box|dot|star)(?![a-z])", name.lower())
        if match is None or not any(_GOOD.fullmatch(plain(inner)) for inner in subfolders(root / name)):
            continue
        if match[1] in folders:
            raise DatasetError(f"{root} holds {folders[match[1]]} and {name}, both of the pattern {match[1]}; keep one")
        folders[match[1]] = name
    return folders


def _list_pattern(dataset: str, category: str, root: Path, folder: str) -> tuple[list[Sample], list[SetAside]]:
    samples: dict[str, Sample] = {}
    repeated: set[str] = set()
    masks = _mask_folders(root, folder, category)
    names = subfolders(root / folder)
    for name in sorted(names, key=lambda name: (_is_mixed(name), name)):
        if _MASKS.fullmatch(plain(name)):
            continue
        files = images_in(root / folder / name, root, category)[0]
        if _GOOD.fullmatch(plain(name)):
            samples |= {path: Sample("", path, dataset, category, "train", "good", "good") for path in files}
            continue
        if _is_mixed(name):  # what their types' folders hold as well counts there
            typed = {_content(root, path) for path, sample in samples.items() if sample.label != "good"}
            repeated |= {path for path in files if _content(root, path) in typed}
            files = [path for path in files if path not in repeated]
        pairs = _pair(files, masks.get(plain(name), []), masks.get("", []))
        for path in files:
            word = _type_of(path) if _is_mixed(name) else name
            samples[path] = Sample("", path, dataset, category, "test", "anomalous", word, pairs.get(path))
    listed = _without_shared_masks(samples[path] for path in sorted(samples))
    unused = {path for paths in masks.values() for path in paths} - known_paths(listed)
    reasons = dict.fromkeys(repeated, "repeats an image of a folder that names its type of defect")
    reasons |= dict.fromkeys(unused, "a mask that no image was paired with")
    aside = [SetAside(category, path, reasons[path]) for path in sorted(reasons)]
    opened = [f"{folder}/{name}" for name in names]
    why = "in no folder that is understood"
    return listed, aside + strays(root / folder, root, category, known_paths(listed, aside), why, opened)


def _is_mixed(name: str) -> bool:
    """Whether a folder holds defects of all types."""
    return _MIXED.fullmatch(plain(name)) is not None


def _without_shared_masks(samples: Iterable[Sample]) -> list[Sample]:
    """The samples without the masks that are named like images of several folders: such a mask may belong to any of
    them."""
    samples = list(samples)
    count = Counter(sample.mask for sample in samples)
    return [replace(s, mask=None) if s.mask is not None and count[s.mask] > 1 else s for s in samples]


def _mask_folders(root: Path, folder: str, category: str) -> dict[str, list[str]]:
    """Folder of images -> its own masks; under the empty name, masks that may belong to any folder."""
    masks_of: dict[str, list[str]] = {}
    for name in subfolders(root / folder):
        match = _MASKS.fullmatch(plain(name))
        if match is not None:
            masks_of.setdefault(match[1] or "", []).extend(images_in(root / folder / name, root, category)[0])
            continue
        for inner in subfolders(root / folder / name):
            if _MASKS.fullmatch(plain(inner)):
                masks = images_in(root / folder / name / inner, root, category)[0]
                masks_of.setdefault(plain(name), []).extend(masks)
    return masks_of


def _pair(images: Sequence[str], *pools: Sequence[str]) -> dict[str, str]:
    """Image -> mask, by name alone: from the first pool in which one mask, and no other, has its name."""
    pairs: dict[str, str] = {}
    for pool in pools:
        for named in (_name, _key):
            masks = _unique(pool, named)
            for name, image in _unique(images, named).items():
                if image not in pairs and name in masks:
                    pairs[image] = masks[name]
    return pairs


def _unique(paths: Sequence[str], named: Callable[[str], str]) -> dict[str, str]:
    """Name -> path of the only file with this name; names that several files share are left out."""
    count = Counter(named(path) for path in paths)
    return {named(path): path for path in paths if count[named(path)] == 1}


def _name(path: str) -> str:
    return stem(path).lower()


def _key(path: str) -> str:
    """The words and numbers of a name without the marks of defects and masks."""
    parts = re.findall(r"[a-z]+|\d+", _name(path))
    return " ".join(part for part in parts if part not in _MARKS)


def _type_of(path: str) -> str:
    """The type of defect that a file's name tells."""
    words = re.findall(r"[a-z]+", _name(path))
    return next((CODES[word] for word in words if word in CODES), "unknown")


def _divided(root: Path, samples: Sequence[Sample], share: float, seed: int) -> list[Sample]:
    """The samples with a share of the good ones moved to those to be judged."""
    names = {sample.path: _content(root, sample.path) for sample in samples if sample.label == "good"}
    several = len(set(names.values())) > 1
    judged = drawn(names.values(), share, seed) if several and share > 0 else set()
    return [replace(s, split="test") if names.get(s.path) in judged else s for s in samples]


def _content(root: Path, path: str) -> str:
    try:
        return content_hash((root / path).read_bytes())
    except OSError:
        return path
