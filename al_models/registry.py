"""Every method by name: one sorted literal line each, imported only when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from al_models.detector import Detector
from al_models.errors import InvalidInput, unknown
from al_models.parameters import checked


@dataclass(frozen=True)
class Method:
    """A row of the registry."""

    target: str
    """`module:Class` below `al_models`."""
    family: str
    """Family of the method in the survey's taxonomy (Fig. 3 of Tao et al. 2022, arXiv:2207.10298)."""
    paper: str
    """Authors, year and where to read it."""


METHODS: dict[str, Method] = {
    "ae_ssim": Method("reconstruction.ae_ssim:AeSsim", "reconstruction", "Bergmann et al. 2019, arXiv:1807.02011"),
    "cflow": Method("generative.cflow:Cflow", "generative", "Gudovskiy et al. 2022, arXiv:2107.12571"),
    "contrario": Method("embedding.contrario:Contrario", "embedding", "Tailanian et al. 2021, arXiv:2110.02407"),
    "cs_flow": Method("generative.cs_flow:CsFlow", "generative", "Rudolph et al. 2022, arXiv:2110.02855"),
    "dfr": Method("embedding.dfr:Dfr", "embedding", "Yang et al. 2020, arXiv:2012.07122"),
    "differnet": Method("generative.differnet:Differnet", "generative", "Rudolph et al. 2021, arXiv:2008.12577"),
    "draem": Method("self_supervised.draem:Draem", "self_supervised", "Zavrtanik et al. 2021, arXiv:2108.07610"),
    "f_anogan": Method(
        "generative.f_anogan:FAnogan", "generative", "Schlegl et al. 2019, doi:10.1016/j.media.2019.01.010"
    ),
    "fastflow": Method("generative.fastflow:Fastflow", "generative", "Yu et al. 2021, arXiv:2111.07677"),
    "favae": Method("embedding.favae:Favae", "embedding", "Dehaene and Eline 2020, arXiv:2008.05369"),
    "fyd": Method("embedding.fyd:Fyd", "embedding", "Zheng et al. 2022, arXiv:2110.04538"),
    "ganomaly": Method("generative.ganomaly:Ganomaly", "generative", "Akcay et al. 2018, arXiv:1805.06725"),
    "gaussian_finetune": Method(
        "embedding.gaussian_finetune:GaussianFinetune", "embedding", "Rippel et al. 2021, arXiv:2108.04116"
    ),
    "mkd": Method("embedding.mkd:Mkd", "embedding", "Salehi et al. 2021, arXiv:2011.11108"),
    "mlf_sc": Method("embedding.mlf_sc:MlfSc", "embedding", "Imamura et al. 2021, arXiv:2104.04289"),
    "mlir": Method("embedding.mlir:Mlir", "embedding", "Yan et al. 2021, ref. 90 of arXiv:2207.10298"),
    "mpad": Method("reconstruction.mpad:Mpad", "reconstruction", "ref. 50 of Tao et al. 2022, arXiv:2207.10298"),
    "ocsvm": Method("one_class.ocsvm:Ocsvm", "one_class", "Schölkopf et al. 2001, doi:10.1162/089976601750264965"),
    "padim": Method("embedding.padim:Padim", "embedding", "Defard et al. 2020, arXiv:2011.08785"),
    "patchcore": Method("embedding.patchcore:Patchcore", "embedding", "Roth et al. 2022, arXiv:2106.08265"),
    "se_svdd": Method("one_class.se_svdd:SeSvdd", "one_class", "Hu et al. 2021, ref. 113 of arXiv:2207.10298"),
    "soe": Method("embedding.soe:Soe", "embedding", "Kim et al. 2021, arXiv:2105.14737"),
    "somad": Method("embedding.somad:Somad", "embedding", "Li et al. 2021, arXiv:2107.09903"),
    "spade": Method("embedding.spade:Spade", "embedding", "Cohen and Hoshen 2020, arXiv:2005.02357"),
    "stpm": Method("embedding.stpm:Stpm", "embedding", "Wang et al. 2021, arXiv:2103.04257"),
    "uninformed_students": Method(
        "embedding.uninformed_students:UninformedStudents", "embedding", "Bergmann et al. 2020, arXiv:1911.02357"
    ),
    "utrad": Method("embedding.utrad:Utrad", "embedding", "Chen et al. 2022, doi:10.1016/j.neunet.2021.12.008"),
    "vae_grad": Method("generative.vae_grad:VaeGrad", "generative", "Dehaene et al. 2020, arXiv:2002.03734"),
    "vt_adl": Method("embedding.vt_adl:VtAdl", "embedding", "Mishra et al. 2021, arXiv:2104.10036"),
}


def detector_class(name: str) -> type[Detector]:
    """The class of a method. Raises UnknownName with the nearest names."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    module, _, cls = METHODS[name].target.partition(":")
    found: type[Detector] = getattr(import_module(f"al_models.{module}"), cls)
    return found


def create(name: str, **params: Any) -> Detector:
    """A detector with the paper's defaults, or the parameters given. Raises UnknownName for either name, InvalidInput
    for a value of another type or out of its bounds, and for values that cannot go together."""
    cls = detector_class(name)
    detector = cls(**checked(name, cls, params))
    why = detector.conflict()
    if why is not None:
        raise InvalidInput(f"{name}: {why}")
    return detector
