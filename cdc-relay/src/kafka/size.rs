//! How large a record is on the wire.

use relay_core::record::Record;

/// A batch's own fields, in bytes
/// (<https://kafka.apache.org/documentation/#recordbatch>).
const BATCH_OVERHEAD_BYTES: usize = 61;

/// The most that a header takes beside its name and value: two lengths.
pub(super) const HEADER_MOST_BYTES: usize = 10;

/// The size of a batch that holds this record alone, uncompressed: what the broker compares with the topic's
/// `max.message.bytes`.
pub(crate) fn batch_bytes(record: &Record<'_>) -> usize {
    let sized = |bytes: Option<&[u8]>| match bytes {
        // A length of -1 is null.
        None => 1,
        Some(bytes) => varint_bytes(bytes.len()) + bytes.len(),
    };
    let headers: usize = record.headers.iter().map(|(n, v)| sized(Some(n.as_bytes())) + sized(v)).sum();
    // Attributes, and the differences to the batch's timestamp and offset, which are 0 for its first record.
    let body = 3 + sized(record.key) + sized(record.value) + varint_bytes(record.headers.len()) + headers;
    BATCH_OVERHEAD_BYTES + varint_bytes(body) + body
}

/// The length of a zigzag varint of a number that is not negative.
fn varint_bytes(n: usize) -> usize {
    let bits = usize::BITS - n.leading_zeros() + 1;
    usize::try_from(bits.div_ceil(7)).unwrap_or(1).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_are_as_long_as_zigzag_makes_them() {
        for (n, bytes) in [(0, 1), (63, 1), (64, 2), (8191, 2), (8192, 3), (1_048_575, 3), (1_048_576, 4)] {
            assert_eq!(varint_bytes(n), bytes, "{n}");
        }
    }
}
