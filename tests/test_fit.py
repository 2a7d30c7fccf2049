"""What names a model."""

from __future__ import annotations

import pytest

from tasks import compute
from tasks import fit as fit_module
from tasks.fit import fit
from tasks.handles import Category, Cell, Prepared, Validated

CATEGORY = Category("memory://fit", "toy", "toy", "data", "catalogues/toy", "0")
VALIDATED = Validated(Prepared(CATEGORY, 256, "images/toy"), "verdicts/toy", "0")


@pytest.mark.parametrize(("method", "features", "equal"), [("ae_ssim", None, False), ("padim", "features/toy", True)])
def test_the_precision_of_a_training_names_its_model(
    method: str, features: str | None, equal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_module, "run_step", lambda *_: None)
    names = []
    for pays in (False, True):  # a machine without and one with bfloat16 in hardware
        monkeypatch.setattr(compute, "_bfloat16_pays", lambda device, pays=pays: pays)
        names.append(fit.fn(Cell("toy", "toy", method, device="cpu"), VALIDATED, features))
    assert (names[0] == names[1]) is equal
