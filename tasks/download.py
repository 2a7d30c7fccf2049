"""Fetch a data set from where its authors offer it to everybody."""

from __future__ import annotations

import logging
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.datasets import about
from storage.download import download_dataset
from storage.errors import DownloadError
from tasks.core.progress import Progress

logger = logging.getLogger(__name__)


@task(name="download", task_run_name="download {dataset}", cache_policy=NO_CACHE)
def download(dataset: str, root: str) -> None:
    """Put the data set's files under `root`: resumed where an earlier try stopped, verified, unpacked.

    A download that is finished does nothing. Raises DownloadError, saying how a person gets the data, for a data set
    without a direct address (nobody but its user can accept a licence), and for files that are not what they should be.
    """
    facts = about(dataset)
    if not facts.downloads:
        raise DownloadError(f"{dataset} has no address that may be fetched from without asking. {facts.obtain}")
    logger.info("%s: licence %s, please cite: %s", dataset, facts.licence, facts.citation)
    progress = Progress(f"download {dataset}")
    download_dataset(facts.downloads, Path(root), progress)
