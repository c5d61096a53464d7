//! Metrics of shapes that the library does not have: what is unknown is left out instead of shown as a number, and what
//! the pipeline does for each transaction costs next to nothing.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering},
    },
};

use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder, NoLabelSet},
    metrics::MetricType,
};

use crate::clock;

/// A gauge that is left out while its value is unknown. Cloning shares it.
#[derive(Debug, Clone)]
pub(crate) struct MaybeGauge(Arc<AtomicU64>);

impl Default for MaybeGauge {
    fn default() -> Self {
        Self(Arc::new(AtomicU64::new(f64::NAN.to_bits())))
    }
}

impl MaybeGauge {
    /// Sets it, or forgets it; what it was.
    pub(crate) fn set(&self, value: Option<f64>) -> Option<f64> {
        let before = self.0.swap(value.unwrap_or(f64::NAN).to_bits(), Ordering::Relaxed);
        Some(f64::from_bits(before)).filter(|value| !value.is_nan())
    }

    /// Sets it to a whole number.
    #[expect(clippy::cast_precision_loss, reason = "beyond 2^53 Prometheus rounds, too")]
    pub(crate) fn set_count(&self, count: u64) {
        self.set(Some(count as f64));
    }

    fn get(&self) -> Option<f64> {
        Some(f64::from_bits(self.0.load(Ordering::Relaxed))).filter(|value| !value.is_nan())
    }
}

impl EncodeMetric for MaybeGauge {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        self.get().map_or(Ok(()), |value| encoder.encode_gauge(&value))
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Gauge
    }
}

/// One of several words: each a gauge with the word in a label, 1 for the one that holds and 0 for the others, and none
/// while it is unknown. Cloning shares it.
#[derive(Debug, Clone)]
pub(crate) struct OneOf {
    label: &'static str,
    words: &'static [&'static str],
    /// Its index; beyond them: unknown.
    which: Arc<AtomicUsize>,
}

impl OneOf {
    pub(crate) fn new(label: &'static str, words: &'static [&'static str]) -> Self {
        Self { label, words, which: Arc::new(AtomicUsize::new(usize::MAX)) }
    }

    /// A word that is not one of them is unknown.
    pub(crate) fn set(&self, word: Option<&str>) {
        let which = word.and_then(|word| self.words.iter().position(|known| *known == word));
        self.which.store(which.unwrap_or(usize::MAX), Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> Option<&'static str> {
        self.words.get(self.which.load(Ordering::Relaxed)).copied()
    }
}

impl EncodeMetric for OneOf {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let Some(current) = self.get() else { return Ok(()) };
        for word in self.words {
            encoder.encode_family(&[(self.label, *word)])?.encode_gauge(&u64::from(*word == current))?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Gauge
    }
}

/// The age, in seconds, of something with a time by Postgres' clock; 0 while there is nothing, and where that clock is
/// ahead of ours. Left out while it is unknown. Cloning shares it.
#[derive(Debug, Clone)]
pub(crate) struct Age(Arc<AtomicI64>);

const UNKNOWN: i64 = i64::MIN;
const NOTHING: i64 = i64::MAX;

impl Default for Age {
    fn default() -> Self {
        Self(Arc::new(AtomicI64::new(UNKNOWN)))
    }
}

impl Age {
    /// Something of this time, in microseconds since Postgres' epoch, or nothing.
    pub(crate) fn set(&self, postgres_us: Option<i64>) {
        self.0.store(postgres_us.unwrap_or(NOTHING), Ordering::Relaxed);
    }

    pub(crate) fn forget(&self) {
        self.0.store(UNKNOWN, Ordering::Relaxed);
    }
}

impl EncodeMetric for Age {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let age_us = match self.0.load(Ordering::Relaxed) {
            UNKNOWN => return Ok(()),
            NOTHING => 0,
            since => clock::us_since(since),
        };
        encoder.encode_gauge(&seconds(age_us))
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Gauge
    }
}

/// The first bucket's bound; each further one is twice the one before it, up to 131 s.
const FIRST_BOUND_US: u64 = 250;
const BOUNDS: usize = 20;

/// A histogram of durations. Only one thread may observe, so that it costs two additions. Cloning shares it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Durations(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    /// The last one is of what is longer than every bound.
    buckets: [AtomicU64; BOUNDS + 1],
    sum_us: AtomicU64,
}

impl Durations {
    pub(crate) fn observe_us(&self, us: u64) {
        let add = |cell: &AtomicU64, n: u64| {
            cell.store(cell.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
        };
        if let Some(bucket) = self.0.buckets.get(bucket(us)) {
            add(bucket, 1);
        }
        add(&self.0.sum_us, us);
    }
}

/// The first bucket whose bound is not below it.
fn bucket(us: u64) -> usize {
    let doublings = u64::BITS - us.div_ceil(FIRST_BOUND_US).saturating_sub(1).leading_zeros();
    usize::try_from(doublings).map_or(BOUNDS, |n| n.min(BOUNDS))
}

impl EncodeMetric for Durations {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let bounds = (0..BOUNDS).map(|n| seconds(FIRST_BOUND_US << n)).chain([f64::INFINITY]);
        let counts = self.0.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed));
        let buckets: Vec<_> = bounds.zip(counts).collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = seconds(self.0.sum_us.load(Ordering::Relaxed));
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

fn seconds(us: u64) -> f64 {
    std::time::Duration::from_micros(us).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;

    fn text(metric: impl EncodeMetric + fmt::Debug + Send + Sync + 'static) -> Vec<String> {
        let mut registry = Registry::default();
        registry.register("m", "M", metric);
        let text = service::metrics::render(&registry);
        text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
    }

    #[test]
    fn what_is_unknown_is_left_out() {
        let gauge = MaybeGauge::default();
        assert!(text(gauge.clone()).is_empty());
        assert_eq!(gauge.set(Some(-1.5)), None);
        assert_eq!(text(gauge.clone()), ["m -1.5"]);
        assert_eq!(gauge.set(None), Some(-1.5));
        assert!(text(gauge).is_empty());
        let word = OneOf::new("word", &["a", "b"]);
        word.set(Some("b"));
        assert_eq!(text(word.clone()), ["m{word=\"a\"} 0", "m{word=\"b\"} 1"]);
        word.set(Some("c"));
        assert!(text(word).is_empty());
    }

    #[test]
    fn an_age_is_never_negative() {
        let age = Age::default();
        assert!(text(age.clone()).is_empty());
        age.set(Some(clock::postgres_now_us() + 3_600_000_000));
        assert_eq!(text(age.clone()), ["m 0.0"], "the server's clock is an hour ahead");
        age.set(Some(clock::postgres_now_us() - 3_600_000_000));
        let seconds: f64 = text(age.clone())[0].strip_prefix("m ").unwrap().parse().unwrap();
        assert!((3600.0..3660.0).contains(&seconds), "{seconds}");
        age.set(None);
        assert_eq!(text(age), ["m 0.0"]);
    }

    #[test]
    fn a_duration_is_in_the_first_bucket_that_takes_it() {
        for n in 0..BOUNDS {
            let bound = FIRST_BOUND_US << n;
            assert_eq!((bucket(bound), bucket(bound + 1)), (n, n + 1));
        }
        assert_eq!((bucket(0), bucket(u64::MAX)), (0, BOUNDS));
        let durations = Durations::default();
        for us in [100, 250, 251, 900_000_000] {
            durations.observe_us(us);
        }
        let text = text(durations);
        assert_eq!(text[..2], ["m_sum 900.000601", "m_count 4"]);
        let cumulative: Vec<_> = text[2..].iter().map(|l| l.rsplit_once(' ').unwrap()).collect();
        assert_eq!(cumulative[0], ("m_bucket{le=\"0.00025\"}", "2"));
        assert_eq!(cumulative[1], ("m_bucket{le=\"0.0005\"}", "3"));
        assert_eq!(cumulative[BOUNDS - 1], ("m_bucket{le=\"131.072\"}", "3"));
        assert_eq!(cumulative[BOUNDS], ("m_bucket{le=\"+Inf\"}", "4"));
    }
}
