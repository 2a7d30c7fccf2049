"""Who is told when a night needs a person or breaks, and that two nights do not meet."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from hashlib import sha256
from typing import Any

from prefect.automations import Automation
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.events import emit_event
from prefect.events.actions import ActionTypes, ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.types import SecretDict

from storage.store import Store

EVENT = "al.nightly.alarm"
FLOW = "nightly"
MODELS_FAILED = "ModelsFailed"
"""State of a night that came through though some model did not: its alarm tells, so this is no broken night."""
_AUTOMATIONS = (
    NEEDS := "al: tell what a night needs a person for",
    BREAKS := "al: tell that a night broke",
    SILENT := "al: take a night that is not heard of any more for crashed",
)
_SILENT_AFTER = timedelta(minutes=10)
"""Silence after which a flow run is taken for crashed; one that lives tells so every three minutes."""
_WAIT_S = 60.0
"""For another night to end; then this one leaves."""


def alert(model: str, told: Sequence[str], page: str) -> None:
    """Emit an event about a model, which automations can act on; `told`: what to look at, in sentences."""
    resource = {"prefect.resource.id": f"al.model.{model}", "prefect.resource.name": model}
    emit_event(EVENT, resource=resource, payload={"model": model, "alarms": list(told), "page": page})


def tell(url: str, silent_after: timedelta = _SILENT_AFTER) -> None:
    """Have the server post each alarm to a webhook, as JSON {"subject", "body"}; an earlier address is replaced.

    It also posts when a night itself breaks: its flow run fails or crashes. A night that was killed where no worker
    watches it is taken for crashed when nothing was heard of it for `silent_after`. A night on Dask that a worker
    started has two flow runs, one within the other, and may be told twice. Whoever knows the address of a webhook can
    post to it, so the server keeps it as a secret.
    """
    block = CustomWebhookNotificationBlock(
        name="al alarms",
        url="{{address}}",
        secrets=SecretDict({"address": url}),
        method="POST",
        json_data={"subject": "{{subject}}", "body": "{{body}}"},
    )
    block_id = block.save("al-alarms", overwrite=True)
    for old in [one for one in _automations() if one.name in _AUTOMATIONS]:
        old.delete()
    needs = SendNotification(
        block_document_id=block_id,
        subject="{{ event.resource.name }} needs a look",
        body="{{ event.payload.alarms | join('; ') }} ({{ event.payload.page }})",
    )
    _create(NEEDS, EventTrigger(expect={EVENT}, posture=Posture.Reactive, threshold=1), needs)
    ends = {f"prefect.flow-run.{state}" for state in ("Failed", "Crashed", "TimedOut")}
    breaks = SendNotification(
        block_document_id=block_id,
        subject="{{ event.resource.name }} broke",
        body="{{ event.resource['prefect.state-name'] }}: {{ event.resource['prefect.state-message'] }} "
        "(flow run {{ event.resource.id }}; the models in use stay as they were)",
    )
    _create(BREAKS, _of_nights(expect=ends, posture=Posture.Reactive), breaks)
    lives = {"after": {"prefect.flow-run.heartbeat"}, "expect": {"prefect.flow-run.*"}}
    crashed = ChangeFlowRunState(state=StateType.CRASHED, message=f"not heard of for {silent_after}")
    _create(SILENT, _of_nights(**lives, posture=Posture.Proactive, within=silent_after), crashed)


def _of_nights(**what: Any) -> EventTrigger:
    """When such an event comes of a night's flow run, or does not."""
    return EventTrigger(
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "flow", "prefect.resource.name": FLOW},
        for_each={"prefect.resource.id"},
        threshold=1,
        **what,
    )


def _create(name: str, trigger: EventTrigger, action: ActionTypes) -> None:
    Automation(name=name, trigger=trigger, actions=[action]).create()


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
