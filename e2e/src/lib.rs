//! The whole system, tested from outside as a user sees it: see `tests/`.
