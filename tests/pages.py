"""What tests of pages share: a page taken apart, and artifacts put into a store by hand."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import zarr

from storage.store import Store

VOID = {"meta", "link", "br", "img", "hr", "input", "wbr"}


class Page(HTMLParser):
    """Collects the tags left open, what each element asks to load, text by element, and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.asked: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.alts: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
                (self.links if tag == "a" else self.asked).append(value or "")
            if name == "id":
                self.ids.append(value or "")
            if name == "alt":
                self.alts.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


def put(store: Store, key: str, arrays: dict[str, np.ndarray], meta: dict[str, Any], files: dict[str, bytes]) -> str:
    with store.draft(key) as draft:
        for name, values in arrays.items():
            path = store.zarr_store(f"{draft.folder}/{name}")
            zarr.create_array(path, shape=values.shape, chunks=values.shape, dtype=values.dtype)[:] = values
        for name, data in files.items():
            store.write_bytes(f"{draft.folder}/{name}", data)
        draft.commit(meta)
    return key
