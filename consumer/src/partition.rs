//! Where a partition stands: written by its worker, read by everyone else.

use std::sync::{
    Mutex, PoisonError,
    atomic::{AtomicBool, AtomicI64, Ordering},
};

use crate::{decide::Cause, group::PartitionId};

/// A partition of ours.
pub(crate) struct Partition {
    pub(crate) id: PartitionId,
    /// The offset of the first record that is not settled; -1 before the first was seen.
    position: AtomicI64,
    /// When the first record that is not settled was written, in milliseconds of Unix time; -1 if that is not known.
    head_ms: AtomicI64,
    /// Whether the worker has settled everything up to the partition's end.
    caught_up: AtomicBool,
    /// The offset that the next record will get; -1 until asked.
    pub(crate) end: AtomicI64,
    waiting: Mutex<Option<(Cause, String)>>,
}

impl Partition {
    pub(crate) fn new(id: PartitionId) -> Self {
        Self {
            id,
            position: AtomicI64::new(-1),
            head_ms: AtomicI64::new(-1),
            caught_up: AtomicBool::new(false),
            end: AtomicI64::new(-1),
            waiting: Mutex::new(None),
        }
    }

    /// The offset that may be committed.
    pub(crate) fn position(&self) -> Option<i64> {
        Some(self.position.load(Ordering::SeqCst)).filter(|p| *p >= 0)
    }

    /// Records that are not settled yet, once known. Markers of transactions count as records where Kafka counts
    /// them, so the end of the partition is believed rather than the difference.
    pub(crate) fn lag_records(&self) -> Option<i64> {
        if self.caught_up.load(Ordering::SeqCst) {
            return Some(0);
        }
        let end = Some(self.end.load(Ordering::SeqCst)).filter(|e| *e >= 0)?;
        Some((end - self.position()?).max(0))
    }

    /// How long ago the first record that is not settled was written, in milliseconds; 0 where all are.
    pub(crate) fn lag_ms(&self, now_ms: i64) -> Option<i64> {
        if self.caught_up.load(Ordering::SeqCst) {
            return Some(0);
        }
        let head_ms = Some(self.head_ms.load(Ordering::SeqCst)).filter(|ms| *ms >= 0)?;
        Some((now_ms - head_ms).max(0))
    }

    /// What the worker waits for, if it does.
    pub(crate) fn waiting(&self) -> Option<(Cause, String)> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn wait_for(&self, what: Option<(Cause, String)>) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }

    /// A batch is under way; its first record has this offset, and was written then.
    pub(crate) fn begins(&self, offset: i64, written_ms: Option<i64>) {
        self.head_ms.store(written_ms.unwrap_or(-1), Ordering::SeqCst);
        self.caught_up.store(false, Ordering::SeqCst);
        if self.position().is_none() {
            // So that the lag is known even if this very batch cannot be settled.
            self.position.store(offset, Ordering::SeqCst);
        }
    }

    /// Everything before `offset` is settled; `at_end`: and nothing comes after it.
    pub(crate) fn settled(&self, offset: i64, at_end: bool) {
        self.position.store(offset, Ordering::SeqCst);
        self.caught_up.store(at_end, Ordering::SeqCst);
    }

    /// The partition ends where the worker is.
    pub(crate) fn at_end(&self) {
        self.caught_up.store(true, Ordering::SeqCst);
    }
}
