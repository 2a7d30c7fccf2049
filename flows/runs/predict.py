"""What to judge with which version: the parameters of the flow, and the command's options."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from flows.runs.device import Device
from flows.runs.store_url import StoreUrl
from storage.image_paths import image_paths, look_for_images
from storage.models import Registry
from storage.store import Store


class PredictRun(BaseModel):
    """Images to judge with a version of a model."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="mvtec_ad/grid (its champion), mvtec_ad/grid@3 or mvtec_ad/grid@challenger")
    images: list[str] = Field(min_length=1, description="Files, folders, patterns such as parts/**/*.png, @list.txt")
    store: StoreUrl = Field("al-store", description="Folder or URL that the model is registered in")
    out: str = Field("al-predictions", description="Folder for what is found; images judged in it are not judged again")
    batch_size: int = Field(16, ge=1, description="Images that are judged at once")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    watch: float | None = Field(
        None, gt=0, description="Look for new images every so many seconds until Ctrl-C; when left out, judge and end"
    )

    @property
    def title(self) -> str:
        """For people, in the UI."""
        return f"{self.model}: {', '.join('/'.join(Path(given).parts[-2:]) for given in self.images)}"

    def left_out(self) -> dict[str, str]:
        """What lies among the images and is not judged -> the reason."""
        return look_for_images(self.images, Path(self.out), may_be_none=True)[1]

    def paths(self) -> list[str]:
        """The images that are there now. Raises DatasetError for what is not, unless it is waited for."""
        return image_paths(self.images, Path(self.out), may_be_none=self.watch is not None)

    def check(self) -> PredictRun:
        """The same, once the version and the images are there. Raises an error that says what is."""
        Registry(Store(self.store)).resolve(self.model)
        self.paths()
        return self
