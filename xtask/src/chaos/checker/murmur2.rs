//! The partition that Kafka's Java client chooses for a key.

/// Java's `Utils.murmur2` without its sign, as `BuiltInPartitioner` takes it: the partition is this, modulo how many there
/// are.
pub(super) fn positive(key: &[u8]) -> u32 {
    const M: u32 = 0x5bd1_e995;
    let mix = |k: u32| {
        let k = k.wrapping_mul(M);
        (k ^ (k >> 24)).wrapping_mul(M)
    };
    // Of the length Java takes the low half, as it would overflow.
    let length = u32::try_from(key.len() & 0xFFFF_FFFF).unwrap_or_default();
    let (words, rest) = key.as_chunks::<4>();
    let mut hash = 0x9747_b28c ^ length;
    for word in words {
        hash = hash.wrapping_mul(M) ^ mix(u32::from_le_bytes(*word));
    }
    if !rest.is_empty() {
        let tail = rest.iter().rev().fold(0, |tail, byte| tail << 8 | u32::from(*byte));
        hash = (hash ^ tail).wrapping_mul(M);
    }
    hash = (hash ^ (hash >> 13)).wrapping_mul(M);
    (hash ^ (hash >> 15)) & 0x7FFF_FFFF
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_what_java_says() {
        // Kafka's own UtilsTest.testMurmur2.
        for (key, java) in [
            ("21", -973_932_308),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
        ] {
            let java: i32 = java;
            assert_eq!(positive(key.as_bytes()), java.cast_unsigned() & 0x7FFF_FFFF, "{key}");
        }
    }
}
