"""What a schema cannot say about a request, for Schemathesis: it would take the refusal for a fault.

Only requests that are meant to be right are touched.
"""

import decimal

import schemathesis
from schemathesis import GenerationMode

seen = {}


@schemathesis.hook
def before_call(ctx, case, kwargs):
    right = case.meta is None or case.meta.generation.mode == GenerationMode.POSITIVE
    if right:
        # A cursor is right if it was given out.
        case.query.pop("cursor", None)
        # Schemathesis 4.32 leaves a header empty if it cannot make one of the pattern.
        if case.headers.get("If-Match") == "":
            del case.headers["If-Match"]
    if right and isinstance(case.body, dict) and "topic" in case.body:
        # Which there may be is configured; the stack allows this one.
        case.body["topic"] = "notifications"
        # Any JSON may be sent but what Postgres cannot store.
        for name in ("payload", "message"):
            if name in case.body:
                case.body[name] = without_nul(case.body[name])
    if right and isinstance(case.body, dict):
        # It has to be the sum.
        case.body.pop("totalAmount", None)
        for item in case.body.get("items", []):
            item["price"] = in_cents(item["price"])
    # A key stands for one request, in quotes or not.
    key = str(case.headers.get("Idempotency-Key", "")).strip().strip('"')
    request = (case.method, case.formatted_path, str(case.body))
    if key and seen.setdefault(key, request) != request and right:
        del case.headers["Idempotency-Key"]


def without_nul(value):
    """The JSON value without U+0000, which a schema cannot forbid at every depth."""
    if isinstance(value, str):
        return value.replace("\0", "")
    if isinstance(value, list):
        return [without_nul(element) for element in value]
    if isinstance(value, dict):
        return {without_nul(name): without_nul(member) for name, member in value.items()}
    return value


def in_cents(price):
    """A price of at most two decimals, which nearly all currencies have."""
    if isinstance(price, str):
        value = decimal.Decimal(price)
        return "0.50" if value > 1_000_000_000 else f"{value:.2f}"
    return round(price, 2)
