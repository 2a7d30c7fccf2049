"""NanoTWICE (Carrera, Manganini, Boracchi, Lanzarone 2017, IEEE Trans. Industrial Informatics): nanofibres under a
scanning electron microscope.

    <root>/Normal/ITIA1130.tif ...                 5 good images
           Anomalous/images/ITIA1101.tif ...       40 images with defects
           Anomalous/gt/ITIA1101_gt.png ...        their masks: any value but 0 is anomalous

A folder between (Normal/ITIA11/*.tif, Anomalous/ITIA11/images/*.tif) and other capitals in the folders' names are
understood; the root may also be the folder above `Normal`. Gray images of 1024 x about 700 pixels.

There is no division beyond that: the good images are learned from, the anomalous ones judged. So no image judged is
good, and five images say little about how far good ones differ. The literature cuts both into patches (15 px in
Carrera et al., 32 px in Napoletano, Piccoli, Schettini 2018, 128 px in Bergmann et al. 2019), and so is the default
here: with `tile=256` an image is a grid of boxes of about that side which meet without gap or overlap, so that every
pixel is judged once and pixel metrics are over the same pixels as those of whole images; a judged box without an
anomalous pixel is good, which makes scores and false rejects measurable. The boxes of an image are one `part`. Boxes
of an image whose mask is missing, or not of its size, are `unknown`. `tile=None` (or 0) takes whole images.

Sources: readers in public repositories (folders, names, any value above 0 is anomalous), of which three agree; Table 9
and section IV-A of the survey, which says 1024 x 3696 pixels for what the others read as 1024 x about 700; sizes of
patches from public implementations of these papers. Not confirmed: the exact height, the licence, a checksum of the
archive, and whether its address still answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from storage.errors import DatasetError, MaskError
from storage.listing import Dataset, Listing, SetAside, choose, images_in, subfolders
from storage.readers import (
    check_option,
    find_root,
    image_size,
    known_paths,
    labelled,
    listing_of,
    marked,
    named,
    pair,
    plain,
    strays,
)
from storage.samples import Sample

TREE = """\
<root>/Normal/ITIA1130.tif ...
<root>/Anomalous/images/ITIA1101.tif ...
<root>/Anomalous/gt/ITIA1101_gt.png ..."""

CATEGORY = "nanofibres"

DATASET = Dataset(
    title="NanoTWICE: nanofibres under an electron microscope",
    licence="not stated where it is offered, as far as we know; ask its authors",
    home="http://www.mi.imati.cnr.it/ettore/NanoTWICE",
    citation="Carrera et al., Defect Detection in SEM Images of Nanofibrous Materials, IEEE Transactions on Industrial "
    "Informatics 13(2), 2017",
    categories=(CATEGORY,),
    images=45,
    tree=TREE,
    obtain="Download dfg05er_Data.zip from its home page and unpack it.",
    split="Normal to learn from, Anomalous to judge; both cut into boxes of about 256 px, of which those without an "
    "anomalous pixel are good",
)
_EXPECTED = "Normal/*.tif, Anomalous/images/*.tif and Anomalous/gt/<image's stem>_gt.png"


def list_samples(dataset: str, root: Path, categories: Sequence[str] | None, *, tile: int | None = 256) -> Listing:
    """The images of NanoTWICE, cut into boxes of about `tile` px or whole. Raises DatasetError for another layout."""
    allowed = tile is None or (type(tile) is int and (tile == 0 or tile >= 8))
    check_option("tile", tile, allowed, "the side of a box, 8 px or more, or 0 for whole images")
    root = find_root(root, _fits, _EXPECTED, TREE)
    choose(categories, [CATEGORY])
    whole, opened = _whole_images(dataset, root)
    aside = strays(root, root, CATEGORY, known_paths(whole), _why_left, opened)
    samples: list[Sample] = []
    for sample in whole:
        cut, left_out = _cut(root, sample, tile) if tile else ([sample], [])
        samples += cut
        aside += left_out
    return listing_of(root, CATEGORY, samples, aside)


def _fits(folder: Path) -> bool:
    return named(folder, "normal").is_dir() and named(folder, "anomalous").is_dir()


def _whole_images(dataset: str, root: Path) -> tuple[list[Sample], list[str]]:
    """The samples, one an image, and the folders that are looked into."""
    samples: list[Sample] = []
    normal, anomalous = (_with_folders(named(root, name)) for name in ("normal", "anomalous"))
    for folder in normal:
        files = images_in(folder, root, CATEGORY)[0]
        samples += [Sample("", file, dataset, CATEGORY, "train", "good", "good", part=file) for file in files]
    for folder in anomalous:
        images, masks = (images_in(named(folder, name), root, CATEGORY)[0] for name in ("images", "gt"))
        samples += [
            Sample("", image, dataset, CATEGORY, "test", "anomalous", "anomalous", mask, None, "nonzero", part=image)
            for image, mask in pair(images, masks, "_gt", "").items()
        ]
    opened = [*normal, *anomalous, *(folder / name for folder in anomalous for name in subfolders(folder))]
    return samples, [folder.relative_to(root).as_posix() for folder in opened]


def _with_folders(folder: Path) -> list[Path]:
    return [folder, *(folder / name for name in subfolders(folder))]


def _why_left(path: str) -> str:
    if plain(PurePosixPath(path).parent.name) == "gt":
        return "a mask of no image"
    return f"lies outside of {_EXPECTED}"


def _cut(root: Path, sample: Sample, tile: int) -> tuple[list[Sample], list[SetAside]]:
    """The sample cut into boxes, each labelled by its mask; the whole sample when its file is no image, which is told
    when it is decoded."""
    try:
        height, width = image_size(root / sample.path)
    except DatasetError:
        return [sample], []
    boxes = [replace(sample, box=box) for box in _grid(width, height, tile)]
    if sample.label == "good":
        return boxes, []
    try:
        marks = marked(root, sample.mask, sample.mask_rule)
        if marks.shape != (height, width):
            raise MaskError(f"{marks.shape[1]}x{marks.shape[0]} px for an image of {width}x{height} px")
    except MaskError as error:
        boxes = [replace(s, label="unknown", defect_type="unknown", mask=None, mask_rule="auto") for s in boxes]
        aside = [] if sample.mask is None else [SetAside(CATEGORY, sample.mask, f"a mask that cannot be used: {error}")]
        return boxes, aside
    return labelled(boxes, marks)


def _grid(width: int, height: int, tile: int) -> Iterator[str]:
    """Boxes of about tile x tile pixels that cover an image once; sides differ by at most one pixel."""
    columns, rows = max(1, round(width / tile)), max(1, round(height / tile))
    for row in range(rows):
        top, bottom = row * height // rows, (row + 1) * height // rows
        for column in range(columns):
            left, right = column * width // columns, (column + 1) * width // columns
            yield f"{left},{top},{right - left},{bottom - top}"
