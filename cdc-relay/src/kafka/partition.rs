//! Which partition librdkafka chooses for a key, so that it is known before the record is sent.

use crate::config::KafkaConfig;

/// The hash functions of `partitioner`
/// (<https://github.com/confluentinc/librdkafka/blob/v2.12.1/CONFIGURATION.md>).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hash {
    Murmur2,
    Crc32,
    Fnv1a,
}

/// How a record without a partition of its own gets one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Partitioner {
    /// None: at random.
    hash: Option<Hash>,
    /// Whether an empty key gets none of its own.
    empty_is_none: bool,
}

impl Partitioner {
    /// `kafka.properties.partitioner`, Java's by default.
    pub(super) fn of(config: &KafkaConfig) -> Self {
        let name = config.properties.get("partitioner").map_or("murmur2_random", |name| name.expose());
        let hash = match name {
            "murmur2" | "murmur2_random" => Some(Hash::Murmur2),
            "consistent" | "consistent_random" => Some(Hash::Crc32),
            "fnv1a" | "fnv1a_random" => Some(Hash::Fnv1a),
            _ => None,
        };
        Self { hash, empty_is_none: name == "consistent_random" }
    }

    /// Of a topic with so many partitions; None where the key decides nothing.
    pub(super) fn partition(self, key: Option<&[u8]>, partitions: i32) -> Option<i32> {
        let key = key.filter(|key| !key.is_empty() || !self.empty_is_none)?;
        let hash = match self.hash? {
            Hash::Murmur2 => murmur2(key) & 0x7FFF_FFFF,
            Hash::Crc32 => crc32(key),
            Hash::Fnv1a => fnv1a(key),
        };
        i32::try_from(hash.checked_rem(u32::try_from(partitions).ok()?)?).ok()
    }
}

/// `MurmurHash2` as Kafka's `Utils.murmur2` has it.
fn murmur2(key: &[u8]) -> u32 {
    const M: u32 = 0x5bd1_e995;
    let (words, rest) = key.as_chunks::<4>();
    // No key is as long as 4 GiB.
    let mut hash = 0x9747_b28c ^ u32::try_from(key.len()).unwrap_or(u32::MAX);
    for word in words {
        let k = u32::from_le_bytes(*word).wrapping_mul(M);
        hash = hash.wrapping_mul(M) ^ (k ^ (k >> 24)).wrapping_mul(M);
    }
    if !rest.is_empty() {
        let tail = rest.iter().rev().fold(0, |tail, byte| tail << 8 | u32::from(*byte));
        hash = (hash ^ tail).wrapping_mul(M);
    }
    hash = (hash ^ (hash >> 13)).wrapping_mul(M);
    hash ^ (hash >> 15)
}

/// CRC-32 as zlib has it.
fn crc32(key: &[u8]) -> u32 {
    !key.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()))
    })
}

/// FNV-1a, and of that the absolute value, as Sarama takes it.
fn fnv1a(key: &[u8]) -> u32 {
    let hash =
        key.iter().fold(0x811C_9DC5, |hash: u32, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    hash.cast_signed().unsigned_abs()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rdkafka::{
        ClientContext, Message as _,
        config::ClientConfig,
        mocking::MockCluster,
        producer::{BaseProducer, BaseRecord, DeliveryResult, Producer as _, ProducerContext},
    };
    use service::Secret;

    use super::*;

    const PARTITIONS: i32 = 7;

    /// Holds each record's partition against what was foreseen.
    struct Delivered;

    impl ClientContext for Delivered {}

    impl ProducerContext for Delivered {
        type DeliveryOpaque = usize;

        fn delivery(&self, result: &DeliveryResult<'_>, foreseen: usize) {
            let message = result.as_ref().expect("the mock takes everything");
            let key = String::from_utf8_lossy(message.key().unwrap_or_default()).into_owned();
            assert_eq!(usize::try_from(message.partition()), Ok(foreseen), "{key:?}");
        }
    }

    #[test]
    fn it_is_the_one_that_librdkafka_chooses() {
        let cluster = MockCluster::new(1).unwrap();
        cluster.create_topic("orders", PARTITIONS, 1).unwrap();
        for name in ["murmur2", "murmur2_random", "consistent", "consistent_random", "fnv1a", "fnv1a_random"]
        {
            let mut config = KafkaConfig::default();
            config.properties.insert("partitioner".into(), Secret::new(name));
            let partitioner = Partitioner::of(&config);
            let producer: BaseProducer<Delivered> = ClientConfig::new()
                .set("bootstrap.servers", cluster.bootstrap_servers())
                .set("partitioner", name)
                .create_with_context(Delivered)
                .unwrap();
            for n in 0..500_usize {
                let key = "ключ-key-".repeat(n % 5) + &"x".repeat(n % 9) + &n.to_string();
                let foreseen = partitioner.partition(Some(key.as_bytes()), PARTITIONS).unwrap();
                let record = BaseRecord::with_opaque_to("orders", usize::try_from(foreseen).unwrap());
                producer.send(record.key(&key).payload("")).map_err(|(e, _)| e).unwrap();
            }
            producer.flush(Duration::from_secs(60)).unwrap();
        }
    }

    #[test]
    fn where_chance_decides_nothing_is_foreseen() {
        let mut config = KafkaConfig::default();
        assert_eq!(Partitioner::of(&config).partition(None, 3), None);
        assert!(Partitioner::of(&config).partition(Some(b""), 3).is_some());
        assert_eq!(Partitioner::of(&config).partition(Some(b"key"), 0), None);
        config.properties.insert("partitioner".into(), Secret::new("random"));
        assert_eq!(Partitioner::of(&config).partition(Some(b"key"), 3), None);
        config.properties.insert("partitioner".into(), Secret::new("consistent_random"));
        assert_eq!(Partitioner::of(&config).partition(Some(b""), 3), None);
    }
}
