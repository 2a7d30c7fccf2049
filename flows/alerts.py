"""Who is told when a night needs a person, and that two nights do not meet."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from hashlib import sha256

from prefect.automations import Automation
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.events import emit_event
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.types import SecretDict

from storage.store import Store

EVENT = "al.nightly.alarm"
AUTOMATION = "al: tell what a night needs a person for"
_WAIT_S = 60.0
"""For another night to end; then this one leaves."""


def alert(model: str, told: Sequence[str], page: str) -> None:
    """Emit an event about a model, which automations can act on; `told`: what to look at, in sentences."""
    resource = {"prefect.resource.id": f"al.model.{model}", "prefect.resource.name": model}
    emit_event(EVENT, resource=resource, payload={"model": model, "alarms": list(told), "page": page})


def tell(url: str) -> None:
    """Have the server post each alarm to a webhook, as JSON {"subject", "body"}; an earlier address is replaced.

    Whoever knows the address of a webhook can post to it, so the server keeps it as a secret.
    """
    block = CustomWebhookNotificationBlock(
        name="al alarms",
        url="{{address}}",
        secrets=SecretDict({"address": url}),
        method="POST",
        json_data={"subject": "{{subject}}", "body": "{{body}}"},
    )
    block_id = block.save("al-alarms", overwrite=True)
    for old in [one for one in _automations() if one.name == AUTOMATION]:
        old.delete()
    Automation(
        name=AUTOMATION,
        trigger=EventTrigger(expect={EVENT}, posture=Posture.Reactive, threshold=1),
        actions=[
            SendNotification(
                block_document_id=block_id,
                subject="{{ event.resource.name }} needs a look",
                body="{{ event.payload.alarms | join('; ') }} ({{ event.payload.page }})",
            )
        ],
    ).create()


def _automations() -> list[Automation]:
    with get_client(sync_client=True) as client:
        return [Automation(**one.model_dump()) for one in client.read_automations()]


def one_at_a_time(until: ExitStack, store: Store, models: Sequence[str]) -> bool:
    """Whether no other night works on one of these models of the store, on this Prefect server; then none will until
    the stack ends.

    Waits a minute for another to end; all models are had, or none. A process that dies loses its places within minutes.
    """
    names = [f"al-night-{sha256(f'{store.url} {model}'.encode()).hexdigest()[:16]}" for model in models]
    with get_client(sync_client=True) as client:
        for name in names:
            client.upsert_global_concurrency_limit_by_name(name, 1)
    try:
        until.enter_context(concurrency(names, occupy=1, timeout_seconds=_WAIT_S, strict=True))
    except (ConcurrencySlotAcquisitionError, TimeoutError):
        return False
    return True
