"""The privacy ledger of a site: what each patient's data has paid for, enforced where the data is."""

from __future__ import annotations

from client.ledger.book import Ledger
from client.ledger.plan import MessageKey, Plan

__all__ = ["Ledger", "MessageKey", "Plan"]
